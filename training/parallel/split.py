"""How rows are split over the ranks that share them, and what these then send each other. No torch here.

Each rank holds as many tokens of every row, in contiguous runs: the linear layers are balanced, and no shape depends
on the documents. For Ulysses that is one run each. For all-gather the runs are chosen so that each rank has as many
visible pairs, too: attention is balanced. Two measures can always be divided evenly among P with 2(P − 1) cuts (Alon
1987, "Splitting necklaces"), so that a rank has fewer than two runs on average, however the documents lie.
"""

from __future__ import annotations

from functools import lru_cache
from math import gcd

import numpy as np

BLOCK = 128
"""Tokens by which runs are cut at most: tiles of the kernels."""
BLOCKS = 32
"""Into how many of them a shard is cut at least, however short."""
TOLERANCE = 0.01
"""By which share of its visible pairs a rank may be off for the sake of fewer runs."""


def first_seen(starts_BS: np.ndarray | None, length: int, window: int | None) -> np.ndarray:
    """The first key that each token sees, (B, S), or (1, S) without documents."""
    t_S = np.arange(length)
    earliest_1S = np.maximum(t_S - (window or length) + 1, 0)[None]
    return earliest_1S if starts_BS is None else np.maximum(earliest_1S, starts_BS)


def split_rows(first_BS: np.ndarray, size: int, is_balanced: bool) -> list[tuple[int, int, int, int]]:
    """Who holds which runs: (rank, begin, end, first), where no token of the run sees a key before `first`.

    Args:
        is_balanced: whether by visible pairs, too; otherwise each of `size` ranks has one run.
    """
    length = first_BS.shape[1]
    block = block_of(length, size)  # so that the number of keys is that of whole tiles, too
    runs = [[(rank * length // size, (rank + 1) * length // size)] for rank in range(size)]
    return [
        (rank, begin, end, int(first_BS[:, begin].min() // block * block))
        for rank, each in enumerate(balanced_runs(first_BS, size) if is_balanced else runs)
        for begin, end in each
    ]


@lru_cache(maxsize=16)
def keys_sent(length: int, size: int, window: int | None) -> np.ndarray:
    """Tokens whose keys and values each rank sends to each, (size, size), for balanced rows without documents. What a
    rank needs of its own is on the diagonal."""
    rows = split_rows(first_seen(None, length, window), size, is_balanced=True)
    holder_S, needed_PS = np.empty(length, dtype=np.int64), np.zeros((size, length), dtype=bool)
    for rank, begin, end, first in rows:
        holder_S[begin:end] = rank
        needed_PS[rank, first:end] = True
    return np.stack([np.bincount(holder_S[needed_S], minlength=size) for needed_S in needed_PS], axis=1)


def block_of(length: int, size: int) -> int:
    """Tokens by which runs of rows of `length` tokens are cut for `size` ranks: a power of two."""
    shard = length // size
    block = gcd(shard, BLOCK)
    while block > 1 and shard < BLOCKS * block:
        block //= 2
    return block


def balanced_runs(first_BS: np.ndarray, size: int) -> list[list[tuple[int, int]]]:
    """For each of `size` ranks runs [begin, end) of as many tokens, with as many visible pairs as blocks allow.

    One rank after the other takes a window from the tokens that are left, which lie in a circle. Of all windows of a
    rank's length one has the mean of their pairs, exactly or within a block: the windows side by side have it together,
    and a window's pairs change little from one place to the next. Of those within TOLERANCE it is the one with the
    fewest runs.
    """
    S = first_BS.shape[1]
    block = block_of(S, size)
    pairs_S = (np.arange(S) + 1 - first_BS).sum(0)
    pairs_N = pairs_S.reshape(-1, block).sum(1)
    left, taken = np.arange(len(pairs_N)), len(pairs_N) // size
    shares = []
    for rank in range(size - 1):
        start = _window(left, pairs_N, taken, size - rank)
        places = np.arange(start, start + taken) % len(left)
        shares.append(np.sort(left[places]))
        left = np.delete(left, places)
    return [_runs(share, block) for share in [*shares, left]]


def _window(left: np.ndarray, pairs_N: np.ndarray, taken: int, ranks: int) -> int:
    """Where in the circle of blocks that are left the window begins that the next of `ranks` takes."""
    n = len(left)
    begins = np.arange(n)
    is_cut = np.roll(left, -1) != left + 1  # between a block and the next in the circle
    cuts = np.concatenate([[0], np.cumsum(np.tile(is_cut, 2))])
    pairs = np.concatenate([[0], np.cumsum(np.tile(pairs_N[left], 2))])
    mean = pairs[n] / ranks
    off = np.abs(pairs[begins + taken] - pairs[begins] - mean)
    within = cuts[begins + taken - 1] - cuts[begins]
    at_edges = is_cut[begins - 1].astype(int) + is_cut[(begins + taken - 1) % n]
    is_good = off <= max(TOLERANCE * mean, off.min())
    order = np.lexsort((off, -at_edges, within, ~is_good))
    return int(order[0])


def _runs(blocks: np.ndarray, block: int) -> list[tuple[int, int]]:
    """Sorted blocks as runs of tokens."""
    begins = np.flatnonzero(np.diff(blocks, prepend=-2) != 1)
    ends = [*begins[1:], len(blocks)]
    return [(int(blocks[i]) * block, (int(blocks[j - 1]) + 1) * block) for i, j in zip(begins, ends, strict=True)]
