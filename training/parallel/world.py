"""The processes of a run: this one's rank, their number, and what they agree on. One process is a world of one."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """Every rank calls the same methods in the same order. In a world of one each returns its argument."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @classmethod
    def start(cls, device: torch.device) -> World:
        """The world that torchrun describes in the environment; without torchrun this process alone."""
        size = int(os.environ.get("WORLD_SIZE", 1))
        if size == 1:
            return cls(device)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(device, dist.get_rank(), size)

    @property
    def is_first(self) -> bool:
        """Whether this rank writes files and speaks."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all ranks, on the device; the host does not wait for it."""
        return self._reduced(value, dist.ReduceOp.SUM)

    def all(self, flag: Tensor) -> Tensor:
        """Whether a bool scalar is true on every rank, on the device; the host does not wait for it."""
        return flag if self.size == 1 else self._reduced(flag.int(), dist.ReduceOp.MIN).bool()

    def count(self, number: int) -> int:
        """The sum over all ranks of a number that is the same on each: no communication."""
        return number * self.size

    def first_reason(self, reason: str) -> str:
        """The text of the lowest rank that has one; "" where none has. The host waits for all ranks."""
        if self.size == 1:
            return reason
        reasons: list[str | None] = [None] * self.size
        dist.all_gather_object(reasons, reason)
        return next((each for each in reasons if each), "")

    def _reduced(self, value: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        if self.size == 1:
            return value
        total = value.clone()
        dist.all_reduce(total, operation)
        return total
