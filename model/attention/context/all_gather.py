"""Each rank attends with its own queries, to keys and values that it receives from all ranks.

A rank holds some contiguous runs of each row. The keys that the queries of a run see are one interval that ends where
the run ends, so a run is one call of the inner backend, whose queries are the last of the keys' positions: causal
attention, windows, documents of any length and soft caps need nothing else. Keys that no query of a rank sees are not
sent to it.

Shape suffixes beside the backends': N tokens of a row on one rank, P ranks, K keys that a rank receives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from math import gcd
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..base import AttentionBackend
from .exchange import Exchange, begin_all_to_all, wide

GROUPS = 2
"""Of heads, at most: the second group's keys and values are sent while the first attends, and the first's gradients
while the second's are computed."""


class Run(NamedTuple):
    """Tokens [begin, end) of each row, which see no key before `first`."""

    begin: int
    end: int
    first: int


class Piece(NamedTuple):
    """Some consecutive keys on their way from their rank to one that needs them."""

    place: int
    """Of the first of them among the sender's tokens."""
    row: int
    """Of the first of them in the row."""
    length: int


class Plan(NamedTuple):
    """What one rank sends, receives and computes for one split of the rows."""

    runs: list[Run]
    sent: list[list[Piece]]
    """To each rank."""
    received: list[list[Piece]]
    """From each rank."""

    @property
    def sizes(self) -> tuple[list[int], list[int]]:
        """Tokens to and from each rank."""
        sent, received = ([_length(pieces) for pieces in all_pieces] for all_pieces in (self.sent, self.received))
        return sent, received


class AllGather(Exchange):
    says = "each receives the keys and values that its queries see"

    def lse_shape(self, q_shape: torch.Size) -> tuple[int, ...]:
        B, N, H, _D = q_shape
        return B, H, N

    def forward(
        self, inner: AttentionBackend, q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, split: Tensor
    ) -> tuple[Tensor, Tensor]:
        plan = self._plan(split)
        places = _places(plan, inner, starts)
        outs, lses = [], []
        arriving = self._arriving(plan, k, v)
        for q_group in _by_group(q, k):
            k_seen, v_seen = next(arriving)
            results = [
                inner.forward(q_group[:, own], k_seen[:, seen], v_seen[:, seen], mask) for own, seen, mask in places
            ]
            outs.append(torch.cat([out for out, _ in results], dim=1))
            lses.append(torch.cat([lse for _, lse in results], dim=-1))
            del k_seen, v_seen, results
        return torch.cat(outs, dim=2), torch.cat(lses, dim=1) if inner.keeps_lse else lses[0]

    def backward(
        self, inner: AttentionBackend, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        starts: Tensor | None, split: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        plan = self._plan(split)
        places = _places(plan, inner, starts)
        dqs, returning = [], []
        lses = _by_group(lse, k, dim=1) if inner.keeps_lse else [lse] * _groups(k)
        arriving = self._arriving(plan, k, v)
        of_groups = zip(*(_by_group(x, k) for x in (dout, q, out)), lses, strict=True)
        for dout_group, q_group, out_group, lse_group in of_groups:
            k_seen, v_seen = next(arriving)
            dq, dkv_KBWD = torch.empty_like(q_group), _gradients_of(k_seen)
            dk_all, dv_all = dkv_KBWD.transpose(0, 1).chunk(2, dim=2)
            for own, seen, mask in places:
                lse_run = lse_group[..., own].contiguous() if inner.keeps_lse else lse
                dq[:, own], dk, dv = inner.backward(
                    dout_group[:, own], q_group[:, own], k_seen[:, seen], v_seen[:, seen], out_group[:, own], lse_run,
                    mask,
                )  # fmt: skip
                dk_all[:, seen] += dk
                dv_all[:, seen] += dv
            # Nothing stays longer than needed: `exchange_bytes` in model/layer_memory.py counts it.
            del k_seen, v_seen, dk, dv, dk_all, dv_all
            dqs.append(dq)
            returning.append(self._begin_return(plan, dkv_KBWD))
            del dkv_KBWD
        grads = [self._summed(plan, received(), q.shape[1]).transpose(0, 1).chunk(2, dim=2) for received in returning]
        dks, dvs = zip(*grads, strict=True)
        return torch.cat(dqs, dim=2), torch.cat(dks, dim=2), torch.cat(dvs, dim=2)

    def _plan(self, split: Tensor) -> Plan:
        return _plan(_rows(split), self.rank, self.size)

    def _arriving(self, plan: Plan, k: Tensor, v: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The keys and values (B, K, G, D) of each group of heads that this rank's queries see, in the order of the
        row. While those of one group are used, the next are on their way."""

        def begin(k: Tensor, v: Tensor) -> Callable[[], Tensor]:
            kv_NBWD = torch.cat([k, v], dim=2).transpose(0, 1)
            sent = torch.cat([kv_NBWD[piece.place :][: piece.length] for pieces in plan.sent for piece in pieces])
            return begin_all_to_all(sent, self.group, *plan.sizes)

        def in_order(received: Tensor) -> tuple[Tensor, Tensor]:
            kv_KBWD = torch.cat([received[at:][: piece.length] for piece, at in _received_by_row(plan)])
            k, v = kv_KBWD.transpose(0, 1).chunk(2, dim=2)
            return k, v

        groups = list(zip(_by_group(k, k), _by_group(v, k), strict=True))
        arriving = begin(*groups[0])
        for following in groups[1:]:
            here, arriving = arriving, begin(*following)
            yield in_order(here())
        yield in_order(arriving())

    def _begin_return(self, plan: Plan, dkv_KBWD: Tensor) -> Callable[[], Tensor]:
        """Send gradients of keys and values back to where these belong."""
        at, parts = 0, {}
        for piece, place in _received_by_row(plan):  # the way that they came
            parts[place] = dkv_KBWD[at:][: piece.length]
            at += piece.length
        send, receive = plan.sizes
        return begin_all_to_all(torch.cat([parts[place] for place in sorted(parts)]), self.group, receive, send)

    def _summed(self, plan: Plan, received: Tensor, n: int) -> Tensor:
        """The gradients (N, B, W, D) of this rank's keys and values: those that each rank has for them, added up."""
        total = received.new_zeros(n, *received.shape[1:], dtype=wide(received))
        at = 0
        for pieces in plan.sent:
            for piece in pieces:
                total[piece.place :][: piece.length] += received[at:][: piece.length]
                at += piece.length
        return total.to(received.dtype)


def _groups(k: Tensor) -> int:
    return gcd(GROUPS, k.shape[2])


def _by_group(x: Tensor, k: Tensor, dim: int = 2) -> Sequence[Tensor]:
    """Of query or key/value heads along `dim` those that belong to each group of the key/value heads of `k`."""
    return x.chunk(_groups(k), dim)


def _gradients_of(k_seen: Tensor) -> Tensor:
    """Zeros (K, B, 2G, D) for the gradients of keys and values."""
    B, K, G, D = k_seen.shape
    return k_seen.new_zeros(K, B, 2 * G, D)


def runs_of(split: Tensor) -> list[tuple[int, Run]]:
    """(rank, run) in the order of the row, which is also the order of a rank's tokens.

    Args:
        split: int64 (at least the number of runs, 4): rank, begin, end and first of a run; −1 where there is none.
    """
    return _runs(_rows(split))


Rows = tuple[tuple[int, ...], ...]


def _rows(split: Tensor) -> Rows:
    return tuple(map(tuple, split.tolist()))


def _runs(split: Rows) -> list[tuple[int, Run]]:
    return sorted(((rank, Run(*run)) for rank, *run in split if rank >= 0), key=lambda each: each[1])


@lru_cache(maxsize=64)
def _plan(split: Rows, rank: int, size: int) -> Plan:
    runs: list[list[Run]] = [[] for _ in range(size)]
    for holder, run in _runs(split):
        runs[holder].append(run)
    needed = [_union([(run.first, run.end) for run in each]) for each in runs]
    sent = [_pieces(runs[rank], intervals) for intervals in needed]
    received = [_pieces(each, needed[rank]) for each in runs]
    return Plan(runs[rank], sent, received)


def _union(intervals: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            begin, end = merged[-1][0], max(end, merged.pop()[1])
        merged.append((begin, end))
    return merged


def _pieces(runs: list[Run], needed: list[tuple[int, int]]) -> list[Piece]:
    """The parts of the runs that lie in the intervals, in the order of the row."""
    pieces, place = [], 0
    for run in runs:
        for begin, end in needed:
            begin, end = max(begin, run.begin), min(end, run.end)
            if begin < end:
                pieces.append(Piece(place + begin - run.begin, begin, end - begin))
        place += run.end - run.begin
    return pieces


def _length(pieces: list[Piece]) -> int:
    return sum(piece.length for piece in pieces)


def _received_by_row(plan: Plan) -> list[tuple[Piece, int]]:
    """What is received in the order of the row, and where it lies in what is received."""
    pieces, at = [], 0
    for piece in (piece for each in plan.received for piece in each):
        pieces.append((piece, at))
        at += piece.length
    return sorted(pieces, key=lambda each: each[0].row)


def _places(plan: Plan, inner: AttentionBackend, starts: Tensor | None) -> list[tuple[slice, slice, Any]]:
    """Of each run its queries among this rank's, the keys that they see among those received, and the mask of both."""
    pieces = [piece for piece, _ in _received_by_row(plan)]

    def received_before(row: int) -> int:
        return sum(min(max(row - piece.row, 0), piece.length) for piece in pieces)

    places, place = [], 0
    for run in plan.runs:
        length = run.end - run.begin
        seen = slice(*map(received_before, (run.first, run.end)))
        places.append((slice(place, place + length), seen, _mask(inner, run, starts)))
        place += length
    return places


def _mask(inner: AttentionBackend, run: Run, starts: Tensor | None) -> object:
    """The inner backend's mask for the queries of a run, over the keys from `run.first` on."""
    if starts is not None:
        starts = (starts[:, run.begin : run.end] - run.first).clamp_min(0)
    queries, keys = run.end - run.begin, run.end - run.first
    return inner.prepare(starts, queries, None if queries == keys else keys)
