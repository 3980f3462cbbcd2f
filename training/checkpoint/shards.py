"""Which rank writes which pieces of a checkpoint's tensors, and which pieces a rank reads.

A tensor of a run of many ranks is whole on each of them, or a DTensor: sharded over some dimensions of a mesh, the same
over the others. A piece that several ranks have is written by one of them: by the one with the least to write so far.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from training.parallel.pieces import Piece, piece_at
from training.parallel.sharding import is_sharded, local
from training.parts import Part

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement

Tensors = dict[str, dict[str, Tensor]]
"""File name → tensor name → tensor."""


class Layout(NamedTuple):
    """A tensor, and who holds it."""

    part: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    mesh: tuple[tuple[int, ...], tuple[int, ...]] | None
    """The shape of its mesh, and the ranks in it; None where every rank has the whole."""
    placements: tuple[Placement, ...]

    @classmethod
    def of(cls, part: str, name: str, tensor: Tensor) -> Layout:
        shape = tuple(tensor.shape)
        if not is_sharded(tensor):
            return cls(part, name, shape, tensor.dtype, None, ())
        ranks = tensor.device_mesh.mesh
        mesh = tuple(ranks.shape), tuple(ranks.flatten().tolist())
        return cls(part, name, shape, tensor.dtype, mesh, tuple(tensor.placements))

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def holders(self, size: int) -> Iterator[tuple[Piece, tuple[int, ...]]]:
        """Each piece that is not empty, and the ranks that have it."""
        if self.mesh is None:
            yield Piece((0,) * len(self.shape), self.shape), tuple(range(size))
            return
        shape, ranks = self.mesh
        assert len(ranks) == size, "a mesh of parameters has all ranks"
        found: dict[Piece, list[int]] = {}
        for rank, coordinate in zip(ranks, product(*map(range, shape)), strict=True):
            found.setdefault(piece_at(self.shape, shape, coordinate, self.placements), []).append(rank)
        for piece, holders in found.items():
            if piece.numel:
                yield piece, tuple(holders)


@lru_cache(maxsize=2)  # a run has one before its first step and one after it
def written_by(layouts: tuple[Layout, ...], size: int) -> tuple[tuple[tuple[int, Piece], ...], ...]:
    """For each tensor its pieces, and which of `size` ranks writes each. Every rank finds the same."""
    loads = [0] * size
    found: list[tuple[tuple[int, Piece], ...]] = [()] * len(layouts)
    largest_first = sorted(range(len(layouts)), key=lambda i: -layouts[i].num_bytes)
    for index in largest_first:
        layout, pieces = layouts[index], []
        for piece, holders in layout.holders(size):
            writer = min(holders, key=loads.__getitem__)
            loads[writer] += piece.numel * layout.dtype.itemsize
            pieces.append((writer, piece))
        found[index] = tuple(pieces)
    return tuple(found)


def file_of(part: str, rank: int) -> str:
    return f"{part}_{rank:05}.safetensors"


def state_of(rank: int) -> str:
    """The values of those parts that each rank has of its own."""
    return f"state_{rank:05}.json"


class Share(NamedTuple):
    """What one of several ranks writes of a checkpoint."""

    tensors: Tensors
    pieces: bytes
    """The content of PIECES: part → tensor name → its dtype, its shape, and [rank, offset, shape] of each piece."""
    num_bytes: int
    """Of all ranks' tensors."""


def share_of(parts: Iterable[Part], rank: int, size: int) -> Share:
    """No communication: what each rank has, the mesh tells."""
    tensors: Tensors = {}
    shared: dict[Layout, Tensor] = {}
    for part in parts:
        if part.per_rank:
            tensors[file_of(part.name, rank)] = part.tensors()
        else:
            shared |= {Layout.of(part.name, name, tensor): tensor for name, tensor in part.tensors().items()}
    layouts = tuple(shared)
    for (layout, tensor), written in zip(shared.items(), written_by(layouts, size), strict=True):
        if any(writer == rank for writer, _ in written):  # a rank has one piece at most
            tensors.setdefault(file_of(layout.part, rank), {})[layout.name] = local(tensor)
    return Share(tensors, pieces_text(layouts, size), sum(layout.num_bytes for layout in layouts))


@lru_cache(maxsize=2)
def pieces_text(layouts: tuple[Layout, ...], size: int) -> bytes:
    """The content of PIECES, a line for each tensor: with a thousand ranks there are a million pieces."""
    parts: dict[str, list[str]] = {}
    for layout, written in zip(layouts, written_by(layouts, size), strict=True):
        entry = {
            "dtype": str(layout.dtype).removeprefix("torch."),
            "shape": layout.shape,
            "pieces": [[writer, piece.offset, piece.shape] for writer, piece in written],
        }
        line = f"  {json.dumps(layout.name)}: {json.dumps(entry, separators=(',', ':'))}"
        parts.setdefault(layout.part, []).append(line)
    texts = [f" {json.dumps(part)}: {{\n" + ",\n".join(lines) + "\n }" for part, lines in parts.items()]
    return ("{\n" + ",\n".join(texts) + "\n}\n").encode()
