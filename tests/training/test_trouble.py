"""One rank of four is killed, asked to stop, out of time, memory or disk, in each phase of a run: all end, and one line
says why."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from processes import LIMIT_S

from tests.training.conftest import TINY
from training.checkpoint import folder as checkpoints
from training.loggers import read_metrics

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PHASES = ("prepare", "data", "step", "evaluation", "save")
GRID = [f"{act} {phase} {rank}" for act in ("kill", "stop", "starve", "time") for rank, phase in enumerate(PHASES[1:])]
GRID += ["kill step 0", "kill prepare 2", "stop prepare 1", "starve prepare 3", "time prepare 0", "freeze step 2"]
A_MINUTE = 60.0
"""In which a lost rank ends the run, beside what its start takes."""


@pytest.fixture(scope="module")
def ended(
    request: pytest.FixtureRequest, text_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """By case, what became of its ranks; one process runs all cases that are asked for. A run that was killed in a save
    goes on afterwards, and there is one that nothing happens to."""
    tests = [item for item in request.session.items if item.path == request.path]
    asked = {item.callspec.params["case"] for item in tests if hasattr(item, "callspec")}
    folder = tmp_path_factory.mktemp("trouble")
    words = words_of(text_folder, folder)
    cases = {}
    for case in sorted(asked):
        act, phase, rank = case.split()
        at = 1 if phase in ("prepare", "save") else 3
        cases[case] = trouble(act, phase, at, int(rank), words, folder / case.replace(" ", "-"))
    if "kill save 3" in asked:
        cases["resumed"] = trouble("none", "save", 1, 0, words, folder / "kill-save-3")
        cases["undisturbed"] = trouble("none", "save", 1, 0, words, folder / "undisturbed")
    return end(cases, folder)


def words_of(text: Path, folder: Path) -> list[str]:
    words = [*TINY, "data=text", f"data.path={text}", f"data.cache_dir={folder / 'cache'}", "data.val_fraction=0.3"]
    words += ["tokenizer=bytes", "batch_size=1", "tokens_per_step=256", "max_steps=6", "checkpoint.every=2"]
    return [*words, "eval_every=2", "parallel=fsdp", "max_time=50"]


def trouble(act: str, phase: str, at: int, rank: int, words: list[str], run: Path) -> dict[str, Any]:
    return {"act": act, "phase": phase, "at": at, "rank": rank, "words": [*words, f"run_dir={run}"], "run": str(run)}


def end(cases: dict[str, dict[str, Any]], folder: Path) -> dict[str, Any]:
    (folder / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "tests/training/trouble.py", str(folder / "cases.json"), str(folder / "ended.json")]
    # As train.py sets it before PyTorch loads.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    subprocess.run(command, cwd=ROOT, env=env, check=True, timeout=LIMIT_S * len(cases))
    found = json.loads((folder / "ended.json").read_text())
    return {case: {**result, "run": Path(cases[case]["run"])} for case, result in found.items()}


def test_a_run_of_which_a_rank_was_killed_in_a_save_goes_on_and_nothing_is_lost(ended: dict[str, Any]) -> None:
    check_equal(ended["resumed"], ended["undisturbed"])


def check_equal(resumed: dict[str, Any], undisturbed: dict[str, Any]) -> None:
    """The same weights, moments and losses, to the last bit; and no half checkpoint is left."""
    assert resumed["codes"] == undisturbed["codes"] == [0] * 4, resumed["said"]
    last = [checkpoints.candidates(each["run"])[0] for each in (resumed, undisturbed)]
    for name in checkpoints.verify(last[1]).files:
        if name.endswith(".safetensors"):
            assert (last[0] / name).read_bytes() == (last[1] / name).read_bytes(), name
    weights = [(each["run"] / "model.safetensors").read_bytes() for each in (resumed, undisturbed)]
    assert weights[0] == weights[1]
    assert not list(checkpoints.checkpoints_of(resumed["run"]).glob(".*"))
    losses = [
        [
            (line["step"], line["train/loss"])
            for line in read_metrics(each["run"] / "metrics.jsonl")
            if "train/loss" in line
        ]
        for each in (resumed, undisturbed)
    ]
    assert losses[0] == losses[1]


def test_twenty_kills_of_any_rank_in_any_phase_lose_nothing(text_folder: Path, tmp_path: Path) -> None:
    chance, words = random.Random(0), [*words_of(text_folder, tmp_path), "max_steps=120"]
    cases = {
        f"kill {number}": trouble(
            "kill", chance.choice(PHASES[1:]), chance.randrange(1, 7), chance.randrange(4), words, tmp_path / "killed"
        )
        for number in range(20)
    }
    cases["resumed"] = trouble("none", "save", 1, 0, words, tmp_path / "killed")
    cases["undisturbed"] = trouble("none", "save", 1, 0, words, tmp_path / "undisturbed")
    found = end(cases, tmp_path)
    kills = [found[case] for case in cases if case.startswith("kill ")]
    other = [each for each in kills if sorted(each["codes"], key=abs) != [-9, 75, 75, 75]]
    assert not other, [(each["codes"], each["said"]) for each in other]
    check_equal(found["resumed"], found["undisturbed"])


@pytest.mark.parametrize("case", GRID)
def test_no_rank_is_left_waiting(ended: dict[str, Any], case: str) -> None:
    act, phase, rank = case.split()
    codes, said, run = ended[case]["codes"], ended[case]["said"], ended[case]["run"]
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert None not in codes, said
    assert "Traceback" not in said, said
    if act in ("kill", "freeze"):
        assert codes.pop(int(rank)) == -9
        assert codes == [75] * 3, said
        assert len(errors) == 1, said
        assert f"rank {rank}" in errors[0]
        assert "is lost" in errors[0]
        assert "the same command goes on" in errors[0]
    elif act == "stop":
        assert codes == [75] * 4, said
        if phase != "prepare":  # before there is anything to save
            assert errors == [f"error: interrupted by SIGTERM; saved {checkpoints.candidates(run)[0]}"]
    elif act == "time":  # before the first step there is something to save, too: what was prepared
        assert codes == [75] * 4, said
        assert errors == [f"error: interrupted by max_time; saved {checkpoints.candidates(run)[0]}"]
    elif phase == "save":
        assert codes == [0] * 4, said
        assert not errors
        assert said.count(f"was not written, older ones are untouched: rank {rank}: disk full") == 1 or rank == "0"
    else:
        assert codes == [3] * 4, said
        assert len(errors) == 1, said
        assert ("rank" not in errors[0]) if rank == "0" else f"rank {rank}" in errors[0]
        assert "out of host memory" in errors[0]
    assert ended[case]["seconds"] < 4 * A_MINUTE
    for path in checkpoints.candidates(run):
        checkpoints.verify(path)
