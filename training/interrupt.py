"""How a run is asked to stop: a signal, a file called STOP in its folder, or its own max_time.

A request is noted, and the loop answers where its state is whole: after the step, or between two batches of an
evaluation. A second Ctrl-C is not ours to handle: the system ends the process at once.
"""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from .errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
POLL_SECONDS = 1.0  # looking for STOP on a network file system takes up to a millisecond
STARTED = time.monotonic()  # of the process, nearly: imports are outside, data and compilation are inside


class Interrupt:
    """`with Interrupt(...) as interrupt:` notes requests to stop; `interrupt.reason()` is the first, or "".

    Args:
        folder: of the run, where a file named STOP ends it. The file is removed, so that a resumed run goes on.
        max_minutes: since this process began; None: no limit.
    """

    def __init__(self, folder: Path, max_minutes: float | None) -> None:
        self.stop_file = folder / "STOP"
        self.deadline = None if max_minutes is None else STARTED + 60 * max_minutes
        self._reason = ""
        self._next_look = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:  # nohup, or a shell that started us in the background
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._reason = self._reason or signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # the next one also ends a call that never returns to Python

    def reason(self) -> str:
        """Why the run shall stop; "" while it shall not."""
        now = time.monotonic()
        if not self._reason and self.deadline is not None and now >= self.deadline:
            self._reason = "max_time"
        if not self._reason and now >= self._next_look:
            self._next_look = now + POLL_SECONDS
            if self.stop_file.exists():
                self.stop_file.unlink(missing_ok=True)
                self._reason = "the STOP file"
        return self._reason

    def end(self, saved: Path) -> Interrupted:
        """What to raise once `saved` is written."""
        code = 130 if self._reason == "SIGINT" else Interrupted.code
        return Interrupted(f"interrupted by {self._reason}; saved {saved}", code)
