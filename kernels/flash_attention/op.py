"""The PyTorch operators `flash_gpt::flash_attention` and its backward: what PyTorch knows about the kernels.

An operator with a fake (shapes without data), a gradient and a FLOP formula is one node to torch.compile, one entry in
a selective-checkpointing policy and one line in FlopCounterMode. The kernels themselves are imported at the first call,
and whether they run on this machine is asked there too: with real tensors, never while tracing.

Registered by torch.library.Library and an autograd.Function, not by torch.library.custom_op: its wrappers take 65 µs
more of the host for a forward and backward pass (docs/lab, L6), and at 1k tokens the GPU waits for them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import _SingleLevelFunction

from ..operators import define
from . import batching

IMPLEMENTATIONS = {"triton": ".portable", "hopper": ".hopper"}
PACKAGE = __name__.partition(".")[0]  # kernels, or flash_gpt where it is installed


def forward(
    q: Tensor, k: Tensor, v: Tensor,
    starts: Tensor | None, ends: Tensor | None, sinks: Tensor | None, slopes: Tensor | None,
    causal: bool, window: int | None, softcap: float, scale: float, deterministic: bool, implementation: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse) of inputs that `flash_attention` has checked. Always both: backward, and a checkpoint, need both."""
    if q.numel() == 0 or k.numel() == 0:
        return _attend_to_nothing(q, v, sinks)
    window = _bounding(window, q, k)
    if implementation == "auto" and _are_few(q, k, v, starts, ends, slopes, causal):
        from .decode_kernels import decode

        choose_implementation("triton", q.device, q.dtype)
        out, lse = decode(q, k, v, None, sinks, window=window, softcap=softcap, scale=scale)
        return out, lse.transpose(1, 2).contiguous()
    return _run(
        "forward", implementation, (q, k, v), starts, ends, sinks, slopes,
        causal=causal, window=window, softcap=softcap, scale=scale,
    )  # fmt: skip


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    starts: Tensor | None, ends: Tensor | None, sinks: Tensor | None, slopes: Tensor | None,
    causal: bool, window: int | None, softcap: float, scale: float, deterministic: bool, implementation: str,
    wanted: list[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients of q, k, v, sinks and slopes; None, or for nothing, where one is not `wanted`."""
    if q.numel() == 0 or k.numel() == 0:
        return _gradients_of_nothing(dlse, lse, sinks, q, k, v, slopes)
    gradients: tuple[Tensor | None, ...] = _run(
        "backward", implementation, (dout, dlse, q, k, v, out, lse), starts, ends, sinks, slopes,
        causal=causal, window=_bounding(window, q, k), softcap=softcap, scale=scale,
        deterministic=deterministic or torch.are_deterministic_algorithms_enabled(), wanted=wanted,
    )  # fmt: skip
    return gradients


def _backward_operator(*inputs: Any) -> tuple[Tensor, ...]:
    """`backward`, with tensors without elements where nothing is wanted: an operator returns tensors only."""
    nothing = inputs[2].new_empty(0)
    return tuple(
        x if is_wanted and x is not None else nothing.clone()
        for x, is_wanted in zip(backward(*inputs), inputs[-1], strict=True)
    )


def _bounding(window: int | None, q: Tensor, k: Tensor) -> int | None:
    """The window, and None where it hides nothing; so no position plus window can pass 2³¹. Here, not where inputs are
    checked: a traced graph would else be one for lengths above the window, or below."""
    return None if window is None or window >= max(q.shape[1], k.shape[1]) else window


FEW_QUERIES, MANY_KEYS = 16, 1024


def _are_few(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, ends: Tensor | None, slopes: Tensor | None, causal: bool
) -> bool:
    """Whether too few queries a head keep the GPU busy, so that the decoding kernels, which split the keys, serve."""
    if q.shape[1] > FEW_QUERIES or k.shape[1] < MANY_KEYS:
        return False
    return causal and starts is None and ends is None and slopes is None and q.shape[3] == v.shape[3] <= 256


def _attend_to_nothing(q: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    B, S, H, _ = q.shape
    lse = q.new_full((B, H, S), -torch.inf, dtype=torch.float32)
    if sinks is not None:
        lse.copy_(sinks[:, None])
    return q.new_zeros(B, S, H, v.shape[3]), lse


def _gradients_of_nothing(
    dlse: Tensor | None, lse: Tensor, sinks: Tensor | None, *others: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Of q, k, v, slopes zeros; of sinks what they are to lse alone."""
    from .problem import dsinks_of  # with Triton

    dsinks = None if sinks is None else dsinks_of(sinks, lse, torch.zeros_like(lse) if dlse is None else -dlse)
    dq, dk, dv, dslopes = (None if x is None else torch.zeros_like(x) for x in others)
    return dq, dk, dv, dsinks, dslopes


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    B, S, H, _D = q.shape
    return q.new_empty(B, S, H, v.shape[3]), q.new_empty((B, H, S), dtype=torch.float32)


def _backward_fake(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    starts: Tensor | None, ends: Tensor | None, sinks: Tensor | None, slopes: Tensor | None, *options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(
        x.new_empty(x.shape) if x is not None and is_wanted else q.new_empty(0)
        for x, is_wanted in zip((q, k, v, sinks, slopes), options[-1], strict=True)
    )


def attend(q: Tensor, k: Tensor, v: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
    """The operator `flash_attention`."""
    if _nobody_looks_on(q, k, v):
        return _FlashAttention.apply(q, k, v, *inputs)
    return torch.ops.flash_gpt.flash_attention.default(q, k, v, *inputs)


def differentiate(dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *inputs: Any) -> Any:
    """The operator `flash_attention_backward`: the gradients of q, k, v, sinks and slopes."""
    if not torch.is_grad_enabled() and _nobody_looks_on(dout, q, k, v):
        return backward(dout, dlse, q, k, v, *inputs)
    # A graph of the gradient is wanted (create_graph=True), or may be.
    return torch.ops.flash_gpt.flash_attention_backward.default(dout, dlse, q, k, v, *inputs)


class _OneLevel(_SingleLevelFunction):
    """A function of one level of torch.func's transforms, which `torch.autograd.Function` would take apart itself."""

    apply: ClassVar[Callable[..., Any]]
    _compiled_autograd_key = staticmethod(torch.autograd.Function._compiled_autograd_key)


class _FlashAttention(_OneLevel):
    """Applied below the dispatcher, which has taken torch.func's transforms apart: of each it sees one level alone."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
        if _nobody_looks_on(q, k, v):
            out, lse = forward(q, k, v, *inputs)
        else:
            out, lse = _below_autograd(torch.ops.flash_gpt.flash_attention.default, q, k, v, *inputs)
        starts, ends, sinks, slopes, *ctx.options = inputs
        ctx.save_for_backward(q, k, v, out, lse, starts, ends, sinks, slopes)
        # An output that the loss does not use gives None, not a tensor of zeros: backward is cheaper without dlse.
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, starts, ends, sinks, slopes = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        wants_q, wants_k, wants_v, _, _, wants_sinks, wants_slopes, *others = ctx.needs_input_grad
        wanted = [wants_q, wants_k, wants_v, wants_sinks, wants_slopes]
        gradients = differentiate(dout, dlse, q, k, v, out, lse, starts, ends, sinks, slopes, *ctx.options, wanted)
        dq, dk, dv, dsinks, dslopes = [x if is_wanted else None for x, is_wanted in zip(gradients, wanted, strict=True)]
        return dq, dk, dv, None, None, dsinks, dslopes, *[None] * len(others)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        raise RuntimeError(f"flash_attention has no forward-mode derivative (jvp); use {PACKAGE}.attention")


def _nobody_looks_on(*tensors: Tensor) -> bool:
    """Whether calling what the dispatcher would call shows in nothing but the time: it takes 7 µs for the forward
    operator and 23 for the backward (docs/lab, L20 and L27). It must be asked where a mode, a transform, a tracer or a
    subclass of Tensor listens, or where there is no data."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and {type(x) for x in tensors} == {Tensor}
        and not tensors[0].is_meta
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._is_tracing()
    )


def _below_autograd(operator: Any, *inputs: Any) -> Any:
    """What the operator returns, without a graph on this level of torch.func's transforms, but with those of the outer
    ones, which PyTorch switches off inside of a function's forward."""
    with torch._C._AutoDispatchBelowAutograd():
        if not torch._C._are_functorch_transforms_active():
            return operator(*inputs)
        with torch.enable_grad(), _set_fwd_grad_enabled(True):
            return operator(*inputs)


class _DifferentiatedOnce(_OneLevel):
    """Backward where its own gradient may be asked for (create_graph=True), to refuse that in words."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        return _below_autograd(torch.ops.flash_gpt.flash_attention_backward.default, *inputs)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise RuntimeError(f"flash_attention is differentiable once; for second derivatives use {PACKAGE}.attention")

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        raise RuntimeError(f"flash_attention is differentiable once; for second derivatives use {PACKAGE}.attention")


def _differentiable(function: Any) -> Any:
    """An operator's kernel of the Autograd key: `function.apply`, which under transforms wants PyTorch to be told."""

    def apply(*inputs: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                return function.apply(*inputs)
        return function.apply(*inputs)

    return apply


# PyTorch counts its own attention kernels so: every query with every key, 2 products forward and 5 backward (the
# scores are computed again). Counting the pairs that a mask lets through would need the values of `starts`, and would
# make the same model cheaper here than with SDPA.
def _forward_flops(q_shape: Any, k_shape: Any, v_shape: Any, *_: Any, **__: Any) -> int:
    B, S, H, D = q_shape
    return 2 * B * H * S * k_shape[1] * (D + v_shape[3])


def _backward_flops(
    dout_shape: Any, dlse_shape: Any, q_shape: Any, k_shape: Any, v_shape: Any, *_: Any, **__: Any
) -> int:
    B, S, H, D = q_shape
    return 2 * B * H * S * k_shape[1] * (3 * D + 2 * v_shape[3])


INPUTS = "Tensor? starts, Tensor? ends, Tensor? sinks, Tensor? slopes"
OPTIONS = "bool causal, SymInt? window, float softcap, float scale, bool deterministic, str implementation"
define(
    "flash_attention",
    f"(Tensor q, Tensor k, Tensor v, {INPUTS}, {OPTIONS}) -> (Tensor, Tensor)",
    forward,
    _forward_fake,
    derivative=_differentiable(_FlashAttention),
    vmap=batching.forward,
    flops=_forward_flops,
)
define(
    "flash_attention_backward",
    f"(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {INPUTS}, {OPTIONS}, "
    "bool[5] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_operator,
    _backward_fake,
    derivative=_differentiable(_DifferentiatedOnce),
    vmap=batching.backward,
    flops=_backward_flops,
)


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
def choose_implementation(
    implementation: str, device: torch.device, dtype: torch.dtype, lacking: str | None = None
) -> str:
    """The implementation that runs such inputs: hopper or triton.

    Args:
        lacking: what the Hopper kernels do not compute of what is asked for (`hopper_lacks`).
    Raises:
        ValueError: none does, or not the one that was named.
    """
    reason = why_not_on(device)
    if reason is not None:
        raise ValueError(reason)
    if implementation == "triton":
        return implementation
    reason = why_not_hopper(device, dtype) or lacking
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


def hopper_lacks(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor | None, slopes: Tensor | None, causal: bool
) -> str | None:
    """What the Hopper kernels do not compute of what is asked for; None where they do all of it.

    With a causal mask `ends` only tell which tokens are padding, as packed sequences have them: their starts hide all
    keys from them already.
    """
    (B, S, H, D), S_k = q.shape, k.shape[1]
    if slopes is not None:
        return "the Hopper kernels have no alibi_slopes"
    if ends is not None and not causal:
        return "the Hopper kernels have no ends, as packed sequences need them that are not causal or have keys apart"
    D_v = v.shape[3]
    if D > 256 or (D_v != D and (D, D_v) != (192, 128)):
        return f"the Hopper kernels have one head_dim of at most 256 for q, k and v, or 192 and 128, not {D} and {D_v}"
    if S_k < S:
        return f"the Hopper kernels have no more queries than keys, not {S} and {S_k}"
    if 4 * B * H * (S_k + 192) >= 2**31:  # the backward's statistics: up to four numbers a row, at 32-bit places
        return (
            f"the Hopper kernels have fewer than 2²⁹ rows, with those that fill a tile; {B} × {H} of {S_k} are too many"
        )
    return None


def _run(
    part: str, implementation: str, tensors: tuple[Any, ...], starts: Tensor | None, ends: Tensor | None,
    sinks: Tensor | None, slopes: Tensor | None, **options: Any,
) -> Any:  # fmt: skip
    """forward or backward, by the kernels that serve these tensors."""
    q, k, v = tensors[:3] if part == "forward" else tensors[2:5]
    lacking = hopper_lacks(q, k, v, ends, slopes, options["causal"])
    name = choose_implementation(implementation, q.device, q.dtype, lacking)
    inputs = *tensors, starts, ends, sinks, slopes
    if name == "hopper" and implementation == "auto":
        if not (_gluon_failed or _is_one_sided(options)):
            try:
                return _call("hopper", part, inputs, options)
            except _gluon_errors() as error:
                _gluon_failed.append(error)
                said = (str(error).strip().splitlines() or [""])[-1]
                warnings.warn(
                    f"the Hopper kernels do not compile with Triton {version('triton')} "
                    f"({type(error).__name__}: {said}); the portable kernels run instead, slower",
                    stacklevel=2,
                )
        name = "triton"
    return _call(name, part, inputs, options)


def _is_one_sided(options: dict[str, Any]) -> bool:
    """Whether dq is wanted without dk and dv, or these without dq: the portable kernels compute either alone."""
    wants_q, wants_k, wants_v, *_ = options.get("wanted", (True,) * 3)
    return wants_q != (wants_k or wants_v)


def _call(name: str, part: str, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
    return getattr(_kernels(name), part)(*inputs, **options)


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
