"""What a run of the tests says of what it leaves out."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
FILES = ["tests/data/test_loader.py", "tests/kernels/test_compile_portable.py"]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is skipped on a GPU")
@pytest.mark.parametrize("processes", ["0", "2"])
@pytest.mark.parametrize(("selection", "more"), [([], ""), (["-m", "gpu"], r", \d+ others \(python -m pytest does\)")])
def test_a_run_says_in_one_line_what_it_leaves_out_and_why(processes: str, selection: list[str], more: str) -> None:
    command = [sys.executable, "-m", "pytest", "-n", processes, *selection, *FILES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("not tested: "))
    said = r"not tested: 1 gpu \(no CUDA GPU here\), 14 slow \(\.ci/run does, with pytest -m slow\)"
    assert re.fullmatch(said + more, line)
