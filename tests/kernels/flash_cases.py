"""Cases for the tests of flash attention, on a CPU and on a GPU, and the rule of `kernels.flash_attention.testing` that
they are judged by."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kernels.flash_attention.testing import (
    Results,
    assert_rows_within_twice,
    assert_within_twice,
    expected_rounding,
    random_starts,
)
from kernels.reference import attention as reference

DOCUMENTS: dict[str, Callable[[int, int], Tensor]] = {
    "short": lambda B, S: random_starts(B, S, 0.5),
    "long": lambda B, S: random_starts(B, S, 0.02),
    # Edges of documents on the edges of tiles.
    "of-64": lambda B, S: (torch.arange(S) // 64 * 64).int().expand(B, S),
    # The three queries before each document have its start already, so with a causal mask they see nothing.
    "gaps": lambda B, S: random_starts(B, S + 3, 0.04)[:, 3:],
}
LAYOUTS = ("contiguous", "fused", "heads-first", "misaligned")


@dataclass(frozen=True)
class Case:
    """One call of flash_attention: S queries, the last of S + extra_keys positions."""

    S: int
    D: int = 64
    B: int = 2
    heads: tuple[int, int] = (2, 1)
    extra_keys: int = 0
    causal: bool = True
    window: int | None = None
    documents: str | None = None
    softcap: float = 0.0
    scale: float | None = None
    sinks: bool = False
    alibi: bool = False
    ends: bool = False
    """Of the keys that each query sees: where its document ends, if there are documents, else anywhere."""
    D_v: int | None = None
    """D where None."""
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"

    def __str__(self) -> str:
        defaults = vars(Case(0))
        told = {name: value for name, value in vars(self).items() if value != defaults[name]}
        return " ".join(f"{name}={value}" for name, value in told.items()).replace("torch.", "")


@dataclass(frozen=True)
class Inputs:
    """q, k, v and then sinks and slopes if there are any; options to call with; gradients of the outputs by name."""

    tensors: list[Tensor]
    options: dict[str, Any]
    grads: dict[str, Tensor]
    by_head: tuple[str, ...] = ()
    """Names of the tensors after v."""

    def double(self) -> Inputs:
        grads = {name: x.double() for name, x in self.grads.items()}
        return replace(self, tensors=[x.double() for x in self.tensors], grads=grads)


def make(case: Case, device: str = "cpu") -> Inputs:
    """The same random inputs whenever it is called; q is large enough for some keys to win."""
    torch.manual_seed(0)
    (H, G), S_k = case.heads, case.S + case.extra_keys
    starts = DOCUMENTS[case.documents](case.B, S_k)[:, -case.S :].to(device) if case.documents else None
    (q,) = _laid_out(case, device, case.S, case.D, H)
    k, v = _laid_out(case, device, S_k, case.D, G, G)
    if case.D_v is not None:
        (v,) = _laid_out(case, device, S_k, case.D_v, G)
    sinks = {"sinks": torch.randn(H, device=device)} if case.sinks else {}
    options = {name: getattr(case, name) for name in ("causal", "window", "softcap", "scale")}
    dout = torch.randn(case.B, case.S, H, v.shape[3], device=device).to(case.dtype)
    dlse = torch.randn(case.B, H, case.S, device=device)
    by_head = sinks | ({"alibi_slopes": torch.rand(H, device=device)} if case.alibi else {})
    if case.ends:
        options["ends"] = _ends(starts, case.B, case.S, S_k).to(device)
    tensors = [q.mul_(2), k, v, *by_head.values()]
    return Inputs(tensors, {**options, "starts": starts}, {"out": dout, "lse": dlse}, tuple(by_head))


def _ends(starts: Tensor | None, B: int, S: int, S_k: int) -> Tensor:
    if starts is None:
        return torch.randint(0, S_k + 1, (B, S)).sort(1).values.int()
    # A document ends where the next one starts.
    starts = starts.cpu().contiguous()
    following = torch.searchsorted(starts, starts, right=True)
    return torch.cat([starts, torch.full((B, 1), S_k)], 1).gather(1, following).int()


def copying(case: Case, margin: float, first: int, device: str = "cpu") -> Inputs:
    """Inputs of a head that copies: a query's score with one key is `margin` to `margin` + 1 nats, before a soft cap,
    and 0 with all others.

    Keys `first` to `first` + D − 1 point along one axis each. Queries that do not see theirs attend to all alike.
    """
    inputs = make(case, device)
    q, k = inputs.tensors[:2]
    axes = torch.eye(case.D, device=device)
    lengths = (margin + torch.rand(case.S, device=device)) * math.sqrt(case.D) / 8
    q.copy_((lengths[:, None] * axes[torch.arange(case.S) % case.D])[:, None].expand_as(q))
    k.zero_()[:, first : first + case.D] = 8 * axes[: max(0, k.shape[1] - first), None]
    return inputs


# What a copying head may come with, at a length that the interpreter can do.
COPYING = {
    "full": Case(512, B=1, heads=(1, 1), causal=False),
    "causal": Case(512, B=1, heads=(2, 1)),
    "documents": Case(512, B=2, heads=(1, 1), documents="long"),
    "window": Case(512, B=1, heads=(2, 2), window=300, extra_keys=70),
    "sinks": Case(512, B=1, heads=(2, 1), causal=False, sinks=True),
    "soft cap": Case(512, B=1, heads=(1, 1), softcap=80.0),
}


def _laid_out(case: Case, device: str, S: int, D: int, *heads: int) -> tuple[Tensor, ...]:
    """Tensors (B, S, heads, D) as callers have them."""
    B = case.B
    if case.layout == "fused":  # views of a projection that holds another head besides
        return torch.randn(B, S, sum(heads) + 1, D, device=device).to(case.dtype).split((*heads, 1), dim=2)[:-1]
    if case.layout == "heads-first":
        return tuple(torch.randn(B, h, S, D, device=device).to(case.dtype).transpose(1, 2) for h in heads)
    odd = int(case.layout == "misaligned")  # not on 16 bytes, where TMA could read
    flat = (torch.randn(odd + B * S * h * D, device=device).to(case.dtype)[odd:] for h in heads)
    return tuple(x.view(B, S, h, D) for x, h in zip(flat, heads, strict=True))


def run(
    function: Callable[..., Any], inputs: Inputs, through: tuple[str, ...] = ("out", "lse"), **more: Any
) -> Results:
    """Outputs, and gradients through those named."""
    leaves = [x.detach().requires_grad_() for x in inputs.tensors]
    by_head = dict(zip(inputs.by_head, leaves[3:], strict=True))
    outputs = dict(
        zip(("out", "lse"), function(*leaves[:3], **inputs.options, **by_head, return_lse=True, **more), strict=True)
    )
    gradients = torch.autograd.grad(
        [outputs[name] for name in through], leaves, [inputs.grads[name] for name in through], materialize_grads=True
    )
    names = [f"d{name}" for name in ("q", "k", "v", *inputs.by_head)]
    results = outputs | dict(zip(names, gradients, strict=True))
    return {name: x.detach() for name, x in results.items()}


def check(
    function: Callable[..., Any], inputs: Inputs, through: tuple[str, ...] = ("out", "lse"), **more: Any
) -> tuple[Results, Results]:
    """Compare with float64 and with standard attention in the inputs' dtype, all from the same rounded inputs: each
    tensor, and each of its rows. Returns the function's results and those in float64."""
    truth = run(reference, inputs.double(), through)
    slack = {"dsinks": _sinks_slack(truth, inputs)} if "dsinks" in truth else {}
    ours, standard = run(function, inputs, through, **more), run(reference, inputs, through)
    assert_within_twice(ours, standard, truth, slack)
    assert_rows_within_twice(ours, standard, truth, rounding(inputs, through))
    return ours, truth


def check_rows(function: Callable[..., Any], inputs: Inputs, **more: Any) -> None:
    """Compare row by row alone. Where one key has nearly all the weight, standard attention's gradients are more exact
    than those of a flash attention can be, whose backward begins with the rounded output."""
    truth, ours, standard = (run(f, x, **m) for f, x, m in (
        (reference, inputs.double(), {}), (function, inputs, more), (reference, inputs, {})))  # fmt: skip
    for name, x in ours.items():
        assert not x.isnan().any(), f"{name} has NaN"
    assert_rows_within_twice(ours, standard, truth, rounding(inputs, ("out", "lse")))


def rounding(inputs: Inputs, through: tuple[str, ...]) -> Results:
    """`expected_rounding` of inputs."""
    q, k, v, *others = inputs.double().tensors
    by_head = dict(zip(inputs.by_head, others, strict=True))
    sinks = by_head.pop("sinks", None)
    dout, dlse = (inputs.grads[name].double() if name in through else None for name in ("out", "lse"))
    return expected_rounding(
        q, k, v, sinks, torch.zeros_like(inputs.double().grads["out"]) if dout is None else dout, dlse,
        dtype=inputs.tensors[0].dtype, **inputs.options, **by_head,
    )  # fmt: skip


def _sinks_slack(truth: Results, inputs: Inputs) -> float:
    """What rounding `out` does to the gradient of sinks, −Σ p_sink (out · dout): every flash attention begins its
    backward with the rounded output, where standard attention has p · (dout · v) for each key."""
    p_sink = torch.exp(inputs.tensors[3].double()[:, None] - truth["lse"])
    products = (truth["out"] * inputs.grads["out"].double()).norm(dim=-1).transpose(1, 2)
    return torch.finfo(inputs.tensors[0].dtype).eps * (p_sink * products).norm().item()
