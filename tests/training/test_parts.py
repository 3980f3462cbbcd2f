"""A run is parts: what one saves, another loads; checkpoints of the format before load too; the model is assembled."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounter

from data import disk
from model import compile_unit
from model.activations_config import FullConfig, MemoryConfig, SelectiveConfig
from model.attention import AttentionConfig, AttentionSpec, build_attention
from model.config import ModelConfig
from model.gpt import GPT
from model.layer_memory import Workload
from training.assemble import assemble
from training.checkpoint import folder as checkpoints
from training.checkpoint import state
from training.config import TrainConfig
from training.loggers import read_metrics
from training.parallel.world import World
from training.run import Run
from training.runtime import resolve_runtime
from training.trainer import Trainer

MakeConfig = Callable[..., TrainConfig]
OLD = Path(__file__).with_name("checkpoint-format-1.tar.gz")
"""The run folder of a run of four steps that e18cd2b trained, killed after its checkpoint of step 3."""
OLD_RUN = ["model.dim=8", "model.ffn_dim=16", "model.vocab_size=260", "optimizer=muon", "log_every=2", "eval_every=0"]
OLD_RUN += ["checkpoint.every=3", "bad_step.spike_sigma=9", "bad_step.spike_window=4", "max_steps=4"]


def silently(line: str) -> None:
    """Instead of print."""


def saved(run: Run) -> dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    """Part → copies of its tensors, its values as JSON gives them back."""
    return {
        part.name: (
            {name: tensor.detach().clone() for name, tensor in part.tensors().items()},
            json.loads(json.dumps(part.values())),
        )
        for part in run.parts
    }


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_the_parts_of_a_run_save_another_run_loads(config: MakeConfig, tmp_path: Path, optimizer: str) -> None:
    options = [f"optimizer={optimizer}", "max_steps=3", "log_every=2", "bad_step.spike_sigma=9"]
    trained = Trainer(config(*options), silently)
    trained.fit()
    before = saved(trained.run)
    assert list(before) == ["model", "optimizer", "guard", "progress", "random", "data", "records"]
    other = config(*options, f"run_dir={tmp_path / 'other'}")
    fresh = Run(other, resolve_runtime(other), silently)
    torch.manual_seed(99)
    for part in fresh.parts[:-1]:  # the records are files, and this run has none
        part.load(*before[part.name])
    after = saved(fresh)
    for name, (tensors, values) in list(before.items())[:-1]:
        assert after[name][1] == values, name
        assert after[name][0].keys() == tensors.keys(), name
        assert all(torch.equal(after[name][0][key], tensor) for key, tensor in tensors.items()), name
    assert fresh.batches.rows == 3 * 4, "three steps of four rows"
    assert before["optimizer"][0], "there are moments"


def test_weights_that_do_not_fit_are_named_and_none_is_loaded(config: MakeConfig) -> None:
    weights = Run(config(), resolve_runtime(config()), silently).parts[0]
    before = {name: tensor.clone() for name, tensor in weights.tensors().items()}
    zeros = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    with pytest.raises(ValueError, match=r"head\.weight is \(1,\), not \(300, 32\)"):
        weights.validate({**zeros, "head.weight": torch.zeros(1)}, {})
    del zeros["norm.weight"]
    with pytest.raises(ValueError, match=r"norm\.weight is not there"):
        weights.validate(zeros, {})
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights.tensors().items())


# ---- checkpoints of format 1


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    with tarfile.open(OLD) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "run"


def test_a_checkpoint_of_format_1_goes_on(config: MakeConfig, old_run: Path) -> None:
    path = checkpoints.path_of(old_run, 3)
    files = {name: load_file(path / f"{name}.safetensors") for name in ("model", "optimizer", "loop")}
    values = json.loads((path / "state.json").read_text())
    loaded = state.read(path, checkpoints.verify(path), [])
    assert all(torch.equal(loaded.tensors["model"][name], tensor) for name, tensor in files["model"].items())
    assert loaded.values["data"]["rows"] == 3 * 4

    lines: list[str] = []
    trainer = Trainer(config(*OLD_RUN), lines.append)
    run, seen = trainer.run, {}
    take_step = run.optimizer.step

    def look(rate: float, good: torch.Tensor, scale: torch.Tensor | None) -> None:
        if not seen:
            seen.update({part.name: dict(part.tensors()) for part in run.parts[:2]})
            for name in ("model", "optimizer"):
                assert seen[name].keys() == files[name].keys()
                assert all(torch.equal(seen[name][key], tensor) for key, tensor in files[name].items())
        take_step(rate, good, scale)

    run.optimizer.step = look  # type: ignore[method-assign]
    trainer.fit()
    assert seen
    assert any(line.startswith(f"resume     step 3 of {path}") for line in lines)
    steps = [record["step"] for record in read_metrics(old_run / "metrics.jsonl") if "train/loss" in record]
    assert steps == [1, 2, 4], "the line of step 4 that came after the checkpoint was cut, and is there once"
    assert run.progress.events == values["events"] + 2
    assert checkpoints.read_manifest(checkpoints.path_of(old_run, 4)).format == 2


def test_a_new_run_begins_with_weights_of_format_1(config: MakeConfig, old_run: Path, tmp_path: Path) -> None:
    new = config(*OLD_RUN, f"init_from={old_run}", f"run_dir={tmp_path / 'new'}", "max_steps=1")
    lines: list[str] = []
    Trainer(new, lines.append).fit()
    assert any(line.startswith(f"init       weights of {checkpoints.path_of(old_run, 3)}") for line in lines)


def test_a_format_that_is_not_known_yet_is_one_line(old_run: Path) -> None:
    path = checkpoints.path_of(old_run, 3)
    manifest = replace(checkpoints.read_manifest(path), format=4)
    disk.write_whole(path / "manifest.json", manifest.to_json())
    with pytest.raises(checkpoints.DamagedCheckpoint, match=r"manifest.json has format 4, this version reads up to 3"):
        checkpoints.verify(path)


# ---- built once


def test_the_runtime_is_decided_once_and_the_attention_built_once(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[AttentionConfig] = []

    def build(chosen: AttentionConfig, spec: AttentionSpec) -> Any:
        built.append(chosen)
        return build_attention(chosen, spec)

    mine = config("max_steps=1")
    decided = resolve_runtime(mine)
    monkeypatch.setattr("training.runtime.build_attention", build)
    monkeypatch.setattr("training.trainer.resolve_runtime", None)
    run = Trainer(mine, silently, decided).run
    assert run.runtime is decided
    assert len(built) == 1
    assert run.model.attention is run.attention
    assert run.attention.spec.max_documents == run.batches.max_documents, "which only the text tells"
    assert 1 < run.batches.max_documents < mine.seq_len  # type: ignore[operator]


def test_a_metric_without_an_entry_is_not_logged(config: MakeConfig) -> None:
    run = Trainer(config(), silently).run
    with pytest.raises(AssertionError, match=r"training\.metrics defines every metric"):
        run.log({"train/los": 1.0})


# ---- assembly

MODELS = [
    ModelConfig("llama", n_layers=2, n_heads=4, n_kv_heads=2, dim=32, ffn_dim=48, vocab_size=101, qk_norm=True),
    ModelConfig(
        "gpt2", n_layers=2, n_heads=4, dim=32, ffn_dim=64, vocab_size=101, position="learned", n_positions=16,
        norm="layernorm", mlp="gelu", bias=True, tie_head=True,
    ),
]  # fmt: skip


@pytest.mark.parametrize("unit", [pytest.param("model", marks=pytest.mark.slow), "block"])
def test_each_job_of_a_long_sweep_is_compiled(monkeypatch: pytest.MonkeyPatch, unit: str) -> None:
    """PyTorch gives up on a function that was compiled eight times, and runs it uncompiled from then on."""
    compile_it, counters = GPT.compile, []

    def counted(model: GPT, unit: str) -> None:
        counters.append(CompileCounter())
        compile_it(model, unit, backend=counters[-1], fullgraph=True)

    monkeypatch.setattr(GPT, "compile", counted)
    tokens = torch.zeros(1, 16, dtype=torch.int64)
    for number in range(10):
        model = replace(MODELS[0], dim=16 + 8 * number, head_dim=8)
        attention = build_attention(AttentionConfig("math"), AttentionSpec(4, 2, 8, 16, "float32"))
        assembled = assemble(model, attention, World(torch.device("cpu")), seed=0, compile=True, unit=unit)
        assembled(tokens, tokens).backward()
    assert [counter.frame_count for counter in counters] == [1 if unit == "model" else 2] * 10


@pytest.mark.parametrize("unit", ["model", "block"])
def test_the_plan_counts_with_the_unit_that_is_compiled(monkeypatch: pytest.MonkeyPatch, unit: str) -> None:
    monkeypatch.setattr(compile_unit, "COMPILE_UNIT", unit)
    compiled: list[str] = []
    monkeypatch.setattr(GPT, "compile", lambda model, unit: compiled.append(unit))
    attention = build_attention(AttentionConfig("math"), AttentionSpec(4, 2, 8, 16, "float32"))
    for memory in (MemoryConfig(), SelectiveConfig(), FullConfig()):
        assemble(MODELS[0], attention, World(torch.device("cpu")), seed=0, compile=True, memory=memory)
        assert Workload(MODELS[0], memory, 1, 16).is_one_graph == (compiled[-1] == "model")
    assert compiled == [unit, unit, "block"]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_a_model_from_the_meta_device_has_the_weights_of_its_seed(model: ModelConfig) -> None:
    assert model.n_kv_heads is not None
    assert model.head_dim is not None
    spec = AttentionSpec(model.n_heads, model.n_kv_heads, model.head_dim, 16, "float32")
    attention = build_attention(AttentionConfig("math"), spec)
    torch.manual_seed(7)
    direct = GPT(model, attention)
    drawn_by_direct = torch.rand(1)
    assembled = assemble(model, attention, World(torch.device("cpu")), seed=7, compile=False)
    assert torch.equal(torch.rand(1), drawn_by_direct), "as many random numbers are drawn"
    expected = dict(direct.named_parameters()) | dict(direct.named_buffers())
    found = dict(assembled.named_parameters()) | dict(assembled.named_buffers())
    assert list(found) == list(expected)
    for name, tensor in found.items():
        assert not tensor.is_meta
        assert torch.equal(tensor, expected[name]), name
    assert (assembled.head.weight is assembled.embedding.weight) == model.tie_head
