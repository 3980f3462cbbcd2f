"""attention=math: the specification, and the baseline that flash attention is measured against."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kernels.reference import attend, visible_pairs

from .base import AttentionBackend


class MathAttention(AttentionBackend):
    """Standard attention with a float32 softmax: two S × S matrices per head are written to memory and read back."""

    name = "math"

    def describe(self) -> str:
        return "plain PyTorch, float32 softmax, S × S scores in memory (the specification)"

    def prepare(self, starts_BS: Tensor | None, seq_len: int, num_keys: int | None = None) -> Tensor:
        spec = self.spec
        options: dict[str, Any] = {"causal": spec.causal, "window": spec.window, "starts": starts_BS}
        return visible_pairs(seq_len, num_keys or seq_len, device=spec.device, **options)

    def __call__(self, q_BSHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, mask: Tensor) -> Tensor:
        spec = self.spec
        out = attend(q_BSHD, k_BSGD, v_BSGD, mask, scale=spec.scale, softcap=spec.softcap)
        assert isinstance(out, Tensor)
        return out
