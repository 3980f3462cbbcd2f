"""What a stranger's hand can do to a run folder: nothing is lost, nothing false goes on, and one line says why."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.tokenizer import Tokenizer
from scripts.checkpoint import main as checkpoint_script
from training.checkpoint import folder as checkpoints
from training.checkpoint import saver
from training.checkpoint.folder import DamagedCheckpoint
from training.config import TrainConfig
from training.errors import SaveFailed
from training.loggers import read_metrics
from training.run_folder import check as check_run_folder
from training.trainer import Trainer

MakeConfig = Callable[..., TrainConfig]
RUN = ("max_steps=4", "checkpoint.every=2", "checkpoint.keep_last=9", "eval_every=0", "bad_step.spike_window=4")


def silently(line: str) -> None:
    """Instead of print."""


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("origin") / "run"


@pytest.fixture
def run(config: MakeConfig, origin: Path, tmp_path: Path) -> Path:
    """The folder of a finished run with checkpoints at steps 2 and 4: a copy of one that is trained once."""
    if not origin.exists():
        fit(config(*RUN, f"run_dir={origin}"))
    return shutil.copytree(origin, tmp_path / "run")


def fit(config: TrainConfig) -> list[str]:
    """Train; returns the lines that it said."""
    lines: list[str] = []
    Trainer(config, lines.append).fit()
    return lines


def forge(
    path: Path,
    tensors: Callable[[str, dict[str, Tensor]], dict[str, Tensor]] = lambda file, group: group,
    state: Callable[[dict[str, Any]], None] = lambda values: None,
    **facts: Any,
) -> None:
    """Write a checkpoint once more, otherwise, with a manifest that is right."""
    manifest = checkpoints.read_manifest(path)
    texts = {name: json.loads((path / name).read_text()) for name in ("state.json", "config.json")}
    state(texts["state.json"])
    groups = {name: load_file(path / name) for name in manifest.files if name.endswith(".safetensors")}
    groups = {name: tensors(name.removesuffix(".safetensors"), group) for name, group in groups.items()}
    writers = {name: lambda file, group=group: save_file(group, str(file)) for name, group in groups.items()}
    kept = {name: getattr(manifest, name) for name in ("step", "tokens", "world_size", "val_loss", "versions")}
    checkpoints.write(path, writers, texts, {**kept, **facts})  # type: ignore[arg-type]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "run.lock"}


def check_refused(config: TrainConfig, said: str) -> None:
    """One line, and nothing in the run folder has changed."""
    before = content(Path(config.run_dir))
    with pytest.raises(ValueError, match=said) as refused:
        fit(config)
    assert "\n" not in str(refused.value)
    assert content(Path(config.run_dir)) == before


# ---- what a right manifest vouches for

FIRST = "blocks.0.mlp.down.weight"
NAN = float("nan")


def changed(file: str, name: str, change: Callable[[Tensor], Tensor | None]) -> Any:
    """A change of one tensor; None removes it."""

    def forged(this: str, group: dict[str, Tensor]) -> dict[str, Tensor]:
        if this != file:
            return group
        tensor = change(group.pop(name, torch.zeros(2)))
        return group if tensor is None else {**group, name: tensor}

    return forged


def fill(value: float) -> Callable[[Tensor], Tensor]:
    return lambda tensor: torch.full_like(tensor, value)


TENSORS: dict[str, tuple[str, str, Callable[[Tensor], Tensor | None], str]] = {
    "weights of another shape": (
        "model",
        FIRST,
        lambda t: t[:1].clone(),
        rf"model: {FIRST} is \(1, 64\), not \(32, 64\)",
    ),
    "weights of another dtype": ("model", FIRST, Tensor.double, f"model: {FIRST} is torch.float64, not torch.float32"),
    "a weight that is NaN": ("model", FIRST, fill(NAN), f"model: {FIRST} has numbers that are not finite"),
    "a weight too many": ("model", "more", fill(0), "model: more is one too many"),
    "a moment of another shape": (
        "optimizer",
        f"{FIRST}/exp_avg",
        lambda t: t.T.contiguous(),
        r"exp_avg is \(64, 32\), not",
    ),
    "a moment of another dtype": ("optimizer", f"{FIRST}/exp_avg_sq", Tensor.half, "exp_avg_sq is torch.float16, not"),
    "a moment that is infinite": (
        "optimizer",
        f"{FIRST}/exp_avg",
        fill(float("inf")),
        "exp_avg has numbers that are not",
    ),
    "a square below zero": ("optimizer", f"{FIRST}/exp_avg_sq", fill(-1), "exp_avg_sq is negative"),
    "a moment that is missing": ("optimizer", f"{FIRST}/exp_avg", lambda t: None, "optimizer: .*exp_avg is not there"),
    "a moment of no weight": ("optimizer", "nothing/exp_avg", fill(0), "optimizer: nothing/exp_avg is one too many"),
    "a moment of no name": ("optimizer", "more", fill(0), "optimizer: more is one too many"),
    "a count that is NaN": ("optimizer", f"{FIRST}/step", fill(NAN), "step has numbers that are not finite"),
    "a count that is half": ("optimizer", f"{FIRST}/step", fill(1.5), "step is 1.5, no count"),
    "a count below zero": ("optimizer", f"{FIRST}/step", fill(-1), "step is -1.0, no count"),
    "many counts": ("optimizer", f"{FIRST}/step", lambda t: torch.zeros(2), r"step is \(2,\), not \(\)"),
    "whole numbers for counts": ("optimizer", f"{FIRST}/step", Tensor.long, "step is torch.int64, not torch.float32"),
    "losses that are NaN": ("guard", "losses", fill(NAN), "guard: the last good losses are not finite"),
    "losses in two dimensions": ("guard", "losses", lambda t: t[None], r"guard: losses is \(1, 4\), not \(4,\)"),
    "no losses": ("guard", "losses", lambda t: None, "guard: KeyError: 'losses'"),
    "counters that are NaN": ("guard", "counters", fill(NAN), "guard: its counts are no counts"),
    "too few counters": ("guard", "counters", lambda t: t[:2].clone(), r"guard: counters is \(2,\), not \(6,\)"),
    "good steps below zero": ("guard", "num_good", fill(-1), "guard: its counts are no counts"),
    "a sum that is NaN": ("progress", "losses", fill(NAN), "progress: losses has numbers that are not finite"),
    "three sums": ("progress", "losses", lambda t: torch.zeros(3), r"progress: losses is \(3,\), not \(2,\)"),
    "random numbers of another kind": ("random", "torch", Tensor.float, "random: torch is torch.float32"),
    "too short a random state": ("random", "torch", lambda t: t[:9].clone(), r"random: torch is \(9,\)"),
    "a random state of zeros": ("random", "torch", fill(0), "random: RuntimeError: Invalid mt19937 state"),
    "no random state": ("random", "torch", lambda t: None, "random: torch is not there"),
}


@pytest.mark.parametrize("what", TENSORS)
def test_tensors_are_compared_with_the_run_before_any_is_loaded(config: MakeConfig, run: Path, what: str) -> None:
    file, name, change, said = TENSORS[what]
    forge(checkpoints.path_of(run, 4), changed(file, name, change))
    check_refused(
        config(*RUN), f"step-00000004 does not hold what this version saves .*{said}.*; remove it to go on from"
    )


def test_moments_that_are_missing_are_named_for_muon_too(config: MakeConfig, run: Path, tmp_path: Path) -> None:
    muon = config(*RUN, "optimizer=muon", f"run_dir={tmp_path / 'muon'}")
    fit(muon)
    path = checkpoints.path_of(tmp_path / "muon", 4)
    forge(path, changed("optimizer", f"{FIRST}/momentum_buffer", lambda tensor: None))
    check_refused(muon, "optimizer: .*momentum_buffer is not there")
    forge(checkpoints.path_of(run, 4), lambda file, group: {} if file == "optimizer" else group)
    check_refused(config(*RUN), "optimizer: nothing is there")


def values(part: str, name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change of one value in state.json; of a nested list, by its place."""

    def forged(state: dict[str, Any]) -> None:
        *path, last = name.split("/")
        target = state[part]
        for key in path:
            target = target[key]
        target[int(last) if isinstance(target, list) else last] = value

    return forged


VALUES: dict[str, tuple[str, str, Any, str]] = {
    "a step that is half": ("progress", "step", 3.5, "progress: step is 3.5, no count"),
    "the step of another checkpoint": ("progress", "step", 3, "progress: step is 3, the manifest's is 4"),
    "events that are a word": ("progress", "events", "many", "progress: events is many, no count"),
    "events below zero": ("progress", "events", -1, "progress: events is -1, no count"),
    "a summary of words": ("progress", "summary", {"train/loss": "low"}, "summary has values that are no numbers"),
    "unfinished numbers": ("progress", "unfinished", [1], "unfinished is no list of names"),
    "rows that are true": ("data", "rows", True, "data: rows is True, no count"),
    "rows of another step": ("data", "rows", 8, "data: 8 rows and 512 tokens are not those of 4 steps"),
    "a text that is a number": ("data", "text", 5, "state.json was not written by this version"),
    "a size that is a word": ("records", "metrics.jsonl", "x", "records: metrics.jsonl is x, no count"),
    "a size below zero": ("records", "metrics.jsonl", -1, "records: metrics.jsonl is -1, no count"),
    "NumPy's position beyond its words": ("random", "numpy/2", 10**9, "random: numpy's state is none"),
    "NumPy's position below zero": ("random", "numpy/2", -5, "random: numpy's state is none"),
    "too few of NumPy's words": ("random", "numpy/1", [1, 2, 3], "random: numpy's state is none"),
    "another generator of NumPy's": ("random", "numpy/0", "PCG64", "random: ValueError: set_state can only|random: "),
    "a Gaussian number that is a word": ("random", "python/2", "x", "a Gaussian number kept for later is none"),
    "too few of Python's words": ("random", "python/1", [1], "random: "),
    "Python's words beyond 32 bits": ("random", "python/1", [2**70] * 625, "random: "),
}


@pytest.mark.parametrize("what", VALUES)
def test_values_are_looked_at_before_any_is_loaded(config: MakeConfig, run: Path, what: str) -> None:
    part, name, value, said = VALUES[what]
    forge(checkpoints.path_of(run, 4), state=values(part, name, value))
    check_refused(config(*RUN), f"step-00000004.*({said})")


def test_generators_are_as_they_were_when_a_state_is_refused(config: MakeConfig, run: Path) -> None:
    forge(checkpoints.path_of(run, 4), state=values("random", "numpy/2", 10**9))
    trainer = Trainer(config(*RUN), silently)
    before, weights = torch.get_rng_state(), [p.detach().clone() for p in trainer.run.model.parameters()]
    with pytest.raises(ValueError, match="random"):
        trainer.fit()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, trainer.run.model.parameters(), weights)), "no part is loaded unless all can be"
    assert not trainer.run.optimizer.adamws[0].state


@pytest.mark.parametrize(
    "facts",
    [{"step": -3}, {"tokens": -1}, {"world_size": True}, {"val_loss": NAN}, {"val_loss": True}],
    ids=lambda facts: "=".join(map(str, *facts.items())),
)
def test_a_manifest_with_numbers_that_are_none_is_no_manifest(config: MakeConfig, run: Path, facts: Any) -> None:
    forge(checkpoints.path_of(run, 4), **facts)
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json"):
        checkpoints.verify(checkpoints.path_of(run, 4))
    shutil.rmtree(checkpoints.path_of(run, 2))
    check_refused(config(*RUN), "holds 1 checkpoints, none of them good")


def test_a_manifest_that_counts_other_tokens_is_refused(config: MakeConfig, run: Path) -> None:
    forge(checkpoints.path_of(run, 4), tokens=511)
    check_refused(config(*RUN), "data: 16 rows and 511 tokens are not those of 4 steps")


def test_an_older_checkpoint_under_a_newer_name_is_named(config: MakeConfig, run: Path) -> None:
    shutil.copytree(checkpoints.path_of(run, 2), checkpoints.path_of(run, 6))
    lines = fit(config(*RUN))
    assert lines[-1] != "damaged"
    (line,) = (line for line in lines if "damaged" in line)
    assert line.endswith("step-00000006 is damaged and not used: manifest.json is that of step 2")
    assert any(line.startswith("resume     step 4 of") for line in lines)


# ---- what cannot be read


@pytest.mark.parametrize("place", ["dangling", "loop", "file"])
def test_a_checkpoints_folder_that_cannot_be_read_is_not_an_empty_one(
    config: MakeConfig, run: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without permission, too; but tests are run as root, who may read everything."""
    (run / "model.safetensors").unlink()  # as if it had not finished
    (run / "checkpoints").rename(run.parent / "elsewhere")
    if place != "file":
        (run / "checkpoints").symlink_to("/mnt/is/not/there" if place == "dangling" else run / "checkpoints")
    else:
        (run / "checkpoints").write_text("")
    said = {
        "dangling": "No such file or directory; it leads to /mnt/is/not/there",
        "loop": "Too many levels of symbolic links; it leads to",
        "file": "Not a directory; it may hold checkpoints",
    }[place]
    with pytest.raises(ValueError, match=f"checkpoints cannot be read: {said}"):
        check_run_folder(config(*RUN))
    check_refused(config(*RUN), f"checkpoints cannot be read: {said}")
    check_refused(config(*RUN, f"resume={run.parent / 'elsewhere' / 'step-00000002'}"), "checkpoints cannot be read")
    with pytest.raises(SystemExit) as ended:
        checkpoint_script(["list", str(run)])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_checkpoints_folder_without_permission_is_not_an_empty_one(config: MakeConfig, run: Path) -> None:
    (run / "checkpoints").chmod(0)
    try:
        with pytest.raises(ValueError, match="checkpoints cannot be read: Permission denied"):
            check_run_folder(config(*RUN))
    finally:
        (run / "checkpoints").chmod(0o755)


def test_a_step_that_leads_nowhere_is_named_and_saved_again_in_its_place(config: MakeConfig, run: Path) -> None:
    step = checkpoints.path_of(run, 4)
    target = run.parent / "moved"
    step.rename(target)
    step.symlink_to(run.parent / "nowhere")
    (line,) = (line for line in fit(config(*RUN)) if "damaged" in line)
    assert "step-00000004 is damaged and not used: manifest.json: No such file" in line
    assert checkpoints.verify(step).step == 4
    assert not step.is_symlink()
    assert not [path for path in step.parent.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "model.safetensors"])
def test_a_pipe_in_the_place_of_a_file_keeps_nobody_waiting(config: MakeConfig, run: Path, name: str) -> None:
    path = checkpoints.path_of(run, 4) / name
    path.unlink()
    os.mkfifo(path)
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(checkpoints.newest(run, silently)), daemon=True)
    thread.start()
    thread.join(60)
    assert found, "it waits"
    assert found[0][0] == checkpoints.path_of(run, 2)


@pytest.mark.parametrize("name", ["run.lock", "metrics.jsonl", "samples.md", "bad-steps.jsonl"])
def test_a_pipe_in_a_run_folder_is_refused(config: MakeConfig, run: Path, name: str) -> None:
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    with pytest.raises(ValueError, match=f"holds {name}, which is no file; remove that, or choose another"):
        check_run_folder(config(*RUN))


# ---- the record is the run's own


@pytest.mark.parametrize("link", ["checkpoints", "step"])
def test_where_checkpoints_are_links_the_record_stays_the_runs(config: MakeConfig, run: Path, link: str) -> None:
    """Beside the target lies the record of somebody else."""
    other = run.parent / "other" / "run"
    other.mkdir(parents=True)
    (other / "run.lock").touch()
    (other / "metrics.jsonl").write_text('{"step": 1, "tokens": 1, "train/loss": 99.0}\n' * 100)
    place = run / "checkpoints" if link == "checkpoints" else checkpoints.path_of(run, 4)
    moved = other / place.relative_to(run)
    moved.parent.mkdir(parents=True, exist_ok=True)
    place.rename(moved)
    place.symlink_to(moved)
    lines = fit(config(*RUN, "max_steps=5"))
    shutil.rmtree(checkpoints.path_of(run, 5))
    lines += fit(config(*RUN, "max_steps=6", f"resume={checkpoints.path_of(run, 4)}"))
    assert not [line for line in lines if "is past" in line], "it is the run's own, and no branch"
    trained = [record["step"] for record in read_metrics(run / "metrics.jsonl") if "train/loss" in record]
    assert trained == [1, 2, 3, 4, 5, 6]
    assert (other / "metrics.jsonl").read_text().count("99.0") == 100
    assert checkpoints.verify(moved if link == "step" else moved / "step-00000004").step == 4


def test_a_branch_from_a_copy_takes_no_record_that_happens_to_lie_beside_it(
    config: MakeConfig, run: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "backup" / "checkpoints" / "step-00000004"
    shutil.copytree(checkpoints.path_of(run, 4), copy)
    (tmp_path / "backup" / "metrics.jsonl").write_text('{"step": 1, "tokens": 1, "train/loss": 99.0}\n' * 100)
    branch = tmp_path / "branch"
    lines = fit(config(*RUN, "max_steps=5", f"resume={copy}", f"run_dir={branch}"))
    assert [record["step"] for record in read_metrics(branch / "metrics.jsonl") if "train/loss" in record] == [5]
    size = json.loads((copy / "state.json").read_text())["records"]["metrics.jsonl"]
    (line,) = (line for line in lines if line.startswith("record"))
    assert f"metrics.jsonl has 0 of the {size:,} bytes that the checkpoint counts on: what earlier steps" in line


def test_a_branch_through_a_link_takes_the_record_of_the_run_that_it_leads_to(
    config: MakeConfig, run: Path, tmp_path: Path
) -> None:
    (tmp_path / "latest").symlink_to(checkpoints.path_of(run, 4))
    branch = tmp_path / "branch"
    fit(config(*RUN, "max_steps=5", f"resume={tmp_path / 'latest'}", f"run_dir={branch}"))
    assert [record["step"] for record in read_metrics(branch / "metrics.jsonl") if "train/loss" in record] == [
        *range(1, 6)
    ]


def test_a_record_that_is_shorter_than_the_checkpoint_counts_on_is_told(config: MakeConfig, run: Path) -> None:
    record = run / "metrics.jsonl"
    whole = record.read_bytes()
    size = json.loads((checkpoints.path_of(run, 4) / "state.json").read_text())["records"]["metrics.jsonl"]
    record.write_bytes(whole[: whole.index(b"\n") + 1])
    (line,) = (line for line in fit(config(*RUN)) if line.startswith("record"))
    assert line.startswith(f"record     {record} has {whole.index(10) + 1:,} of the {size:,} bytes")


def test_weights_that_are_refused_leave_the_record_of_the_folder(config: MakeConfig, run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "run.lock").touch()
    (other / "metrics.jsonl").write_text('{"step": 0, "tokens": 0}\n')
    wide = config("model.dim=64", f"init_from={run / 'model.safetensors'}", f"run_dir={other}")
    check_refused(wide, "does not fit")


# ---- a full disk


def test_room_is_looked_for_where_the_checkpoints_lie(config: MakeConfig, small_disk: Path, tmp_path: Path) -> None:
    """And the weights are written to the run folder, on another disk."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.lock").touch()
    (small_disk / "checkpoints").mkdir()
    (folder / "checkpoints").symlink_to(small_disk / "checkpoints")
    fit(config(*RUN))
    assert len(checkpoints.candidates(folder)) == 2
    assert (folder / "model.safetensors").is_file()
    (small_disk / "filler").write_bytes(b"\0" * (shutil.disk_usage(small_disk).free - 50_000))
    with pytest.raises(SaveFailed, match=r"disk full: .* MB needed, 0\.[01] MB free"):
        fit(config(*RUN, "max_steps=5"))
    assert [path.name for path in (small_disk / "checkpoints").iterdir()].count("step-00000005") == 0
    assert not list(folder.rglob(".*"))


def test_a_file_that_the_disk_took_half_of_without_a_word_makes_no_checkpoint(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(tensors: dict[str, Tensor], file: str) -> None:
        save_file(tensors, file)
        os.truncate(file, os.stat(file).st_size // 2)

    monkeypatch.setattr(saver, "save_file", half)
    with pytest.raises(SaveFailed, match="step-00000004 was not written, older ones are untouched: disk full"):
        fit(config(*RUN))
    assert not list((Path(config().run_dir) / "checkpoints").iterdir())


def test_what_does_not_read_back_as_it_was_written_is_removed(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoints.write

    def spoiled(folder: Path, *rest: Any) -> Any:
        manifest = write(folder, *rest)
        if manifest.step == 4:
            with open(folder / "model.safetensors", "r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"!")
        return manifest

    monkeypatch.setattr(checkpoints, "write", spoiled)
    with pytest.raises(
        SaveFailed, match=r"did not read back as written and is removed, older ones are untouched: model"
    ):
        fit(config(*RUN))
    (left,) = checkpoints.candidates(Path(config().run_dir))
    assert checkpoints.verify(left).step == 2


def test_what_killed_processes_were_writing_is_swept_wherever_it_lies(config: MakeConfig, run: Path) -> None:
    for name in (".config.yaml.part-123", ".tokenizer.json.part-4567"):
        (run / name).write_text("half")
    (run / ".model.safetensors.part-123").mkdir()
    (run / ".mine").write_text("mine")
    fit(config(*RUN))
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == [".mine"]


# ---- a run is known by what it is


@pytest.mark.parametrize("setting", ["learning_rate=1e-4", "log_every=3", "schedule.min_ratio=0.5"])
def test_a_finished_run_takes_no_settings_that_it_was_not_trained_with(
    config: MakeConfig, run: Path, setting: str
) -> None:
    said = f"{setting.partition('=')[0]}=.* comes too late for .*step-00000004, the last step of the run, which had"
    with pytest.raises(ValueError, match=said):
        check_run_folder(config(*RUN, setting))
    check_refused(config(*RUN, setting), said)
    lines = fit(config(*RUN, setting, "max_steps=6"))
    assert any(line.startswith(f"           changed: {setting.partition('=')[0]} ") for line in lines)
    assert [r["step"] for r in read_metrics(run / "metrics.jsonl") if "train/loss" in r][-1] == 6
    assert checkpoints.read_manifest(checkpoints.candidates(run)[0]).step == 6


def test_a_finished_run_that_is_started_again_as_it_was_says_so(config: MakeConfig, run: Path, tmp_path: Path) -> None:
    before = content(run)
    fit(config(*RUN, f"data.cache_dir={tmp_path / 'cache'}", "max_time=60"))
    now = content(run)
    assert [path for path in before if now[path] != before[path]] == [str(run / "config.yaml")]


def test_the_tokenizer_is_known_by_what_it_is_wherever_its_file_lies(
    config: MakeConfig, run: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved.json"
    shutil.copyfile(run / "tokenizer.json", moved)
    for steps, path in ((5, run / "tokenizer.json"), (6, moved)):
        lines = fit(config(*RUN, f"max_steps={steps}", "tokenizer=file", f"tokenizer.path={path}"))
        assert any(line.startswith(f"resume     step {steps - 1} of") for line in lines)
    lines = fit(config(*RUN, "max_steps=7"))  # learned from the text again
    assert any(line.startswith("resume     step 6 of") for line in lines)


def test_another_tokenizer_is_refused_before_the_text_is_read(config: MakeConfig, run: Path, tmp_path: Path) -> None:
    remedy = f"use tokenizer=file tokenizer.path={run / 'tokenizer.json'}"
    with pytest.raises(ValueError, match=f"tokenizer=bytes does not fit .*another tokenizer; {remedy}"):
        check_run_folder(config(*RUN, "max_steps=5", "tokenizer=bytes"))
    learned = config(*RUN, "max_steps=5")
    learned.tokenizer.vocab_size = 290
    with pytest.raises(ValueError, match=r"tokenizer\.vocab_size=290 does not fit"):
        check_run_folder(learned)
    mine = tmp_path / "mine.json"
    shutil.copyfile(run / "tokenizer.json", mine)
    options = [*RUN, "tokenizer=file", f"tokenizer.path={mine}"]
    fit(config(*options, "max_steps=5"))
    Tokenizer.train(["other text, other tokens"] * 9, 280).save(mine)
    with pytest.raises(ValueError, match=f"tokenizer.path={mine} does not fit .*another tokenizer; {remedy}"):
        check_run_folder(config(*options, "max_steps=6"))
    mine.unlink()
    with pytest.raises(ValueError, match=r"mine\.json is no file"):
        check_run_folder(config(*options, "max_steps=6"))
