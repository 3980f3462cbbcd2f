"""How a run is asked to stop: a signal, a file called STOP in its folder, or its own max_time.

A request is noted, and the loop answers where its state is whole: after the step, or between two batches of an
evaluation. A second Ctrl-C ends the process at once.

Signals often go to every process of a group: from Ctrl-C, from `timeout`, from Slurm. A compiler that dies of one fails
the run, and PyTorch (2.11, 2.13) waits for ever for a compile worker that has died of one. So the main thread blocks
these signals, which all processes that it starts inherit, and a thread of their own listens for them.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
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
        self._handlers: dict[signal.Signals, Any] = {}
        self._heard: socket.socket | None = None

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is not threading.main_thread():  # elsewhere Python allows no handlers
            return self
        # nohup, or a shell that starts us in the background, has some of them ignored, and so they stay
        numbers = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._heard, self._tell = socket.socketpair()
        self._tell.setblocking(False)
        self._wakeup_fd = signal.set_wakeup_fd(self._tell.fileno(), warn_on_full_buffer=False)
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in numbers}
        # Before they are blocked, so that they reach this thread.
        threading.Thread(target=self._listen, args=(self._heard,), daemon=True).start()
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._heard is None:
            return
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_fd)
        self._tell.close()  # the listener reads the end, and returns

    def _listen(self, heard: socket.socket) -> None:
        interrupted = False
        with heard:
            while byte := heard.recv(1):
                number = signal.Signals(byte[0])
                if number not in self._handlers:
                    continue
                if number == signal.SIGINT and interrupted:
                    os._exit(130)
                interrupted |= number == signal.SIGINT
                self._reason = self._reason or number.name

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
