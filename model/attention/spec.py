"""What attention must compute, and on what: everything a backend needs to know to say whether it can. No torch here."""

from __future__ import annotations

from dataclasses import dataclass


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
