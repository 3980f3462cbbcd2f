"""Context parallelism: how rows are split over the ranks that share them, and put together again.

Each rank holds as many tokens of every row, in contiguous runs: the linear layers are balanced, and no shape depends
on the documents. For Ulysses that is one run each. For all-gather the runs are chosen so that each rank has as many
visible pairs, too: attention is balanced. Two measures can always be divided evenly among P with 2(P − 1) cuts (Alon
1987, "Splitting necklaces"), so that a rank has fewer than two runs on average, however the documents lie.
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil, gcd

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data.loader import IGNORE_INDEX, Batch
from model.attention.base import AttentionBackend
from model.attention.context import ContextAttention
from model.attention.context.all_gather import runs_of

BLOCK = 128
"""Tokens by which runs are cut at most: tiles of the kernels."""
BLOCKS = 32
"""Into how many of them a shard is cut at least, however short."""
TOLERANCE = 0.01
"""By which share of its visible pairs a rank may be off for the sake of fewer runs."""


class SharedRows:
    """Rows of which every rank of a group reads the same, and computes a shard."""

    def __init__(self, attention: ContextAttention) -> None:
        exchange = attention.exchange
        self.group, self.rank, self.size = exchange.group, exchange.rank, exchange.size
        self.window = attention.spec.window
        self.is_balanced = attention.method == "all-gather"
        self.follows_documents = attention.inner.takes_any_length
        """Whether documents decide on the runs; else these are the same for all batches, so that nothing recompiles."""

    def shard(self, batch: Batch) -> Batch:
        """This rank's part of a batch that lies on the host, with its part of the counts.

        Rows are filled up to a multiple of the ranks: at their end, where no other token sees it, and without a target.
        """
        B, S = batch.tokens_BS.shape
        length = ceil(S / self.size) * self.size
        starts_BS = None if batch.starts_BS is None else _padded(batch.starts_BS, length, None)
        split = self._split(starts_BS, length)
        own = torch.cat([torch.arange(run.begin, run.end) for rank, run in runs_of(split) if rank == self.rank])
        targets_BS = _padded(batch.targets_BS, length, IGNORE_INDEX)[:, own]
        positions_BS = _padded(batch.positions_BS, length, 0)[:, own]
        pairs_BS = (positions_BS + 1).clamp_max(self.window or length)[:, own < S].expand(B, -1)
        return replace(
            batch,
            tokens_BS=_padded(batch.tokens_BS, length, 0)[:, own],
            targets_BS=targets_BS,
            positions_BS=positions_BS,
            starts_BS=starts_BS,
            split=split,
            num_tokens=pairs_BS.numel(),
            num_targets=int((targets_BS != IGNORE_INDEX).sum()),
            visible_pairs=int(pairs_BS.sum()),
        )

    def whole(self, values_BN: Tensor, shard: Batch, seq_len: int) -> Tensor:
        """A value of each token of all ranks' shards, in the order of the rows: (B, seq_len)."""
        assert shard.split is not None
        gathered = [torch.empty_like(values_BN) for _ in range(self.size)]
        dist.all_gather(gathered, values_BN.contiguous(), group=self.group)
        read = [0] * self.size
        parts = []
        for rank, run in runs_of(shard.split):
            length = run.end - run.begin
            parts.append(gathered[rank][:, read[rank] : read[rank] + length])
            read[rank] += length
        return torch.cat(parts, dim=1)[:, :seq_len]

    def _split(self, starts_BS: Tensor | None, length: int) -> Tensor:
        """Who holds which runs of rows of `length` tokens, and from where these see keys: see `runs_of`."""
        documents = None if starts_BS is None or not self.follows_documents else starts_BS.numpy()
        first_BS = first_seen(documents, length, self.window)
        if self.is_balanced:
            runs = balanced_runs(first_BS, self.size)
        else:
            runs = [[(rank * length // self.size, (rank + 1) * length // self.size)] for rank in range(self.size)]
        block = block_of(length, self.size)  # so that the number of keys is that of whole tiles, too
        rows = [
            (rank, begin, end, first_BS[:, begin].min() // block * block)
            for rank, each in enumerate(runs)
            for begin, end in each
        ]
        split = torch.full((2 * self.size, 4), -1)
        split[: len(rows)] = torch.tensor(rows)
        return split


def shared_rows(attention: AttentionBackend) -> SharedRows | None:
    """How rows are split for this attention; None where they are whole."""
    return SharedRows(attention) if isinstance(attention, ContextAttention) else None


def first_seen(starts_BS: np.ndarray | None, length: int, window: int | None) -> np.ndarray:
    """The first key that each token sees, (B, S), or (1, S) without documents."""
    t_S = np.arange(length)
    earliest_1S = np.maximum(t_S - (window or length) + 1, 0)[None]
    return earliest_1S if starts_BS is None else np.maximum(earliest_1S, starts_BS)


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


def _padded(x_BS: Tensor, length: int, value: int | None) -> Tensor:
    """Rows filled up to `length` with a value, or with their last."""
    more = length - x_BS.shape[1]
    if more == 0:
        return x_BS
    filling = x_BS[:, -1:].expand(-1, more) if value is None else x_BS.new_full((len(x_BS), more), value)
    return torch.cat([x_BS, filling], dim=1)
