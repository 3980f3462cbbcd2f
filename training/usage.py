"""What `--help` prints: how a program is called, the choices, and the settings with their comments."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from textwrap import wrap

from .mistakes import CONFIGS

COLUMNS = 120
Row = tuple[str, str, str]
"""Name, default, meaning."""


def usage(how: str) -> str:
    """The page of a program that takes the settings of train.py; they are read from configs/train.yaml.

    Args:
        how: its docstring.
    """
    defaults, settings = (CONFIGS / "train.yaml").read_text("utf-8").partition("\nhydra:")[0].split("\n\n", 1)
    return "\n".join(
        [
            how.strip(),
            "",
            *_table([("Choices", "default", "what there is"), *_choices(defaults)]),
            "",
            *_table([("Settings", "CPU | GPU", "what it is"), *_settings(settings)]),
            "",
            "A choice has settings of its own: configs/CHOICE/NAME.yaml. Flags: --hydra-help.",
        ]
    )


def _choices(text: str) -> Iterator[Row]:
    for line in text.splitlines():
        if found := re.fullmatch(r"  - (\w+): (.+?) # (.+)", line):
            yield found[1], _value(found[2]), found[3]


def _settings(text: str) -> Iterator[Row]:
    section = ""
    for line in text.splitlines():
        found = re.fullmatch(r"( *)(\w+):(?: ([^#]+?))?(?: # (.+))?", line)
        if not found:
            continue
        indent, name, value, comment = found.groups()
        if value is None:
            section = f"{name}."
        else:
            yield f"{section if indent else ''}{name}", _value(value), comment or ""


def _value(text: str) -> str:
    """A default as a person reads it; nothing where it is computed."""
    text = re.sub(r"\$\{cpu_or_gpu:([^,]+),([^}]+)\}", r"\1 | \2", text)
    text = re.sub(r"^\$\{([\w.]+)\}$", r"as \1", text)
    return "" if "${" in text else text


def _table(rows: Iterable[Row]) -> Iterator[str]:
    for number, (name, value, said) in enumerate(rows):
        first = f"{'  ' if number else ''}{name}"
        yield from wrap(
            said, COLUMNS, initial_indent=f"{first:25} {value:20} ", subsequent_indent=" " * 47, break_on_hyphens=False
        )
