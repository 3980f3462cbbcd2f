"""Processes, one or the ranks of a run. Waiting for them: for events, and for as long as a busy machine takes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from training.parallel.launch import local_launch

ROOT = Path(__file__).resolve().parents[1]
# For whatever should end by itself: so long only if it hangs. No test depends on how fast the machine is.
LIMIT_S = 900.0


def wait_until(event: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    """Return once `event()` is true.

    Raises:
        AssertionError: the process has ended before, or LIMIT_S have passed.
    """
    deadline = time.monotonic() + LIMIT_S
    while not event():
        assert process is None or process.poll() is None, f"ended before: {process.communicate()}"
        assert time.monotonic() < deadline, f"not within {LIMIT_S:.0f} s"
        time.sleep(0.02)


def run_unread(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a Python command whose standard output nobody reads any more."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        return subprocess.run(
            [sys.executable, *command], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=LIMIT_S, **options
        )
    finally:
        os.close(writer)


def environments(size: int) -> list[dict[str, str]]:
    """Of the ranks of a run on this machine."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    more = {"PYTHONPATH": path, "TORCH_CPP_LOG_LEVEL": "ERROR"}  # as train.py sets it before PyTorch loads
    return [{**os.environ, **world, **more} for world in local_launch(size)]


def start_ranks(command: Sequence[str], size: int) -> list[subprocess.Popen[str]]:
    """Begin a Python command on `size` ranks of this machine; all that each says comes through one pipe."""
    return [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for environment in environments(size)
    ]


def run_ranks(command: Sequence[str], size: int) -> list[str]:
    """What each rank says until it has ended, without an error."""
    ranks = start_ranks(command, size)
    said = [rank.communicate(timeout=LIMIT_S)[0] for rank in ranks]
    # The rank that is wrong says so; others say that it is gone.
    wrong = [text for text in said if "AssertionError" in text]
    assert [rank.returncode for rank in ranks] == [0] * size, "\n".join(wrong or said)
    return said


def fork_ranks(program: Sequence[str], size: int) -> None:
    """Run a program on `size` ranks without an error. They are forks of one process, which imports for all of them."""
    command = [sys.executable, "tests/forked.py", *program]
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(
        command, cwd=ROOT, env=environments(size)[0], text=True, timeout=LIMIT_S, check=False, **streams
    )
    assert done.returncode == 0, done.stdout
