"""Is it right? What an implementation must give for random inputs, and how far it may be off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from kernels import attention as reference
from kernels import starts_from_cu_seqlens

from .cases import Case


@dataclass
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    starts: Tensor | None

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v


def make_inputs(case: Case, device: torch.device) -> Inputs:
    torch.manual_seed(0)
    B, S, D = case.batch, case.seq_len, case.head_dim
    options: dict[str, Any] = {"dtype": getattr(torch, case.dtype), "device": device}
    q, k, v = (torch.randn(B, S, h, D, **options, requires_grad=True) for h in (case.heads, *[case.kv_heads] * 2))
    starts = None
    if case.documents:
        offsets = torch.tensor([0, *accumulate(case.documents)], dtype=torch.int32, device=device)
        starts = starts_from_cu_seqlens(offsets, S).expand(B, S).contiguous()
    return Inputs(q, k, v, torch.randn(B, S, case.heads, D, **options), starts)


MOST_SCORES = 2**28  # that are checked in full: 2 GiB in float64
SAMPLE = 128


def checked_rows(case: Case) -> list[tuple[int, int]]:
    """The queries [begin, end) that are compared: all of them, or two stretches where that would be slow."""
    S = case.seq_len
    if case.heads // case.kv_heads * S**2 <= MOST_SCORES:
        return [(0, S)]
    middle = S // 2 + 77  # on no tile's edge
    return [(middle - SAMPLE, middle), (S - SAMPLE, S)]


def only_rows(dout: Tensor, rows: list[tuple[int, int]]) -> Tensor:
    """dout, and zero outside these rows: then the rows alone decide all three gradients, at any length."""
    if rows == [(0, dout.shape[1])]:
        return dout
    kept = torch.zeros_like(dout)
    for begin, end in rows:
        kept[:, begin:end] = dout[:, begin:end]
    return kept


def one_group(case: Case, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The last row's last key/value head and its query heads: where a wrong offset is wrong by most."""
    return q[-1:, :, -(case.heads // case.kv_heads) :], k[-1:, :, -1:], v[-1:, :, -1:]


def at_rows(x: Tensor, rows: list[tuple[int, int]]) -> Tensor:
    return torch.cat([x[:, begin:end] for begin, end in rows], 1)


Results = dict[str, Tensor]


def standard(case: Case, inputs: Inputs, dout: Tensor, dtype: torch.dtype) -> Results:
    """Standard attention of one group in this dtype, by the definition: out of the checked rows, and gradients."""
    rows = checked_rows(case)
    leaves = [x.detach().to(dtype).requires_grad_() for x in one_group(case, *inputs.qkv)]
    q, k, v = leaves
    outs = []
    for begin, end in rows:
        keys = end if case.causal else case.seq_len
        starts = None if inputs.starts is None else inputs.starts[-1:, begin:end]
        out = reference(
            q[:, begin:end], k[:, :keys], v[:, :keys], causal=case.causal, window=case.window, starts=starts,
            softcap=case.softcap,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        outs.append(out)
    douts = at_rows(one_group(case, dout, dout, dout)[0], rows).to(dtype)
    grads = torch.autograd.grad(torch.cat(outs, 1), leaves, douts)
    return {"out": torch.cat(outs, 1).detach(), **dict(zip(("dq", "dk", "dv"), grads, strict=True))}


@dataclass
class Check:
    """The truth for these inputs, and the largest error of each tensor that is not wrong, as a share of its norm."""

    dout: Tensor
    truth: Results
    limits: dict[str, float]

    @classmethod
    def of(cls, case: Case, inputs: Inputs) -> Check:
        """The field's rule: at most twice the error of standard attention in the same dtype, both against float64."""
        dout = only_rows(inputs.dout, checked_rows(case))
        truth = standard(case, inputs, dout, torch.float64)
        usual = standard(case, inputs, dout, inputs.q.dtype)
        noise = 16 * torch.finfo(torch.float32).eps * max(x.norm().item() for x in truth.values())
        limits = {name: 2 * error(usual[name], x) + noise / x.norm().item() for name, x in truth.items()}
        return cls(dout, truth, limits)

    def errors(self, case: Case, out: Tensor, grads: Sequence[Tensor]) -> dict[str, float]:
        """Error against float64 by tensor, as a share of the true tensor's norm."""
        results = {"out": at_rows(one_group(case, out, out, out)[0], checked_rows(case))}
        if grads:
            results |= dict(zip(("dq", "dk", "dv"), one_group(case, *grads), strict=True))
        return {name: error(x, self.truth[name]) for name, x in results.items()}

    def complaint(self, errors: dict[str, float]) -> str | None:
        """What is wrong, in words; None when nothing is."""
        for name, size in errors.items():
            if not size <= self.limits[name]:  # NaN is wrong too
                return f"{name} is off by {size / self.limits[name]:.2g} times what is allowed"
        return None


def error(x: Tensor, truth: Tensor) -> float:
    return ((x.detach().double() - truth).norm() / truth.norm()).item()


def poison_free_memory(inputs: Inputs) -> None:
    """NaN where the next outputs will be allocated: what a kernel leaves unwritten shows, and not a peer's results."""
    blocks = [torch.full_like(x, torch.nan) for x in (inputs.q, inputs.q, inputs.k, inputs.v)]
    del blocks
