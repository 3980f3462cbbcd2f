"""Which text is trained on and which is held out."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from data import disk
from data.sources import Document, Source

Split = Callable[[Document], Iterator[tuple[str, str]]]
"""A document → (side, text), where a side is "train" or "val"."""


def choose_split(source: Source, val_fraction: float) -> Split:
    """How a source is split: whole documents go to one side by a hash of their text (or key), so that adding documents
    moves no other, and copies of a text stay together.

    With so few documents that a side would be empty, the last `val_fraction` of each document is held out instead.

    Raises:
        ValueError: there is no text.
    """
    sides, documents = set(), 0
    for _, document in source.documents():
        sides.add(_side(document, val_fraction))
        documents += 1
        if len(sides) == 2:
            return lambda document: iter([(_side(document, val_fraction), document.text)])
    if not documents:
        raise ValueError(f"no text in {source.where}: every document is empty")
    return lambda document: cut_tail(document.text, val_fraction)


def cuts_tails(split: Split) -> bool:
    """Whether a split holds out the ends of documents."""
    return len(list(split(Document("", "a line\n" * 100)))) == 2


def _side(document: Document, val_fraction: float) -> str:
    key = document.text if document.key is None else document.key
    number = int(disk.sha256(key)[:12], 16) / 2**48
    return "val" if number < val_fraction else "train"


def cut_tail(text: str, fraction: float) -> Iterator[tuple[str, str]]:
    """A text without its last `fraction`, and that, from the end of a line if one is near."""
    tail = round(len(text) * fraction)
    target = len(text) - tail
    # At most twice the fraction goes to validation; a longer line than that is cut within.
    cut = text.rfind("\n", max(0, target - tail), target) + 1 or target
    for side, part in (("train", text[:cut]), ("val", text[cut:])):
        if part.strip():
            yield side, part
