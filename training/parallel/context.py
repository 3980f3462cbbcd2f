"""Context parallelism: batches of which every rank computes a shard, and what they compute put together again."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

import torch
import torch.distributed as dist
from torch import Tensor

from data.loader import IGNORE_INDEX, Batch
from model.attention.base import AttentionBackend
from model.attention.context import ContextAttention
from model.attention.context.all_gather import runs_of

from .split import first_seen, split_rows


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
        rows = split_rows(first_seen(documents, length, self.window), self.size, self.is_balanced)
        split = torch.full((2 * self.size, 4), -1)
        split[: len(rows)] = torch.tensor(rows)
        return split


def shared_rows(attention: AttentionBackend) -> SharedRows | None:
    """How rows are split for this attention; None where they are whole."""
    return SharedRows(attention) if isinstance(attention, ContextAttention) else None


def _padded(x_BS: Tensor, length: int, value: int | None) -> Tensor:
    """Rows filled up to `length` with a value, or with their last."""
    more = length - x_BS.shape[1]
    if more == 0:
        return x_BS
    filling = x_BS[:, -1:].expand(-1, more) if value is None else x_BS.new_full((len(x_BS), more), value)
    return torch.cat([x_BS, filling], dim=1)
