"""Which text is trained on and which is held out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data import disk
from data.progress import bar
from data.sources import Document, Source

STREAM_BYTES = 2**24  # of a stream: what its split is chosen by, for it is read over a network
BINS = 2**16


@dataclass(frozen=True)
class Split:
    """A document → (side, text), where a side is "train" or "val".

    A document of more than `cut_above` bytes gives its end, `fraction` of it, to validation. Others go to one side
    whole: to validation those whose hash, a number from 0 to 1, is below `threshold`. So adding documents moves no
    other, and copies of a text stay together. Where the source says the side of a document, that is its side.
    """

    fraction: float
    threshold: float
    cut_above: float = math.inf

    def __call__(self, document: Document) -> Iterator[tuple[str, str]]:
        if document.side is not None:
            yield document.side, document.text
        elif self.cut_above < math.inf and _size(document) > self.cut_above:
            yield from cut_tail(document.text, self.fraction)
        else:
            yield ("val" if _place(document) < self.threshold else "train"), document.text

    @property
    def cuts_all(self) -> bool:
        """Whether it holds out the end of every document."""
        return self.cut_above < 1


def is_fair(share: float, fraction: float) -> bool:
    """Whether a share is what was asked for, to within a factor of two."""
    return fraction / 2 <= share <= 2 * fraction


def choose_split(source: Source, val_fraction: float) -> Split:
    """How a source is split, so that `val_fraction` of its bytes are held out, to within a factor of two.

    1. Whole documents, by a hash of their text (or key), where that holds out such a share. Where documents have keys
       it is taken in any case: it is to be the same for sources that differ a little.
    2. Where sizes are very different: of documents that have more than half of what is to be held out, the end; of
       the others whole ones, in the order of their hashes, until there is enough.
    3. With so few documents that a side would be empty, or so many copies of a text that this fails, too: the end of
       each.

    What is measured is all of the text, but for a stream, of which it is the beginning.

    Raises:
        ValueError: there is no text.
    """
    by_hash = Split(val_fraction, val_fraction)
    if source.held_out is not None:
        return by_hash
    total = held = 0
    sides, keyed = set(), False
    for document, size in _measured(source):
        ((side, _),) = by_hash(document)
        sides.add(side)
        total += size
        held += size if side == "val" else 0
        keyed = document.key is not None
        if keyed and len(sides) == 2:
            return by_hash
    if not total:
        raise ValueError(f"no text in {source.where}: every document is empty")
    ends = Split(val_fraction, threshold=0, cut_above=0)
    if len(sides) < 2:
        return ends
    if is_fair(held / total, val_fraction):
        return by_hash
    cut_above = val_fraction * total / 2
    bytes_at = np.zeros(BINS)
    for document, size in _measured(source):
        if size <= cut_above:
            bytes_at[int(_place(document) * BINS)] += size
    held_below = np.append(0, np.cumsum(bytes_at))
    threshold = int(np.argmin(np.abs(held_below - val_fraction * held_below[-1])))
    held = held_below[threshold] + val_fraction * (total - held_below[-1])
    return Split(val_fraction, threshold / BINS, cut_above) if is_fair(held / total, val_fraction) else ends


def _measured(source: Source) -> Iterator[tuple[Document, int]]:
    """The documents that a split is chosen by, and their sizes in bytes."""
    total = 0
    with bar("measuring", source.size) as advance:
        for _, document in source.documents():
            size = _size(document)
            yield document, size
            advance(size)
            total += size
            if source.streamed and total >= STREAM_BYTES:
                return


def _size(document: Document) -> int:
    return len(document.text) if document.text.isascii() else len(document.text.encode())


def _place(document: Document) -> float:
    """A number from 0 to 1 that follows from a document's key or text alone."""
    return int(disk.sha256(document.text if document.key is None else document.key)[:12], 16) / 2**48


def cut_tail(text: str, fraction: float) -> Iterator[tuple[str, str]]:
    """A text without its last `fraction`, and that, from the end of a line if one is near."""
    tail = round(len(text) * fraction)
    target = len(text) - tail
    # At most twice the fraction goes to validation; a longer line than that is cut within.
    cut = text.rfind("\n", max(0, target - tail), target) + 1 or target
    for side, part in (("train", text[:cut]), ("val", text[cut:])):
        if part.strip():
            yield side, part
