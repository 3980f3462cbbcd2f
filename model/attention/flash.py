"""attention=flash: flash-gpt's own kernels, which read the interval of keys that a query sees and nothing else."""

from __future__ import annotations

from contextlib import suppress
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from kernels import flash_attention, flash_attention_backward, flash_decode
from kernels.flash_attention.config import choose_tiles

from .base import AttentionBackend
from .config import AttentionConfig, FlashConfig, has_hopper_kernels
from .spec import AttentionSpec

SHORT_ROW = 4096
"""Tokens of a row for which the kernels are those of all longer rows."""


class FlashAttention(AttentionBackend):
    """flash-gpt's kernels; the mask is `starts` itself, or None without documents."""

    name = "flash"
    decodes_with = "flash-gpt's decoding kernel"
    keeps_lse = True

    def __init__(self, spec: AttentionSpec, config: AttentionConfig) -> None:
        super().__init__(spec, config)
        assert isinstance(config, FlashConfig)
        self.implementation = config.implementation
        self._compiling: Thread | None = None

    def describe(self) -> str:
        spec = self.spec
        if spec.capability is None:
            return "Triton's interpreter: exact and very slow, for tests"
        if self.implementation == "triton" or not has_hopper_kernels(spec):
            return f"flash-gpt's portable Triton kernels; {self._tiles()}"
        return "flash-gpt's Hopper kernels"

    def _tiles(self) -> str:
        """Queries × keys in a tile of each of the portable kernels."""
        spec = self.spec
        assert spec.capability is not None
        described = []
        for kernel, name in {"forward": "forward", "dq": "dQ", "dkdv": "dK/dV"}.items():
            tiles = choose_tiles(
                kernel,
                spec.head_dim,
                spec.capability,
                float32=spec.dtype == "float32",
                causal=spec.causal,
                local=spec.window is not None or spec.masks_documents,
                softcap=spec.softcap > 0,
            )
            described.append(f"{name} {tiles.m} × {tiles.n}")
        return f"tiles of queries × keys: {', '.join(described)}"

    def compile_ahead(self) -> None:
        if self.spec.capability is not None:
            self._compiling = Thread(target=self._compile, daemon=True)
            self._compiling.start()

    def _compile(self) -> None:
        """Call the kernels once with a row that is short and in all else like the run's, so that Triton has them."""
        spec = self.spec
        S = min(spec.seq_len, SHORT_ROW + spec.seq_len % 16)  # as divisible by 16 as the run's
        heads = (spec.n_heads, spec.n_kv_heads, spec.n_kv_heads)
        options = {"dtype": getattr(torch, spec.dtype), "device": spec.device, "requires_grad": True}
        starts = torch.zeros(1, S, dtype=torch.int32, device=spec.device) if spec.masks_documents else None
        with suppress(Exception):  # whatever is wrong is said where the run itself calls them
            qkv = torch.zeros(1, S, sum(heads), spec.head_dim, **options)
            q, k, v = qkv.split(heads, dim=2)
            self(q.contiguous(), k.contiguous(), v, starts).sum().backward()

    def prepare(self, starts_BS: Tensor | None, seq_len: int, num_keys: int | None = None) -> Tensor | None:
        if self._compiling:
            self._compiling.join()
            self._compiling = None
        return starts_BS

    def __call__(self, q_BSHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, mask: Tensor | None) -> Tensor:
        out, _ = self.forward(q_BSHD, k_BSGD, v_BSGD, mask)
        return out

    def forward(self, q_BSHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        result = flash_attention(q_BSHD, k_BKGD, v_BKGD, starts=mask, return_lse=True, **self._options())
        assert isinstance(result, tuple)
        return result

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return flash_attention_backward(dout, q, k, v, out, lse, starts=mask, **self._options())

    def _options(self) -> dict[str, Any]:
        spec = self.spec
        options = {"causal": spec.causal, "window": spec.window, "softcap": spec.softcap, "scale": spec.scale}
        return options | {"implementation": self.implementation}

    def prepare_decode(self, lengths_B: Tensor, seq_len: int, capacity: int) -> Tensor:
        return lengths_B

    def decode(self, q_BSHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor, mask: Tensor) -> Tensor:
        spec = self.spec
        out = flash_decode(q_BSHD, k_BKGD, v_BKGD, mask, window=spec.window, softcap=spec.softcap, scale=spec.scale)
        assert isinstance(out, Tensor)
        return out
