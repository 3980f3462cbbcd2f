"""The processes of a run: this one's rank, their number, and what they agree on. One process is a world of one.

Ranks that share rows (`parallel.context`) are neighbours, and so are ranks that hold one copy of the parameters
together (`parallel=fsdp`, `hsdp`): of 8 ranks with context=2 and shards=4, 0 and 1 read the same rows, and 0 to 3 hold
one copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from .config import FsdpConfig, ParallelConfig
from .launch import Launch
from .watch import Watch

TIMEOUT = timedelta(minutes=30)
"""Of a collective. Ranks wait for each other's data, compilation and files; `watch` finds those that are lost."""
_watches: list[Watch] = []
"""The one of this process, where its world has several ranks."""


@dataclass(frozen=True)
class World:
    """Every rank calls the same methods in the same order. In a world of one each returns its argument."""

    device: torch.device
    rank: int = 0
    size: int = 1
    context_size: int = 1
    """Ranks that share a row, each a part of its tokens."""
    context_group: dist.ProcessGroup | None = None
    """Those that share this rank's rows; None where rows are whole."""
    mesh: DeviceMesh | None = None
    """Over which parameters are sharded: ("shard",), or ("replica", "shard") where there are several copies of them;
    None where each rank holds all."""
    watch: Watch | None = None
    """Of the other ranks; None in a world of one."""

    @classmethod
    def start(cls, device: torch.device, parallel: ParallelConfig | None = None) -> World:
        """The world that a launcher describes in the environment; without one this process alone.

        Raises:
            ValueError: so many processes cannot be arranged as `parallel` says.
        """
        launch, parallel = Launch.here(), parallel or ParallelConfig()
        parallel.check(launch)
        is_sharded = isinstance(parallel, FsdpConfig)
        if launch.size == 1 and not is_sharded:
            return cls(device)
        if device.type == "cuda":
            torch.cuda.set_device(device.index or 0)  # a mesh warns where none is chosen yet
        if not dist.is_initialized():
            # Small numbers that the hosts agree on go through gloo, so that they need not wait for the devices.
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            store: dist.Store = dist.HashStore()
            if launch.size > 1:
                store, _, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
            dist.init_process_group(
                backend,
                store=dist.PrefixStore("world", store),
                timeout=TIMEOUT,
                rank=launch.rank,
                world_size=launch.size,
            )
            if launch.size > 1:
                another: Any = store  # a thread has a connection of its own
                _watches.append(Watch(dist.PrefixStore("watch", another.clone()), launch.rank, launch.size))
        data_size, shards = parallel.data_size(launch.size), parallel.shard_size(launch)
        group = mesh = None
        if parallel.context > 1:
            rows = init_device_mesh(device.type, (data_size, parallel.context), mesh_dim_names=("data", "context"))
            group = rows.get_group("context")
        if is_sharded:
            sizes = {"replica": launch.size // shards, "shard": shards}
            if sizes["replica"] == 1:
                del sizes["replica"]
            mesh = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        watch = _watches[0] if _watches else None
        return cls(device, launch.rank, launch.size, parallel.context, group, mesh, watch)

    @property
    def is_first(self) -> bool:
        """Whether this rank writes files and speaks."""
        return self.rank == 0

    @property
    def data_size(self) -> int:
        """Into how many parts the rows of a step are divided; `data_rank` of them this rank reads."""
        return self.size // self.context_size

    @property
    def data_rank(self) -> int:
        return self.rank // self.context_size

    @property
    def context_rank(self) -> int:
        """Which part of its rows this rank computes."""
        return self.rank % self.context_size

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all ranks, on the device; the host does not wait for it."""
        return self._reduced(value, dist.ReduceOp.SUM)

    def max(self, value: Tensor) -> Tensor:
        """The largest over all ranks of each number, on the tensor's device."""
        return self._reduced(value, dist.ReduceOp.MAX)

    def all(self, flag: Tensor) -> Tensor:
        """Whether a bool scalar is true on every rank, on the device; the host does not wait for it."""
        return flag if self.size == 1 else self._reduced(flag.int(), dist.ReduceOp.MIN).bool()

    def count(self, numbers: Sequence[int]) -> list[int]:
        """The sum over all ranks of each number. Hosts wait for each other's, not for the devices."""
        return list(numbers) if self.size == 1 else self.sum(torch.tensor(list(numbers))).tolist()

    def first_reason(self, reason: str) -> str:
        """The text of the lowest rank that has one; "" where none has. Hosts wait for each other's."""
        if self.size == 1:
            return reason
        if not self.count([bool(reason)])[0]:
            return ""
        return next(each for each in self.gather(reason) if each)

    def gather(self, item: Any) -> list[Any]:
        """Every rank's, in the order of ranks."""
        items: list[Any] = [item] * self.size
        if self.size > 1:
            dist.all_gather_object(items, item)
        return items

    def wait(self) -> None:
        """Until every rank's host is here."""
        self.count([0])

    def _reduced(self, value: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        if self.size == 1:
            return value
        total = value.clone()
        dist.all_reduce(total, operation)
        return total
