"""A model of short rows goes on with longer ones: experiment=extend-context."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from training.checkpoint import folder as checkpoints
from training.config import TrainConfig, load_config
from training.trainer import Trainer

SMALL = ["model.n_layers=1", "model.dim=32", "model.n_heads=2", "model.n_kv_heads=1", "model.head_dim=16"]
SMALL += ["model.ffn_dim=64", "data.documents=40", "data.val_fraction=0.2", "eval_tokens=1024", "log_every=1"]
SMALL += ["device=cpu", "logger=none"]


def fit(config: TrainConfig) -> list[str]:
    said: list[str] = []
    Trainer(config, said.append).fit()
    return said


def test_a_run_with_longer_rows_begins_with_the_weights_and_goes_on_where_it_stopped(
    composed: Callable[..., DictConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def load(experiment: str, folder: str, *others: str) -> TrainConfig:
        place = [f"data.cache_dir={tmp_path / 'cache'}", f"run_dir={tmp_path / folder}"]
        return load_config(composed(f"experiment={experiment}", *SMALL, *place, *others))

    fit(load("recall", "short", "seq_len=256", "max_steps=2"))
    with pytest.raises(ValueError, match="init_from=runs/short"):
        fit(load("extend-context", "long", "seq_len=512"))
    extend = ("extend-context", "long", f"init_from={tmp_path / 'short'}", "seq_len=512")
    said = fit(load(*extend, "max_steps=2", "checkpoint.every=1"))
    assert any(line.startswith("init       weights of") and "step 2" in line for line in said)
    assert "           changed: model.rotary.scaling none → yarn" in said
    assert "           changed: model.rotary.factor 1.0 → 4.0" in said
    again = fit(load(*extend, "max_steps=3", "checkpoint.every=1"))
    assert not [line for line in again if line.startswith("init")], "the checkpoint is taken, not the short model"
    assert checkpoints.candidates(tmp_path / "long")[0].name == "step-00000003"
