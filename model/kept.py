"""Where layers keep tensors from the forward pass until the backward pass: here, where they are."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

TAKEN = "a second backward pass through the same layers, which keep their tensors for one"


class Ticket:
    """What was kept of one layer in one forward pass. Dropped untaken, when no backward pass came, it frees it, too."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors: list[Tensor] | None = list(tensors)

    def take(self) -> list[Tensor]:
        """The tensors, with their shapes and strides, and no longer held here.

        Raises:
            RuntimeError: they were taken before.
        """
        if self._tensors is None:
            raise RuntimeError(TAKEN)
        tensors, self._tensors = self._tensors, None
        return tensors


class Store:
    """Keeps tensors in the memory that they were computed in. One for a model; tickets are taken in reverse order."""

    def keep(self, tensors: Sequence[Tensor]) -> Ticket:
        """Hold these, of one layer, until its ticket is taken. Nobody writes to them in between."""
        return Ticket(tensors)
