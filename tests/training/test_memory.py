"""What a person reads when memory ends."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

from training.config import TrainConfig
from training.errors import NonFiniteError, OutOfMemory
from training.memory import advice, memory_metrics, out_of_memory_explained, predicted
from training.trainer import Trainer

MakeConfig = Callable[..., TrainConfig]


def test_math_attention_is_told_the_size_of_its_scores_first(config: MakeConfig) -> None:
    # batch 4 · 2 heads · 16384² · 4 bytes = 8 GiB
    text = advice(config("attention=math", "seq_len=16384"))
    assert text.startswith("What helps: attention=auto (math holds 8.0 GiB of S × S scores per layer")
    sdpa_math = advice(config("attention=sdpa", "attention.kernel=math", "seq_len=16384"))
    assert sdpa_math.startswith("What helps: attention=auto (")
    assert "attention=auto" not in advice(config("attention=sdpa"))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("family", ["model=tiny", "model=gpt2-124m"])
def test_the_state_that_is_predicted_is_the_state_that_is_held(config: MakeConfig, optimizer: str, family: str) -> None:
    small = ["model.n_layers=2", "model.n_heads=2", "model.dim=32", "model.vocab_size=300", "max_steps=1"]
    mine = config(family, *small, f"optimizer={optimizer}")
    trainer = Trainer(mine, lambda line: None)
    trainer.fit()
    weights = sum(parameter.nbytes for parameter in trainer.run.model.parameters())
    moments = sum(value.nbytes for name, value in trainer.run.optimizer.tensors().items() if not name.endswith("/step"))
    plan = predicted(mine)
    assert (plan.weights, plan.gradients, plan.optimizer) == (weights, weights, moments)
    assert plan.state == 2 * weights + moments
    assert (plan.optimizer == 2 * weights) == (optimizer == "adamw")


def test_logits_and_scores_that_are_predicted_by_hand(config: MakeConfig) -> None:
    # 4 rows of 32 tokens, 300 logits of 4 bytes each and their gradients; a chunk holds 100 tokens
    assert predicted(config("attention=sdpa")).logits == 2 * 4 * 128 * 300
    assert predicted(config("attention=sdpa", "model.loss_chunk_size=100")).logits == 2 * 4 * 100 * 300
    assert predicted(config("attention=sdpa")).scores == 0
    plan = predicted(config("attention=math"))
    assert plan.scores == 4 * 2 * 32 * 32 * 4, "rows · heads · S² · 4 bytes"
    assert plan.total == plan.state + plan.logits + plan.scores


def test_more_logits_at_once_than_need_be_are_told_of_chunks(config: MakeConfig) -> None:
    rows = ["batch_size=4", "seq_len=1024"]
    for chunk in (0, 4096):
        hint = "model.loss_chunk_size=2048 (now 4096 × 300 logits exist at once)"
        assert hint in advice(config(*rows, f"model.loss_chunk_size={chunk}"))
    assert "loss_chunk_size" not in advice(config(*rows, "model.loss_chunk_size=1024"))
    assert "loss_chunk_size" not in advice(config("model.loss_chunk_size=0")), "128 tokens are few"


def test_the_next_policy_that_keeps_less_is_told(config: MakeConfig) -> None:
    assert advice(config("memory=none")).startswith("What helps: memory=full (")
    assert advice(config("memory=selective")).startswith("What helps: memory=full (")
    assert advice(config("memory=full", "memory.layers=0.5")).startswith("What helps: memory.layers=1 (now 0.5)")
    assert "memory" not in advice(config("memory=full"))


def test_a_batch_of_one_row_is_not_told_to_shrink_it(config: MakeConfig) -> None:
    text = advice(config("batch_size=1"))
    assert "batch_size" not in text
    assert "seq_len=16" in text
    assert "smaller model=" in text


@pytest.mark.parametrize(("batch_size", "accumulation"), [(2, 1), (3, 1), (5, 1), (7, 3)])
def test_the_batch_that_is_advised_is_smaller_and_works(config: MakeConfig, batch_size: int, accumulation: int) -> None:
    tokens = batch_size * accumulation * 32
    text = advice(config(f"batch_size={batch_size}", f"tokens_per_step={tokens}"))
    hint = re.search(r"batch_size=(\d+) \(tokens_per_step=(\d+) ", text)
    assert hint is not None
    assert int(hint[1]) < batch_size
    assert int(hint[2]) == tokens
    config(f"batch_size={hint[1]}", f"tokens_per_step={hint[2]}")


def test_the_cpu_allocators_refusal_becomes_a_line_for_a_person(config: MakeConfig) -> None:
    with pytest.raises(OutOfMemory) as refused, out_of_memory_explained(config()):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: "
            "you tried to allocate 17179869184 bytes. Error code 12 (Cannot allocate memory)"
        )
    assert re.match(r"out of memory: \d+\.\d GiB held at most, 16.0 GiB wanted. What helps: ", str(refused.value))


def test_a_real_refusal_of_the_cpu_allocator_is_recognised(config: MakeConfig) -> None:
    # 2⁶⁰ bytes: beyond any machine's address space, so that nothing is allocated on the way to the refusal.
    with pytest.raises(OutOfMemory, match=r"held at most, 1073741824\.0 GiB wanted"), out_of_memory_explained(config()):
        torch.empty(2**60, dtype=torch.uint8)


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2"), NonFiniteError("step 3"), ValueError("seq_len")])
def test_any_other_error_passes_unchanged(config: MakeConfig, error: Exception) -> None:
    with pytest.raises(type(error)) as raised, out_of_memory_explained(config()):
        raise error
    assert raised.value is error


def test_a_gpus_refusal_says_what_was_held_and_wanted(config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    held = {"allocated_bytes.all.current": 70 * 2**30, "reserved_bytes.all.current": 75 * 2**30}

    class Card:
        total_memory = 80 * 2**30

    monkeypatch.setattr(torch.cuda, "memory_stats", lambda *_: held)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: Card)
    with pytest.raises(OutOfMemory) as refused, out_of_memory_explained(config()):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 12.50 GiB. GPU 0 has ...")
    line = "out of GPU memory: 70.0 GiB allocated and 75.0 GiB reserved of 80.0 GiB, 12.50 GiB wanted. What helps: "
    assert str(refused.value).startswith(line)


def test_a_cpu_has_no_memory_peaks() -> None:
    assert memory_metrics(torch.device("cpu")) == {}
