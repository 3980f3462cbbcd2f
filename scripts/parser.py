"""How a command of this folder reads its words: `--help` shows its docstring and its options; a mistake is one line."""

from __future__ import annotations

import argparse
from typing import NoReturn

from training.terminal import say_error


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """What argparse finds wrong."""
        self.refuse(f"{message}; {self.prog} --help shows what there is")

    def refuse(self, message: str) -> NoReturn:
        """End the process with exit code 2 and one line, which says what to do instead."""
        say_error(message)
        raise SystemExit(2)


def parser_of(name: str, usage: str | None) -> Parser:
    """The parser of `python -m scripts.NAME`.

    Args:
        usage: its docstring.
    """
    return Parser(
        prog=f"python -m scripts.{name}", description=usage, formatter_class=argparse.RawDescriptionHelpFormatter
    )
