"""What is measured: calls of attention, by shape and mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import torch

from model.arithmetic import causal_keys

GRID_TOKENS, GRID_WIDTH = 16384, 2048  # the field's usual grid: batch · sequence, heads · head_dim


@dataclass(frozen=True)
class Case:
    """One call of attention on random q (B, S, H, D), k and v (B, S, G, D)."""

    head_dim: int
    seq_len: int
    batch: int
    heads: int
    kv_heads: int
    causal: bool = True
    window: int | None = None
    documents: tuple[int, ...] = ()
    """Lengths of the documents that share each row; none for one document."""
    deterministic: bool = False
    """The gradients must be bitwise the same on every run."""
    softcap: float = 0.0
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        assert self.causal or not (self.window or self.documents), "windows and documents are causal here"
        assert not self.documents or sum(self.documents) == self.seq_len

    @property
    def pairs(self) -> float:
        """Query-key pairs per head and row: S², by convention half of that when causal, exact with a mask."""
        if self.documents or self.window:
            return sum(n * causal_keys(n, self.window) for n in self.documents or (self.seq_len,))
        return self.seq_len**2 / (2 if self.causal else 1)

    @property
    def flops(self) -> float:
        """Forward FLOPs, 4 · B · H · D · pairs; backward counts 2.5 times that, whatever a kernel recomputes."""
        return 4 * self.batch * self.heads * self.head_dim * self.pairs

    @property
    def is_grid(self) -> bool:
        """Whether it belongs to the usual grid, not to the special shapes."""
        return self == on_grid(self.head_dim, self.seq_len, causal=self.causal)

    @property
    def label(self) -> str:
        shape = f"S {self.seq_len:,}"
        if self.is_grid:
            return f"{'causal' if self.causal else 'full'}, {shape}"
        if self.documents:
            return f"{len(self.documents)} documents, {shape}"
        if self.window:
            return f"window {self.window:,}, {shape}"
        if self.deterministic:
            return f"deterministic, {shape}"
        if self.softcap:
            return f"soft cap {self.softcap:g}, {shape}"
        if self.kv_heads != self.heads:
            return f"{self.heads} : {self.kv_heads} heads, {shape}"
        return f"{'causal' if self.causal else 'full'}, B {self.batch}, H {self.heads}, {shape}, {self.dtype}"


def on_grid(D: int, S: int, **mask: Any) -> Case:
    heads = max(1, GRID_WIDTH // D)
    return Case(D, S, max(1, GRID_TOKENS // S), heads, heads, **mask)


def random_lengths(seq_len: int, documents: int) -> tuple[int, ...]:
    """A row cut at random places, the same ones every time."""
    cuts = torch.randperm(seq_len - 1, generator=torch.Generator().manual_seed(0))[: documents - 1] + 1
    edges = [0, *sorted(cuts.tolist()), seq_len]
    return tuple(end - begin for begin, end in pairwise(edges))


GROUPS = (
    "causal", "full", "head-dims", "documents", "window", "deterministic", "softcap", "grouped", "short", "notes",
    "million",
)  # fmt: skip
MILLION = [Case(64, S, 1, 8, 8) for S in (2**16, 2**18, 2**20)]


def choose_cases(groups: Sequence[str], head_dims: Sequence[int], seq_lens: Sequence[int]) -> list[Case]:
    """The cases of these groups, each once. `seq_lens` are the grid's; the other groups have their own."""
    common = [D for D in head_dims if D in (64, 128)]
    small = [64] if 64 in head_dims else []
    S = 16384
    plain = [on_grid(D, S) for D in common]  # what masks and determinism are compared with
    cases = {
        "causal": [on_grid(D, n) for D, n in product(head_dims, seq_lens)],
        "full": [on_grid(D, n, causal=False) for D, n in product(head_dims, seq_lens)],
        "head-dims": [on_grid(D, S, causal=causal) for D, causal in product((96, 192, 256), (True, False))],
        "documents": [*plain, *(on_grid(D, S, documents=random_lengths(S, S // 1024)) for D in common)],
        "window": [on_grid(D, S, window=1024) for D in common],
        "deterministic": [*plain, *(on_grid(D, S, deterministic=True) for D in common)],
        # of 50, as Gemma 2 has it
        "softcap": [*plain, *(on_grid(D, S, softcap=50.0) for D in common)],
        "grouped": [Case(D, S, 1, 32, kv_heads) for D, kv_heads in product(common, (32, 8))],
        # one row of 1k tokens: less work for the GPU than for Python
        "short": [Case(D, 1024, 1, GRID_WIDTH // D, GRID_WIDTH // D) for D in common],
        # the shape in the notes that this project began with
        "notes": [Case(D, 51200, 32, 8, 8, causal=c, dtype="float16") for D in small for c in (True, False)],
        "million": MILLION if small else [],
    }
    return list(dict.fromkeys(case for group in groups for case in cases[group]))
