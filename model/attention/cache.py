"""A cache of keys and values around any backend: each new token attends to all before it, and none is computed again.

Shape suffixes beside the backends': C slots of the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .base import AttentionBackend

MOST_QUERIES = 16
"""Tokens that one step may add to each row."""


@dataclass(frozen=True)
class Chunk:
    """The mask of tokens [start, start + S) of every row: a prompt is read in one or several of these."""

    start: int
    lengths_B: Tensor
    earlier_N: Tensor
    """Slots of the keys before `start` that the chunk sees, the oldest first."""
    mask: Any
    """The inner backend's, of S queries over N + S keys."""


class Step(NamedTuple):
    """The mask of the next S tokens of each row, wherever the row stands: all of it lies on the device."""

    rows_B1: Tensor
    slots_BS: Tensor
    mask: Any
    """What the inner backend's `decode` reads."""


class CachedAttention(AttentionBackend):
    """A backend with a memory of keys and values for every layer, allocated once.

    Rows are aligned left: a row's first token is at position 0, and rows may have different lengths. The key of
    position s lies in slot s mod C. Without a sliding window C is the capacity, and nothing wraps; with one, no more
    than the window and the tokens of one step are kept, however long the rows grow.

    Prompts are read by `chunk`, with the inner backend's own kernels; then `advance` and `step` add tokens, with no
    length known to Python, so that one CUDA graph serves every step. What either returns, (positions, mask), is for
    `GPT.hidden`, whose blocks call `for_layer`'s result.
    """

    name = "cached"

    def __init__(self, inner: AttentionBackend, n_layers: int, batch_size: int, capacity: int) -> None:
        """
        Args:
            inner: causal. Its spec says the dtype of keys and values, and the device.
            capacity: most tokens that a row may come to have.
        Raises:
            ValueError: the inner backend is not causal.
        """
        super().__init__(inner.spec, inner.config)
        spec = inner.spec
        if not spec.causal:
            raise ValueError("keys are cached for causal attention alone: here an earlier token would see a later one")
        self.inner, self.capacity = inner, capacity
        slots = capacity if spec.window is None else min(capacity, spec.window - 1 + MOST_QUERIES)
        shape = (batch_size, slots, spec.n_kv_heads, spec.head_dim)
        options: dict[str, Any] = {"dtype": getattr(torch, spec.dtype), "device": spec.device}
        # A tensor for each layer: of one tensor of all layers a compiled step would write a copy for each layer.
        self.layers = [
            _CachedLayer(inner, torch.zeros(shape, **options), torch.zeros(shape, **options)) for _ in range(n_layers)
        ]
        self.lengths_B = torch.zeros(batch_size, dtype=torch.int32, device=spec.device)
        """Tokens of each row: those in the cache, and in a step its new ones."""
        self._rows_B1 = torch.arange(batch_size, device=spec.device)[:, None]

    @property
    def slots(self) -> int:
        return self.layers[0].keys_BCGD.shape[1]

    @property
    def num_bytes(self) -> int:
        return sum(layer.keys_BCGD.nbytes + layer.values_BCGD.nbytes for layer in self.layers)

    def describe(self) -> str:
        return f"{self.inner.describe()}; with a cache: {self.inner.decodes_with}"

    # ---- reading prompts

    def chunk(self, start: int, seq_len: int, lengths_B: Tensor) -> tuple[Tensor, Chunk]:
        """Positions (1, S) and mask of tokens [start, start + S) of all rows; those before are in the cache.

        Args:
            lengths_B: int32, tokens that each row will have; what a row has beyond is padding, and not kept.
        """
        spec, device = self.spec, self.lengths_B.device
        oldest = 0 if spec.window is None else max(0, start - spec.window + 1)
        earlier_N = torch.arange(oldest, start, device=device) % self.slots
        num_keys = len(earlier_N) + seq_len if start > 0 else None
        mask = Chunk(start, lengths_B, earlier_N, self.inner.prepare(None, seq_len, num_keys))
        return torch.arange(start, start + seq_len, device=device)[None], mask

    def prepare(self, starts_BS: Tensor | None, seq_len: int, num_keys: int | None = None) -> Chunk:
        """Of whole rows, from their beginning."""
        assert starts_BS is None, "each row of a cache is one document"
        return self.chunk(0, seq_len, torch.full_like(self.lengths_B, seq_len))[1]

    # ---- adding tokens

    def advance(self, seq_len: int = 1) -> None:
        """Count the next S tokens of each row, at most MOST_QUERIES. Call it outside what is compiled: Inductor would
        compute the new lengths again for each layer."""
        assert seq_len <= MOST_QUERIES
        self.lengths_B += seq_len

    def step(self, seq_len: int = 1) -> tuple[Tensor, Step]:
        """Positions (B, S) and mask of the last S tokens of each row, which are to be read now."""
        positions_BS = self.lengths_B[:, None] + torch.arange(-seq_len, 0, device=self.lengths_B.device)
        mask = self.inner.prepare_decode(self.lengths_B, seq_len, self.slots)
        return positions_BS, Step(self._rows_B1, positions_BS % self.slots, mask)

    # ---- attending

    def for_layer(self, layer: int) -> _CachedLayer:
        return self.layers[layer]

    def __call__(self, q_BSHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, mask: Any) -> Tensor:
        raise TypeError("a cache attends by layers: call what for_layer returns")


class _CachedLayer:
    """A layer's keys and values, and attention over them."""

    def __init__(self, inner: AttentionBackend, keys_BCGD: Tensor, values_BCGD: Tensor) -> None:
        self.inner, self.keys_BCGD, self.values_BCGD = inner, keys_BCGD, values_BCGD

    def __call__(self, q_BSHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, mask: Chunk | Step) -> Tensor:
        if isinstance(mask, Step):
            self.keys_BCGD[mask.rows_B1, mask.slots_BS] = k_BSGD
            self.values_BCGD[mask.rows_B1, mask.slots_BS] = v_BSGD
            return self.inner.decode(q_BSHD, self.keys_BCGD, self.values_BCGD, mask.mask)
        k_BKGD, v_BKGD = k_BSGD, v_BSGD
        if mask.start > 0:
            k_BKGD = torch.cat([self.keys_BCGD[:, mask.earlier_N], k_BSGD], 1)
            v_BKGD = torch.cat([self.values_BCGD[:, mask.earlier_N], v_BSGD], 1)
        out = self.inner(q_BSHD, k_BKGD, v_BKGD, mask.mask)
        _keep(self.keys_BCGD, k_BSGD, mask)
        _keep(self.values_BCGD, v_BSGD, mask)
        return out


def _keep(cache_BCGD: Tensor, x_BSGD: Tensor, chunk: Chunk) -> None:
    """Write a chunk's keys, or values, into their slots."""
    (B, S), C, start = x_BSGD.shape[:2], cache_BCGD.shape[1], chunk.start
    if start + S <= C:  # nothing wraps. Padding is written over before it is seen
        cache_BCGD[:, start : start + S] = x_BSGD
        return
    # Slot j holds the latest position of its row that it can, if that is in the chunk.
    last_B1 = (chunk.lengths_B.long().clamp_max(start + S) - 1)[:, None]
    slots_C = torch.arange(C, device=x_BSGD.device)
    index_BC = last_B1 - (last_B1 - slots_C) % C - start
    rows_B1 = torch.arange(B, device=x_BSGD.device)[:, None]
    is_new_BC11 = (index_BC >= 0)[:, :, None, None]
    cache_BCGD.copy_(torch.where(is_new_BC11, x_BSGD[rows_B1, index_BC.clamp_min(0)], cache_BCGD))
