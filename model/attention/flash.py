"""attention=flash: flash-gpt's own kernels, which read the interval of keys that a query sees and nothing else."""

from __future__ import annotations

from torch import Tensor

from kernels import flash_attention
from kernels.flash_attention.config import choose_tiles

from .base import AttentionBackend


class FlashAttention(AttentionBackend):
    name = "flash"

    def describe(self) -> str:
        spec = self.spec
        if spec.capability is None:
            return "Triton's interpreter: exact and very slow, for tests"
        tiles = {}
        for kernel in ("forward", "dq", "dkdv"):
            chosen = choose_tiles(
                kernel,
                spec.head_dim,
                spec.capability,
                float32=spec.dtype == "float32",
                causal=spec.causal,
                local=spec.window is not None or spec.masks_documents,
                softcap=spec.softcap > 0,
            )
            tiles[kernel] = f"{chosen.m} × {chosen.n}"
        return (
            f"flash-gpt's Triton kernels; forward in tiles of {tiles['forward']} (queries × keys), "
            f"dQ {tiles['dq']}, dK/dV {tiles['dkdv']}"
        )

    def prepare(self, starts_BS: Tensor | None, seq_len: int) -> Tensor | None:
        return starts_BS

    def __call__(self, q_BSHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, mask: Tensor | None) -> Tensor:
        spec = self.spec
        out = flash_attention(
            q_BSHD,
            k_BSGD,
            v_BSGD,
            causal=spec.causal,
            window=spec.window,
            starts=mask,
            softcap=spec.softcap,
            scale=spec.scale,
        )
        assert isinstance(out, Tensor)
        return out
