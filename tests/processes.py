"""Waiting for processes: for events, and for as long as a busy machine takes."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable

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
