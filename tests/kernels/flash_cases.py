"""Cases for the tests of flash attention, on a CPU and on a GPU, and the rule that they are judged by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.reference import attention as reference


def random_starts(B: int, S: int, probability: float) -> Tensor:
    """Each token begins a document with this probability."""
    begins = torch.rand(B, S) < probability
    return torch.where(begins, torch.arange(S), 0).cummax(1).values.int()


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
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"

    def __str__(self) -> str:
        defaults = vars(Case(0))
        told = {name: value for name, value in vars(self).items() if value != defaults[name]}
        return " ".join(f"{name}={value}" for name, value in told.items()).replace("torch.", "")


@dataclass(frozen=True)
class Inputs:
    """q, k, v and, last, sinks if there are any; options to call with; gradients of the outputs by name."""

    tensors: list[Tensor]
    options: dict[str, Any]
    grads: dict[str, Tensor]

    def double(self) -> Inputs:
        return Inputs([x.double() for x in self.tensors], self.options, {n: x.double() for n, x in self.grads.items()})


def make(case: Case, device: str = "cpu") -> Inputs:
    """The same random inputs whenever it is called; q is large enough for some keys to win."""
    torch.manual_seed(0)
    (H, G), S_k = case.heads, case.S + case.extra_keys
    starts = DOCUMENTS[case.documents](case.B, S_k)[:, -case.S :].to(device) if case.documents else None
    (q,) = _laid_out(case, device, case.S, H)
    k, v = _laid_out(case, device, S_k, G, G)
    sinks = [torch.randn(H, device=device)] if case.sinks else []
    options = {name: getattr(case, name) for name in ("causal", "window", "softcap", "scale")}
    dout = torch.randn(case.B, case.S, H, case.D, device=device).to(case.dtype)
    dlse = torch.randn(case.B, H, case.S, device=device)
    return Inputs([q.mul_(2), k, v, *sinks], {**options, "starts": starts}, {"out": dout, "lse": dlse})


def _laid_out(case: Case, device: str, S: int, *heads: int) -> tuple[Tensor, ...]:
    """Tensors (B, S, heads, D) as callers have them."""
    B, D = case.B, case.D
    if case.layout == "fused":  # views of a projection that holds another head besides
        return torch.randn(B, S, sum(heads) + 1, D, device=device).to(case.dtype).split((*heads, 1), dim=2)[:-1]
    if case.layout == "heads-first":
        return tuple(torch.randn(B, h, S, D, device=device).to(case.dtype).transpose(1, 2) for h in heads)
    odd = int(case.layout == "misaligned")  # not on 16 bytes, where TMA could read
    flat = (torch.randn(odd + B * S * h * D, device=device).to(case.dtype)[odd:] for h in heads)
    return tuple(x.view(B, S, h, D) for x, h in zip(flat, heads, strict=True))


Results = dict[str, Tensor]


def run(
    function: Callable[..., Any], inputs: Inputs, through: tuple[str, ...] = ("out", "lse"), **more: Any
) -> Results:
    """Outputs, and gradients through those named."""
    leaves = [x.detach().requires_grad_() for x in inputs.tensors]
    sinks = {"sinks": leaves[3]} if len(leaves) > 3 else {}
    outputs = dict(
        zip(("out", "lse"), function(*leaves[:3], **inputs.options, **sinks, return_lse=True, **more), strict=True)
    )
    gradients = torch.autograd.grad(
        [outputs[name] for name in through], leaves, [inputs.grads[name] for name in through], materialize_grads=True
    )
    results = outputs | dict(zip(("dq", "dk", "dv", "dsinks"), gradients, strict=False))
    return {name: x.detach() for name, x in results.items()}


def check(
    function: Callable[..., Any], inputs: Inputs, through: tuple[str, ...] = ("out", "lse"), **more: Any
) -> tuple[Results, Results]:
    """Compare with float64 and with standard attention in the inputs' dtype, all from the same rounded inputs. Returns
    the function's results and those in float64."""
    truth = run(reference, inputs.double(), through)
    slack = {"dsinks": _sinks_slack(truth, inputs)} if "dsinks" in truth else {}
    ours = run(function, inputs, through, **more)
    assert_within_twice(ours, run(reference, inputs, through), truth, slack)
    return ours, truth


def _sinks_slack(truth: Results, inputs: Inputs) -> float:
    """What rounding `out` does to the gradient of sinks, −Σ p_sink (out · dout): every flash attention begins its
    backward with the rounded output, where standard attention has p · (dout · v) for each key."""
    p_sink = torch.exp(inputs.tensors[3].double()[:, None] - truth["lse"])
    products = (truth["out"] * inputs.grads["out"].double()).norm(dim=-1).transpose(1, 2)
    return torch.finfo(inputs.tensors[0].dtype).eps * (p_sink * products).norm().item()


def assert_within_twice(
    ours: Results, standard: Results, truth: Results, slack: dict[str, float] | None = None
) -> None:
    """The rule of the field: an error of at most twice that of standard attention in the same dtype.

    Where many queries see one key, gradients are differences of equal numbers: standard attention may get exactly 0
    and we a rounding error, so a little float32 noise is allowed beside it.
    """
    size = max(_finite(x).norm().item() for x in truth.values())
    noise = 16 * torch.finfo(torch.float32).eps * size
    for name, exact in truth.items():
        got = ours[name]
        assert got.shape == exact.shape, name
        assert not got.isnan().any(), f"{name} has NaN"
        assert (got.isinf() == exact.isinf()).all(), f"{name} is infinite elsewhere"
        error, allowed = ((_finite(x) - _finite(exact)).norm().item() for x in (got, standard[name]))
        limit = 2 * allowed + noise + (slack or {}).get(name, 0.0)
        assert error <= limit, f"{name}: error {error:.2e}, standard attention's is {allowed:.2e} (limit {limit:.2e})"


def _finite(x: Tensor) -> Tensor:
    return x.double().masked_fill(x.isinf(), 0)
