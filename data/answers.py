"""Rows in which only answers are targets, and how far each answer lies from where it was told: see `data.recall`."""

from __future__ import annotations

import numpy as np

from data.packing import IGNORE_INDEX, Row, Rows


class AnswersOnly:
    """Rows whose targets are IGNORE_INDEX but after a marker and a key, trained on in the order in which they were
    written, whatever the seed: short documents come first.

    Args:
        marker_id: the token that stands before each key that is asked for.
    """

    def __init__(self, rows: Rows, marker_id: int) -> None:
        self.rows, self.seq_len, self.marker_id = rows, rows.seq_len, marker_id

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self._answers(self.rows[index])

    def at(self, seed: int, position: int) -> Row:
        return self[position % len(self)]

    @property
    def max_documents(self) -> int:
        return self.rows.max_documents

    def _answers(self, row: Row) -> Row:
        keys = np.flatnonzero(row.tokens[:-1] == self.marker_id) + 1
        targets = np.full_like(row.targets, IGNORE_INDEX)
        targets[keys] = row.targets[keys]
        return row._replace(targets=targets)


def distances(tokens_BS: np.ndarray, targets_BS: np.ndarray) -> np.ndarray:
    """Tokens from the last earlier place of each key that is asked for to its question: int64, one for each target in
    the order of rows and places. Every key was told before."""
    order_BS = np.argsort(tokens_BS, axis=1, kind="stable")  # places of the same token stand side by side
    earlier_BS = np.empty_like(order_BS)
    np.put_along_axis(earlier_BS, order_BS, np.roll(order_BS, 1, axis=1), axis=1)
    is_key_BS = targets_BS != IGNORE_INDEX
    rows, keys = np.nonzero(is_key_BS)
    told = earlier_BS[is_key_BS]
    assert (tokens_BS[rows, told] == tokens_BS[rows, keys]).all()
    return keys - told
