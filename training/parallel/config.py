"""How a run is spread over its processes: the fields of `configs/parallel/*.yaml`. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from model.attention.config import CONTEXT_METHODS

from .launch import Launch


@dataclass
class ParallelConfig:
    """Each rank holds the whole model."""

    name: str = "data"
    context: int = 1
    """Ranks that share each row."""
    context_method: str = "auto"
    """How they attend: auto, ulysses or all-gather."""

    def __post_init__(self) -> None:
        if self.context < 1:
            raise ValueError(f"parallel.context={self.context} is not possible; use 1 for whole rows, or more")
        if self.context_method not in ("auto", *CONTEXT_METHODS):
            raise ValueError(
                f"parallel.context_method={self.context_method} is unknown; use auto, {', '.join(CONTEXT_METHODS)}"
            )

    def check(self, launch: Launch) -> None:
        """Raises ValueError where so many processes cannot be arranged so."""
        if launch.size % self.context:
            raise ValueError(
                f"parallel.context={self.context} does not divide the {_processes(launch.size)} of this run; "
                f"use {_divisors(launch.size)}, or torchrun --nproc-per-node={self.context}"
            )

    def data_size(self, size: int) -> int:
        """Into how many parts the rows of a step are divided; 1 where the run of this configuration was larger."""
        return max(1, size // self.context)

    def shard_size(self, launch: Launch) -> int:
        """Ranks that hold one copy of the parameters together; 1: each holds all."""
        return 1


@dataclass
class FsdpConfig(ParallelConfig):
    """All ranks hold one copy of the parameters together, those that share rows among them."""

    name: str = "fsdp"
    reshard: bool = True
    """Whether a block's parameters are freed after its forward pass, and gathered again for its backward pass."""
    offload: bool = False
    """Whether parameters, gradients and moments stay in host memory, and are updated there."""

    def shard_size(self, launch: Launch) -> int:
        return launch.size


@dataclass
class HsdpConfig(FsdpConfig):
    """Groups of neighbouring ranks hold a copy each."""

    name: str = "hsdp"
    shards: int | None = None
    """Ranks of a group; None: those of a node."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shards is not None and self.shards < 1:
            raise ValueError(f"parallel.shards={self.shards} is not possible; use 1 or more, or null for a node's GPUs")

    def check(self, launch: Launch) -> None:
        super().check(launch)
        if launch.size % self.shard_size(launch):
            raise ValueError(
                f"parallel.shards={self.shard_size(launch)} does not divide the {_processes(launch.size)} of this run; "
                f"use {_divisors(launch.size)}"
            )

    def shard_size(self, launch: Launch) -> int:
        return self.shards or launch.local_size


def _processes(size: int) -> str:
    return f"{size} processes" if size > 1 else "one process"


def _divisors(size: int) -> str:
    return ", ".join(str(number) for number in range(1, size + 1) if size % number == 0)


PARALLELISMS: dict[str, type[ParallelConfig]] = {"data": ParallelConfig, "fsdp": FsdpConfig, "hsdp": HsdpConfig}
