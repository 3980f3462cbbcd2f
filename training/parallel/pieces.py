"""What a rank has of a tensor: the whole of it, or of a DTensor a piece."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from .sharding import is_sharded

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement


class Piece(NamedTuple):
    """A box within a tensor."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def within(self, other: Piece) -> Piece | None:
        """What both have; None where they have nothing in common. A scalar has itself."""
        first = tuple(map(max, self.offset, other.offset))
        ends = [min(a + n, b + m) for a, n, b, m in zip(*self, *other, strict=True)]
        shape = tuple(end - start for start, end in zip(first, ends, strict=True))
        return Piece(first, shape) if all(size > 0 for size in shape) else None

    def slices(self, of: Piece) -> tuple[slice, ...]:
        """Where this piece is in a tensor that holds the piece `of`."""
        starts = [mine - theirs for mine, theirs in zip(self.offset, of.offset, strict=True)]
        return tuple(slice(start, start + size) for start, size in zip(starts, self.shape, strict=True))


def piece_at(
    shape: Sequence[int], mesh_shape: Sequence[int], coordinate: Sequence[int], placements: Sequence[Placement]
) -> Piece:
    """What the rank at a coordinate of a mesh has of a tensor: chunks as `torch.chunk` cuts them, for one dimension of
    the mesh after the other."""
    offset, held = [0] * len(shape), list(shape)
    for number, place, placement in zip(mesh_shape, coordinate, placements, strict=True):
        if placement.is_replicate():
            continue
        assert placement.is_shard(), f"no checkpoint is made of {placement}"
        dim = placement.dim % len(shape)  # type: ignore[attr-defined]
        chunk = -(-held[dim] // number)
        start = min(place * chunk, held[dim])
        offset[dim], held[dim] = offset[dim] + start, min(chunk, held[dim] - start)
    return Piece(tuple(offset), tuple(held))


def piece_of(tensor: Tensor) -> Piece:
    """What this rank has of a tensor."""
    if not is_sharded(tensor):
        return Piece((0,) * tensor.dim(), tuple(tensor.shape))
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    return piece_at(tensor.shape, tuple(mesh.mesh.shape), coordinate, tensor.placements)
