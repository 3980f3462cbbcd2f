"""Checkpoints: whole or not there, verified, exact. What is damaged is named, and the one before is used."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from data import disk
from data.config import HubData
from scripts.checkpoint import main as checkpoint_script
from training.checkpoint import fits, saver
from training.checkpoint import folder as checkpoints
from training.checkpoint.folder import DamagedCheckpoint, Manifest
from training.checkpoint.restore import restore
from training.checkpoint.saver import Saver
from training.checkpoint.state import written
from training.config import CheckpointConfig, TrainConfig
from training.errors import Interrupted, NonFiniteError, SaveFailed
from training.loggers import read_metrics
from training.run_folder import LOCK, RunFolder
from training.run_folder import check as check_run_folder
from training.trainer import Trainer

MakeConfig = Callable[..., TrainConfig]
TENSORS = tuple(f"{part}.safetensors" for part in ("model", "optimizer", "guard", "progress", "random"))
JSON = (checkpoints.STATE, checkpoints.CONFIG)
RUN = ("max_steps=6", "checkpoint.every=2", "checkpoint.keep_last=9", "eval_every=0")
EXACT = ("step", "tokens", "train/loss", "train/grad_norm", "train/learning_rate", "val/loss", "val/bits_per_byte")


def silently(line: str) -> None:
    """Instead of print."""


def fit(config: TrainConfig, stop_at: int = 0, during: str = "step") -> Trainer:
    """Train; with stop_at, be asked to stop in that step, or in the evaluation after it."""
    trainer = Trainer(config, silently)
    if not stop_at:
        trainer.fit()
        return trainer
    check, losses = trainer.run.guard.check, trainer.run.train_step.losses

    def ask(step: int, *rest: torch.Tensor) -> torch.Tensor:
        if step == stop_at and during == "step":
            trainer.run.interrupt._reason = "SIGTERM"
        return check(step, *rest)

    def ask_in_evaluation(batch: Any) -> torch.Tensor:
        if trainer.run.progress.step == stop_at and during == "evaluation":
            trainer.run.interrupt._reason = "SIGTERM"
        return losses(batch)

    trainer.run.guard.check, trainer.run.train_step.losses = ask, ask_in_evaluation  # type: ignore[method-assign]
    with pytest.raises(Interrupted, match="by SIGTERM; saved") as interrupted:
        trainer.fit()
    assert interrupted.value.code == 75
    return trainer


def exact(trainer: Trainer) -> list[dict[str, float]]:
    """The record without what a clock measured."""
    return [
        {name: value for name, value in record.items() if name in EXACT}
        for record in read_metrics(trainer.run.folder / "metrics.jsonl")
    ]


def same(first: Trainer, second: Trainer) -> bool:
    """Two runs end with the same weights, moments, sums and random numbers, bit for bit, and with the same record."""
    paths = [checkpoints.candidates(trainer.run.folder)[0] for trainer in (first, second)]
    pairs = ((paths[0] / name, paths[1] / name) for name in TENSORS)
    equal = [one.read_bytes() == other.read_bytes() for one, other in pairs]
    return all(equal) and exact(first) == exact(second)


@pytest.fixture
def run(config: MakeConfig, tmp_path: Path) -> Callable[..., Path]:
    """run() is the folder of a finished run with checkpoints at steps 2, 4 and 6; `RUN` are its settings."""

    def train(*overrides: str) -> Path:
        return fit(config(*RUN, *overrides)).run.folder

    return train


# ---- exact


def check_stopped_and_resumed(config: MakeConfig, folder: Path, *overrides: str, stop_at: int, during: str) -> None:
    options = ["max_steps=10", "log_every=3", "eval_every=3", "sample_tokens=4", "sample_every=3", "learning_rate=1e-2"]
    options += ["tokens_per_step=256", "schedule.warmup_steps=2", "bad_step.spike_sigma=6", "bad_step.spike_window=2"]
    options += overrides
    whole = fit(config(*options, f"run_dir={folder / 'whole'}"))
    parts = [*options, f"run_dir={folder / 'parts'}"]
    stopped = fit(config(*parts), stop_at, during)
    assert not (stopped.run.folder / "model.safetensors").exists()
    resumed = Trainer(config(*parts), silently)
    torch.manual_seed(123)  # a new process may have drawn more or fewer random numbers
    resumed.fit()
    assert same(whole, resumed)
    for name in ("samples.md", "model.safetensors"):
        assert (whole.run.folder / name).read_bytes() == (resumed.run.folder / name).read_bytes()
    last = [{name for name in each.run.progress.summary if name in EXACT} for each in (resumed, whole)]
    assert last[0] == last[1]


def test_a_run_ends_after_max_time(config: MakeConfig) -> None:
    with pytest.raises(Interrupted, match=r"interrupted by max_time; saved .*step-00000000$") as interrupted:
        fit(config("max_steps=1_000_000", "max_time=0.001"))
    assert interrupted.value.code == 75


def test_a_run_that_is_not_to_save_writes_neither_checkpoints_nor_weights(config: MakeConfig, tmp_path: Path) -> None:
    options = ["max_steps=4", "checkpoint.every=2", "checkpoint.save=false", f"run_dir={tmp_path / 'run'}"]
    whole = fit(config(*options))
    assert whole.run.progress.step == 4
    with pytest.raises(Interrupted, match=r"interrupted by max_time; saved nothing, as checkpoint.save=false says"):
        fit(config(*options, "max_time=0.001", f"run_dir={tmp_path / 'stopped'}"))
    names = {path.name for folder in ("run", "stopped") for path in (tmp_path / folder).iterdir()}
    assert "metrics.jsonl" in names
    assert not names & {"checkpoints", "model.safetensors"}


@pytest.mark.parametrize(
    ("stop_at", "during", "optimizer"),
    [
        (5, "step", "adamw"),
        (6, "evaluation", "muon"),
        pytest.param(5, "step", "muon", marks=pytest.mark.slow),
        pytest.param(6, "evaluation", "adamw", marks=pytest.mark.slow),
        pytest.param(10, "evaluation", "adamw", marks=pytest.mark.slow),
        pytest.param(10, "evaluation", "muon", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_stopped_and_resumed_is_the_run_that_is_not(
    config: MakeConfig, tmp_path: Path, optimizer: str, stop_at: int, during: str
) -> None:
    check_stopped_and_resumed(config, tmp_path, f"optimizer={optimizer}", stop_at=stop_at, during=during)


def test_a_run_on_a_stream_that_is_not_prepared_goes_on_where_it_was(
    config: MakeConfig, tmp_path: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows() -> Iterator[dict[str, str]]:
        yield from ({"text": path.read_text()} for path in sorted(text_folder.iterdir()))

    monkeypatch.setattr("data.hub._load", lambda _: datasets.IterableDataset.from_generator(rows))
    monkeypatch.setattr("data.hub._commit", lambda _: "a commit")
    data = HubData(path="a/b", streaming=True, prepare=False, val_fraction=0.3, cache_dir=str(tmp_path / "cache"))
    streamed = lambda *overrides: replace(config(*overrides), data=data)  # noqa: E731
    check_stopped_and_resumed(streamed, tmp_path, stop_at=5, during="step")


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["flash", "sdpa", "flex", "math"])
def test_on_a_gpu_too_where_it_is_asked_to_be_deterministic(config: MakeConfig, tmp_path: Path, attention: str) -> None:
    options = [
        f"attention={attention}",
        "device=cuda",
        "deterministic=true",
        "compile=false",
        "seq_len=64",
        "batch_size=2",
    ]
    try:
        check_stopped_and_resumed(config, tmp_path, *options, stop_at=5, during="step")
    finally:
        torch.use_deterministic_algorithms(False)


def test_what_was_recorded_after_the_checkpoint_is_recorded_once(config: MakeConfig, tmp_path: Path) -> None:
    whole = fit(config("max_steps=6", f"run_dir={tmp_path / 'whole'}"))
    options = config("max_steps=6", "checkpoint.every=2", "checkpoint.keep_last=9", "eval_every=2")
    folder = fit(options).run.folder
    lines = (folder / "metrics.jsonl").read_text()
    for step in (4, 6):
        shutil.rmtree(checkpoints.path_of(folder, step))  # as if it had been killed after step 5
    (folder / "metrics.jsonl").write_text(lines + '{"step": 7, "tok')
    resumed = fit(options)
    assert resumed.run.progress.summary["checkpoint/load_seconds"] > 0, "from step 2, not from the beginning"
    train = [record for record in exact(resumed) if "train/loss" in record]
    assert [record["step"] for record in train] == [1, 2, 3, 4, 5, 6]
    assert train == [record for record in exact(whole) if "train/loss" in record]


def test_a_run_killed_before_its_first_checkpoint_begins_anew(config: MakeConfig, run: Callable[..., Path]) -> None:
    folder = run()
    before = exact(Trainer(config(*RUN), silently))
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(ValueError, match="holds a finished run, no checkpoint; choose another, or remove it"):
        fit(config(*RUN))
    (folder / "model.safetensors").unlink()
    assert exact(fit(config(*RUN))) == before


def test_a_run_with_nothing_but_damaged_checkpoints_is_not_begun_anew(
    config: MakeConfig, run: Callable[..., Path]
) -> None:
    folder = run()
    (folder / "model.safetensors").unlink()
    for path in checkpoints.candidates(folder):
        (path / "state.json").write_text("{}")
    record = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="holds 3 checkpoints, none of them good; choose another"):
        fit(config(*RUN))
    assert (folder / "metrics.jsonl").read_bytes() == record


def test_a_finished_run_is_left_as_it_is(config: MakeConfig, run: Callable[..., Path]) -> None:
    folder = run()
    names = ("metrics.jsonl", "model.safetensors")
    before = [(folder / name).read_bytes() for name in names]
    again = fit(config(*RUN))
    assert [(folder / name).read_bytes() for name in names] == before
    assert math.isfinite(again.run.progress.summary["train/loss"])


def test_a_branch_goes_on_elsewhere_and_leaves_its_origin_alone(
    config: MakeConfig, run: Callable[..., Path], tmp_path: Path
) -> None:
    origin = run()
    before = {path: path.read_bytes() for path in origin.rglob("*") if path.is_file()}
    options = ["max_steps=8", "eval_every=0", f"resume={checkpoints.path_of(origin, 4)}"]
    branch = config(*options, f"run_dir={tmp_path / 'branch'}")
    trainer = fit(branch)
    assert [record["step"] for record in exact(trainer) if "train/loss" in record] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert {path: path.read_bytes() for path in origin.rglob("*") if path.is_file()} == before
    lines: list[str] = []
    Trainer(branch, lines.append).fit()  # the same command again
    assert any("is past resume=" in line for line in lines)
    assert any(line.startswith("resume     step 8 of ") for line in lines)


# ---- what does not fit


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.dim=64", "model.dim=64 does not fit .*step-00000006, which was trained with model.dim=32"),
        ("model.vocab_size=310", "model.vocab_size=310 does not fit"),
        ("seq_len=16", "seq_len=16 does not fit"),
        ("seed=3", "seed=3 does not fit"),
        ("optimizer=muon", "optimizer.name=muon does not fit"),
        ("max_steps=5", "max_steps=5 is less than the 6 steps"),
        ("data.val_fraction=0.4", "data.val_fraction=0.4 does not fit"),
    ],
)
def test_a_checkpoint_that_does_not_fit_says_which_field_differs(
    config: MakeConfig, run: Callable[..., Path], override: str, said: str
) -> None:
    folder = run()
    before = (folder / "metrics.jsonl").read_bytes(), (folder / "config.yaml").read_bytes()
    with pytest.raises(ValueError, match=said) as refused:
        Trainer(config(*RUN, override), silently).fit()
    assert "\n" not in str(refused.value)
    if not override.startswith("data."):  # the configuration alone tells: before the text is read or torch is loaded
        with pytest.raises(ValueError, match=said):
            check_run_folder(config(*RUN, override))
    assert ((folder / "metrics.jsonl").read_bytes(), (folder / "config.yaml").read_bytes()) == before


def test_the_tokens_of_a_step_are_compared_and_not_whether_they_were_typed(
    config: MakeConfig, run: Callable[..., Path]
) -> None:
    path = checkpoints.path_of(run(), 6)
    saved = json.loads((path / "config.json").read_text())
    for typed in (None, 128):
        (path / "config.json").write_text(json.dumps({**saved, "tokens_per_step": typed}))
        for same in ("tokens_per_step=null", "tokens_per_step=128"):
            assert "tokens_per_step" not in {key for key, _, _ in fits.differences(path, config(same))}
        other = {key: (old, new) for key, old, new in fits.differences(path, config("batch_size=2"))}
        assert other["tokens_per_step"] == (128, 64)


def test_what_two_configurations_tell_is_said_before_the_text_is_looked_at(
    config: MakeConfig, run: Callable[..., Path]
) -> None:
    folder = run()
    check_run_folder(config(*RUN))
    with pytest.raises(ValueError, match=r"model.dim=64 does not fit .*step-00000006"):
        check_run_folder(config("model.dim=64"))
    with pytest.raises(ValueError, match=r"seed=3 does not fit .*step-00000004"):
        check_run_folder(config("seed=3", f"resume={checkpoints.path_of(folder, 4)}", f"run_dir={folder / 'branch'}"))
    newest = checkpoints.path_of(folder, 6) / "config.json"
    newest.write_text(newest.read_text().replace('"dim": 32', '"dim": 64'))  # what it says is not what was saved
    with pytest.raises(ValueError, match=r"model.dim=64 does not fit .*step-00000004"):
        check_run_folder(config("model.dim=64"))


def test_a_path_that_holds_no_checkpoint_is_said_before_the_text_is_looked_at(
    config: MakeConfig, text_folder: Path
) -> None:
    for setting in ("resume", "init_from"):
        with pytest.raises(ValueError, match=f"{setting}={text_folder} holds no checkpoint; name a run"):
            check_run_folder(config(f"{setting}={text_folder}"))


def test_what_may_differ_is_said(config: MakeConfig, run: Callable[..., Path]) -> None:
    run()
    lines: list[str] = []
    Trainer(config("max_steps=8", "learning_rate=1e-4"), lines.append).fit()
    assert any("changed: learning_rate 0.002 → 0.0001" in line for line in lines)


def test_resume_none_refuses_a_run_and_a_wrong_path_is_named(config: MakeConfig, run: Callable[..., Path]) -> None:
    folder = run()
    with pytest.raises(ValueError, match=r"already holds a run; choose another, or resume=auto"):
        Trainer(config("resume=none"), silently)
    with pytest.raises(ValueError, match=r"resume=nowhere does not exist"):
        Trainer(config("resume=nowhere"), silently)
    with pytest.raises(ValueError, match=r"is older than .*step-00000006"):
        Trainer(config("max_steps=6", f"resume={checkpoints.path_of(folder, 4)}"), silently).fit()


# ---- damage

FILES = [*TENSORS, *JSON, checkpoints.MANIFEST]
DAMAGES = ("flipped", "truncated", "deleted", "grown")


def damage(path: Path, how: str, where: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    if how == "flipped":
        data[int(where * (len(data) - 1))] ^= 1 << int(where * 7)
        path.write_bytes(data)
    elif how == "truncated":
        path.write_bytes(data[: int(where * (len(data) - 1))])
    elif how == "grown":
        path.write_bytes(data + b"\0")
    else:
        path.unlink()


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_named_with_the_reason_and_the_one_before_is_used(
    shared_run: Path, tmp_path: Path, name: str, how: str
) -> None:
    run = tmp_path / "copy"
    shutil.copytree(shared_run, run)
    newest = checkpoints.path_of(run, 6)
    damage(newest / name, how)
    lines: list[str] = []
    found = checkpoints.newest(run, lines.append)
    assert found is not None
    assert found[0] == checkpoints.path_of(run, 4)
    (line,) = lines
    assert line.startswith(f"checkpoint {newest} is damaged and not used: {name}")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(FILES), place=st.integers(0, 10**7), bit=st.integers(0, 7))
def test_any_flipped_bit_is_noticed(shared_run: Path, name: str, place: int, bit: int) -> None:
    path = checkpoints.path_of(shared_run, 6) / name
    whole = path.read_bytes()
    data = bytearray(whole)
    data[place % len(data)] ^= 1 << bit
    try:
        path.write_bytes(data)
        with pytest.raises(DamagedCheckpoint):
            checkpoints.verify(path.parent)
    finally:
        path.write_bytes(whole)
    checkpoints.verify(path.parent)


@pytest.fixture(scope="module")
def shared_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints, at steps 2, 4 and 6; whoever changes them puts them back."""
    run = tmp_path_factory.mktemp("run")
    for step in (2, 4, 6):
        write(run, step)
    return run


def write(run: Path, step: int, val_loss: float | None = None, state: Any = None) -> Path:
    tensors = {name: lambda path: path.write_bytes(os.urandom(500)) for name in TENSORS}
    facts = {"step": step, "tokens": 100 * step, "world_size": 1, "val_loss": val_loss, "versions": {"torch": "2"}}
    path = checkpoints.path_of(run, step)
    checkpoints.write(path, tensors, {"state.json": state or {"step": step}, "config.json": {"seed": 0}}, facts)  # type: ignore[arg-type]
    return path


def test_training_goes_on_from_the_one_before_and_replaces_the_damaged(
    config: MakeConfig, run: Callable[..., Path], tmp_path: Path
) -> None:
    folder = run()
    damage(checkpoints.path_of(folder, 6) / "model.safetensors", "flipped")
    damage(checkpoints.path_of(folder, 4) / "manifest.json", "deleted")
    lines: list[str] = []
    resumed = Trainer(config(*RUN), lines.append)
    resumed.fit()
    assert [line for line in lines if "damaged" in line] == [
        f"checkpoint {checkpoints.path_of(folder, 6)} is damaged and not used: "
        "model.safetensors has changed since it was written (SHA-256)",
        f"checkpoint {checkpoints.path_of(folder, 4)} is damaged and not used: "
        "manifest.json: No such file or directory",
    ]
    assert any(f"resume     step 2 of {checkpoints.path_of(folder, 2)}" in line for line in lines)
    assert checkpoints.verify(checkpoints.path_of(folder, 6)).step == 6
    assert same(fit(config("max_steps=6", "eval_every=0", f"run_dir={tmp_path / 'whole'}")), resumed)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=10,
)


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=300) | JSON_VALUES.map(lambda value: json.dumps(value).encode()))
@example(data=b"[" * 100_000)
@example(data=b'{"format": ' + b"9" * 5000 + b"}")
def test_no_manifest_does_anything_but_be_refused(data: bytes) -> None:
    with pytest.raises(DamagedCheckpoint):
        Manifest.from_json(data)


@pytest.mark.parametrize("field", [*Manifest.__dataclass_fields__])
@settings(max_examples=60, deadline=None)
@given(value=JSON_VALUES | st.dictionaries(st.sampled_from([*FILES, "../x", "/etc/passwd"]), JSON_VALUES))
def test_a_manifest_forged_with_a_right_digest_leads_nowhere(field: str, value: Any) -> None:
    facts: dict[str, Any] = {"format": 1, "step": 1, "tokens": 1, "world_size": 1, "val_loss": None, "versions": {}}
    files = {name: [1, "0" * 64] for name in (*TENSORS, *JSON)}
    data = Manifest(**{**facts, "config_sha256": "", "files": files, field: value}).to_json()
    with TemporaryDirectory() as run:
        path = checkpoints.path_of(Path(run), 1)
        path.mkdir(parents=True)
        (path / "manifest.json").write_bytes(data)
        assert checkpoints.newest(Path(run), silently) is None, "no file is what this says"
        assert checkpoint_script(["list", run]) in (0, 1), "no traceback"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(values={"random": {}, "data": "", "tokenizer": "", "records": {}, "summary": {}, "reported": 0, "events": 0})
@given(values=st.dictionaries(st.sampled_from(["random", "data", "records", "events", "summary"]), JSON_VALUES))
def test_a_forged_state_is_one_line(
    config: MakeConfig, tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]
) -> None:
    run = tmp_path_factory.mktemp("forged")
    (run / "run.lock").touch()
    write(run, 2, state=values)
    with pytest.raises(ValueError, match="step-00000002") as refused:
        Trainer(config(f"run_dir={run}"), silently).fit()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("key", ["random", "python"])
def test_a_checkpoint_of_another_program_that_fits_by_its_config_is_one_line(
    config: MakeConfig, run: Callable[..., Path], key: str
) -> None:
    path = checkpoints.path_of(run(), 6)
    texts = {name: json.loads((path / name).read_text()) for name in JSON}
    texts["state.json"]["random"] = {} if key == "random" else {"python": [1], "numpy": []}
    facts = {"step": 6, "tokens": 1, "world_size": 1, "val_loss": None, "versions": {}}
    data = {name: (path / name).read_bytes() for name in TENSORS}
    writers = {name: lambda file, name=name: file.write_bytes(data[name]) for name in data}
    checkpoints.write(path, writers, texts, facts)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="step-00000006 does not hold what this version saves"):
        fit(config(*RUN))


# ---- whole or not there


def test_a_save_that_fails_leaves_nothing_and_the_older_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 2)
    for failing in ("rename", "fsync", "open"):

        def fail(*arguments: Any, **more: Any) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("builtins.open" if failing == "open" else f"os.{failing}", fail)
            with pytest.raises(OSError, match="No space"):
                write(tmp_path, 4)
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


def test_everything_is_on_the_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def spy(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    monkeypatch.setattr(os, "rename", lambda *pair: (events.append("rename"), rename(*pair)))
    write(tmp_path, 2)
    *files, manifest, part, renamed, parent = events
    assert set(files) == {*TENSORS, *JSON}
    assert (manifest, renamed, parent) == ("manifest.json", "rename", "checkpoints")
    assert part.startswith(".step-00000002.part-")


def test_the_record_is_on_the_disk_before_the_checkpoint_that_counts_on_it(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    sync = disk.sync
    monkeypatch.setattr(disk, "sync", lambda path: (synced.append(path), sync(path)))
    fit(config("max_steps=1"))
    of_checkpoint = [path for path in synced if ".step-00000001." in str(path)]  # the weights come when they come
    assert {"model.safetensors"} < {path.name for path in of_checkpoint}
    assert "metrics.jsonl" in [path.name for path in synced[: synced.index(of_checkpoint[0])]]


def test_what_a_killed_save_left_is_swept_by_the_next_process(config: MakeConfig, run: Callable[..., Path]) -> None:
    folder = run()
    part = folder / "checkpoints" / ".step-00000008.part-123"
    part.mkdir()
    (part / "model.safetensors").write_bytes(b"half")
    (folder / "checkpoints" / "mine").mkdir()
    fit(config(*RUN))
    assert not part.exists()
    assert (folder / "checkpoints" / "mine").exists()


def test_two_processes_cannot_train_in_one_folder(config: MakeConfig) -> None:
    refusal = rf"is being trained by process {os.getpid()} on .*; stop that, or choose"
    late = Trainer(config(), silently)  # began before the first one held the folder
    first = RunFolder(config())
    with pytest.raises(ValueError, match=refusal):
        late.fit()
    with pytest.raises(ValueError, match=refusal):
        check_run_folder(config())  # before anything slow, or out of memory
    first.close()
    check_run_folder(config())
    fit(config())


def test_who_only_looks_at_a_run_folder_keeps_nobody_out(config: MakeConfig) -> None:
    RunFolder(config()).close()
    with open(Path(config().run_dir) / LOCK, "rb") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        threading.Timer(0.15, looking.close).start()
        RunFolder(config()).close()


# ---- which ones stay


def test_retention_keeps_the_newest_each_kth_and_the_best(tmp_path: Path) -> None:
    for step, loss in ((1, 3.0), (2, 1.0), (3, None), (4, 2.0), (5, 2.5), (6, None)):
        write(tmp_path, step, loss)
    damaged = checkpoints.path_of(tmp_path, 3)
    (damaged / "manifest.json").unlink()
    gone = checkpoints.prune(tmp_path, last=2, every=4, best=True)
    assert [path.name for path in gone] == ["step-00000001"]
    assert [path.name for path in checkpoints.candidates(tmp_path)] == [
        f"step-0000000{step}" for step in (6, 5, 4, 3, 2)
    ]


def test_nothing_is_removed_while_the_newest_is_damaged(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step)
    damage(checkpoints.path_of(tmp_path, 3) / "model.safetensors", "flipped")
    with pytest.raises(DamagedCheckpoint):
        checkpoints.prune(tmp_path, last=1, every=0, best=False)
    assert len(checkpoints.candidates(tmp_path)) == 3


def test_a_run_keeps_what_its_config_says(config: MakeConfig) -> None:
    options = ["max_steps=9", "checkpoint.every=1", "checkpoint.keep_last=2", "checkpoint.keep_every=4"]
    folder = fit(config(*options, "eval_every=0")).run.folder
    found = checkpoints.candidates(folder)
    assert [checkpoints.read_manifest(path).step for path in found] == [9, 8, 4]
    assert checkpoints.read_manifest(found[0]).val_loss is not None, "the last step is evaluated"
    assert checkpoints.read_manifest(found[0]).tokens == 9 * 128
    assert any("checkpoint/save_seconds" in record for record in read_metrics(folder / "metrics.jsonl"))


# ---- a new run from old weights


def test_weights_to_begin_with_are_refused_where_a_run_has_begun_with_others(
    config: MakeConfig, run: Callable[..., Path], tmp_path: Path
) -> None:
    other = run("max_steps=1")
    words = ["max_steps=2", f"run_dir={tmp_path / 'new'}"]
    fit(config(*words, f"init_from={other}"))
    fit(config(*words, f"init_from={other}", "max_steps=3"))  # what the command was
    weights = other / "model.safetensors"
    with pytest.raises(ValueError, match=f"init_from={weights} begins .* of one that began with init_from={other}"):
        check_run_folder(config(*words, f"init_from={weights}"))
    with pytest.raises(ValueError, match="is of one that began with random weights; choose another run_dir"):
        check_run_folder(config("max_steps=9", f"init_from={tmp_path / 'new'}"))


def test_a_new_run_begins_with_the_weights_of_another(
    config: MakeConfig, run: Callable[..., Path], tmp_path: Path
) -> None:
    origin = run()
    for source in (origin, checkpoints.path_of(origin, 6), origin / "model.safetensors"):
        new = config("seq_len=64", "max_steps=2", f"init_from={source}", f"run_dir={tmp_path / source.name / 'new'}")
        trainer = Trainer(new, silently)
        with closing(RunFolder(new)) as folder:
            restore(trainer.run, folder)
        old = Trainer(config(*RUN), silently)
        with closing(RunFolder(old.run.config)) as folder:
            restore(old.run, folder)
        assert trainer.run.progress.step == 0
        assert all(map(torch.equal, trainer.run.model.parameters(), old.run.model.parameters()))
        assert not trainer.run.optimizer.adamws[0].state


def test_weights_that_cannot_be_read_or_are_of_another_size_are_refused_before_anything_slow(
    config: MakeConfig, run: Callable[..., Path], tmp_path: Path
) -> None:
    origin, text, folder, missing = run(), tmp_path / "notes.txt", tmp_path / "folder", tmp_path / "missing"
    for place in (folder, missing):
        place.mkdir()
        shutil.copy(origin / "config.yaml", place)
    text.write_text("no weights")
    (folder / "model.safetensors").write_text("no weights")
    (missing / "config.json").write_text('{"model_type": "gpt2"}')
    shutil.copy(origin / "model.safetensors", tmp_path / "weights")
    for source, words, said in (
        (text, [], "notes.txt cannot be read as safetensors: .*; name a run, a checkpoint or a model.safetensors"),
        (folder, [], "folder/model.safetensors cannot be read as safetensors"),
        (missing, [], "missing"),
        (tmp_path / "weights", ["model.dim=64"], r"does not fit: it holds [\d,]+ parameters, and model.name=.* has"),
    ):
        with pytest.raises(ValueError, match=said) as refused:
            check_run_folder(config(*words, f"init_from={source}", f"run_dir={tmp_path / 'new'}"))
        assert "\n" not in str(refused.value)
    check_run_folder(config(f"init_from={tmp_path / 'weights'}", f"run_dir={tmp_path / 'new'}"))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (["model.dim=64"], "model.dim=64 does not fit .*, which was trained with model.dim=32"),
        (["model.vocab_size=310"], "model.vocab_size=310 does not fit"),
        (["model.dim=64", "model.vocab_size=310"], r"; use (?=.*model\.dim=32)(?=.*model\.vocab_size=300)"),
        # The same shapes: only the configuration tells 4 heads of 8 from 2 of 16.
        (["model.n_heads=4", "model.n_kv_heads=2"], "model.head_dim=8 does not fit"),
    ],
)
def test_weights_of_another_architecture_are_refused_by_the_field_that_differs(
    config: MakeConfig, run: Callable[..., Path], tmp_path: Path, override: list[str], said: str
) -> None:
    origin = run()
    for source in (origin, checkpoints.path_of(origin, 6)):
        new = config(*override, f"init_from={source}", f"run_dir={tmp_path / 'new'}")
        with pytest.raises(ValueError, match=said):
            check_run_folder(new)
        with pytest.raises(ValueError, match=said):
            Trainer(new, silently).fit()


def test_a_new_run_may_attend_otherwise_and_says_so(
    config: MakeConfig, run: Callable[..., Path], tmp_path: Path
) -> None:
    lines: list[str] = []
    new = config("model.window=8", "model.rotary.theta=500000", f"init_from={run()}", f"run_dir={tmp_path / 'new'}")
    Trainer(new, lines.append).fit()
    changed = [line.strip() for line in lines if "changed: " in line]
    assert changed == ["changed: model.rotary.theta 10000.0 → 500000.0", "changed: model.window None → 8"]


def test_a_copy_of_a_checkpoint_is_one_whatever_it_is_called(
    config: MakeConfig, run: Callable[..., Path], tmp_path: Path
) -> None:
    copy = tmp_path / "backup of friday"
    shutil.copytree(checkpoints.path_of(run(), 6), copy)
    for setting, first in (("resume", 7), ("init_from", 1)):
        new = config("max_steps=7", "eval_every=0", f"run_dir={tmp_path / setting}")
        setattr(new, setting, str(copy))
        trained = [record["step"] for record in exact(fit(new)) if "train/loss" in record]
        assert trained == list(range(first, 8))
    damage(copy / "model.safetensors", "flipped")
    with pytest.raises(ValueError, match=r"init_from=.*backup of friday is damaged: model.safetensors has changed"):
        fit(config(f"init_from={copy}", f"run_dir={tmp_path / 'new'}"))


# ---- surroundings


def test_a_disk_that_fills_costs_a_line_and_no_checkpoint(config: MakeConfig, small_disk: Path) -> None:
    options = [f"run_dir={small_disk / 'run'}", "max_steps=8", "checkpoint.every=2", "eval_every=0"]
    lines: list[str] = []
    trainer = Trainer(config(*options), lines.append)
    save = trainer.run.saver.save

    def fill_before_step_4(*arguments: Any, **more: Any) -> None:
        trainer.run.saver.finish()
        if trainer.run.progress.step == 4:
            free = shutil.disk_usage(small_disk).free
            (small_disk / "filler").write_bytes(b"\0" * (free - 100_000))
        save(*arguments, **more)
        if trainer.run.progress.step == 4:
            trainer.run.saver.finish()
            assert checkpoints.verify(checkpoints.path_of(trainer.run.folder, 2)).step == 2
            (small_disk / "filler").unlink()

    trainer.run.saver.save = fill_before_step_4  # type: ignore[method-assign]
    trainer.fit()
    (line,) = (line for line in lines if "not written" in line)
    assert "step-00000004 was not written, older ones are untouched: disk full: " in line
    assert "MB needed" in line
    assert "free some" in line
    assert line.endswith("training goes on")
    assert checkpoints.verify(checkpoints.path_of(trainer.run.folder, 8)).step == 8
    assert not list((trainer.run.folder / "checkpoints").glob(".*"))


def test_a_run_that_begins_on_a_full_disk_is_refused_in_one_line(config: MakeConfig, small_disk: Path) -> None:
    with open(small_disk / "filler", "ab", buffering=0) as filler, suppress(OSError):
        while filler.write(b"\0" * 4096):
            pass
    with pytest.raises(ValueError, match=r"run_dir=.* cannot be written: No space left on device; free some space"):
        fit(config(f"run_dir={small_disk / 'run'}"))


def test_the_disk_may_fill_in_the_middle_of_a_save(
    config: MakeConfig, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(config(f"run_dir={small_disk / 'run'}", "max_steps=2", "checkpoint.every=1"), silently)
    (small_disk / "filler").write_bytes(b"\0" * (20 * 2**20 - 300_000))
    monkeypatch.setattr(saver, "need_space", lambda folder, needed: None)  # there was room when it was asked
    with pytest.raises(SaveFailed, match=r"was not written.*disk full: .* MB needed, .* MB free; free some"):
        trainer.fit()
    assert not list((trainer.run.folder / "checkpoints").glob(".*"))


def test_a_run_folder_that_becomes_read_only_costs_lines_and_not_the_training(
    config: MakeConfig, small_disk: Path
) -> None:
    lines: list[str] = []
    trainer = Trainer(config(f"run_dir={small_disk / 'run'}", "max_steps=6", "checkpoint.every=2"), lines.append)
    check = trainer.run.guard.check

    def remount(step: int, *rest: torch.Tensor) -> torch.Tensor:
        if step == 3:
            trainer.run.saver.finish()
            for logger in list(trainer.run.loggers.loggers):
                if logger.name == "jsonl":  # an open file would keep the file system writable
                    logger.finish("interrupted")
            trainer.run_folder.close()
            subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
        return check(step, *rest)

    trainer.run.guard.check = remount  # type: ignore[method-assign]
    with pytest.raises(SaveFailed, match="Read-only file system"):
        trainer.fit()
    assert trainer.run.progress.step == 6
    assert any("step-00000004 was not written" in line and "Read-only file system" in line for line in lines)
    assert checkpoints.verify(checkpoints.path_of(trainer.run.folder, 2)).step == 2
    for path in (small_disk / "run", small_disk / "new" / "run"):
        with pytest.raises(ValueError, match=r"run_dir=.* cannot be written: Read-only file system; choose another"):
            check_run_folder(config("max_steps=6", f"run_dir={path}"))


# ---- bad steps


def spoil(trainer: Trainer, steps: set[int], value: float = math.nan) -> None:
    loss = trainer.run.train_step.loss

    def spoiled(batch: Any) -> torch.Tensor:
        return loss(batch) * (value if trainer.run.progress.step in steps and torch.is_grad_enabled() else 1.0)

    trainer.run.train_step.loss = spoiled  # type: ignore[method-assign]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_bad_steps_are_skipped_counted_and_their_batch_is_written_down(config: MakeConfig, optimizer: str) -> None:
    lines: list[str] = []
    options = [f"optimizer={optimizer}", "max_steps=9", "log_every=3", "bad_step.action=skip", "tokens_per_step=256"]
    trainer = Trainer(config(*options), lines.append)
    spoil(trainer, {4, 5, 8})
    trainer.fit()
    assert all(parameter.isfinite().all() for parameter in trainer.run.model.parameters())
    records = [record for record in read_metrics(trainer.run.folder / "metrics.jsonl") if "train/loss" in record]
    assert [record.get("train/skipped_steps", 0) for record in records] == [0, 0, 2, 3]
    assert all(math.isfinite(record["train/loss"]) for record in records)
    said = [line for line in lines if line.startswith("skipped")]
    assert "NaN or infinite at step 4, and 1 more since the last line; 2 so far" in said[0]
    assert "at step 8; 3 so far" in said[1]
    first, second = map(json.loads, (trainer.run.folder / "bad-steps.jsonl").read_text().splitlines())
    assert (first["step"], second["step"]) == (4, 8)
    assert first["rows"] == trainer.run.rows_of(4)
    assert len(first["rows"]) == 8
    assert (first["bad_steps"], second["bad_steps"]) == (2, 1)


def test_a_run_that_left_bad_steps_out_goes_on_where_the_next_one_ends_it(config: MakeConfig) -> None:
    trainer = Trainer(config("max_steps=6", "bad_step.action=skip"), silently)
    spoil(trainer, {2})
    trainer.fit()
    assert fit(config("max_steps=12", "bad_step.action=stop")).run.progress.step == 12
    trainer = Trainer(config("max_steps=18", "bad_step.action=stop"), silently)
    spoil(trainer, {15})
    with pytest.raises(NonFiniteError, match="at step 15"):
        trainer.fit()


def test_a_bad_step_that_cannot_be_written_down_is_told(config: MakeConfig) -> None:
    lines: list[str] = []
    trainer = Trainer(config(), lines.append)
    spoil(trainer, {2})
    trainer.run.guard.record = trainer.run.folder  # as little to be written to as a file on a full disk
    with pytest.raises(NonFiniteError, match="at step 2; no parameter took that step"):
        trainer.fit()
    assert any(line.startswith("bad step   2: its rows were 4 to 7, which") for line in lines)


def test_a_spike_is_a_bad_step_and_an_ordinary_loss_is_none(config: MakeConfig) -> None:
    options = ["max_steps=12", "bad_step.spike_sigma=6", "bad_step.spike_window=4", "learning_rate=1e-4"]
    assert "train/skipped_steps" not in fit(config(*options, "bad_step.action=skip")).run.progress.summary
    shutil.rmtree(config().run_dir)
    trainer = Trainer(config(*options), silently)
    spoil(trainer, {9}, 50.0)
    with pytest.raises(NonFiniteError, match=r"the loss spiked to 2\d\d.* at step 9; no parameter took that step"):
        trainer.fit()


def test_too_many_bad_steps_in_a_row_end_the_run_and_save_nothing_over_the_good_ones(config: MakeConfig) -> None:
    options = ["max_steps=20", "bad_step.action=skip", "bad_step.most_in_a_row=3", "checkpoint.every=2", "log_every=20"]
    trainer = Trainer(config(*options), silently)
    spoil(trainer, set(range(5, 21)))
    with pytest.raises(NonFiniteError, match=r"4 steps in a row were bad|3 steps in a row were bad"):
        trainer.fit()
    # Two bad steps in a row are not too many: step 6 is saved, with the parameters of step 4.
    assert checkpoints.read_manifest(checkpoints.candidates(trainer.run.folder)[0]).step == 6


def test_whoever_may_read_the_run_may_read_its_weights(run: Callable[..., Path]) -> None:
    before = os.umask(0o027)
    try:
        folder = run("max_steps=2")
    finally:
        os.umask(before)
    files = [folder / "model.safetensors", *checkpoints.path_of(folder, 2).iterdir()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o640}


def test_no_save_takes_memory_that_the_first_step_has_not(
    config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To pin it takes longer than a save may."""
    trainer, steps = Trainer(config("max_steps=4", "checkpoint.every=2"), silently), list[int]()
    progress, host_memory = trainer.run.progress, Saver._host_memory
    monkeypatch.setattr(
        Saver, "_host_memory", lambda saver, source: (steps.append(progress.step), host_memory(saver, source))[1]
    )
    trainer.fit()
    assert set(steps) == {1}
    assert len(steps) == sum(len(group) for group in written(trainer.run.parts, {}).tensors.values())


def test_where_no_memory_can_be_pinned_saves_go_on_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu(torch.Tensor):
        is_cuda = True

    def empty(*shape: Any, pin_memory: bool, **options: Any) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory\nand a page of advice")
        return plain(*shape, **options)

    plain, lines = torch.empty, list[str]()
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **o: empty(*shape, pin_memory=pin_memory, **o))
    saver = Saver(tmp_path, CheckpointConfig(), lines.append)
    tensors = [torch.zeros(3).as_subclass(OnGpu) for _ in range(2)]
    assert [saver._host_memory(tensor).shape for tensor in tensors] == [(3,), (3,)]
    assert len(lines) == 1
    assert "no more memory can be pinned" in lines[0]
    assert "\n" not in lines[0]
