"""The PyTorch operators `flash_gpt::flash_attention` and its backward: what PyTorch knows about the kernels.

An operator with a fake (shapes without data), a gradient and a FLOP formula is one node to torch.compile, one entry in
a selective-checkpointing policy and one line in FlopCounterMode. The kernels themselves are imported at the first call,
and whether they run on this machine is asked there too: with real tensors, never while tracing.

Registered by torch.library.Library and an autograd.Function, not by torch.library.custom_op: its wrappers take 65 µs
more of the host for a forward and backward pass (docs/kernels/portable.md), and at 1k tokens the GPU waits for them.
"""

from __future__ import annotations

import warnings
from functools import cache
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

IMPLEMENTATIONS = {"triton": ".portable", "hopper": ".hopper"}
PACKAGE = __name__.partition(".")[0]  # kernels, or flash_gpt where it is installed


def forward(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, sinks: Tensor | None,
    causal: bool, window: int | None, softcap: float, scale: float, deterministic: bool, implementation: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse) of inputs that `flash_attention` has checked. Always both: backward, and a checkpoint, need both."""
    return _run(
        "forward", implementation, q, k, v, starts, sinks, causal=causal, window=window, softcap=softcap, scale=scale
    )


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    starts: Tensor | None, sinks: Tensor | None,
    causal: bool, window: int | None, softcap: float, scale: float, deterministic: bool, implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv, dsinks); dsinks has no elements where there are no sinks: an operator returns tensors only."""
    dq, dk, dv, dsinks = _run(
        "backward", implementation, dout, dlse, q, k, v, out, lse, starts, sinks,
        causal=causal, window=window, softcap=softcap, scale=scale,
        deterministic=deterministic or torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return dq, dk, dv, q.new_empty(0) if dsinks is None else dsinks


def _forward_fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    B, S, H, _D = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, S), dtype=torch.float32)


def _backward_fake(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    out: Tensor, lse: Tensor, starts: Tensor | None, sinks: Tensor | None, *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dsinks = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = torch.ops.flash_gpt.flash_attention.default(q, k, v, *inputs)
        starts, sinks, *ctx.options = inputs
        ctx.save_for_backward(q, k, v, out, lse, starts, sinks)
        # An output that the loss does not use gives None, not a tensor of zeros: backward is cheaper without dlse.
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, starts, sinks = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        backward_op = torch.ops.flash_gpt.flash_attention_backward.default
        function = _DifferentiatedOnce.apply if torch.is_grad_enabled() else backward_op
        dq, dk, dv, dsinks = function(dout, dlse, q, k, v, out, lse, starts, sinks, *ctx.options)
        return dq, dk, dv, None, None if sinks is None else dsinks, *(None for _ in ctx.options)


class _DifferentiatedOnce(torch.autograd.Function):
    """Backward where its own gradient may be asked for (create_graph=True), to refuse that in words."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        return torch.ops.flash_gpt.flash_attention_backward.default(*inputs)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise RuntimeError(f"flash_attention is differentiable once; for second derivatives use {PACKAGE}.attention")


# PyTorch counts its own attention kernels so: every query with every key, 2 products forward and 5 backward (the
# scores are computed again). Counting the pairs that a mask lets through would need the values of `starts`, and would
# make the same model cheaper here than with SDPA.
def _forward_flops(q_shape: Any, k_shape: Any, *_: Any, **__: Any) -> int:
    B, S, H, D = q_shape
    return 2 * 2 * B * H * S * k_shape[1] * D


def _backward_flops(dout_shape: Any, dlse_shape: Any, q_shape: Any, k_shape: Any, *_: Any, **__: Any) -> int:
    B, S, H, D = q_shape
    return 5 * 2 * B * H * S * k_shape[1] * D


MASK = (
    "Tensor? starts, Tensor? sinks, bool causal, SymInt? window, float softcap, float scale, bool deterministic, "
    "str implementation"
)
SCHEMAS = {
    "flash_attention": f"(Tensor q, Tensor k, Tensor v, {MASK}) -> (Tensor, Tensor)",
    "flash_attention_backward": "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{MASK}) -> (Tensor, Tensor, Tensor, Tensor)",
}
_library = torch.library.Library("flash_gpt", "FRAGMENT")
if not hasattr(torch.ops.flash_gpt, "flash_attention"):  # imported as kernels and as flash_gpt: the first one's serve
    for name, function, fake, flops in (
        ("flash_attention", forward, _forward_fake, _forward_flops),
        ("flash_attention_backward", backward, _backward_fake, _backward_flops),
    ):
        _library.define(name + SCHEMAS[name], tags=[torch.Tag.pt2_compliant_tag])
        _library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"flash_gpt::{name}", fake, lib=_library)
        register_flop_formula(getattr(torch.ops.flash_gpt, name))(flops)
    _library.impl("flash_attention", _FlashAttention.apply, "Autograd")


FLASH_ATTENTION_OPS = [torch.ops.flash_gpt.flash_attention.default]
"""What selective activation checkpointing should save rather than compute again:
`create_selective_checkpoint_contexts(FLASH_ATTENTION_OPS)` of torch.utils.checkpoint."""


@cache
def why_not_on(device: torch.device) -> str | None:
    """The reason the kernels cannot run on this device of this machine, with a remedy; None when they can."""
    remedy = f"use {PACKAGE}.attention (plain PyTorch, S × S scores in memory)"
    if find_spec("triton") is None:
        return f"flash_attention needs Triton, which is not installed (pip install triton, on Linux); or {remedy}"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            name = torch.cuda.get_device_name(device)
            return f"flash_attention needs compute capability 8.0 or newer; {name} has {major}.{minor}; {remedy}"
        return None
    if device.type == "cpu":
        from .portable import INTERPRETED

        if INTERPRETED:
            return None
        return (
            f"flash_attention runs on CUDA GPUs, not on CPU tensors; {remedy}, "
            "or set TRITON_INTERPRET=1 before Triton is imported (its interpreter: slow, for tests)"
        )
    return f"flash_attention runs on CUDA GPUs, not on {device.type} tensors; {remedy}"


@cache
def choose_implementation(implementation: str, device: torch.device, dtype: torch.dtype) -> str:
    """The implementation that runs such inputs: hopper or triton.

    Raises:
        ValueError: none does, or not the one that was named.
    """
    reason = why_not_on(device)
    if reason is not None:
        raise ValueError(reason)
    if implementation == "triton":
        return implementation
    reason = why_not_hopper(device, dtype)
    if reason is None:
        return "hopper"
    if implementation == "auto":
        return "triton"
    raise ValueError(f"implementation='hopper': {reason}; use implementation='auto' or 'triton'")


def why_not_hopper(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason the Hopper kernels do not run such inputs on this device; None when they do."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "the Hopper kernels need an NVIDIA GPU of compute capability 9.0"
    if (capability := torch.cuda.get_device_capability(device)) != (9, 0):
        name = torch.cuda.get_device_name(device)
        return f"the Hopper kernels need compute capability 9.0; {name} has {capability[0]}.{capability[1]}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"the Hopper kernels compute in float16 and bfloat16, not {dtype}"
    return None


def _run(part: str, implementation: str, *tensors: Any, **options: Any) -> Any:
    """forward or backward, by the kernels that serve these tensors."""
    name = choose_implementation(implementation, tensors[0].device, tensors[0].dtype)
    if name == "hopper" and implementation == "auto":
        if not _gluon_failed:
            try:
                return getattr(_kernels("hopper"), part)(*tensors, **options)
            except _gluon_errors() as error:
                _gluon_failed.append(error)
                said = (str(error).strip().splitlines() or [""])[-1]
                warnings.warn(
                    f"the Hopper kernels do not compile with Triton {version('triton')} "
                    f"({type(error).__name__}: {said}); the portable kernels run instead, slower",
                    stacklevel=2,
                )
        name = "triton"
    return getattr(_kernels(name), part)(*tensors, **options)


_gluon_failed: list[Exception] = []
"""Gluon is experimental: the first error of its compiler, after which `auto` means the portable kernels."""


@cache
def _gluon_errors() -> tuple[type[Exception], ...]:
    """What another version of Triton would raise for the Hopper kernels, and the GPU would not."""
    from triton.errors import TritonError

    return TritonError, ImportError, AttributeError, TypeError


@cache
def _kernels(name: str) -> ModuleType:
    return import_module(IMPLEMENTATIONS[name], __package__)
