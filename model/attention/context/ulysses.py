"""Each rank attends with some of the heads, to whole rows (DeepSpeed-Ulysses, Jacobs et al. 2023, arXiv:2309.14509).

Shape suffixes beside the backends': N tokens of a row on one rank, P ranks, S = P · N.
"""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

from ..base import AttentionBackend
from .exchange import Exchange, begin_all_to_all, wide


class Ulysses(Exchange):
    """Rank p holds tokens [p·N, (p + 1)·N) of each row, and attends with query heads [p·H/P, (p + 1)·H/P).

    Where P does not divide the key/value heads, each is sent as often as makes it do so; the gradients of all copies
    are summed where the head belongs.
    """

    says = "each attends with its heads to whole rows"

    def lse_shape(self, q_shape: torch.Size) -> tuple[int, ...]:
        B, N, H, _D = q_shape
        return B, H // self.size, N * self.size

    def forward(
        self, inner: AttentionBackend, q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, split: Tensor
    ) -> tuple[Tensor, Tensor]:
        q, k, v = self._by_heads(q, *self._repeated(k, v))
        out, lse = inner.forward(q, k, v, inner.prepare(starts, q.shape[1]))
        (out,) = self._by_tokens(out)
        return out, lse

    def backward(
        self, inner: AttentionBackend, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        starts: Tensor | None, split: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        G = k.shape[2]
        results = [dout, out] if inner.keeps_lse else [dout]  # else nobody reads out
        q, k, v, dout, *outs = self._by_heads(q, *self._repeated(k, v), *results)
        out = outs[0] if outs else out
        grads = inner.backward(dout, q, k, v, out, lse, inner.prepare(starts, q.shape[1]))
        del (
            q,
            k,
            v,
            dout,
            out,
            outs,
        )  # nothing stays longer than it is needed: `exchange_bytes` in model/layer_memory.py
        dq, dk, dv = self._by_tokens(*grads)
        return dq, _summed(dk, G), _summed(dv, G)

    def _repeated(self, *kv: Tensor) -> list[Tensor]:
        """Keys and values with every head as often in a row as makes their number divisible by the ranks'."""
        times = self.size // gcd(kv[0].shape[2], self.size)
        return [x.repeat_interleave(times, dim=2) if times > 1 else x for x in kv]

    def _by_heads(self, *tensors: Tensor) -> list[Tensor]:
        """(B, N, H, D) of all heads → (B, S, H/P, D) of all tokens, in one exchange."""
        P = self.size
        parts = [x.unflatten(2, (P, -1)).permute(2, 1, 0, 3, 4) for x in tensors]
        heads = [part.shape[3] for part in parts]
        received_PNBHD = begin_all_to_all(torch.cat(parts, dim=3), self.group)()
        return list(received_PNBHD.flatten(0, 1).transpose(0, 1).split(heads, dim=2))

    def _by_tokens(self, *tensors: Tensor) -> list[Tensor]:
        """(B, S, H/P, D) of all tokens → (B, N, H, D) of all heads, in one exchange."""
        P = self.size
        parts = [x.unflatten(1, (P, -1)).permute(1, 2, 0, 3, 4) for x in tensors]
        heads = [part.shape[3] for part in parts]
        received_PNBHD = begin_all_to_all(torch.cat(parts, dim=3).contiguous(), self.group)()
        return [part.permute(2, 1, 0, 3, 4).flatten(2, 3) for part in received_PNBHD.split(heads, dim=3)]


def _summed(grad: Tensor, heads: int) -> Tensor:
    """The gradients of each head's copies, added up."""
    if grad.shape[2] == heads:
        return grad
    return grad.unflatten(2, (heads, -1)).sum(3, dtype=wide(grad)).to(grad.dtype)
