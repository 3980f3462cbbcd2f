"""What a person reads when memory ends."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from model.activations_config import MEMORY_POLICIES
from model.memory import predict, state_bytes
from model.precision_config import precision_named
from training.capacity import workload
from training.config import TrainConfig
from training.errors import NonFiniteError, OutOfMemory
from training.memory import NOTICEABLY, advice, memory_metrics, out_of_memory_explained
from training.parallel.world import World
from training.runtime import Runtime
from training.trainer import Trainer

MakeConfig = Callable[..., TrainConfig]
CPU = Runtime(None, precision_named("fp32"), False)


def told(config: TrainConfig) -> str:
    return advice(config, CPU)


def test_math_attention_is_told_the_size_of_its_scores_first(config: MakeConfig) -> None:
    # batch 4 · 2 heads · 16384² · 4 bytes = 8 GiB
    text = told(config("attention=math", "seq_len=16384"))
    assert text.startswith("What helps: attention=auto (math holds 8.0 GiB of S × S scores per layer")
    sdpa_math = told(config("attention=sdpa", "attention.kernel=math", "seq_len=16384"))
    assert sdpa_math.startswith("What helps: attention=auto (")
    assert "attention=auto" not in told(config("attention=sdpa"))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("family", ["model=tiny", "model=gpt2-124m"])
def test_the_state_that_is_predicted_is_the_state_that_is_held(config: MakeConfig, optimizer: str, family: str) -> None:
    small = ["model.n_layers=2", "model.n_heads=2", "model.dim=32", "model.vocab_size=300", "max_steps=1"]
    mine = config(family, *small, f"optimizer={optimizer}")
    trainer = Trainer(mine, lambda line: None)
    trainer.fit()
    weights = sum(parameter.nbytes for parameter in trainer.run.model.parameters())
    moments = sum(value.nbytes for name, value in trainer.run.optimizer.tensors().items() if not name.endswith("/step"))
    work = workload(mine, CPU)
    assert state_bytes(work) == (weights, weights, moments)
    assert (moments == 2 * weights) == (optimizer == "adamw")
    plan = predict(work)
    assert (plan.weights, plan.optimizer) == (weights, moments)


def test_more_logits_at_once_than_need_be_are_told_of_chunks(config: MakeConfig) -> None:
    rows = ["batch_size=4", "seq_len=1024"]
    for chunk in (0, 4096):
        hint = "model.loss_chunk_size=2048 (now 4096 × 300 logits exist at once)"
        assert hint in told(config(*rows, f"model.loss_chunk_size={chunk}"))
    assert "loss_chunk_size" not in told(config(*rows, "model.loss_chunk_size=1024"))
    assert "loss_chunk_size" not in told(config("model.loss_chunk_size=0")), "128 tokens are few"


LONG = ["seq_len=4096", "batch_size=1", "model.n_layers=8", "model.dim=128", "model.ffn_dim=512"]


def test_a_policy_that_takes_noticeably_less_is_told_with_both_peaks(config: MakeConfig) -> None:
    for policy in ("none", "selective"):
        mine = config(f"memory={policy}", *LONG)
        hint = re.search(r"What helps: memory=(\w+).* \(([\d.]+) GiB instead of ([\d.]+) by prediction\)", told(mine))
        assert hint is not None
        now = predict(workload(mine, CPU)).total
        leaner = predict(replace(workload(mine, CPU), memory=MEMORY_POLICIES[hint[1]]())).total
        assert leaner <= NOTICEABLY * now
        assert (hint[2], hint[3]) == (f"{leaner / 2**30:.1f}", f"{now / 2**30:.1f}")
    assert "memory=" not in told(config("memory=full", "memory.keep_attention=0", *LONG))


def test_a_batch_of_one_row_is_not_told_to_shrink_it(config: MakeConfig) -> None:
    text = told(config("batch_size=1"))
    assert "batch_size" not in text
    assert "seq_len=16" in text
    assert "smaller model=" in text


@pytest.mark.parametrize(("batch_size", "accumulation"), [(2, 1), (3, 1), (5, 1), (7, 3)])
def test_the_batch_that_is_advised_is_smaller_and_works(config: MakeConfig, batch_size: int, accumulation: int) -> None:
    tokens = batch_size * accumulation * 32
    text = told(config(f"batch_size={batch_size}", f"tokens_per_step={tokens}"))
    hint = re.search(r"batch_size=(\d+) \(tokens_per_step=(\d+) ", text)
    assert hint is not None
    assert int(hint[1]) < batch_size
    assert int(hint[2]) == tokens
    config(f"batch_size={hint[1]}", f"tokens_per_step={hint[2]}")


def test_the_cpu_allocators_refusal_becomes_a_line_for_a_person(config: MakeConfig) -> None:
    with pytest.raises(OutOfMemory) as refused, out_of_memory_explained(config(), CPU):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: "
            "you tried to allocate 17179869184 bytes. Error code 12 (Cannot allocate memory)"
        )
    assert re.match(r"out of memory: \d+\.\d GiB held at most, 16.0 GiB wanted. What helps: ", str(refused.value))


def test_a_real_refusal_of_the_cpu_allocator_is_recognised(config: MakeConfig) -> None:
    # 2⁶⁰ bytes: beyond any machine's address space, so that nothing is allocated on the way to the refusal.
    with (
        pytest.raises(OutOfMemory, match=r"held at most, 1073741824\.0 GiB wanted"),
        out_of_memory_explained(config(), CPU),
    ):
        torch.empty(2**60, dtype=torch.uint8)


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2"), NonFiniteError("step 3"), ValueError("seq_len")])
def test_any_other_error_passes_unchanged(config: MakeConfig, error: Exception) -> None:
    with pytest.raises(type(error)) as raised, out_of_memory_explained(config(), CPU):
        raise error
    assert raised.value is error


@pytest.mark.parametrize(("free", "others"), [(4, ""), (1, ", 4.0 GiB held by other programs (nvidia-smi lists them)")])
def test_a_gpus_refusal_says_what_was_held_and_wanted(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch, free: int, others: str
) -> None:
    held = {"allocated_bytes.all.current": 70 * 2**30, "reserved_bytes.all.current": 75 * 2**30}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda *_: held)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (free * 2**30, 80 * 2**30))
    with pytest.raises(OutOfMemory) as refused, out_of_memory_explained(config(), CPU):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 12.50 GiB. GPU 0 has ...")
    line = f"out of GPU memory: 70.0 GiB allocated and 75.0 GiB reserved of 80.0 GiB{others}, 12.50 GiB wanted. "
    assert str(refused.value).startswith(line + "What helps: ")


def test_a_cpu_has_no_memory_peaks() -> None:
    assert memory_metrics(World(torch.device("cpu"))) == {}
