"""Which folder a run gets, and what may lie in it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from training import jobs, run_folder
from training.config import TrainConfig
from training.run_folder import claimed, make_new, run_nearby

ROOT = Path(__file__).resolve().parents[2]
MakeConfig = Callable[..., TrainConfig]


def test_runs_of_the_same_second_have_folders_of_their_own(config: MakeConfig, tmp_path: Path) -> None:
    asked = config(f"run_dir={tmp_path / 'runs' / 'now_tiny'}")
    with claimed(asked, False) as first, claimed(asked, False) as second, claimed(asked, False) as third:
        names = [Path(each.run_dir).name for each in (first, second, third)]
        assert names == ["now_tiny", "now_tiny-2", "now_tiny-3"]
        (Path(second.run_dir) / "config.yaml").touch()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["now_tiny-2"], "what stayed empty is gone"


def test_processes_that_ask_at_once_get_different_folders(tmp_path: Path) -> None:
    program = "import sys; from pathlib import Path; from training.run_folder import make_new; "
    program += "sys.stdin.read(1); print(make_new(Path(sys.argv[1])).name)"
    command = [sys.executable, "-c", program, str(tmp_path / "now")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    processes = [subprocess.Popen(command, cwd=ROOT, text=True, **pipes) for _ in range(4)]  # type: ignore[call-overload]
    for process in processes:
        process.stdin.write("go")
        process.stdin.flush()
    assert sorted(process.communicate(timeout=60)[0].strip() for process in processes) == [
        "now",
        "now-2",
        "now-3",
        "now-4",
    ]


def test_a_folder_that_was_named_is_that_folder(config: MakeConfig, tmp_path: Path) -> None:
    asked = config(f"run_dir={tmp_path}")
    with claimed(asked, True) as same:
        assert same is asked
    assert tmp_path.exists()


def test_a_name_that_cannot_be_made_is_refused(config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written"), claimed(config(f"run_dir={tmp_path}/file/x"), False):
        pass
    assert make_new(tmp_path / "file").name == "file-2"


@pytest.mark.parametrize("name", ["train.log", "slurm-12.out"])
def test_a_log_in_the_run_folder_does_not_refuse_it(config: MakeConfig, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("what an earlier process printed")
    run_folder.check(config(f"run_dir={tmp_path}"))
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="already holds something"):
        run_folder.check(config(f"run_dir={tmp_path}"))


def test_what_this_process_prints_into_may_have_any_name(config: MakeConfig, tmp_path: Path) -> None:
    asked, stdout = config(f"run_dir={tmp_path}"), os.dup(1)
    with open(tmp_path / "printed", "w") as file:
        with pytest.raises(ValueError, match="already holds something"):
            run_folder.check(asked)
        os.dup2(file.fileno(), 1)
        try:
            run_folder.check(asked)
        finally:
            os.dup2(stdout, 1)
            os.close(stdout)


def test_a_path_that_is_no_run_may_have_meant_one(config: MakeConfig, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for number, name in enumerate(("notes", "other")):
        (runs / name / "checkpoints" / "step-00000006").mkdir(parents=True)
        (runs / name / "run.lock").touch()
        os.utime(runs / name / "run.lock", (number, number))
    checkpoints = runs / "notes" / "checkpoints"
    for path in (checkpoints, checkpoints / "step-00000006", runs / "notes" / "model.safetensors", runs / "note"):
        assert run_nearby(path) == runs / "notes"
    assert run_nearby(runs) == runs / "other", "the newest"
    assert run_nearby(tmp_path) is None
    assert run_nearby(runs / "something-else") is None
    with pytest.raises(ValueError, match=rf"choose another, or run_dir={runs / 'notes'} to go on with that"):
        run_folder.check(config(f"run_dir={checkpoints}"))


def test_a_folder_with_almost_the_name_of_a_run_is_said_to_be_a_new_one(
    composed: Callable[..., DictConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "run.lock").touch()
    lines: list[str] = []
    for more, said in (([], 1), (["max_steps=3"], 0)):
        words = [f"run_dir={tmp_path / 'nots'}", *more]
        monkeypatch.setattr(jobs, "typed", lambda words=words: words)
        lines.clear()
        jobs.settings_of_job(composed(*words), lines.append)
        assert len(lines) == said
        assert all(line.endswith(f"nots begins a new run; {tmp_path / 'notes'} is one that is there") for line in lines)
