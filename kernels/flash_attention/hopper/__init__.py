"""Flash attention for Hopper (sm_90) in Gluon: the contract of portable.py, for 16-bit inputs, at the card's speed.

`forward` and `backward` launch the kernels. Read forward_pass.py first, then backward_pass.py; each opens with a
picture of its warps. What they stand on:

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
    host.py             descriptors and launches
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from ..problem import Problem, aligned, cdiv, dsinks_of
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
from .host import floats, launch, plain_rows, queue_counter, rows
from .preprocess import preprocess_kernel
from .scheduler import SORT_CHUNK, sort_kernel

Tensors = tuple[Tensor, ...]
Outputs = tuple[Tensor, Tensor, Tensor | None]


def forward(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, ends: Tensor | None, sinks: Tensor | None,
    slopes: None = None, *, causal: bool, window: int | None, softcap: float, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out and LSE, as `portable.forward`, of inputs against which `op.hopper_lacks` says nothing."""
    (B, S, H, D), S_k, G = q.shape, k.shape[1], k.shape[2]
    q, k, v = aligned(q), aligned(k), aligned(v)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, H, S, dtype=torch.float32, device=q.device)
    problem = Problem(causal, window, starts, softcap, scale)
    config = forward_config(_kind(problem, H, G), D, S_k, window)
    n_tiles = cdiv(S, QUERIES * config.consumers)
    n_work_tiles = n_tiles * B * H
    multiprocessors = _multiprocessors(q.device)
    waves = FORWARD_WAVES_DOCUMENTS if config.starts else FORWARD_WAVES
    interleaved = log_interleaved(config, B * G, n_tiles * config.group, int(waves * multiprocessors))
    with torch.cuda.device_of(q):
        launch(
            forward_kernel, min(n_work_tiles, multiprocessors),
            rows(q, QUERIES), rows(k, config.n), rows(v, config.n), rows(out, QUERIES), lse, problem.starts, sinks,
            queue_counter(q.device), n_work_tiles, n_tiles, interleaved, S, S_k, *problem.scalars, CONFIG=config,
        )  # fmt: skip
    return out, lse


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
    (B, S, H, D), G = q.shape, k.shape[2]
    q, k, v, dout = (aligned(x) for x in (q, k, v, dout))
    dlse = None if dlse is None else dlse.contiguous()
    problem = Problem(causal, window, starts, softcap, scale)
    config = backward_config(_kind(problem, H, G), D, deterministic)
    # Tile after tile of queries: LSE, delta, and with documents starts.
    shape = B, H, cdiv(S, QUERIES), config.row_stats // QUERIES, QUERIES
    row_stats = torch.empty(shape, dtype=torch.float32, device=q.device)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    compute = _dkdv_then_dq if D > 128 else _fused
    with torch.cuda.device_of(q):
        compute(config, problem, scale, (q, k, v, dout), (out, lse, dlse), row_stats, (dq, dk, dv))
    dsinks = None
    if sinks is not None and wanted[3]:
        dsinks = dsinks_of(sinks, lse, row_stats[:, :, :, 1].flatten(2)[:, :, :S])
    return dq, dk, dv, dsinks, None


def _preprocess(
    config: Backward, problem: Problem, dout: Tensor, outputs: Outputs, S_k: int, row_stats: Tensor,
    accum: Tensor | None = None, counters: tuple[Tensor | None, ...] = (None,) * 3, n_accumulators: int = 0,
    n_heads: int = 0,
) -> Tensor | None:  # fmt: skip
    """The rows' statistics, and where dQ is accumulated in memory the accumulators and counters for that, cleared.

    Returns the queries that see each tile of keys (`queries_by_starts`), where there are documents.
    """
    out, lse, dlse = outputs
    (B, S, H, _), query_tiles = out.shape, row_stats.shape[2]
    ends = None
    if problem.starts is not None:
        ends = torch.empty(B, cdiv(S_k, config.n), 2, dtype=torch.int32, device=out.device)
    launch(
        preprocess_kernel, B * H * query_tiles,
        plain_rows(out, QUERIES), plain_rows(dout, QUERIES), lse, dlse, problem.starts, row_stats, ends, accum,
        *counters, S, S_k, query_tiles, n_accumulators, n_heads, H=H, M=QUERIES, N=config.n, D=config.width,
        SUMMED=sum(config.dq_columns), ROW_STATS=config.row_stats,
    )  # fmt: skip
    return ends


def _fused(
    config: Backward, problem: Problem, scale: float, inputs: Tensors, outputs: Outputs, row_stats: Tensor,
    gradients: Tensors,
) -> None:  # fmt: skip
    (q, k, v, dout), (dq, dk, dv) = inputs, gradients
    (B, S, H, _), S_k, G = q.shape, k.shape[1], k.shape[2]
    query_tiles, n_tiles = cdiv(S, QUERIES), cdiv(S_k, config.n)
    n_work_tiles = n_tiles * B * G
    programs = min(n_work_tiles, _multiprocessors(q.device))
    lag, count, interleaved = accumulator_plan(config, B * G, n_tiles, programs)
    n_accumulators = count * H // G * query_tiles  # of a tile of queries each
    accum = torch.empty(n_accumulators * QUERIES * sum(config.dq_columns), dtype=torch.float32, device=q.device)
    added, cleared = (torch.empty(B * G, dtype=torch.int32, device=q.device) for _ in range(2))
    semaphores = torch.empty(B * H * query_tiles, dtype=torch.int32, device=q.device) if config.deterministic else None
    row, chunk_columns = CHUNK_ROW.value, CHUNK_COLUMNS.value
    accum_rows = (floats(accum, QUERIES * columns // row, row) for columns in config.dq_columns)
    counters = added, cleared, semaphores
    ends = _preprocess(config, problem, dout, outputs, S_k, row_stats, accum, counters, n_accumulators, B * G)
    sorted_tiles = None
    if ends is not None and not config.deterministic:  # there dQ is summed in the order of the keys
        sorted_tiles = torch.empty(B, n_tiles, dtype=torch.int32, device=q.device)
        launch(
            sort_kernel, B * cdiv(n_tiles, SORT_CHUNK),
            ends, sorted_tiles, S_k - S, n_tiles, N=config.n, CHUNK=SORT_CHUNK, CAUSAL=config.causal,
        )  # fmt: skip
    launch(
        backward_kernel, programs if config.persistent else n_work_tiles + lag * n_tiles,
        rows(q, QUERIES), rows(k, config.n), rows(v, config.n), rows(dout, QUERIES),
        floats(row_stats, config.row_stats), *accum_rows, floats(accum, QUERIES * chunk_columns // row, row),
        rows(dq, QUERIES, chunk_columns), rows(dk, config.n), rows(dv, config.n), accum, ends, sorted_tiles,
        queue_counter(q.device), *counters, count, lag, n_work_tiles, n_tiles, interleaved, S, S_k, *problem.scalars,
        scale, CONFIG=config,
    )  # fmt: skip


def _dkdv_then_dq(
    config: Backward, problem: Problem, scale: float, inputs: Tensors, outputs: Outputs, row_stats: Tensor,
    gradients: Tensors,
) -> None:  # fmt: skip
    (q, k, v, dout), (dq, dk, dv) = inputs, gradients
    (B, S, H, _), S_k, G = q.shape, k.shape[1], k.shape[2]
    n_tiles, m_tiles = cdiv(S_k, config.n), cdiv(cdiv(S, QUERIES), CONSUMERS.value)
    tiles = rows(q, QUERIES), rows(k, config.n), rows(v, config.n), rows(dout, QUERIES)
    work_tiles = (SPLIT_WAVES_DOCUMENTS if config.starts else SPLIT_WAVES) * _multiprocessors(q.device)
    ends = _preprocess(config, problem, dout, outputs, S_k, row_stats)
    launch(
        dkdv_kernel, n_tiles * B * G,
        *tiles, floats(row_stats, config.row_stats), rows(dk, config.n), rows(dv, config.n), ends,
        n_tiles, log_interleaved(config, B * G, n_tiles, work_tiles), S, S_k, *problem.scalars, scale, CONFIG=config,
    )  # fmt: skip
    launch(
        dq_kernel, m_tiles * B * H,
        *tiles, rows(dq, QUERIES), row_stats, problem.starts,
        m_tiles, log_interleaved(config, B * G, m_tiles * config.group, work_tiles), S, S_k, *problem.scalars, scale,
        CONFIG=config,
    )  # fmt: skip


def _kind(problem: Problem, H: int, G: int) -> Kind:
    flags = problem.flags
    return Kind(H, H // G, flags["CAUSAL"], flags["WINDOW"], flags["STARTS"], flags["SOFTCAP"])


@cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
