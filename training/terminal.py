"""Standard output and error: what is written there ends no run, whoever reads it and whatever he can read."""

from __future__ import annotations

import codecs
import io
import os
import select
import sys

# For streams that are not UTF-8: what our own lines have beyond ASCII, as it is typed.
TYPED = {
    **dict(zip("×–—−·²³⁶█", "x---*236#", strict=True)),
    **{"√": "sqrt ", "…": "...", "→": "->", "≤": "<=", "≥": ">=", "≠": "!="},
    **dict.fromkeys("─━═", "-"),
    **dict.fromkeys("│┃║", "|"),
    **dict.fromkeys("╭╮╰╯┌┐└┘├┤┬┴┼", "+"),
}


class Output(io.FileIO):
    """A stream that takes everything: what a closed pipe, a lost terminal or a full disk refuses is dropped."""

    def write(self, data: object) -> int:
        try:
            while (written := super().write(data)) is None:  # type: ignore[arg-type]  # a pipe that does not block
                select.select([], [self], [])
            return written
        except OSError:
            return memoryview(data).nbytes  # type: ignore[arg-type]


def secure() -> None:
    """Make standard output and error streams that raise nothing."""
    codecs.register_error("typed", _typed)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:  # closed (`>&-`): otherwise the next file that is opened would take its place
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper) and stream.fileno() == number:
            binary = io.BufferedWriter(Output(number, "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(binary, stream.encoding, "typed", line_buffering=True))


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


def say(line: str) -> None:
    print(plain(line), flush=True)


def say_error(message: str) -> None:
    """One line on standard error."""
    print(f"error: {plain(' '.join(message.split()))}", file=sys.stderr, flush=True)
