"""Flash attention for Hopper (sm_90) in Gluon: the contract of portable.py, for 16-bit inputs, at the card's speed.

`forward` and `backward` launch the kernels of forward_pass.py, backward_pass.py and backward_wide.py.
"""

from __future__ import annotations

from functools import cache, lru_cache

import torch
import triton
from torch import Tensor

from ..problem import Problem, aligned, cdiv, dsinks_of
from .backward_pass import CONSUMERS, Backward, M, backward_kernel, prepare_kernel
from .backward_wide import dkdv_kernel, dq_kernel
from .common import Kind
from .forward_pass import Forward, forward_kernel
from .host import launch, numbers, padded, plain_rows, queue_counter, rows
from .order import sort_kernel

Tensors = tuple[Tensor, ...]
Outputs = tuple[Tensor, Tensor, Tensor | None]


@lru_cache(maxsize=4096)
def forward_config(kind: Kind, head_dim: int, S_k: int, window: int | None) -> tuple[Forward, int]:
    """How to cut the forward pass: the kernel's constants, and the keys in a tile.

    The figures are TFLOP/s on an H100 (bf16, causal, 16k tokens, heads · head_dim = 2048); docs/kernels/hopper.md has
    them all.
    """
    consumers, key_stages, value_stages, n = 2, 2, 3, 128
    if head_dim <= 64:
        key_stages, value_stages = 4, 4
        # Three consumers hide more of the softmax: 641 against 553 at 16k. Rows of 1k waste too much of their tiles of
        # 192 queries: 320 against 350.
        if S_k > 2048:
            consumers = 3
            # Half as many keys in a block waste less at the ends of windows and documents (372 against 317 where the
            # window is 1k), and where blocks are masked half as much code passes through the instruction cache: 377
            # against 284 with documents of 1k.
            if kind.starts or (window is not None and window <= 2048):
                n = 64
    elif head_dim > 128:
        n = 64
    config = Forward(
        **vars(kind), consumers=consumers, query_stages=2 if head_dim <= 128 else 1, key_stages=key_stages,
        value_stages=value_stages, columns=columns_of(head_dim),
    )  # fmt: skip
    return config, n


def log_mixed(kind: Kind, n_groups: int, group_items: int, items: int) -> int:
    """How many of the last groups of heads `Order` mixes, as a power of two: those with about so many items. One, which
    changes nothing, where all tiles are as long."""
    groups = min(items // group_items, n_groups) if kind.causal and not kind.window else 1
    return max(groups, 1).bit_length() - 1


@lru_cache(maxsize=4096)
def sums_plan(kind: Kind, n_heads: int, n_tiles: int, programs: int) -> tuple[int, int, int]:
    """(lag, count, log_mixed) of `Places` and `Order`, for so many key heads with so many tiles of keys each.

    A head is complete once as many items have begun after it as run at a time; with a causal mask a few more, since its
    first ones take longest, and with documents still more, since any of them may. Mixed heads all need places, and
    nobody may wait for a head that is mixed with its own.
    """
    mixed = log_mixed(kind, n_heads, n_tiles, 2 * programs if kind.starts else programs)
    # At 1k and 4k, head_dim 128: 312 and 560 with 1.6, 320 and 550 with 1.2. With 1, head_dim 64, 1k: 305, not 335.
    # Documents of 1k, rows of 16k and 64k: 374 and 326 with 1.3, 419 and 377 with 2, 420 and 377 with 2.5.
    rounds = 2.5 if kind.starts else 1.3 if kind.causal else 1
    items = int(rounds * programs)
    lag = min(max(1 + (items + n_tiles // 2) // n_tiles, 2**mixed), n_heads)
    return lag, min(lag + 2**mixed + programs // n_tiles, n_heads), mixed


def columns_of(head_dim: int) -> tuple[int, ...]:
    """The parts of head_dim in powers of two: see parts.py."""
    whole = padded(head_dim)
    rest = max(whole // 8, triton.next_power_of_2(head_dim - whole // 2))
    return (whole // 2, rest) if head_dim > 64 and rest < whole // 2 else (whole,)


@lru_cache(maxsize=4096)
def backward_config(kind: Kind, head_dim: int, deterministic: bool) -> Backward:
    """How to cut the backward pass: see the fields of `Backward`."""
    small, wide = head_dim <= 64, head_dim > 128
    return Backward(
        **vars(kind), columns=columns_of(head_dim), width=padded(head_dim), n=64 if wide else 128, stages=2,
        key_stages=2 if small else 1, chunk_stages=4 if small else 3,
        keys_in_registers=small, persistent=small, deterministic=deterministic and not wide,
        staggered=not (kind.causal or deterministic or wide),
    )  # fmt: skip


def forward(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, sinks: Tensor | None, *,
    causal: bool, window: int | None, softcap: float, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out and LSE, as `portable.forward`."""
    (B, S, H, D), S_k, G = q.shape, k.shape[1], k.shape[2]
    q, k, v = aligned(q), aligned(k), aligned(v)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, H, S, dtype=torch.float32, device=q.device)
    problem = Problem(causal, window, starts, softcap, scale)
    config, n = forward_config(_kind(problem, H, G), D, S_k, window)
    n_tiles = cdiv(S, 64 * config.consumers)
    n_items = n_tiles * B * H
    multiprocessors = _multiprocessors(q.device)
    # Documents make tiles long and short in any order: of 1k, head_dim 64, 387 instead of 377.
    items = (6 if config.starts else 1.5) * multiprocessors
    mixed = log_mixed(config, B * G, n_tiles * config.group, int(items))
    with torch.cuda.device_of(q):
        launch(
            forward_kernel, min(n_items, multiprocessors),
            rows(q, 64), rows(k, n), rows(v, n), rows(out, 64), lse, problem.starts, sinks, queue_counter(q.device),
            n_items, n_tiles, mixed, S, S_k, *problem.scalars, CONFIG=config,
        )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    starts: Tensor | None, sinks: Tensor | None, *, causal: bool, window: int | None, softcap: float, scale: float,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """dq, dk, dv and dsinks, as `portable.backward`; without `deterministic` the last bits of dq differ between runs.

    With head_dim up to 128, dq is summed in float32, which takes memory while it runs: for the queries of some 450
    tiles of 128 keys (900 with documents), whatever B and H are, and for those of three key heads at least. Above, dq
    is never summed in memory, and always the same.
    """
    (B, S, H, D), G = q.shape, k.shape[2]
    q, k, v, dout = (aligned(x) for x in (q, k, v, dout))
    dlse = None if dlse is None else dlse.contiguous()
    problem = Problem(causal, window, starts, softcap, scale)
    config = backward_config(_kind(problem, H, G), D, deterministic)
    # Tile after tile: numbers of its rows.
    shape = B, H, cdiv(S, M.value), config.numbers // M.value, M.value
    statistics = torch.empty(shape, dtype=torch.float32, device=q.device)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    compute = _dkdv_then_dq if D > 128 else _fused
    with torch.cuda.device_of(q):
        compute(config, problem, scale, (q, k, v, dout), (out, lse, dlse), statistics, (dq, dk, dv))
    dsinks = None
    if sinks is not None:
        dsinks = dsinks_of(sinks, lse, statistics[:, :, :, 1].flatten(2)[:, :, :S])
    return dq, dk, dv, dsinks


def _prepare(
    config: Backward, problem: Problem, dout: Tensor, outputs: Outputs, S_k: int, statistics: Tensor,
    sums: Tensor | None = None, counts: tuple[Tensor | None, ...] = (None,) * 3, n_places: int = 0, n_heads: int = 0,
) -> Tensor | None:  # fmt: skip
    """The rows' statistics, and where dQ is summed in memory the places and counts for that.

    Returns the rows that see each tile of keys (`queries_by_starts`), where there are documents.
    """
    out, lse, dlse = outputs
    (B, S, H, _), query_tiles = out.shape, statistics.shape[2]
    ends = None
    if problem.starts is not None:
        ends = torch.empty(B, cdiv(S_k, config.n), 2, dtype=torch.int32, device=out.device)
    launch(
        prepare_kernel, B * H * query_tiles,
        plain_rows(out, M.value), plain_rows(dout, M.value), lse, dlse, problem.starts, statistics, ends, sums, *counts,
        S, S_k, query_tiles, n_places, n_heads, H=H, M=M.value, N=config.n, D=config.width,
        SUMMED=sum(config.shares), NUMBERS=config.numbers,
    )  # fmt: skip
    return ends


def _fused(
    config: Backward, problem: Problem, scale: float, inputs: Tensors, outputs: Outputs, statistics: Tensor,
    gradients: Tensors,
) -> None:  # fmt: skip
    (q, k, v, dout), (dq, dk, dv) = inputs, gradients
    (B, S, H, _), S_k, G = q.shape, k.shape[1], k.shape[2]
    query_tiles, n_tiles = cdiv(S, M.value), cdiv(S_k, config.n)
    n_items = n_tiles * B * G
    programs = min(n_items, _multiprocessors(q.device))
    lag, places, mixed = sums_plan(config, B * G, n_tiles, programs)
    n_places = places * H // G * query_tiles
    sums = torch.empty(n_places * M.value * sum(config.shares), dtype=torch.float32, device=q.device)
    added, cleared = (torch.empty(B * G, dtype=torch.int32, device=q.device) for _ in range(2))
    turns = torch.empty(B * H * query_tiles, dtype=torch.int32, device=q.device) if config.deterministic else None
    sum_rows = (numbers(sums, M.value * columns // 32, 32) for columns in config.shares)
    counts = added, cleared, turns
    ends = _prepare(config, problem, dout, outputs, S_k, statistics, sums, counts, n_places, B * G)
    sorted_tiles = None
    if ends is not None and not config.deterministic:  # turns are in the order of the keys
        sorted_tiles = torch.empty(B, n_tiles, dtype=torch.int32, device=q.device)
        launch(
            sort_kernel, B * cdiv(n_tiles, 64),
            ends, sorted_tiles, S_k - S, n_tiles, N=config.n, CHUNK=64, CAUSAL=config.causal,
        )  # fmt: skip
    launch(
        backward_kernel, programs if config.persistent else n_items + lag * n_tiles,
        rows(q, M.value), rows(k, config.n), rows(v, config.n), rows(dout, M.value),
        numbers(statistics, config.numbers), *sum_rows, numbers(sums, 32, 32), rows(dq, M.value, 16),
        rows(dk, config.n), rows(dv, config.n), sums, ends, sorted_tiles, queue_counter(q.device), *counts,
        places, lag, n_items, n_tiles, mixed, S, S_k, *problem.scalars, scale, CONFIG=config,
    )  # fmt: skip


def _dkdv_then_dq(
    config: Backward, problem: Problem, scale: float, inputs: Tensors, outputs: Outputs, statistics: Tensor,
    gradients: Tensors,
) -> None:  # fmt: skip
    (q, k, v, dout), (dq, dk, dv) = inputs, gradients
    (B, S, H, _), S_k, G = q.shape, k.shape[1], k.shape[2]
    query_tiles = cdiv(S, M.value)
    n_tiles, m_tiles = cdiv(S_k, config.n), cdiv(query_tiles, CONSUMERS.value)
    tiles = rows(q, M.value), rows(k, config.n), rows(v, config.n), rows(dout, M.value)
    # Nothing is summed in memory, so there is room to mix more.
    items = (16 if config.starts else 4) * _multiprocessors(q.device)
    ends = _prepare(config, problem, dout, outputs, S_k, statistics)
    launch(
        dkdv_kernel, n_tiles * B * G,
        *tiles, numbers(statistics, config.numbers), rows(dk, config.n), rows(dv, config.n), ends,
        n_tiles, log_mixed(config, B * G, n_tiles, items), S, S_k, *problem.scalars, scale, CONFIG=config,
    )  # fmt: skip
    launch(
        dq_kernel, m_tiles * B * H,
        *tiles, rows(dq, M.value), statistics, problem.starts,
        m_tiles, log_mixed(config, B * G, m_tiles * config.group, items), S, S_k, *problem.scalars, scale,
        CONFIG=config,
    )  # fmt: skip


def _kind(problem: Problem, H: int, G: int) -> Kind:
    flags = problem.flags
    return Kind(H, H // G, flags["CAUSAL"], flags["WINDOW"], flags["STARTS"], flags["SOFTCAP"])


@cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
