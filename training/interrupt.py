"""How a run is asked to stop: a signal, a file called STOP in its folder, or its own max_time.

A request is noted, and the loop answers where its state is whole: after the step, or between two batches of an
evaluation. A second Ctrl-C ends the process at once. Before there is anything to save (imports, preparation of the
data, construction of the model) a signal ends the process at once, with the same exit code.

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
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from data.live import LINE

from .errors import Interrupted
from .parallel.launch import speaks

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
POLL_SECONDS = 1.0  # looking for STOP on a network file system takes up to a millisecond
STARTED = time.monotonic()  # of the process, nearly: imports are outside, data and compilation are inside


def listen(hear: Callable[[signal.Signals], None]) -> Callable[[], None]:
    """Call `hear` for each of SIGNALS that arrives, in a thread of its own, whatever the main thread is at.

    Returns:
        What ends that: afterwards signals are again what they were before.
    """
    if threading.current_thread() is not threading.main_thread():  # elsewhere Python allows no handlers
        return lambda: None
    # nohup, or a shell that starts us in the background, has some of them ignored, and so they stay
    numbers = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    heard, tell = socket.socketpair()
    tell.setblocking(False)
    tell_fd = tell.detach()  # open until `end`, whether or not somebody keeps that
    wakeup_fd = signal.set_wakeup_fd(tell_fd, warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, lambda *_: None) for number in numbers}

    def work() -> None:
        with heard:
            while byte := heard.recv(1):
                if byte[0] in handlers:
                    hear(signal.Signals(byte[0]))

    # Before they are blocked, so that they reach this thread.
    threading.Thread(target=work, daemon=True).start()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)

    def end() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup_fd)
        os.close(tell_fd)  # the thread reads the end, and returns

    return end


def leave(number: signal.Signals) -> NoReturn:
    """End the process at once: there is nothing to save. An exception would be lost in some import or callback."""
    LINE.end()
    with suppress(OSError, ValueError):  # nobody may read it
        if speaks():
            os.write(2, f"error: interrupted by {number.name} before training began\n".encode())
    os._exit(code_of(number.name))


def keep_exit_code() -> None:
    """For the last second of a process, in which Python gives signals back their power to kill it."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def code_of(reason: str) -> int:
    return 130 if reason == "SIGINT" else Interrupted.code


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
        self._interrupted = False
        self._next_look = 0.0

    def __enter__(self) -> Interrupt:
        self._end = listen(self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    def _note(self, number: signal.Signals) -> None:
        if number == signal.SIGINT and self._interrupted:
            LINE.end()
            os._exit(130)
        self._interrupted |= number == signal.SIGINT
        self._reason = self._reason or number.name

    def reason(self) -> str:
        """Why the run shall stop; "" while it shall not."""
        now = time.monotonic()
        if not self._reason and self.deadline is not None and now >= self.deadline:
            self._reason = "max_time"
        if not self._reason and now >= self._next_look:
            self._next_look = now + POLL_SECONDS
            with suppress(OSError):  # a file system that does not answer now is no reason to end
                if self.stop_file.exists():
                    self._reason = "the STOP file"
                    self.stop_file.unlink(missing_ok=True)
        return self._reason

    def end(self, saved: Path | None, reason: str = "") -> Interrupted:
        """What to raise once `saved` is written; `reason` is another process's, where that was asked."""
        reason = reason or self._reason
        kept = "saved nothing, as checkpoint.save=false says" if saved is None else f"saved {saved}"
        return Interrupted(f"interrupted by {reason}; {kept}", code_of(reason))
