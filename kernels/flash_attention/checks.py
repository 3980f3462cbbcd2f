"""What a caller can get wrong, said once, in plain Python over shapes and dtypes: no value of a tensor is read, so
nothing waits for the GPU, and torch.compile traces it without a break, for any length where it is asked to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

PACKAGE = __name__.partition(".")[0]  # kernels, or flash_gpt where it is installed
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PLAIN = f"use {PACKAGE}.attention (plain PyTorch, S × S scores in memory)"
ROWS, PACKED = "(batch, sequence, heads, head_dim)", "(tokens, heads, head_dim)"
TRANSPOSED = "from PyTorch's (B, H, S, D) use .transpose(1, 2)"
ROWS_FIT = f"(B, S, H, D) for q, (B, S_k, H_kv, D) for k and (B, S_k, H_kv, D_v) for v ({TRANSPOSED})"
PACKED_FIT = "(T, H, D) for q, (T_k, H_kv, D) for k and (T_k, H_kv, D_v) for v"
NUMBERS = (int, float, torch.SymInt, torch.SymFloat)
MOST = 576
"""The largest head_dim: that of latent attention's keys."""


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where it is on, as for PyTorch's own attention: operators are not on its list.
    float64 stays what it is, there and here."""
    device_type = tensors[0].device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):  # autocast does not know meta
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def check_tensor(name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is of type {type(x).__name__}; pass a tensor")


def check_qkv(q: Tensor, k: Tensor, v: Tensor, *, packed: bool = False) -> None:
    """Of rows (B, S, H, D), or `packed` (T, H, D)."""
    if not q.dim() == k.dim() == v.dim() == (3 if packed else 4):
        takes = f": flash_attention_varlen takes packed {PACKED}; for {ROWS} use flash_attention"
        raise ValueError(f"{shapes(q, k, v)}{takes if packed else f' must be {ROWS} each'}")
    (*rows, H, D), (*keys, G, D_k), (*values, G_v, D_v) = q.shape, k.shape, v.shape
    if not (are_same((*keys, G), (*values, G_v)) and (packed or holds(keys[0] == rows[0])) and D_k == D):
        raise ValueError(f"{shapes(q, k, v)} do not fit: {PACKED_FIT if packed else ROWS_FIT}")
    if G == 0 or H % G:
        where = "dimension 1 holds the heads" if packed else f"dimension 2 holds the heads ({TRANSPOSED})"
        raise ValueError(f"{H} query heads are not a multiple of {G} key/value heads; {where}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q is {q.dtype}, k {k.dtype} and v {v.dtype}; cast them to one dtype")
    if not q.device == k.device == v.device:
        raise ValueError(f"q is on {q.device}, k on {k.device} and v on {v.device}; move them to one device")
    if q.dtype not in DTYPES:
        raise ValueError(f"flash_attention computes in float16, bfloat16 and float32, not {q.dtype}; cast q, k and v")
    for head_dim in (D, D_v):
        if head_dim % 8 or not 16 <= head_dim <= MOST:
            raise ValueError(_head_dim_refused(head_dim))
    if q.stride(-1) != 1 or k.stride(-1) != 1 or v.stride(-1) != 1:
        name, x = next((name, x) for name, x in (("q", q), ("k", k), ("v", v)) if x.stride(-1) != 1)
        raise ValueError(f"{name}'s last dimension is not contiguous (strides {x.stride()}); pass {name}.contiguous()")


def _head_dim_refused(head_dim: int) -> str:
    if head_dim > MOST:
        return f"flash_attention takes a head_dim of at most {MOST}, not {head_dim}; {PLAIN}"
    remedy = "pad q, k and v with zeros to the next one, pass scale=1/√(unpadded head_dim) and cut the output"
    return f"flash_attention takes a head_dim that is a multiple of 8 from 16 to {MOST}, not {head_dim}; {remedy}"


def check_causal(causal: Any) -> None:
    if not isinstance(causal, bool):
        raise ValueError(f"causal={causal!r}: use True or False")


def check_window(window: Any) -> None:
    if window is None:
        return
    if isinstance(window, bool) or not isinstance(window, int | torch.SymInt):
        raise ValueError(f"window={window!r}: use an int (of keys, the query's own included), or None for all")
    if window < 1:
        raise ValueError(f"window={window}: a query sees at least itself; use 1 or more, or None for all keys")


def check_scaling(softcap: float, scale: float | None, head_dim: int) -> float:
    """The scale, as a number."""
    if isinstance(scale, Tensor) or isinstance(softcap, Tensor):
        name = "scale" if isinstance(scale, Tensor) else "softcap"
        remedy = "one that is learned multiplies q: q * scale, scale=1.0" if name == "scale" else "it is not learned"
        raise ValueError(f"{name} is a tensor: pass a number, which has no gradient; {remedy}")
    if not (isinstance(softcap, NUMBERS) and 0 <= softcap < math.inf):
        raise ValueError(f"softcap={softcap!r}: use a cap above 0, or 0 for none")
    if scale is None:
        return 1 / math.sqrt(head_dim)
    if not (isinstance(scale, NUMBERS) and 0 < scale < math.inf):
        raise ValueError(
            f"scale={scale!r}: use a number above 0 (pass -q to flip the scores' sign, 0 * q for equal ones)"
        )
    return float(scale)


def check_bounds(name: str, bounds: Tensor, q: Tensor) -> None:
    """`starts` or `ends`."""
    check_tensor(name, bounds)
    B, S = q.shape[:2]
    if not are_same(bounds.shape, (B, S)):
        raise ValueError(
            f"{name} {tuple(bounds.shape)} must be ({B}, {S}), one for each query; "
            f"to use one row for the whole batch pass {name}.expand({B}, {S})"
        )
    if bounds.dtype != torch.int32:
        raise ValueError(f"{name} is {bounds.dtype}; pass {name}.int()")
    if bounds.device != q.device:
        raise ValueError(f"{name} is on {bounds.device}, q on {q.device}; move it with .to(q.device)")


def check_by_head(name: str, x: Tensor, q: Tensor) -> None:
    """`sinks` or `alibi_slopes`."""
    check_tensor(name, x)
    if x.shape != (q.shape[2],):
        what = "logit" if name == "sinks" else "slope"
        raise ValueError(f"{name} {tuple(x.shape)} must be ({q.shape[2]},): one {what} per query head")
    if x.dtype not in DTYPES:
        raise ValueError(f"{name} is {x.dtype}; pass float32, float16 or bfloat16")
    if x.device != q.device:
        raise ValueError(f"{name} is on {x.device}, q on {q.device}; move it with .to(q.device)")


def shapes(q: Tensor, k: Tensor, v: Tensor) -> str:
    return f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}"


def are_same(sizes: Sequence[Any], others: Sequence[Any]) -> bool:
    if not torch.compiler.is_compiling():
        return tuple(sizes) == tuple(others)
    return len(sizes) == len(others) and all(holds(x == y) for x, y in zip(sizes, others, strict=True))


def holds(condition: Any) -> bool:
    """Whether sizes are as they should be. Where PyTorch traces, and sizes come from data, it may not be known: then
    yes, and the traced graph checks it."""
    if not torch.compiler.is_compiling():
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import guard_or_true

    if not guard_or_true(condition):
        return False
    torch._check(condition)
    return True


NO = {
    "dropout_p": "no dropout of weights; drop out what the attention block returns",
    "dropout": "no dropout of weights; drop out what the attention block returns",
    "attn_mask": "no mask as a matrix; describe it by causal, window, starts and ends, or use PyTorch's flex_attention",
    "attn_bias": "no bias as a matrix; use alibi_slopes, or PyTorch's flex_attention with a score_mod",
    "bias": "no bias as a matrix; use alibi_slopes, or PyTorch's flex_attention with a score_mod",
    "is_causal": "another name for it: pass causal",
    "softmax_scale": "another name for it: pass scale",
    "window_size": "another name for it: pass window, the most recent keys that a query sees, itself included",
    "sliding_window": "another name for it: pass window",
    "enable_gqa": "no switch for it: k and v may always have fewer heads than q",
}
"""What callers of flash_attention bring from other functions."""
NO_VARLEN = NO | {
    "starts": "no starts: cu_seqlens says where sequences begin",
    "ends": "no ends: cu_seqlens says where sequences end",
    "attn_mask": "no mask as a matrix; describe it by causal, window, cu_seqlens and cu_seqlens_k",
}


def refuse(function: str, others: dict[str, Any], remedies: dict[str, str]) -> None:
    """Arguments that a function has not."""
    for name in others:
        if name in remedies:
            raise TypeError(f"{name}: {function} has {remedies[name]}")
    raise TypeError(f"{function} has no argument {next(iter(others))!r}")
