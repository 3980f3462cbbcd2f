"""The sweeps in examples/sweeps: what they compose, and that a study goes on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from processes import LIMIT_S

from training import jobs
from training.config import load_config
from training.metrics import METRICS

ROOT = Path(__file__).resolve().parent.parent
SWEEPS = ROOT / "examples" / "sweeps"
FIELDS = ("sampler", "direction", "storage", "study_name", "n_trials", "n_jobs", "max_failure_rate", "params")
"""What hydra-optuna-sweeper 1.3 takes."""


@pytest.fixture
def sweeper() -> Iterator[None]:
    """Optuna's, as far as composing goes, whether or not it is installed."""
    groups = ConfigStore.instance().repo["hydra"]["sweeper"]
    before = groups.get("optuna.yaml")
    fields: dict[str, Any] = {"_target_": "hydra_plugins.x.OptunaSweeper", **dict.fromkeys(FIELDS)}
    node = OmegaConf.create(fields | {"sampler": {"n_startup_trials": 10}, "params": {}}, flags={"struct": True})
    OmegaConf.set_struct(node.params, False)
    ConfigStore.instance().store(group="hydra/sweeper", name="optuna", node=node, provider="test")
    yield
    groups.pop("optuna.yaml")
    if before is not None:
        groups["optuna.yaml"] = before


@pytest.fixture
def composed(sweeper: None, composes_for_cpu: None) -> DictConfig:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        words = [f"hydra.searchpath=[file://{ROOT / 'examples'}]", "+sweeps=optuna", "hydra.sweep.dir=/runs/tune"]
        return compose("train", words, return_hydra_config=True)


def test_optunas_sweep_composes_and_keeps_its_study_in_its_folder(composed: DictConfig) -> None:
    optuna = composed.hydra.sweeper
    assert optuna.storage == "sqlite:////runs/tune/study.db"
    assert optuna.study_name, "a study without a name does not go on"
    assert composed.optimized_metric in METRICS
    assert METRICS[composed.optimized_metric].better == {"minimize": "lower", "maximize": "higher"}[optuna.direction]


def test_every_value_that_optuna_may_choose_is_one_that_a_run_takes(composed: DictConfig) -> None:
    words = [f"{key}={value}" for key, value in composed.hydra.sweeper.params.items()]
    for override in OverridesParser.create().parse_overrides(words):
        value = override.value()
        for end in (value.start, value.end) if hasattr(value, "start") else value.list:
            OmegaConf.update(composed, override.key_or_group, end)
            settings = OmegaConf.masked_copy(composed, [key for key in composed if key != "hydra"])
            config = load_config(settings)
            assert config.model.name == "tiny"
            assert config.plan.max_steps == 200


def test_w_and_bs_sweep_runs_commands_that_a_run_takes(composes_for_cpu: None) -> None:
    sweep = yaml.safe_load((SWEEPS / "wandb.yaml").read_text())  # as W&B does, to which 3e-4 is a text
    assert sweep["metric"]["name"] in METRICS
    assert sweep["program"] == "train.py"
    fixed = [word for word in sweep["command"] if not word.startswith("${")]
    assert sweep["command"][-1] == "${args_no_hyphens}"
    ends = {key: values.get("values") or [values["min"], values["max"]] for key, values in sweep["parameters"].items()}
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        for key, values in ends.items():
            for value in values:
                assert isinstance(value, int | float)
                config = load_config(compose("train", [*fixed, f"{key}={value}"]))
                assert (config.model.name, config.plan.max_steps) == ("tiny", 200)


def test_both_sweeps_try_the_same(composed: DictConfig) -> None:
    sweep = yaml.safe_load((SWEEPS / "wandb.yaml").read_text())
    assert set(sweep["parameters"]) == set(composed.hydra.sweeper.params)


def test_a_sweeper_that_keeps_a_study_finds_the_folder_there(
    sweeper: None, composes_for_cpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "sweep", None)
    folder = tmp_path / "runs" / "tune"
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        words = [f"hydra.searchpath=[file://{ROOT / 'examples'}]", "+sweeps=optuna", f"run_dir={folder}"]
        config = compose("train", words, return_hydra_config=True)
        OmegaConf.set_readonly(config.hydra, False)
        OmegaConf.update(config, "hydra.overrides.task", words[1:], force_add=True)
        jobs.BeforeTheFirstJob()._prepare(config)
    assert folder.is_dir()
    assert config.hydra.sweeper.storage == f"sqlite:///{folder}/study.db"
    assert jobs.sweep is not None
    assert jobs.sweep.swept == ["learning_rate", "schedule.warmup_steps"]


def test_a_study_that_is_started_again_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    import optuna

    command = [sys.executable, "train.py", "-m", "-cd", "examples", "+sweeps=optuna", f"run_dir={tmp_path / 'tune'}"]
    command += ["hydra.sweeper.n_trials=1", "schedule.warmup_steps=2", "max_steps=4", "seq_len=64", "batch_size=2"]
    command += ["eval_tokens=1024", "device=cpu", "data=synthetic"]
    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)
        assert done.returncode == 0, done.stderr
    study = optuna.load_study(study_name="rate-and-warmup", storage=f"sqlite:///{tmp_path}/tune/study.db")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 2
    assert all(trial.value < 10 for trial in study.trials)
