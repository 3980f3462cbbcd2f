"""Flash attention for Hopper (sm_90) in Gluon: the contract of portable/, for 16-bit inputs, at the card's speed.

`forward` and `backward` launch the kernels. Read forward_pass.py first, then backward_pass.py; each opens with a
picture of its warps. What they stand on:

    config.py           tile sizes, stages and registers, with the figures that chose them
    scheduler.py        which work tile a program computes, and when
    pipeline.py         barriers, channels, TMA
    split_d.py          tiles in parts of head_dim: products and what is done to their results
    padding.py          values of padding tokens, read as 0
    mask.py             who sees whom; ../intervals.py and ../scores.py, shared with the portable kernels
    softmax.py          the forward's softmax, which seldom looks for a maximum
    softcap.py          the soft cap's tanh
    key_tiles.py        a work tile of the backward, and the queries that see it
    dq_accumulator.py   how dQ is summed over tiles of keys
    backward_split.py   the backward above head_dim 128
    preprocess.py       row statistics and cleared memory, before the backward
    compiler.py         what the code does for the compiler's sake
    launches.py         what a call launches, found once for each kind of call
    host.py             a launch, tensor descriptors, scratch memory
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..problem import aligned, dsinks_of
from . import host
from .host import pointer
from .launches import Call, backward_launches, forward_launch


def forward(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, ends: Tensor | None, sinks: Tensor | None,
    slopes: None = None, *, causal: bool, window: int | None, softcap: float, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out and LSE, as `portable.forward`, of inputs against which `op.hopper_lacks` says nothing."""
    q, k, v = aligned(q), aligned(k), aligned(v)
    call = Call(
        q.device, q.dtype, q.shape, k.shape, v.shape, (q.stride(), k.stride(), v.stride()),
        starts is not None, ends is not None, causal, window, softcap, scale,
        sinks=None if sinks is None else sinks.dtype,
    )  # fmt: skip
    B, S, H, _ = q.shape
    out = torch.empty(B, S, H, v.shape[3], dtype=q.dtype, device=q.device)
    lse = torch.empty(B, H, S, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        forward_launch(call)(
            q, k, v, out, lse, pointer(starts), pointer(ends), pointer(sinks), host.queue_counter(q.device)
        )
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
    queries of 280 to 570 tiles of 128 keys (more with documents), whatever B and H are, and for those of two key heads
    at least. Above, there are none, and dq is always the same.
    """
    q, k, v, dout, out = aligned(q), aligned(k), aligned(v), aligned(dout), aligned(out)
    dlse = None if dlse is None else dlse.contiguous()
    call = Call(
        q.device, q.dtype, q.shape, k.shape, v.shape, (q.stride(), k.stride(), v.stride(), dout.stride(), out.stride()),
        starts is not None, ends is not None, causal, window, softcap, scale,
        dlse=dlse is not None, deterministic=deterministic,
    )  # fmt: skip
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    launches = backward_launches(call)
    memory, scratch = launches.scratch.allocate(q.device)
    with torch.cuda.device_of(q):
        launches.run(
            q, k, v, dout, out, pointer(lse), pointer(dlse), pointer(starts), pointer(ends), dq, dk, dv, *scratch
        )
    dsinks = None
    if sinks is not None and wanted[3]:
        dsinks = dsinks_of(sinks, lse, launches.delta(memory))
    return dq, dk, dv, dsinks, None
