"""One rank of four is killed, asked to stop, or out of memory or disk, in each phase of a run: all end, and one line
says why."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY
from processes import LIMIT_S

from training.checkpoint import folder as checkpoints

ROOT = Path(__file__).parents[2]
PHASES = ("prepare", "data", "step", "evaluation", "save")
QUICK = ("kill save 3", "stop evaluation 2", "starve step 1")
GRID = [f"{act} {phase} {rank}" for act in ("kill", "stop", "starve") for rank, phase in enumerate(PHASES[1:])]
GRID += ["kill step 0", "kill prepare 2", "stop prepare 1", "starve prepare 3", "freeze step 2"]
A_MINUTE = 60.0
"""In which a lost rank ends the run, beside what its start takes."""


@pytest.fixture(scope="module")
def ended(
    request: pytest.FixtureRequest, text_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """By case, what became of its ranks; one process runs all cases that are asked for."""
    asked = {item.callspec.params["case"] for item in request.session.items if item.path == request.path}  # type: ignore[attr-defined]
    return end(asked, text_folder, tmp_path_factory.mktemp("trouble"))


def end(asked: set[str], text: Path, folder: Path) -> dict[str, Any]:
    words = [*TINY, "data=text", f"data.path={text}", f"data.cache_dir={folder / 'cache'}", "data.val_fraction=0.3"]
    words += ["tokenizer=bytes", "batch_size=1", "tokens_per_step=256", "max_steps=6", "checkpoint.every=2"]
    words += ["eval_every=2", "parallel=fsdp"]
    cases = {}
    for case in sorted(asked):
        act, phase, rank = case.split()
        run = folder / case.replace(" ", "-")
        cases[case] = {"act": act, "phase": phase, "rank": int(rank), "words": [*words, f"run_dir={run}"]}
    (folder / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "tests/training/trouble.py", str(folder / "cases.json"), str(folder / "ended.json")]
    # As train.py sets it before PyTorch loads.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    subprocess.run(command, cwd=ROOT, env=env, check=True, timeout=LIMIT_S * len(cases))
    found = json.loads((folder / "ended.json").read_text())
    return {case: {**result, "run": folder / case.replace(" ", "-")} for case, result in found.items()}


@pytest.mark.parametrize("case", [*QUICK, *(pytest.param(case, marks=pytest.mark.slow) for case in GRID)])
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
    if phase != "save" and act != "stop" and phase != "prepare":
        assert checkpoints.candidates(run), "that of step 2"
