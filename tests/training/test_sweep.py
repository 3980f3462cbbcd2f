"""Sweeps: each job's folder, the record, the table, and what is refused before the first job."""

from __future__ import annotations

import json
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from scripts.kill_test import write_small_text
from training import cli, jobs
from training.config import TrainConfig
from training.sweep import Sweep, comparison, identity

MakeConfig = Callable[..., TrainConfig]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _no_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "sweep", None)
    monkeypatch.setattr(jobs, "failures", [])


def leave_run(folder: str, config: TrainConfig) -> None:
    Path(folder).mkdir(parents=True)
    (Path(folder) / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(asdict(config))))


def folders(config: MakeConfig, where: Path, swept: str, settings: list[str], *shared: str) -> list[str]:
    """The folders of a sweep's jobs, each of which leaves its settings there."""
    sweep = Sweep("id", str(where), [swept])
    found = []
    for number, setting in enumerate(settings):
        chosen = config(setting, *shared)
        folder = sweep.folder_for(number, str(where), chosen)
        if not Path(folder).exists():
            leave_run(folder, chosen)
        found.append(Path(folder).name)
    return found


# ---- a job is known by its settings


def test_a_sweep_in_another_order_finds_each_jobs_own_folder(config: MakeConfig, tmp_path: Path) -> None:
    rates = ["learning_rate=1e-3", "learning_rate=3e-3", "learning_rate=5e-3"]
    assert folders(config, tmp_path, "learning_rate", rates) == ["0", "1", "2"]
    assert folders(config, tmp_path, "learning_rate", rates[::-1]) == ["2", "1", "0"]
    assert folders(config, tmp_path, "learning_rate", ["learning_rate=0.003", "learning_rate=9e-3"]) == ["1", "3"]


def test_other_settings_are_other_jobs_whatever_their_number(config: MakeConfig, tmp_path: Path) -> None:
    seeds = ["seed=1", "seed=2"]
    assert folders(config, tmp_path, "seed", seeds) == ["0", "1"]
    assert folders(config, tmp_path, "seed", seeds, "learning_rate=7e-4") == ["2", "3"]
    assert folders(config, tmp_path, "seed", seeds) == ["0", "1"]


def test_a_longer_sweep_goes_on_in_the_same_folders(config: MakeConfig, tmp_path: Path) -> None:
    seeds = ["seed=1", "seed=2"]
    assert folders(config, tmp_path, "seed", seeds, "max_steps=4") == ["0", "1"]
    assert folders(config, tmp_path, "seed", seeds, "max_steps=8", "log_every=2", "eval_every=3") == ["0", "1"]


def test_lengths_that_are_swept_tell_jobs_apart(config: MakeConfig, tmp_path: Path) -> None:
    assert folders(config, tmp_path, "max_steps", ["max_steps=4", "max_steps=8"]) == ["0", "1"]
    assert folders(config, tmp_path, "max_steps", ["max_steps=8", "max_steps=4"]) == ["1", "0"]
    every = [f"checkpoint.every={n}" for n in (1, 2)]
    assert folders(config, tmp_path / "other", "checkpoint.every", every) == ["0", "1"]


def test_a_folder_with_something_else_in_it_is_left_alone(config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    assert folders(config, tmp_path, "seed", ["seed=1", "seed=2"]) == ["1", "2"]


def test_identity_is_what_a_run_is_and_not_how_it_is_watched() -> None:
    settings = {"seed": 1, "log_every": 5, "data": {"name": "x", "cache_dir": "c"}, "checkpoint": {"every": 3}}
    assert dict(identity(settings, [])) == {"seed": 1, "data.name": "x"}
    assert dict(identity(settings, ["checkpoint.every", "log_every"])) == {
        "seed": 1,
        "log_every": 5,
        "data.name": "x",
        "checkpoint.every": 3,
    }


# ---- what a job returns, and what is recorded of it


@pytest.fixture
def job_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, list[str]], None]:
    """job_of(number, words): Hydra is at that job of a sweep."""

    def at(number: int, words: list[str]) -> None:
        node = OmegaConf.create({"mode": "MULTIRUN", "job": {"num": number}, "overrides": {"task": words}})
        node.mode = jobs.RunMode.MULTIRUN
        monkeypatch.setattr(jobs, "HydraConfig", SimpleNamespace(initialized=lambda: True, get=lambda: node))

    return at


@pytest.mark.parametrize(
    ("summary", "metric", "returned"),
    [
        ({"val/loss": 1.5, "train/loss": 1.0}, "val/loss", 1.5),
        ({"val/loss": 1.5, "train/loss": 1.0}, "train/loss", 1.0),
        ({"train/loss": 1.0}, "val/loss", math.inf),
        (None, "val/loss", math.inf),
    ],
)
def test_a_job_returns_the_metric_that_a_sweeper_minimises(
    job_of: Any, summary: dict[str, float] | None, metric: str, returned: float
) -> None:
    job_of(0, ["seed=1"])
    found = cli.job(lambda composed: summary, OmegaConf.create({"optimized_metric": metric}))
    assert found == returned


def test_a_job_that_fails_is_the_worst_there_is_and_its_code_is_kept(
    job_of: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def task(composed: DictConfig) -> dict[str, float]:
        raise ValueError("seed=1 is no good")

    job_of(0, ["seed=1"])
    assert cli.job(task, OmegaConf.create({"optimized_metric": "val/loss"})) == math.inf
    assert capsys.readouterr().err == "error: seed=1 is no good\n"
    assert jobs.failures == [2]


def test_jobs_in_other_processes_are_in_the_table_too(
    job_of: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    callback = jobs.BeforeTheFirstJob()
    callback.sweep = Sweep("id", str(tmp_path), ["seed"], total=3, refused=[2])
    (tmp_path / "sweep.jsonl").write_text(json.dumps({"sweep": "another", "job": 0, "code": 0, "metrics": {"a": 1}}))
    (tmp_path / "sweep.jsonl").open("a").write("\nhalf a li\n")

    def task(composed: DictConfig) -> dict[str, float]:
        if composed.seed == 1:
            raise cli.NonFiniteError("loss is not finite")
        return {"train/loss": float(composed.seed), "val/loss": 2.0, "throughput/mfu": math.nan}

    for number in (1, 3, 0, 2):
        monkeypatch.setattr(jobs, "sweep", None)  # a process that knows nothing but what comes with the job
        pickle.loads(pickle.dumps(callback)).on_job_start(OmegaConf.create(), task_function=task)
        job_of(number, [f"seed={number}", "max_steps=4"])
        cli.job(task, OmegaConf.create({"optimized_metric": "val/loss", "seed": number}))
    capsys.readouterr()
    assert callback.sweep.compare() == [4]
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "comparison.txt").read_text()
    rows = [line.split() for line in printed.splitlines()[1:]]
    assert [row[:2] for row in rows] == [["seed=0", "0.0000"], ["seed=3", "3.0000"]]
    assert "NaN" not in (tmp_path / "sweep.jsonl").read_text()


def test_each_job_has_a_header_with_what_is_its_own() -> None:
    words = ["model=tiny", "seed=2", "+data.x=1", "learning_rate=0.001"]
    assert Sweep("", "", ["seed", "data.x"], total=4).header(1, words) == "job        2/4   seed=2 +data.x=1"
    assert Sweep("", "", ["seed"]).header(0, ["seed=2"]) == "job        1   seed=2"


def test_the_table_names_jobs_by_what_they_do_not_share_and_sends_no_escape_codes() -> None:
    text = comparison([(["a=1", "b=2"], {"train/loss": 1.0}), (["a=1", "b=\x1b[31m"], {"train/loss": 2.0})])
    assert "a=1" not in text
    assert r"b=\x1b[31m" in text


# ---- real sweeps

SMALL = ["model=tiny", "model.n_layers=1", "model.n_heads=2", "model.n_kv_heads=1", "model.dim=32", "model.ffn_dim=64"]
SMALL += ["model.vocab_size=300", "seq_len=32", "eval_tokens=128", "sample_tokens=0", "device=cpu", "logger=none"]
SMALL += ["data=text", "data.path=text", "data.val_fraction=0.3", "data.cache_dir=cache", "log_every=1"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweeps")
    write_small_text(folder / "text")
    return folder


def sweep(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Both streams are in `stdout`."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HYDRA", "WANDB", "TRITON"))}
    environment |= {"HOME": str(home), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "train.py"), "-m", *SMALL, *arguments]
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}  # as they come
    return subprocess.run(command, cwd=home, env=environment, text=True, timeout=110, **streams)


@pytest.mark.slow
def test_a_sweep_started_again_in_another_order_swaps_no_results(home: Path) -> None:
    first = sweep(home, "run_dir=sw", "learning_rate=1e-3,3e-3", "max_steps=2")
    assert first.returncode == 0, first.stdout
    heads = [line for line in first.stdout.splitlines() if line.startswith("job  ")]
    assert heads == ["job        1/2   learning_rate=0.001", "job        2/2   learning_rate=0.003"]
    header, *rows = (home / "sw/comparison.txt").read_text().splitlines()
    again = sweep(home, "run_dir=sw", "learning_rate=3e-3,1e-3", "max_steps=2")
    assert again.returncode == 0, again.stdout
    assert (home / "sw/comparison.txt").read_text().splitlines() == [header, *rows[::-1]]
    inside = {path.name for path in (home / "sw").iterdir()}
    assert inside == {"0", "1", "multirun.yaml", "sweep.jsonl", "comparison.txt"}
    assert not (home / "runs").exists(), "all of the sweep is in the folder that was named"
    within = sweep(home, "run_dir=sw/0", "learning_rate=1e-3,3e-3")
    assert (within.returncode, within.stdout.count("\n")) == (2, 1)
    assert "run_dir=sw/0 holds a run, and -m makes a folder of runs; choose another" in within.stdout


@pytest.mark.slow
def test_a_job_that_this_machine_cannot_do_is_refused_before_another_trains(home: Path) -> None:
    done = sweep(home, "hydra.sweep.dir=moved", "attention=math,flash", "max_steps=1")
    assert done.returncode == 2
    first, second, *_ = done.stdout.splitlines()
    assert first.startswith("error: attention=flash: ")
    assert second == "job        1/2   attention=math"
    assert "error: " not in "".join(done.stdout.splitlines()[1:])
    assert {path.name for path in (home / "moved").iterdir()} == {"0_tiny_math_32", "multirun.yaml", "sweep.jsonl"}
    rows = [json.loads(row) for row in (home / "moved/sweep.jsonl").read_text().splitlines()]
    assert [(row["job"], row["code"]) for row in rows] == [(0, 0)]


def test_a_sweep_with_a_secret_or_an_unknown_name_is_refused_before_anything_is_written(home: Path) -> None:
    key = "hf_" + "aB3" * 10
    before = {path.name for path in home.iterdir()}
    assert sweep(home, "model=tiny,nosuch").returncode == 2
    for setting in (f"logger.wandb.notes=a,{key}", f"+hydra.job.env_set.X={key}", "+logger.wandb.api_key=a,b"):
        done = sweep(home, "seed=1,2", setting)
        assert done.returncode == 2
        (line,) = done.stdout.splitlines()
        assert "looks like a secret" in line
        assert key not in line
        assert {path.name for path in home.iterdir()} <= before | {"runs"}
        assert not any(home.glob("runs/*"))
