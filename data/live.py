"""The last line of a terminal: what is being done, and how far it has come. What is printed scrolls above it.

A thread draws it, four times a second, from values that the work leaves behind: the work never waits for it, and
nothing asks a device. Nothing is drawn where standard output is no terminal, or before `LINE.attach`. The cursor is
never hidden, so that a process that is killed leaves a whole terminal.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

DRAW_SECONDS = 0.25
ERASE = b"\r\x1b[2K"

Draw = Callable[[int], "Text"]
"""The line, in at most so many columns."""


class LiveLine:
    """The line of this process: that of the last `show` which no `hide` has ended."""

    def __init__(self) -> None:
        self._shown: list[Draw] = []
        self._doing: Draw | None = None
        self._console: Console | None = None
        self._forget()
        atexit.register(self.end)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)  # another process's line, and maybe a lock that it holds

    def _forget(self) -> None:
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None
        self._fd: int | None = None
        self._there = b""  # what stands in the terminal
        self._is_mid_line = False  # what was printed last did not end its line

    def attach(self) -> None:
        """Draw from now on, if standard output is a terminal. Whoever writes there does so by `above`."""
        if sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown"):
            self._fd = sys.stdout.fileno()

    def doing(self, what: str) -> None:
        """Say what is being done, and for how long already, while nothing else is shown."""
        if self._fd is None:
            return
        from rich.text import Text  # here: nobody else waits for its import

        began = time.monotonic()

        def draw(columns: int) -> Text:
            seconds = time.monotonic() - began
            return Text(f"{what} …" + (f" {seconds:.0f} s" if seconds >= 2 else ""), style="dim")

        with self._lock:
            self._doing = draw
            self._begin()

    def show(self, draw: Draw) -> None:
        """Draw this instead of what was shown before, until `hide(draw)`."""
        with self._lock:
            self._shown.append(draw)
            self._begin()

    def hide(self, draw: Draw) -> None:
        with self._lock:
            if draw in self._shown:
                self._shown.remove(draw)
            self.draw()

    def end(self) -> None:
        """Take everything away: at the end of a run, and of the process, however that ends."""
        if not self._lock.acquire(timeout=1.0):  # a process that ends at once waits for nobody
            return
        self._shown.clear()
        self._doing = None
        self.draw()
        self._lock.release()

    def above(self, data: bytes, write: Callable[[bytes], int]) -> int:
        """Print above the line: `write(data)`, with the line gone meanwhile."""
        if self._fd is None:
            return write(data)
        with self._lock:
            line, self._there = self._there, b""
            if line:
                self._put(ERASE)
            written = write(data)
            self._is_mid_line = data[-1:] != b"\n"
            if line and not self._is_mid_line:
                self._put(line)
                self._there = line
            return written

    def draw(self) -> None:
        """Bring the terminal up to date."""
        if self._fd is None:
            return
        with self._lock:
            draw = self._shown[-1] if self._shown else self._doing
            line = b"" if self._is_mid_line or draw is None else self._styled(draw)
            if line != self._there:
                self._put((b"\r" + line + b"\x1b[K") if line else ERASE)
                self._there = line

    def _begin(self) -> None:
        if self._fd is not None and self._thread is None:
            self._thread = threading.Thread(target=self._draw_on, daemon=True)
            self._thread.start()
        self.draw()

    def _draw_on(self) -> None:
        while self._fd is not None:
            time.sleep(DRAW_SECONDS)
            self.draw()

    def _styled(self, draw: Draw) -> bytes:
        from rich.console import Console

        if self._console is None:
            self._console = Console(file=sys.stdout, highlight=False)
        columns = columns_of(sys.stdout) - 1  # in the last column a terminal may begin the next line
        with self._console.capture() as captured:
            self._console.print(draw(columns), end="", no_wrap=True, overflow="crop", width=columns)
        return captured.get().encode(sys.stdout.encoding or "utf-8", sys.stdout.errors or "replace")

    def _put(self, data: bytes) -> None:
        assert self._fd is not None
        with suppress(OSError):  # the terminal is gone
            os.write(self._fd, data)


def columns_of(stream: object) -> int:
    """Width of a terminal; 80 where it does not tell."""
    with suppress(OSError, AttributeError, ValueError):
        return os.get_terminal_size(stream.fileno()).columns or 80  # type: ignore[attr-defined]
    return 80


LINE = LiveLine()
