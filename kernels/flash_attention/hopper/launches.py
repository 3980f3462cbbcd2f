"""What a call launches, with everything but where its tensors lie: found once for each kind of call, and kept."""

from __future__ import annotations

from functools import cache, lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ...device import multiprocessors
from ..problem import cdiv, scalars
from . import host
from .backward_pass import backward_kernel
from .backward_split import dkdv_kernel, dq_kernel
from .config import (
    FORWARD_WAVES,
    FORWARD_WAVES_DOCUMENTS,
    QUERIES,
    SPLIT_WAVES,
    SPLIT_WAVES_DOCUMENTS,
    Backward,
    Kind,
    Split,
    accumulator_plan,
    backward_config,
    forward_config,
    log_interleaved,
    padded,
    split_config,
)
from .dq_accumulator import CHUNK_COLUMNS, CHUNK_ROW, CONSUMERS
from .forward_pass import forward_kernel
from .host import Launch, Pointer, Scratch, Sizes, Template, contiguous_strides, floats, plain_rows, rows
from .preprocess import preprocess_kernel
from .scheduler import SORT_CHUNK, sort_kernel

CALLS = 1024
"""Kinds of calls whose launches are kept: rows of ever new lengths may not fill the memory."""
FLOAT, INT = torch.float32, torch.int32


class Call(NamedTuple):
    """All of a call that its launches depend on."""

    device: torch.device
    dtype: torch.dtype
    q: Sizes
    k: Sizes
    v: Sizes
    """Shapes: (B, S, H, D), (B, S_k, G, D) and (B, S_k, G, D_v)."""
    strides: tuple[Sizes, ...]
    """Of q, k and v; in the backward also of dout and out."""
    starts: bool
    packed: bool
    """There are ends, and with them tokens that may be padding: see padding.py."""
    causal: bool
    window: int | None
    softcap: float
    scale: float
    sinks: torch.dtype | None = None
    dlse: bool = False
    deterministic: bool = False

    @property
    def kind(self) -> Kind:
        (_, _, H, _), (_, _, G, _) = self.q, self.k
        return _kind(H, H // G, self.causal, self.window is not None, self.starts, self.softcap > 0)

    @property
    def numbers(self) -> tuple[float, ...]:
        """S, S_k, window, tanh_scale and scale_log2."""
        return self.q[1], self.k[1], *scalars(self.window, self.softcap, self.scale)

    @property
    def out(self) -> Sizes:
        """(B, S, H, D_v), also dout's shape."""
        return *self.q[:3], self.v[3]

    def rows(self, shape: Sizes, n_rows: int, strides: Sizes | None = None, n_columns: int | None = None) -> Template:
        """The descriptor of a tensor with these strides, or a contiguous one."""
        return rows(shape, strides or contiguous_strides(shape), self.dtype, n_rows, n_columns)


@lru_cache(maxsize=CALLS)
def forward_launch(call: Call) -> Launch:
    (B, S, H, D), (_, S_k, G, _), (q, k, v) = call.q, call.k, call.strides
    config = forward_config(call.kind, D, call.v[3], S_k, call.window)
    n_tiles = cdiv(S, QUERIES * config.consumers)
    n_work_tiles = n_tiles * B * H
    waves = FORWARD_WAVES_DOCUMENTS if config.starts else FORWARD_WAVES
    work_tiles = int(waves * multiprocessors(call.device))
    interleaved = log_interleaved(config, B * G, n_tiles * config.group, work_tiles)
    panel = config.panel
    return Launch(
        forward_kernel, call.device, min(n_work_tiles, multiprocessors(call.device)),
        (
            call.rows(call.q, QUERIES, q, panel), call.rows(call.k, config.n, k, panel),
            call.rows(call.v, config.n, v, panel), call.rows(call.out, QUERIES, n_columns=panel),
        ),
        (n_work_tiles, n_tiles, interleaved, *call.numbers), CONFIG=config,
    )  # fmt: skip


@lru_cache(maxsize=CALLS)
def backward_launches(call: Call) -> FusedLaunches | SplitLaunches:
    D, D_v = call.q[3], call.v[3]
    if D > 128:
        return SplitLaunches(call, split_config(call.kind, D, D_v))
    return FusedLaunches(call, backward_config(call.kind, D, call.deterministic))


class BackwardLaunches:
    """What the backward up to head_dim 128 and the one above have in common."""

    def __init__(self, call: Call, config: Backward | Split, panel: int | None = None) -> None:
        (B, S, H, _), (q, k, v, dout, _) = call.q, call.strides
        self.S = S
        # Tile after tile of queries: LSE, delta, and with documents starts.
        self.row_stats = B, H, cdiv(S, QUERIES), config.row_stats // QUERIES, QUERIES
        self.inputs = (
            call.rows(call.q, QUERIES, q, panel), call.rows(call.k, config.n, k, panel),
            call.rows(call.v, config.n, v, panel), call.rows(call.out, QUERIES, dout, panel),
            floats(prod(self.row_stats), config.row_stats),
        )  # fmt: skip
        self.key_gradients = tuple(call.rows(x, config.n, n_columns=panel) for x in (call.k, call.v))

    def preprocess_launch(
        self, call: Call, config: Backward | Split, n_accumulators: int = 0, n_heads: int = 0
    ) -> Launch:
        """Writes the rows' statistics; with documents also the queries that see each tile of keys
        (`queries_by_starts`). Clears accumulators and counters of dQ where there are some."""
        (_, S, H, _), (*_, dout, out) = call.q, call.strides
        return Launch(
            preprocess_kernel, call.device, prod(self.row_stats[:3]),
            (plain_rows(call.out, out, call.dtype, QUERIES), plain_rows(call.out, dout, call.dtype, QUERIES)),
            (S, call.k[1], self.row_stats[2], n_accumulators, n_heads), H=H, M=QUERIES, N=config.n,
            D=padded(call.v[3]), SUMMED=sum(config.dq_columns) if isinstance(config, Backward) else 0,
            ROW_STATS=config.row_stats,
        )  # fmt: skip

    def delta(self, memory: Tensor) -> Tensor:
        """Σ out · dout − dlse of each row, (B, H, S): a view of the scratch memory, which begins with `row_stats`."""
        return memory[: prod(self.row_stats)].view(self.row_stats)[:, :, :, 1].flatten(2)[:, :, : self.S]


class FusedLaunches(BackwardLaunches):
    """The backward up to head_dim 128."""

    def __init__(self, call: Call, config: Backward) -> None:
        super().__init__(call, config)
        (B, S, H, _), (_, S_k, G, _) = call.q, call.k
        query_tiles, n_tiles = cdiv(S, QUERIES), cdiv(S_k, config.n)
        n_work_tiles = n_tiles * B * G
        programs = min(n_work_tiles, multiprocessors(call.device))
        lag, count, interleaved = accumulator_plan(config, B * G, n_tiles, programs)
        n_accumulators = count * H // G * query_tiles  # of a tile of queries each
        n_sums = n_accumulators * QUERIES * sum(config.dq_columns)
        sorts = config.starts and not config.deterministic  # deterministic sums have the keys' order
        self.scratch = Scratch.of(
            row_stats=(FLOAT, prod(self.row_stats)),
            query_ends=(INT, B * n_tiles * 2 if config.starts else 0),
            accum=(FLOAT, n_sums),
            added=(INT, B * G),
            cleared=(INT, B * G),
            semaphores=(INT, B * H * query_tiles if config.deterministic else 0),
            sorted_tiles=(INT, B * n_tiles if sorts else 0),
        )
        self.preprocess = self.preprocess_launch(call, config, n_accumulators, B * G)
        self.sort = Launch(
            sort_kernel, call.device, B * cdiv(n_tiles, SORT_CHUNK), (), (S_k - S, n_tiles),
            N=config.n, CHUNK=SORT_CHUNK, CAUSAL=config.causal,
        ) if sorts else None  # fmt: skip
        row = CHUNK_ROW.value
        sums = [floats(n_sums, QUERIES * n // row, row) for n in (*config.dq_columns, CHUNK_COLUMNS.value)]
        dq_desc = call.rows(call.q, QUERIES, n_columns=CHUNK_COLUMNS.value)
        self.fused = Launch(
            backward_kernel, call.device, programs if config.persistent else n_work_tiles + lag * n_tiles,
            (*self.inputs, *sums, dq_desc, *self.key_gradients),
            (count, lag, n_work_tiles, n_tiles, interleaved, *call.numbers, call.scale), CONFIG=config,
        )  # fmt: skip

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, out: Tensor, lse: Pointer, dlse: Pointer, starts: Pointer,
        ends: Pointer, dq: Tensor, dk: Tensor, dv: Tensor, row_stats: Pointer, query_ends: Pointer, accum: Pointer,
        added: Pointer, cleared: Pointer, semaphores: Pointer, sorted_tiles: Pointer,
    ) -> None:  # fmt: skip
        self.preprocess(out, dout, lse, dlse, starts, ends, row_stats, query_ends, accum, added, cleared, semaphores)
        if self.sort is not None:
            self.sort(query_ends, sorted_tiles)
        self.fused(
            q, k, v, dout, row_stats, accum, accum, accum, dq, dk, dv, accum, *sequences(starts, ends), query_ends,
            sorted_tiles, host.queue_counter(q.device), added, cleared, semaphores,
        )  # fmt: skip


class SplitLaunches(BackwardLaunches):
    """The backward above head_dim 128: dK and dV, then dQ."""

    def __init__(self, call: Call, config: Split) -> None:
        super().__init__(call, config, config.panel)
        (B, S, H, _), (_, S_k, G, _) = call.q, call.k
        n_tiles, m_tiles = cdiv(S_k, config.n), cdiv(cdiv(S, QUERIES), CONSUMERS.value)
        self.scratch = Scratch.of(
            row_stats=(FLOAT, prod(self.row_stats)), query_ends=(INT, B * n_tiles * 2 if config.starts else 0)
        )
        self.preprocess = self.preprocess_launch(call, config)
        work_tiles = (SPLIT_WAVES_DOCUMENTS if config.starts else SPLIT_WAVES) * multiprocessors(call.device)
        interleaved = log_interleaved(config, B * G, n_tiles, work_tiles)
        self.dkdv = Launch(
            dkdv_kernel, call.device, n_tiles * B * G, (*self.inputs, *self.key_gradients),
            (n_tiles, interleaved, *call.numbers, call.scale), CONFIG=config,
        )  # fmt: skip
        interleaved = log_interleaved(config, B * G, m_tiles * config.group, work_tiles)
        self.dq = Launch(
            dq_kernel, call.device, m_tiles * B * H,
            (*self.inputs[:4], call.rows(call.q, QUERIES, n_columns=config.panel)),
            (m_tiles, interleaved, *call.numbers, call.scale), CONFIG=config,
        )  # fmt: skip

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, out: Tensor, lse: Pointer, dlse: Pointer, starts: Pointer,
        ends: Pointer, dq: Tensor, dk: Tensor, dv: Tensor, row_stats: Pointer, query_ends: Pointer,
    ) -> None:  # fmt: skip
        self.preprocess(out, dout, lse, dlse, starts, ends, row_stats, query_ends, None, None, None, None)
        self.dkdv(q, k, v, dout, row_stats, dk, dv, *sequences(starts, ends), query_ends)
        self.dq(q, k, v, dout, dq, row_stats, starts, ends)


def sequences(starts: Pointer, ends: Pointer) -> tuple[Pointer, Pointer]:
    """What a producer knows of packed sequences (`padding.Packed`)."""
    return (None, None) if ends is None else (starts, ends)


_kind = cache(Kind)
