"""How a command of this folder reads its words: `--help` shows its docstring and its options; a mistake is one line."""

from __future__ import annotations

import argparse
import re
from difflib import get_close_matches
from typing import Any, NoReturn

from training.numbers import whole_number
from training.parallel.launch import Launch
from training.terminal import tell


class Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        # --tokens would be --tokens-per-second, and its number a prompt.
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """What argparse finds wrong."""
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        near = get_close_matches(unknown[1], self._option_string_actions, n=1, cutoff=0.7) if unknown else []
        hint = f" (did you mean {near[0]}?)" if near else ""
        self.refuse(f"{message}{hint}; {self.prog} --help shows what there is")

    def refuse(self, message: str) -> NoReturn:
        """End the process with exit code 2 and one line, which says what to do instead."""
        tell(message)
        raise SystemExit(2)


def whole(text: str, least: int = 0, key: str = "") -> int:
    """The type of an option: a whole number, written as train.py reads the setting `key`."""
    number = whole_number(text, key)
    if not isinstance(number, int) or not least <= number < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not possible; use a whole number from {least} to 2⁶³ − 1")
    return number


def positive(text: str) -> int:
    """The type of an option: how many of something; 1k is 1,000."""
    return whole(text, least=1)


def row_length(text: str) -> int:
    """The type of an option: tokens of a row; 1k is 1,024."""
    return whole(text, least=1, key="seq_len")


def parser_of(name: str, usage: str | None, *, of_ranks: bool = False) -> Parser:
    """The parser of `python -m scripts.NAME`.

    Args:
        usage: its docstring.
        of_ranks: whether several processes run the command together; otherwise they are refused.
    """
    if not of_ranks:
        refuse_ranks(name)
    return Parser(
        prog=f"python -m scripts.{name}", description=usage, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def refuse_ranks(name: str) -> None:
    """End with exit code 2 and one line where a launcher has started several processes of `scripts.NAME`."""
    try:
        size = Launch.here().size
    except ValueError as error:
        tell(str(error))
        raise SystemExit(2) from error
    if size > 1:
        tell(f"scripts.{name} runs in one process, not in {size}; use python -m scripts.{name}, without torchrun")
        raise SystemExit(2)
