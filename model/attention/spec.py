"""What attention must compute, and on what: everything a backend needs to know to say whether it can. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from model.config import ModelConfig


@dataclass(frozen=True)
class AttentionSpec:
    """One description for every backend.

    A query t sees the keys s with max(starts[t], t − window + 1) ≤ s ≤ t: causal attention, a sliding window and packed
    documents are all one interval, whose left end never moves back.
    """

    n_heads: int
    n_kv_heads: int
    head_dim: int
    seq_len: int
    dtype: str
    """What q, k and v arrive in (the autocast dtype), by torch's name: bfloat16, float16, float32."""
    capability: tuple[int, int] | None = None
    """Compute capability of the GPU, such as (9, 0); None on a CPU."""
    causal: bool = True
    window: int | None = None
    """Most recent keys a query sees, itself included; None for all."""
    max_documents: int | None = None
    """Most documents that share a row. None: rows are one document, and `starts` is never given."""
    softcap: float = 0.0
    scale: float | None = None
    """Multiplies the scores; 1/√head_dim when None."""

    @classmethod
    def of(
        cls,
        model: ModelConfig,
        *,
        seq_len: int,
        dtype: str,
        capability: tuple[int, int] | None = None,
        max_documents: int | None = None,
    ) -> AttentionSpec:
        """What a model asks of its attention."""
        assert model.n_kv_heads is not None
        assert model.head_dim is not None
        return cls(
            n_heads=model.n_heads,
            n_kv_heads=model.n_kv_heads,
            head_dim=model.head_dim,
            seq_len=seq_len,
            dtype=dtype,
            capability=capability,
            window=model.window,
            max_documents=max_documents,
            softcap=model.attention_softcap,
            scale=model.attention_scale,
        )

    @property
    def device(self) -> str:
        """cpu or cuda."""
        return "cpu" if self.capability is None else "cuda"

    @property
    def masks_documents(self) -> bool:
        return self.max_documents is not None

    @property
    def is_plain(self) -> bool:
        """Nothing but causal (or full) attention: what every kernel in the field can do."""
        return self.window is None and not self.masks_documents and self.softcap == 0
