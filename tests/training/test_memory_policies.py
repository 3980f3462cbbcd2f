"""A run under a memory policy is the run without one, from its first step to a resume under another policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from training.checkpoint import folder as checkpoints
from training.config import TrainConfig, load_config
from training.loggers import read_metrics
from training.trainer import Trainer

MakeConfig = Callable[..., TrainConfig]
POLICIES = ["memory=none", "memory=selective", "memory=full"]
OPTIONS = ["model.n_layers=3", "model.window=9", "tokens_per_step=256", "deterministic=true", "learning_rate=1e-2"]


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


def fit(config: TrainConfig) -> list[str]:
    lines: list[str] = []
    Trainer(config, lines.append).fit()
    return lines


def trained(folder: Path) -> tuple[bytes, list[float]]:
    """The weights, and the losses of the record."""
    records = read_metrics(folder / "metrics.jsonl")
    losses = [record[name] for record in records for name in ("train/loss", "val/loss") if name in record]
    return (folder / "model.safetensors").read_bytes(), losses


@pytest.mark.parametrize(
    "attention", ["sdpa", *(pytest.param(name, marks=pytest.mark.slow) for name in ("math", "flex"))]
)
def test_a_run_under_any_policy_ends_with_the_same_bits(config: MakeConfig, tmp_path: Path, attention: str) -> None:
    """Documents, a window, accumulation and deterministic algorithms included."""
    results = []
    for number, policy in enumerate([*POLICIES, "memory=full memory.keep_attention=0 memory.layers=0.5"]):
        folder = tmp_path / str(number)
        fit(config(f"attention={attention}", *policy.split(), *OPTIONS, f"run_dir={folder}"))
        results.append(trained(folder))
    assert all(result == results[0] for result in results)
    assert len(results[0][1]) > 4


@pytest.mark.parametrize(
    ("before", "after"), [(0, 2), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((2, 1), (1, 0)))]
)
def test_a_run_may_go_on_under_another_policy(config: MakeConfig, tmp_path: Path, before: int, after: int) -> None:
    options = [*OPTIONS, "max_steps=6", "checkpoint.every=2", "checkpoint.keep_last=9"]
    whole, branch = tmp_path / "whole", tmp_path / "branch"
    fit(config(POLICIES[before], *options, f"run_dir={whole}"))
    resume = f"resume={checkpoints.path_of(whole, 4)}"
    lines = fit(config(POLICIES[after], *options, f"run_dir={branch}", resume))
    names = [policy.partition("=")[2] for policy in (POLICIES[before], POLICIES[after])]
    assert any(f"memory.name {names[0]} → {names[1]}" in line for line in lines)
    assert trained(branch) == trained(whole)


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["flash", "sdpa", "flex"])
def test_on_a_gpu_policies_train_alike_in_ever_less_memory(config: MakeConfig, tmp_path: Path, attention: str) -> None:
    options = [f"attention={attention}", "device=cuda", "compile=true", "max_steps=6", "seq_len=1024"]
    options += ["learning_rate=1e-4"]  # with a larger one losses jump, and roundings show
    options += ["model.n_layers=8", "model.n_heads=4", "model.n_kv_heads=2", "model.dim=256", "model.ffn_dim=1024"]
    losses, peaks = [], []
    tiles = "memory.tile=1024 memory.head_groups=2"
    for policy in [*POLICIES[:2], f"memory=full {tiles}", f"memory=full memory.keep_attention=0 {tiles}"]:
        folder = tmp_path / str(len(peaks))
        fit(config(*options, *policy.split(), f"run_dir={folder}"))
        records = [record for record in read_metrics(folder / "metrics.jsonl") if "train/loss" in record]
        losses.append([record["train/loss"] for record in records])
        peaks.append(records[-1]["memory/peak_allocated_gib"])
    assert peaks == sorted(set(peaks), reverse=True)
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["flash", "sdpa", "flex", "math"])
def test_on_a_gpu_uncompiled_selective_ends_with_the_same_bits(
    config: MakeConfig, tmp_path: Path, attention: str
) -> None:
    """memory=full does not: it adds up weight gradients in float32, which otherwise are bf16."""
    options = [*OPTIONS, f"attention={attention}", "device=cuda", "compile=false"]
    results = []
    for policy in POLICIES[:2]:
        folder = tmp_path / str(len(results))
        fit(config(*options, policy, f"run_dir={folder}"))
        results.append(trained(folder))
    assert all(result == results[0] for result in results)


def test_what_layers_keep_is_said_at_the_start(config: MakeConfig) -> None:
    options = ["attention=sdpa", "model.n_layers=5", "seq_len=64", "max_steps=1", "model.dim=1024"]
    # 3 layers × 4 rows of 64 tokens × (4 · 1024 of the input + 4 · 2 · 512 of attention's output + 4 · 2 of its LSE)
    gib = 3 * 4 * 64 * (4 * 1024 + 4 * 1024 + 8) / 2**30
    lines = fit(config(*options, "memory=full", "memory.layers=0.6"))
    assert f"memory     full: 3 of 5 layers keep {gib:.2f} GiB for the backward pass" in "\n".join(lines)
    assert gib >= 0.005, "not 0.00"


def test_a_policy_that_does_not_exist_is_refused_by_name(composed: Callable[..., object]) -> None:
    raw = composed("memory=full")
    raw.memory.name = "fulll"  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"memory\.name=fulll is unknown; use none, selective, full"):
        load_config(raw)  # type: ignore[arg-type]
