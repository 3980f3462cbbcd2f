"""Flash attention for Hopper (sm_90) in Gluon: the contract of portable.py, for 16-bit inputs, at the card's speed.

`forward` and `backward` launch the kernels; how is found once for each kind of `Call`. Read forward_pass.py first, then
backward_pass.py; each opens with a picture of its warps. What they stand on:

    config.py           tile sizes, stages and registers, with the figures that chose them
    scheduler.py        which work tile a program computes, and when
    pipeline.py         barriers, channels, TMA
    split_d.py          tiles in parts of head_dim: products and what is done to their results
    mask.py             who sees whom; ../intervals.py and ../scores.py, shared with the portable kernels
    softmax.py          the forward's softmax, which seldom looks for a maximum
    softcap.py          the soft cap's tanh
    key_tiles.py        a work tile of the backward, and the queries that see it
    dq_accumulator.py   how dQ is summed over tiles of keys
    backward_split.py   the backward above head_dim 128
    preprocess.py       row statistics and cleared memory, before the backward
    compiler.py         what the code does for the compiler's sake
    host.py             launches, descriptors and scratch memory
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ..problem import aligned, cdiv, dsinks_of, scalars
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
    accumulator_plan,
    backward_config,
    forward_config,
    log_interleaved,
)
from .dq_accumulator import CHUNK_COLUMNS, CHUNK_ROW, CONSUMERS
from .forward_pass import forward_kernel
from .host import (
    Blank,
    Launch,
    Pointer,
    Scratch,
    Sizes,
    contiguous_strides,
    floats,
    plain_rows,
    pointer,
    queue_counter,
    rows,
)
from .preprocess import preprocess_kernel
from .scheduler import SORT_CHUNK, sort_kernel

CALLS = 1024
"""Kinds of calls whose launches are kept: rows of ever new lengths may not fill the memory."""
FLOAT, INT = torch.float32, torch.int32


class Call(NamedTuple):
    """All that the launches of a call depend on: everything but where its tensors lie."""

    device: torch.device
    dtype: torch.dtype
    q: Sizes
    k: Sizes
    """Shapes: (B, S, H, D) and (B, S_k, G, D)."""
    strides: tuple[Sizes, ...]
    """Of q, k and v; in the backward also of dout and out."""
    starts: bool
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
        """S, S_k, window, cap and factor, as kernels take them."""
        return self.q[1], self.k[1], *scalars(self.window, self.softcap, self.scale)


def forward(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, ends: Tensor | None, sinks: Tensor | None,
    slopes: None = None, *, causal: bool, window: int | None, softcap: float, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out and LSE, as `portable.forward`, of inputs against which `op.hopper_lacks` says nothing."""
    q, k, v = aligned(q), aligned(k), aligned(v)
    call = Call(
        q.device, q.dtype, q.shape, k.shape, (q.stride(), k.stride(), v.stride()), starts is not None,
        causal, window, softcap, scale, sinks=None if sinks is None else sinks.dtype,
    )  # fmt: skip
    B, S, H, _ = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(B, H, S, dtype=FLOAT, device=q.device)
    with torch.cuda.device_of(q):
        forward_launch(call)(q, k, v, out, lse, pointer(starts), pointer(sinks), queue_counter(q.device))
    return out, lse


@lru_cache(maxsize=CALLS)
def forward_launch(call: Call) -> Launch:
    (B, S, H, D), (_, S_k, G, _), (q, k, v) = call.q, call.k, call.strides
    config = forward_config(call.kind, D, S_k, call.window)
    n_tiles = cdiv(S, QUERIES * config.consumers)
    n_work_tiles = n_tiles * B * H
    multiprocessors = _multiprocessors(call.device)
    waves = FORWARD_WAVES_DOCUMENTS if config.starts else FORWARD_WAVES
    interleaved = log_interleaved(config, B * G, n_tiles * config.group, int(waves * multiprocessors))
    descriptors = (
        rows(call.q, q, call.dtype, QUERIES), rows(call.k, k, call.dtype, config.n),
        rows(call.k, v, call.dtype, config.n), rows(call.q, contiguous_strides(call.q), call.dtype, QUERIES),
    )  # fmt: skip
    numbers = n_work_tiles, n_tiles, interleaved, *call.numbers
    programs = min(n_work_tiles, multiprocessors)
    return Launch(forward_kernel, call.device, programs, descriptors, numbers, CONFIG=config)


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    starts: Tensor | None, ends: Tensor | None, sinks: Tensor | None, slopes: None = None, *,
    causal: bool, window: int | None, softcap: float, scale: float, deterministic: bool = False,
    wanted: Sequence[bool] = (True,) * 5,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """dq, dk, dv, dsinks and None, as `portable.backward`; without `deterministic` the last bits of dq differ between
    runs.

    With head_dim up to 128, dq is summed in float32 accumulators, memory that is needed while the kernel runs: for the
    queries of some 450 tiles of 128 keys (900 with documents), whatever B and H are, and for those of three key heads
    at least. Above, there are none, and dq is always the same.
    """
    q, k, v, dout, out = aligned(q), aligned(k), aligned(v), aligned(dout), aligned(out)
    dlse = None if dlse is None else dlse.contiguous()
    call = Call(
        q.device, q.dtype, q.shape, k.shape, (q.stride(), k.stride(), v.stride(), dout.stride(), out.stride()),
        starts is not None, causal, window, softcap, scale, dlse=dlse is not None, deterministic=deterministic,
    )  # fmt: skip
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    launches = backward_launches(call)
    memory, scratch = launches.scratch.allocate(q.device)
    with torch.cuda.device_of(q):
        launches.run(q, k, v, dout, out, pointer(lse), pointer(dlse), pointer(starts), dq, dk, dv, *scratch)
    dsinks = None
    if sinks is not None and wanted[3]:
        dsinks = dsinks_of(sinks, lse, launches.delta(memory))
    return dq, dk, dv, dsinks, None


@lru_cache(maxsize=CALLS)
def backward_launches(call: Call) -> FusedLaunches | SplitLaunches:
    return SplitLaunches(call) if call.q[3] > 128 else FusedLaunches(call)


class BackwardLaunches:
    """What both ways of the backward begin with."""

    def __init__(self, call: Call, config: Backward) -> None:
        B, S, H, _ = call.q
        # Tile after tile of queries: LSE, delta, and with documents starts.
        self.row_stats = B, H, cdiv(S, QUERIES), config.row_stats // QUERIES, QUERIES
        self.S = S

    def delta(self, memory: Tensor) -> Tensor:
        """Σ out · dout − dlse of each row, (B, H, S), where the first part of the scratch memory has it."""
        return memory[: prod(self.row_stats)].view(self.row_stats)[:, :, :, 1].flatten(2)[:, :, : self.S]


class FusedLaunches(BackwardLaunches):
    """The backward up to head_dim 128."""

    def __init__(self, call: Call) -> None:
        (B, S, H, D), (_, S_k, G, _) = call.q, call.k
        config = backward_config(call.kind, D, call.deterministic)
        super().__init__(call, config)
        query_tiles, n_tiles = cdiv(S, QUERIES), cdiv(S_k, config.n)
        n_work_tiles = n_tiles * B * G
        programs = min(n_work_tiles, _multiprocessors(call.device))
        lag, count, interleaved = accumulator_plan(config, B * G, n_tiles, programs)
        n_accumulators = count * H // G * query_tiles  # of a tile of queries each
        n_sums = n_accumulators * QUERIES * sum(config.dq_columns)
        sorts = config.starts and not config.deterministic  # there the order of the sum is that of the keys
        self.scratch = Scratch.of(
            (FLOAT, prod(self.row_stats)),
            (INT, B * n_tiles * 2 if config.starts else 0),
            (FLOAT, n_sums),
            (INT, B * G),
            (INT, B * G),
            (INT, B * H * query_tiles if config.deterministic else 0),
            (INT, B * n_tiles if sorts else 0),
        )
        self.preprocess = _preprocess(call, config, n_accumulators, B * G)
        self.sort = _sort(call, config, n_tiles) if sorts else None
        row = CHUNK_ROW.value
        sums = [floats(n_sums, QUERIES * n // row, row) for n in (*config.dq_columns, CHUNK_COLUMNS.value)]
        dq_rows = rows(call.q, contiguous_strides(call.q), call.dtype, QUERIES, CHUNK_COLUMNS.value)
        self.main = Launch(
            backward_kernel, call.device, programs if config.persistent else n_work_tiles + lag * n_tiles,
            (*_inputs(call, config), *sums, dq_rows, *_key_gradients(call, config)),
            (count, lag, n_work_tiles, n_tiles, interleaved, *call.numbers, call.scale), CONFIG=config,
        )  # fmt: skip

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, out: Tensor, lse: Pointer, dlse: Pointer, starts: Pointer,
        dq: Tensor, dk: Tensor, dv: Tensor, row_stats: Pointer, ends: Pointer, accum: Pointer, added: Pointer,
        cleared: Pointer, semaphores: Pointer, sorted_tiles: Pointer,
    ) -> None:  # fmt: skip
        self.preprocess(out, dout, lse, dlse, starts, row_stats, ends, accum, added, cleared, semaphores)
        if self.sort is not None:
            self.sort(ends, sorted_tiles)
        self.main(
            q, k, v, dout, row_stats, accum, accum, accum, dq, dk, dv,
            accum, ends, sorted_tiles, queue_counter(q.device), added, cleared, semaphores,
        )  # fmt: skip


class SplitLaunches(BackwardLaunches):
    """The backward above head_dim 128: dK and dV, then dQ."""

    def __init__(self, call: Call) -> None:
        (B, S, H, D), (_, S_k, G, _) = call.q, call.k
        config = backward_config(call.kind, D, call.deterministic)
        super().__init__(call, config)
        n_tiles, m_tiles = cdiv(S_k, config.n), cdiv(cdiv(S, QUERIES), CONSUMERS.value)
        self.scratch = Scratch.of((FLOAT, prod(self.row_stats)), (INT, B * n_tiles * 2 if config.starts else 0))
        self.preprocess = _preprocess(call, config)
        inputs, dq_rows = _inputs(call, config), rows(call.q, contiguous_strides(call.q), call.dtype, QUERIES)
        work_tiles = (SPLIT_WAVES_DOCUMENTS if config.starts else SPLIT_WAVES) * _multiprocessors(call.device)
        interleaved = log_interleaved(config, B * G, n_tiles, work_tiles)
        self.dkdv = Launch(
            dkdv_kernel, call.device, n_tiles * B * G, (*inputs, *_key_gradients(call, config)),
            (n_tiles, interleaved, *call.numbers, call.scale), CONFIG=config,
        )  # fmt: skip
        interleaved = log_interleaved(config, B * G, m_tiles * config.group, work_tiles)
        self.dq = Launch(
            dq_kernel, call.device, m_tiles * B * H, (*inputs[:4], dq_rows),
            (m_tiles, interleaved, *call.numbers, call.scale), CONFIG=config,
        )  # fmt: skip

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, out: Tensor, lse: Pointer, dlse: Pointer, starts: Pointer,
        dq: Tensor, dk: Tensor, dv: Tensor, row_stats: Pointer, ends: Pointer,
    ) -> None:  # fmt: skip
        self.preprocess(out, dout, lse, dlse, starts, row_stats, ends, None, None, None, None)
        self.dkdv(q, k, v, dout, row_stats, dk, dv, ends)
        self.dq(q, k, v, dout, dq, row_stats, starts)


def _preprocess(call: Call, config: Backward, n_accumulators: int = 0, n_heads: int = 0) -> Launch:
    """The rows' statistics, and where dQ is accumulated in memory the accumulators and counters for that, cleared; with
    documents also the queries that see each tile of keys (`queries_by_starts`)."""
    B, S, H, _ = call.q
    query_tiles, (*_, dout, out) = cdiv(S, QUERIES), call.strides
    return Launch(
        preprocess_kernel, call.device, B * H * query_tiles,
        (plain_rows(call.q, out, call.dtype, QUERIES), plain_rows(call.q, dout, call.dtype, QUERIES)),
        (S, call.k[1], query_tiles, n_accumulators, n_heads), H=H, M=QUERIES, N=config.n, D=config.width,
        SUMMED=sum(config.dq_columns), ROW_STATS=config.row_stats,
    )  # fmt: skip


def _sort(call: Call, config: Backward, n_tiles: int) -> Launch:
    """The last tiles, the longest first."""
    programs, shift = call.q[0] * cdiv(n_tiles, SORT_CHUNK), call.k[1] - call.q[1]
    return Launch(
        sort_kernel, call.device, programs, (), (shift, n_tiles), N=config.n, CHUNK=SORT_CHUNK, CAUSAL=config.causal
    )


def _inputs(call: Call, config: Backward) -> tuple[Blank, ...]:
    """Descriptors of q, k, v, dout and the rows' statistics."""
    B, S, H, _ = call.q
    q, k, v, dout, _ = call.strides
    return (
        rows(call.q, q, call.dtype, QUERIES), rows(call.k, k, call.dtype, config.n),
        rows(call.k, v, call.dtype, config.n), rows(call.q, dout, call.dtype, QUERIES),
        floats(B * H * cdiv(S, QUERIES) * config.row_stats, config.row_stats),
    )  # fmt: skip


def _key_gradients(call: Call, config: Backward) -> tuple[Blank, Blank]:
    """Descriptors of dk and dv."""
    both = rows(call.k, contiguous_strides(call.k), call.dtype, config.n)
    return both, both


_kind = cache(Kind)


@cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
