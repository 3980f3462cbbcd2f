"""Runs in bf16: weights are cast once a step, and no load or step leaves an old cast behind; moments in bf16."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from model.float8 import Float8Linear
from model.linear import Linear
from training.checkpoint import folder as checkpoints
from training.config import TrainConfig
from training.config.saved import saved_settings, upgraded, with_saved
from training.loggers import read_metrics
from training.run import Run
from training.runtime import Runtime
from training.trainer import Trainer

MakeConfig = Callable[..., TrainConfig]
OPTIONS = ["precision=bf16", "attention=sdpa", "tokens_per_step=256", "learning_rate=1e-2", "max_steps=6"]
OPTIONS += ["eval_every=2", "checkpoint.every=2", "checkpoint.keep_last=9", "sample_tokens=4", "model.tie_head=true"]


def fit(config: TrainConfig) -> Trainer:
    trainer = Trainer(config, lambda line: None)
    trainer.fit()
    return trainer


def trained(folder: Path) -> tuple[bytes, list[float], str]:
    """The weights, the losses of training and evaluation, the samples."""
    records = read_metrics(folder / "metrics.jsonl")
    losses = [record[name] for record in records for name in ("train/loss", "val/loss") if name in record]
    return (folder / "model.safetensors").read_bytes(), losses, (folder / "samples.md").read_text()


def copies(trainer: Trainer) -> list[Linear]:
    return [x for x in trainer.run.model.modules() if isinstance(x, Linear) and x.working is not None]


@pytest.mark.parametrize("policy", ["memory=none", "memory=selective"])
def test_a_run_ends_with_the_bits_of_one_whose_micro_batches_cast_for_themselves(
    config: MakeConfig, tmp_path: Path, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = fit(config(*OPTIONS, policy, f"run_dir={tmp_path / 'once'}"))
    assert len(copies(trainer)) == 5
    monkeypatch.setattr(Runtime, "working_dtype", lambda runtime, config: None)
    trainer = fit(config(*OPTIONS, policy, f"run_dir={tmp_path / 'each'}"))
    assert not copies(trainer)
    assert trained(tmp_path / "once") == trained(tmp_path / "each")


@pytest.mark.gpu
def test_on_a_gpu_compiled_copies_change_no_loss_and_need_no_memory(
    config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With memory=none autocast's own casts are held, too, from the forward pass to the backward pass."""
    options = ["device=cuda", "compile=true", "attention=flash", "model.n_layers=8", "model.n_heads=8", "model.dim=512"]
    options += ["model.ffn_dim=2048", "seq_len=1024", "tokens_per_step=8192", "max_steps=6", "sample_tokens=0"]
    results = {}
    for name in ("once", "each"):
        trainer = fit(config(*OPTIONS, *options, f"run_dir={tmp_path / name}"))
        assert len(copies(trainer)) == (4 * 8 + 1 if name == "once" else 0)
        records = [x for x in read_metrics(tmp_path / name / "metrics.jsonl") if "train/loss" in x]
        results[name] = [x["train/loss"] for x in records], max(x["memory/peak_allocated_gib"] for x in records)
        monkeypatch.setattr(Runtime, "working_dtype", lambda runtime, config: None)
    assert results["once"][0] == pytest.approx(results["each"][0], rel=1e-3)
    assert results["once"][1] < 1.02 * results["each"][1]


def test_a_run_that_goes_on_or_begins_with_weights_multiplies_with_those(config: MakeConfig, tmp_path: Path) -> None:
    whole, branch = tmp_path / "whole", tmp_path / "branch"
    fit(config(*OPTIONS, f"run_dir={whole}"))
    fit(config(*OPTIONS, f"run_dir={branch}", f"resume={checkpoints.path_of(whole, 2)}"))
    assert trained(branch)[:2] == trained(whole)[:2]
    begun = tmp_path / "begun"
    weights = f"init_from={whole / 'model.safetensors'}"
    fit(config(*OPTIONS, weights, "max_steps=1", "learning_rate=1e-9", f"run_dir={begun}"))
    last, first = (
        [record["val/loss"] for record in read_metrics(folder / "metrics.jsonl") if "val/loss" in record]
        for folder in (whole, begun)
    )
    assert first[0] == pytest.approx(last[-1], rel=1e-4)


def test_a_bad_step_that_is_left_out_leaves_weights_and_copies_as_they_were(config: MakeConfig) -> None:
    trainer = Trainer(config(*OPTIONS, "bad_step.action=skip"), lambda line: None)
    layer = trainer.run.model.blocks[0].mlp.down
    assert isinstance(layer, Linear)
    history: list[torch.Tensor] = []

    def spoil(grad: torch.Tensor) -> torch.Tensor:
        return torch.full_like(grad, math.nan) if trainer.run.progress.step == 4 else grad

    def watch(run: Run) -> None:
        assert layer.working is not None
        assert torch.equal(layer.working, layer.weight.to(torch.bfloat16))
        history.append(layer.working.clone())

    layer.weight.register_hook(spoil)
    trainer.services[0].after_step = watch  # type: ignore[method-assign]
    trainer.fit()
    same = [torch.equal(*pair) for pair in itertools.pairwise(history)]
    assert same == [False, False, True, False, False]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (["precision=bf16"], False),
        (["precision=bf16", "tokens_per_step=256"], True),
        (["precision=bf16", "memory=selective"], False),
        (["precision=bf16-residual", "memory=full", "tokens_per_step=256"], True),
        (["precision=fp32", "memory=full", "tokens_per_step=256"], False),
    ],
)
def test_there_are_copies_where_a_step_has_several_micro_batches(
    config: MakeConfig, options: list[str], kept: bool
) -> None:
    settings = config(*options)
    runtime = Runtime(None, settings.precision, False)
    assert runtime.working_dtype(settings) is (torch.bfloat16 if kept else None)


@pytest.mark.parametrize("precision", ["bf16", "bf16-residual"])
def test_the_residual_stream_is_what_the_precision_says(config: MakeConfig, precision: str) -> None:
    lines: list[str] = []
    trainer = Trainer(config(f"precision={precision}", "attention=sdpa", "memory=full", "max_steps=1"), lines.append)
    seen: list[torch.dtype] = []
    trainer.run.model.blocks[0].register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0].dtype))
    trainer.fit()
    expected = torch.bfloat16 if precision == "bf16-residual" else torch.float32
    assert set(seen) == {expected}
    decided = trainer.run.runtime.precision
    assert (decided.residual_bytes, decided.product_bytes) == (expected.itemsize, 2)
    assert any(line.startswith("device ") and f", {precision}, " in line for line in lines)


def losses(config: MakeConfig, folder: Path, *options: str) -> list[float]:
    """Of 100 steps, in which the loss falls from 5.7 to 1.2."""
    run = ["max_steps=100", "attention=sdpa", "learning_rate=3e-3", "eval_every=0", "checkpoint.every=0"]
    fit(config(*run, *options, f"run_dir={folder}"))
    return [record["train/loss"] for record in read_metrics(folder / "metrics.jsonl") if "train/loss" in record]


@pytest.mark.slow
def test_bf16_in_the_residual_stream_or_in_the_moments_costs_no_more_than_twice_what_bf16_products_do(
    config: MakeConfig, tmp_path: Path
) -> None:
    """As the mean distance of the curve of the training loss from that of fp32."""
    exact = losses(config, tmp_path / "fp32")
    assert exact[-1] < 1.5
    bf16, residual, moments = (
        statistics.fmean(abs(a - b) for a, b in zip(losses(config, tmp_path / option, option), exact, strict=True))
        for option in ("precision=bf16", "precision=bf16-residual", "precision.moments=bfloat16")
    )
    assert 0 < moments < 2 * bf16
    assert bf16 != residual < 2 * bf16


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_goes_on_with_its_bf16_moments_and_with_those_of_the_other_dtype(
    config: MakeConfig, tmp_path: Path, optimizer: str
) -> None:
    options = [f"optimizer={optimizer}", "max_steps=4", "checkpoint.every=2", "checkpoint.keep_last=9"]
    whole, same, other = tmp_path / "whole", tmp_path / "same", tmp_path / "other"
    fit(config(*options, "precision.moments=bfloat16", f"run_dir={whole}"))
    resume = f"resume={checkpoints.path_of(whole, 2)}"
    fit(config(*options, "precision.moments=bfloat16", f"run_dir={same}", resume))
    assert (same / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    lines: list[str] = []
    trainer = Trainer(config(*options, "precision.moments=float32", f"run_dir={other}", resume), lines.append)
    trainer.fit()
    assert "           changed: precision.moments bfloat16 → float32" in lines
    assert {tensor.dtype for tensor in trainer.run.optimizer.tensors().values()} == {torch.float32}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "precision  fp32 (auto): residual stream float32, moments float32"),
        (
            ["precision=bf16", "precision.moments=bfloat16"],
            "precision  bf16: residual stream float32, moments bfloat16",
        ),
        (["precision=bf16-residual"], "precision  bf16-residual: residual stream bfloat16, moments float32"),
    ],
)
def test_the_start_says_what_the_precision_is(config: MakeConfig, options: list[str], said: str) -> None:
    lines: list[str] = []
    Trainer(config(*options, "max_steps=1"), lines.append).fit()
    assert said in lines


def test_a_residual_stream_in_bf16_is_refused_where_auto_finds_no_bf16(config: MakeConfig) -> None:
    with pytest.raises(ValueError, match=r"precision.residual=bfloat16 .*precision=fp32.*use precision=bf16-residual"):
        Trainer(config("precision.residual=bfloat16"), lambda line: None)


def test_a_residual_stream_in_float32_is_not_called_bf16_residual(config: MakeConfig) -> None:
    with pytest.raises(
        ValueError, match=r"precision.residual=float32 with precision=bf16-residual; use precision=bf16"
    ):
        config("precision=bf16-residual", "precision.residual=float32")


def test_what_an_older_version_saved_goes_on_without_a_change(config: MakeConfig, tmp_path: Path) -> None:
    """precision was one word, and the moments' dtype a setting of the optimizer."""
    whole, folder = tmp_path / "whole", tmp_path / "older"
    options = ["precision=bf16-residual", "precision.moments=bfloat16", "max_steps=2", "checkpoint.every=1"]
    fit(config(*options, f"run_dir={whole}"))
    settings = saved_settings(whole)
    assert settings is not None
    older = {**settings, "precision": "bf16-residual", "optimizer": {**settings["optimizer"], "moments": "bfloat16"}}
    folder.mkdir()
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(older)))
    assert saved_settings(folder) == settings
    composed = with_saved(OmegaConf.create(settings), upgraded(older), ["precision.moments"])
    assert composed.precision.moments == "bfloat16"


@pytest.mark.parametrize("options", [[], ["precision.scaling=rowwise", "memory=full", "memory.tile=16"]])
def test_a_run_in_fp8_learns_and_goes_on_bit_for_bit(config: MakeConfig, tmp_path: Path, options: list[str]) -> None:
    settings = ["precision=fp8", "attention=sdpa", "learning_rate=1e-2", "max_steps=6", "tokens_per_step=256"]
    settings += ["checkpoint.every=2", "checkpoint.keep_last=9", "eval_every=2", "sample_tokens=4", *options]
    whole, branch, lines = tmp_path / "whole", tmp_path / "branch", list[str]()
    trainer = Trainer(config(*settings, f"run_dir={whole}"), lines.append)
    trainer.fit()
    assert sum(isinstance(layer, Float8Linear) for layer in trainer.run.model.modules()) == 4
    (said,) = (line for line in lines if line.startswith("precision  "))
    assert "fp8: attention.qkv, attention.out, mlp.gate_up, mlp.down of each block, scaled " in said
    assert ", emulated" in said
    fit(config(*settings, f"run_dir={branch}", f"resume={checkpoints.path_of(whole, 2)}"))
    assert trained(branch)[:2] == trained(whole)[:2]
    records = [x["train/loss"] for x in read_metrics(whole / "metrics.jsonl") if "train/loss" in x]
    assert records[-1] < records[0]


def test_layers_that_fp8_leaves_alone_are_named_and_a_model_without_others_is_refused(config: MakeConfig) -> None:
    lines: list[str] = []
    Trainer(config("precision=fp8", "model.ffn_dim=72", "max_steps=1"), lines.append).fit()
    left = "in bf16, for want of multiples of 16, mlp.down (72 → 32)"
    (said,) = (line for line in lines if line.startswith("precision  "))
    assert "fp8: attention.qkv, attention.out, mlp.gate_up of" in said
    assert left in said
    with pytest.raises(
        ValueError, match=r"fp8 needs layers .* multiples of 16.*attention.qkv 36 → 72.*use precision=bf16"
    ):
        config("precision=fp8", "model.dim=36", "model.ffn_dim=72")


@pytest.mark.slow
def test_fp8_over_100_steps_costs_little_more_than_bf16(config: MakeConfig, tmp_path: Path) -> None:
    exact = losses(config, tmp_path / "fp32")
    distances = [
        statistics.fmean(abs(a - b) for a, b in zip(losses(config, tmp_path / name, *options), exact, strict=True))
        for name, options in {
            "fp8": ["precision=fp8"],
            "rowwise": ["precision=fp8", "precision.scaling=rowwise"],
        }.items()
    ]
    assert 0 < max(distances) < 0.03
