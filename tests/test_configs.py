"""Every file in configs/ is one that a person can choose, and says all there is to set."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from data.config import SOURCES, TOKENIZERS, HubData
from model.attention.config import ATTENTIONS
from model.config import ModelConfig, RotaryConfig
from training import cli, jobs
from training.config import load_config
from training.config.schema import CHOICES
from training.loggers import LoggerConfig, WandbConfig
from training.trainer import Trainer

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
GROUPS = sorted(folder.name for folder in CONFIGS.iterdir() if folder.is_dir())
OPTIONS = [f"{group}={path.stem}" for group in GROUPS for path in sorted((CONFIGS / group).glob("*.yaml"))]
EXPERIMENTS = [option for option in OPTIONS if option.startswith("experiment=")]

EXTENDS = "experiment=extend-context"
SMALL = ["model.n_layers=1", "model.n_heads=8", "model.n_kv_heads=null", "model.dim=64", "model.ffn_dim=64"]
SMALL += ["model.vocab_size=300", "seq_len=64", "batch_size=2", "tokens_per_step=null", "max_steps=2"]
SMALL += ["eval_tokens=128", "sample_tokens=2", "device=cpu", "logger=none", "schedule.warmup_tokens=null"]


@cache
def compose_once(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", list(overrides))


@pytest.fixture
def composed(composes_for_cpu: None) -> Callable[..., DictConfig]:
    """composed("seq_len=64") is what Hydra composes for that command."""
    return compose_once


@pytest.fixture
def text(tmp_path: Path) -> list[str]:
    for number in range(12):
        lines = [f"{place} green bottles of {number} standing on the wall" for place in range(30)]
        (tmp_path / f"{number}.txt").write_text("\n".join(lines))
    return ["data=text", f"data.path={tmp_path}", "data.val_fraction=0.3", f"data.cache_dir={tmp_path / 'cache'}"]


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_is_a_configuration_that_loads(composed: Callable[..., DictConfig], option: str) -> None:
    raw = composed(option)
    group, _, name = option.partition("=")
    required = {"text": {"path": "x"}, "hf": {"path": "x"}, "file": {"path": "x"}, "hub": {"path": "x"}}
    required["tokens"] = {"path": "x"}
    required["mix"] = {"parts": {"a": {"name": "stdlib"}}}
    config = load_config(OmegaConf.merge(raw, {group: required[name]}) if name in required else raw)
    # A preset's name is where the table of a sweep, the run folder and W&B get it from.
    if group == "data" and name not in SOURCES:
        assert config.data.name == "hf"  # a dataset by name
    elif group not in ("experiment", "logger"):
        assert getattr(config, group).name == name


@pytest.mark.parametrize("name", ["none", "tensorboard", "wandb", "all"])
def test_a_logger_is_what_its_name_says(composed: Callable[..., DictConfig], name: str) -> None:
    logger = load_config(composed(f"logger={name}")).logger
    assert (logger.wandb.mode != "disabled") == (name in ("wandb", "all"))
    assert logger.tensorboard == (name in ("tensorboard", "all"))


@pytest.mark.parametrize("option", [option for option in OPTIONS if not option.startswith("experiment=")])
def test_every_setting_is_written_down(composed: Callable[..., DictConfig], option: str) -> None:
    group, _, name = option.partition("=")
    typed = CHOICES.get(group, {})
    one = {"model": ModelConfig, "tokenizer": TOKENIZERS.get(name), "data": HubData, "logger": LoggerConfig}
    written = OmegaConf.to_container(composed(option), resolve=False)[group]  # type: ignore[index, call-overload]
    missing = {field.name for field in fields(typed.get(name) or one[group])} - set(written)
    assert missing <= ({"rotary"} if written.get("position") == "learned" else set())
    if "rotary" in written:
        assert set(written["rotary"]) == {field.name for field in fields(RotaryConfig)}
    if "wandb" in written:
        assert set(written["wandb"]) == {field.name for field in fields(WandbConfig)}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_trains(
    composed: Callable[..., DictConfig], text: list[str], tmp_path: Path, experiment: str
) -> None:
    # One that brings its own text has rows that it fits into.
    own = ["seq_len=256", "data.documents=40", f"data.cache_dir={tmp_path / 'cache'}"]
    text = own if experiment in ("experiment=recall", EXTENDS) else text
    if experiment == EXTENDS:
        short = load_config(composed("experiment=recall", *SMALL, *text, f"run_dir={tmp_path / 'short'}"))
        Trainer(short, lambda line: None).fit()
        text += [f"init_from={short.run_dir}"]
    config = load_config(composed(experiment, *SMALL, *text, f"run_dir={tmp_path / 'run'}"))
    summary = Trainer(config, lambda line: None).fit()
    assert math.isfinite(summary["train/loss"])
    assert math.isfinite(summary["val/bits_per_byte"])


@pytest.mark.parametrize("gpu", [False, True])
def test_the_sweep_compares_every_attention_that_there_is(monkeypatch: pytest.MonkeyPatch, gpu: bool) -> None:
    monkeypatch.setattr(cli, "_runs_on_gpu", lambda: gpu)
    cli.register_resolvers()
    experiment = OmegaConf.load(CONFIGS / "experiment/attention-swap.yaml")
    swept = experiment.hydra.sweeper.params.attention.split(",")
    assert set(swept) == set(ATTENTIONS) - {"auto"} - (set() if gpu else {"flash"})


@pytest.mark.parametrize(
    ("gpu", "seq_len", "rows"),
    [(False, 512, 4), (False, 4096, 1), (True, 1024, 16), (True, 16384, 1), (True, 65536, 1)],
)
def test_short_rows_come_several_at_a_time(monkeypatch: pytest.MonkeyPatch, gpu: bool, seq_len: int, rows: int) -> None:
    monkeypatch.setattr(cli, "_runs_on_gpu", lambda: gpu)
    cli.register_resolvers()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        assert load_config(compose("train", [f"seq_len={seq_len}"])).batch_size == rows
        assert load_config(compose("train", [f"seq_len={seq_len}", "batch_size=3"])).batch_size == 3


class InACycle:
    def __init__(self) -> None:
        self.itself = self


def test_a_job_of_a_sweep_begins_without_what_the_one_before_left(monkeypatch: pytest.MonkeyPatch) -> None:
    hydra = SimpleNamespace(initialized=lambda: False, get=lambda: SimpleNamespace(overrides=SimpleNamespace(task=[])))
    monkeypatch.setattr(jobs, "HydraConfig", hydra)
    models: list[weakref.ref[InACycle]] = []

    def task(composed: DictConfig) -> dict[str, float]:
        assert all(model() is None for model in models)
        models.append(weakref.ref(InACycle()))
        return {}

    for _ in range(3):
        cli.job(task, OmegaConf.create())
    assert len(models) == 3


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("attention=", ["attention=auto", "attention=math", "attention=sdpa"]),
        ("seq", ["seq_len="]),
    ],
)
def test_the_shell_completes_groups_and_settings(typed: str, offered: list[str]) -> None:
    line = f"train.py {typed}"
    environment = {**os.environ, "COMP_LINE": line, "COMP_POINT": str(len(line))}
    command = [sys.executable, "train.py", "-sc", "query=bash"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert set(offered) <= set(done.stdout.split())
