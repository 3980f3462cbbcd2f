"""How a setting is refused: its name, its value, what to do instead."""

from __future__ import annotations

from typing import Any


def require(ok: bool, name: str, value: Any, remedy: str) -> None:
    """Raises ValueError, one line, where `ok` is false."""
    if not ok:
        raise ValueError(f"{name}={value} is not possible; {remedy}")
