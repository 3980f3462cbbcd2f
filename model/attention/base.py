"""The attention contract: one description of what to compute, many backends that compute exactly that.

Shape suffixes, here and in the backends: B batch, S sequence, H query heads, G key/value heads, D head dimension.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .config import AttentionConfig


@dataclass(frozen=True)
class AttentionSpec:
    """Everything a backend must know to say, before training starts, whether it can honour it.

    A query t sees the keys s with max(starts[t], t − window + 1) ≤ s ≤ t: causal attention, a sliding window and packed
    documents are all one interval, whose left end never moves back.
    """

    n_heads: int
    n_kv_heads: int
    head_dim: int
    seq_len: int
    device: torch.device
    dtype: torch.dtype
    """What q, k and v arrive in (the autocast dtype)."""
    causal: bool = True
    window: int | None = None
    """Most recent keys a query sees, itself included; None for all."""
    max_documents: int | None = None
    """Most documents that share a row. None: rows are one document, and `starts` is never given."""
    softcap: float = 0.0
    scale: float | None = None
    """Multiplies the scores; 1/√head_dim when None."""

    @property
    def masks_documents(self) -> bool:
        return self.max_documents is not None

    @property
    def is_plain(self) -> bool:
        """Nothing but causal (or full) attention: what every kernel in the field can do."""
        return self.window is None and not self.masks_documents and self.softcap == 0


class AttentionBackend(ABC):
    """One way to compute attention. Subclasses honour the spec exactly or refuse it; nothing is approximated.

    Adding a backend: a file with one subclass, a line each in `BACKENDS` and `ATTENTIONS`, a YAML in
    `configs/attention/`.
    """

    name: ClassVar[str]

    def __init__(self, spec: AttentionSpec, config: AttentionConfig) -> None:
        self.spec = spec
        self.config = config

    @classmethod
    @abstractmethod
    def why_not(cls, spec: AttentionSpec, config: AttentionConfig) -> str | None:
        """The reason this backend cannot honour the spec, with a remedy; None when it can."""

    @abstractmethod
    def describe(self) -> str:
        """Which kernel really runs and why, for the start-up line."""

    @abstractmethod
    def prepare(self, starts_BS: Tensor | None, seq_len: int) -> Any:
        """Turn a batch's document starts into the mask this backend reads: once per batch, shared by all layers.

        Runs eagerly, outside the compiled model, and returns tensors (or a BlockMask) of shapes that never change.

        Args:
            starts_BS: int32, index in its row of the first token of each token's document; None without documents.
            seq_len: S, which is the spec's except where validation text is shorter than a row.
        """

    @abstractmethod
    def __call__(self, q_BSHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, mask: Any) -> Tensor:
        """out (B, S, H, D) from q (B, S, H, D), k and v (B, S, G, D) and what `prepare` returned."""
