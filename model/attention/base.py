"""The attention contract: one description of what to compute, many backends that compute exactly that.

Shape suffixes, here and in the backends: B batch, S sequence, H query heads, G key/value heads, D head dimension.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from kernels.reference import attend, cached_pairs

from .config import AttentionConfig
from .spec import AttentionSpec


class AttentionBackend(ABC):
    """One way to compute attention, exactly as the spec says. What it cannot do, its config's `why_not` has refused.

    Adding a backend: docs/extending.md.
    """

    name: str
    decodes_with: ClassVar[str] = "plain PyTorch"
    """What `decode` runs."""
    keeps_lse: ClassVar[bool] = False
    """Whether `forward` returns the log-sum-exp, with which `backward` need not compute attention again."""
    takes_any_length: ClassVar[bool] = True
    """Whether a new length of queries or keys costs nothing but its computation; False: it is compiled."""

    def __init__(self, spec: AttentionSpec, config: AttentionConfig) -> None:
        """Raises ValueError where PyTorch, and nothing that can be known without it, refuses the spec."""
        self.spec = spec
        self.config = config

    @abstractmethod
    def describe(self) -> str:
        """Which kernel really runs and why, for the start-up line."""

    @abstractmethod
    def prepare(self, starts_BS: Tensor | None, seq_len: int, num_keys: int | None = None) -> Any:
        """Turn a batch's document starts into the mask this backend reads: once per batch, shared by all layers.

        Runs eagerly, outside the compiled model, and returns tensors (or a BlockMask) of shapes that never change.

        Args:
            starts_BS: int32, index in its row of the first token of each token's document; None without documents.
            seq_len: S, which is the spec's except where validation text is shorter than a row.
            num_keys: where there are more keys than queries, which are then the last S positions; None for S.
        """

    def prepare_shard(self, starts_BS: Tensor | None, split: Tensor) -> Any:
        """As `prepare`, where ranks share rows: `model.attention.context`.

        Args:
            starts_BS: of whole rows. split: who holds which of their tokens.
        """
        raise TypeError(f"attention={self.name} attends to whole rows")

    def mask(self, starts_BS: Tensor | None, seq_len: int, split: Tensor | None = None) -> Any:
        """Of a batch: of whole rows, or with a split of shards."""
        return self.prepare(starts_BS, seq_len) if split is None else self.prepare_shard(starts_BS, split)

    @abstractmethod
    def __call__(self, q_BSHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, mask: Any) -> Tensor:
        """out (B, S, H, D) from q (B, S, H, D), k and v (B, S, G, D) and what `prepare` returned."""

    # ---- without a graph, for a wrapper that computes gradients itself: `model.attention.context`

    def forward(self, q_BSHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor, mask: Any) -> tuple[Tensor, Tensor]:
        """(out, lse), what `backward` needs beside its inputs: lse float32 (B, H, S) where `keeps_lse`, else empty."""
        return self(q_BSHD, k_BKGD, v_BKGD, mask), q_BSHD.new_empty(0, dtype=torch.float32)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv) of what `forward` computed: here by computing it again."""
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        with torch.enable_grad():
            dq, dk, dv = torch.autograd.grad(self(q, k, v, mask), (q, k, v), dout)
        return dq, dk, dv

    def compile_ahead(self) -> None:  # noqa: B027 (most backends have no kernels to compile)
        """Begin to compile this backend's kernels, on a thread; `prepare` waits for it."""

    def bound_documents(self, max_documents: int | None) -> None:
        """Tell the backend, once the text is known, how many documents a row holds at most."""
        self.spec = replace(self.spec, max_documents=max_documents)

    # ---- a few new tokens over a cache of keys: `model.attention.cache`

    def prepare_decode(self, lengths_B: Tensor, seq_len: int, capacity: int) -> Any:
        """What `decode` reads beside the cache: once per step, shared by all layers, without waiting for the device.

        Args:
            lengths_B: int32, tokens of each row, its `seq_len` new ones included.
            capacity: slots of the cache; the key of position s lies in slot s mod capacity.
        """
        return cached_pairs(lengths_B, seq_len, capacity, self.spec.window)

    def decode(self, q_BSHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor, mask: Any) -> Tensor:
        """out (B, S, H, D) of the last S tokens of each row, over caches (B, capacity, G, D): by the definition, unless
        a backend has something faster."""
        out = attend(q_BSHD, k_BKGD, v_BKGD, mask, scale=self.spec.scale, softcap=self.spec.softcap)
        assert isinstance(out, Tensor)
        return out

    def for_layer(self, layer: int) -> Callable[[Tensor, Tensor, Tensor, Any], Tensor]:
        """What layer 0, 1, … attends with: the same object for all, so that one compiled block serves every layer.

        A cache returns that layer's part. An index among the arguments of a compiled block would compile it per layer.
        """
        return self
