"""What ranks that share rows exchange to attend: two ways, of which each is a class, and the collective of both."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..base import AttentionBackend


class Exchange(ABC):
    """Attention of a rank's tokens to all tokens of their rows; every rank of the group computes its own at once."""

    says: ClassVar[str]
    """How, for the start-up line."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)

    @abstractmethod
    def lse_shape(self, q_shape: torch.Size) -> tuple[int, ...]:
        """Of the log-sum-exp that `forward` returns where the inner backend has one."""

    @abstractmethod
    def forward(
        self, inner: AttentionBackend, q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, split: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(out, lse) of this rank's queries (B, N, H, D), keys and values (B, N, G, D).

        Args:
            starts, split: of whole rows, see `Shard`.
        """

    @abstractmethod
    def backward(
        self, inner: AttentionBackend, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        starts: Tensor | None, split: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """The gradients of this rank's q, k and v, from what `forward` was given and gave."""


def begin_all_to_all(
    x_N: Tensor, group: dist.ProcessGroup, send: Sequence[int] | None = None, receive: Sequence[int] | None = None
) -> Callable[[], Tensor]:
    """Send rows of `x_N` (N, ...), contiguous, to every rank in its turn; what is returned waits until what every rank
    sent here is there, in their turn, and returns it. On a GPU its stream waits, not the host.

    Args:
        send, receive: rows to and from each rank; None: as many for each.
    """
    received = x_N.new_empty(len(x_N) if receive is None else sum(receive), *x_N.shape[1:])
    splits = [None if sizes is None else list(sizes) for sizes in (receive, send)]
    work = dist.all_to_all_single(received, x_N, splits[0], splits[1], group=group, async_op=True)
    on_its_way = [(work, x_N, received)]

    def finish() -> Tensor:
        work, _, received = on_its_way.pop()  # so that what was sent goes, and what was received belongs to the caller
        work.wait()
        return received

    return finish


def wide(x: Tensor) -> torch.dtype:
    """What gradients of several ranks are summed in: float32, or float64 where they come in that."""
    return torch.promote_types(x.dtype, torch.float32)
