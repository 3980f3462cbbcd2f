"""attention=flash: flash-gpt's own Triton kernel."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .base import AttentionBackend, AttentionSpec
from .config import AttentionConfig


class FlashAttention(AttentionBackend):
    """The name is reserved: this version has no Triton kernel yet, and says so instead of running something else."""

    name = "flash"

    @classmethod
    def why_not(cls, spec: AttentionSpec, config: AttentionConfig) -> str | None:
        return "flash-gpt's own Triton kernel is not in this version yet; use attention=auto, sdpa, flex or math"

    def describe(self) -> str:
        raise NotImplementedError

    def prepare(self, starts_BS: Tensor | None, seq_len: int) -> Any:
        raise NotImplementedError

    def __call__(self, q_BSHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, mask: Any) -> Tensor:
        raise NotImplementedError
