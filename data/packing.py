"""Rows of a fixed length from a token stream, where each row's documents lie, and the order rows are visited in."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from data.corpus import TokenStream


class Row(NamedTuple):
    """One training sequence. Token t sees the keys [starts[t], t] and has position t - starts[t] in its document.

    tokens, targets: (S,) int64; targets[t] is the token after tokens[t].
    starts: (S,) int32, nondecreasing, the index in the row of the first token of t's document (0 for a document that
        began in an earlier row); None where rows are read as one continuous text.
    """

    tokens: np.ndarray
    targets: np.ndarray
    starts: np.ndarray | None


class PackedRows:
    """A stream cut into rows of `seq_len`: row i has tokens [i·S, i·S + S) and, one further, their targets.

    Every token is an input once, save the tail that fills no row.

    Raises:
        ValueError: the stream is too short for one row.
    """

    def __init__(self, stream: TokenStream, seq_len: int, document_mask: bool) -> None:
        self.stream, self.seq_len, self.document_mask = stream, seq_len, document_mask
        if len(self) < 1:
            raise ValueError(
                f"seq_len={seq_len} needs at least {seq_len + 1} tokens and a split of the corpus has only "
                f"{len(stream.tokens)}: lower seq_len, add text, or change data.val_fraction"
            )

    def __len__(self) -> int:
        return (len(self.stream.tokens) - 1) // self.seq_len

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        begin, end = index * self.seq_len, (index + 1) * self.seq_len
        tokens = self.stream.tokens[begin : end + 1].astype(np.int64)
        return Row(tokens[:-1], tokens[1:], self._starts(begin, end) if self.document_mask else None)

    def _starts(self, begin: int, end: int) -> np.ndarray:
        first, last = self._documents(begin, end)
        starts_D = np.maximum(self.stream.document_starts[first:last] - begin, 0)
        lengths_D = np.diff(starts_D, append=end - begin)
        return np.repeat(starts_D.astype(np.int32), lengths_D)

    def _documents(self, begin: int | np.ndarray, end: int | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First and one past the last document that has tokens in [begin, end)."""
        starts = self.stream.document_starts
        return np.searchsorted(starts, begin, side="right") - 1, np.searchsorted(starts, end, side="left")

    @property
    def max_documents(self) -> int:
        """The most documents that touch one row, over all rows: the fixed size a row's `cu_seqlens` needs, less one."""
        if not self.document_mask:
            return 1
        begin = np.arange(len(self)) * self.seq_len
        first, last = self._documents(begin, begin + self.seq_len)
        return int((last - first).max())


@lru_cache(maxsize=4)
def row_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """(n,) int64, read-only: the order of an epoch's n rows, a pure function of (seed, epoch, n).

    Sorts raw Philox output, which NumPy promises never to change, where it may change `permutation`.
    """
    keys = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(n)
    order = np.argsort(keys, kind="stable")
    order.flags.writeable = False
    return order


def row_index(seed: int, n: int, position: int) -> int:
    """The row at a global position: position = epoch · n + place in that epoch's order."""
    epoch, place = divmod(position, n)
    return int(row_order(seed, epoch, n)[place])
