"""Standard output and error: what is written there ends no run, whoever reads it and whatever he can read."""

from __future__ import annotations

import codecs
import io
import os
import select
import socket
import sys
import textwrap
import time

from data.live import LINE, columns_of

from .parallel.launch import speaks

LAUNCHER_SECONDS = 4.0
"""In which torchrun or Slurm ends all processes of which one has failed."""

# For streams that are not UTF-8: what our own lines have beyond ASCII, as it is typed.
TYPED = {
    **dict(zip("×–—−·²³⁶█━", "x---*236#=", strict=True)),
    **{"√": "sqrt ", "…": "...", "→": "->", "≤": "<=", "≥": ">=", "≠": "!="},
    **dict.fromkeys("─═", "-"),
    **dict.fromkeys("│┃║", "|"),
    **dict.fromkeys("╭╮╰╯┌┐└┘├┤┬┴┼", "+"),
}


class Output(io.FileIO):
    """A stream that takes everything: what a closed pipe, a lost terminal or a full disk refuses is dropped.

    On a terminal it prints above the live line.
    """

    def write(self, data: object) -> int:
        content = bytes(data)  # type: ignore[call-overload]
        return LINE.above(content, self._write) if self.isatty() else self._write(content)

    def _write(self, data: bytes) -> int:
        try:
            while (written := super().write(data)) is None:  # a pipe that does not block
                select.select([], [self], [])
            return written
        except OSError:
            return len(data)


def secure() -> None:
    """Make standard output and error streams that raise nothing, and let the live line be drawn."""
    codecs.register_error("typed", _typed)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:  # closed (`>&-`): otherwise the next file that is opened would take its place
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper) and stream.fileno() == number:
            binary = io.BufferedWriter(Output(number, "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(binary, stream.encoding, "typed", line_buffering=True))
    if speaks():
        LINE.attach()


def use_utf8() -> None:
    """Where the locale is not UTF-8, begin again in Python's UTF-8 mode: files and their names are UTF-8 everywhere.

    What is printed keeps the locale's encoding.
    """
    if codecs.lookup(sys.getfilesystemencoding()).name == "utf-8" or os.environ.get("PYTHONUTF8") == "1":
        return
    os.environ["PYTHONUTF8"] = "1"
    if sys.stdout is not None:
        os.environ.setdefault("PYTHONIOENCODING", sys.stdout.encoding)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _typed(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return "".join(TYPED.get(char, "?") for char in error.object[error.start : error.end]), error.end


def plain(text: str) -> str:
    """`text` without what a terminal would obey: escape codes in a file's name or a value are shown, not sent."""
    return "".join(
        char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode("ascii") for char in text
    )


INDENT = 11
"""Columns before what a line says, behind the word that names it."""


def columns() -> int | None:
    """Width of the terminal that standard output is; None where it is none."""
    return columns_of(sys.stdout) if sys.stdout.isatty() else None


def say(line: str) -> None:
    """One line; a terminal that is narrower gets it in several, broken between words. Of several ranks the first says
    it."""
    if not speaks():
        return
    line, width = plain(line), columns()
    print(line if width is None else folded(line, width), flush=True)


def folded(text: str, columns: int) -> str:
    """Lines of so many columns at most, but for a word that is longer: a path can be copied as a whole."""
    fold = textwrap.TextWrapper(
        columns,
        subsequent_indent=" " * INDENT,
        break_long_words=False,
        break_on_hyphens=False,
        drop_whitespace=True,
        replace_whitespace=False,
    )
    return "\n".join(line if len(line) <= columns else fold.fill(line) for line in text.split("\n"))


def say_error(message: str) -> None:
    """One line on standard error."""
    line = f"error: {plain(' '.join(message.split()))}"
    print(folded(line, columns_of(sys.stderr)) if sys.stderr.isatty() else line, file=sys.stderr, flush=True)


def tell(message: str) -> None:
    """One line for an error. What is wrong on every rank the first one says: the launcher ends the others meanwhile."""
    if not speaks():
        time.sleep(LAUNCHER_SECONDS)
        message = f"rank {os.environ['RANK']} on {socket.gethostname()}: {message}"
    say_error(message)
