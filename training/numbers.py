"""Whole numbers as people write them: 1_000_000, 1e6, 2B, 16k."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from decimal import Decimal
from functools import cache
from typing import Any, get_args, get_type_hints

POWERS_OF_TWO = ("seq_len", "tokens_per_step", "model.window", "model.n_positions", "model.rotary.original_seq_len")
"""Lengths of rows, and what is a multiple of them: in these k is 1,024 and 16k is 16,384; elsewhere k is 1,000."""
WRITTEN = re.compile(r"\s*([+-]?[\d_]+(?:\.\d+)?(?:[eE]\+?\d{1,2})?)([kmbgtKMBGT]?)\s*")
EXPONENTS = {"": 0, "k": 1, "m": 2, "b": 3, "g": 3, "t": 4}


def whole_number(value: Any, key: str = "") -> Any:
    """The whole number that `value` is written for; where it is none, `value` as it is."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**63:
        return int(value)
    written = WRITTEN.fullmatch(value) if isinstance(value, str) else None
    if written is None or not written[1].strip("+-_"):
        return value
    unit = 1024 if key in POWERS_OF_TWO else 1000
    number = Decimal(written[1]) * unit ** EXPONENTS[written[2].lower()]
    return int(number) if number == number.to_integral_value() else value


def whole_number_keys(schema: type, choices: dict[str, dict[str, type]]) -> frozenset[str]:
    """Dotted names of the settings that are whole numbers, in any option of a group."""
    return frozenset(_whole_number_keys(schema, choices, ""))


def _whole_number_keys(schema: type, choices: dict[str, dict[str, type]], prefix: str) -> Iterator[str]:
    hints = _hints(schema)
    for field in fields(schema):
        kind, key = hints[field.name], f"{prefix}{field.name}"
        if kind is int or (int in get_args(kind) and bool not in get_args(kind)):
            yield key
        for option in choices[key].values() if key in choices else [kind]:
            if is_dataclass(option):
                assert isinstance(option, type)
                yield from _whole_number_keys(option, {}, f"{key}.")


@cache
def _hints(schema: type) -> dict[str, Any]:
    return get_type_hints(schema)
