"""The processes of a run, as their launcher (torchrun, or `scripts/slurm_train.sbatch`) describes them to each in its
environment. No torch here."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """What torchrun or Slurm says of this process."""

    rank: int = 0
    size: int = 1
    """Processes of the run, on all nodes: one for each GPU."""
    local_rank: int = 0
    """Of this process on its node: the number of its GPU."""
    local_size: int = 1
    """Processes of this node."""
    is_launched: bool = False
    """Whether there is a launcher, be it of one process."""

    @classmethod
    def here(cls) -> Launch:
        """Of this process.

        Raises:
            ValueError: a variable of the environment is no number, or does not fit the others.
        """
        if "WORLD_SIZE" not in os.environ:
            return cls()
        size, rank = _number("WORLD_SIZE", 1), _number("RANK", 0)
        local_size = _number("LOCAL_WORLD_SIZE", size)
        launch = cls(rank, size, _number("LOCAL_RANK", rank % local_size if local_size else 0), local_size, True)
        if not 0 <= rank < size or not 0 <= launch.local_rank < local_size <= size:
            raise ValueError(f"{launch} is not possible: the variables RANK, WORLD_SIZE … are wrong; use torchrun")
        return launch


def speaks() -> bool:
    """Whether this process is the one of several that says what all know."""
    return os.environ.get("RANK", "0") == "0"


def local_launch(size: int) -> list[dict[str, str]]:
    """What a launcher would add to the environment of each of `size` processes on this machine, by rank.

    They meet at a port that is free now, and each has one thread, as torchrun gives it.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    common |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, default)
    try:
        return int(value)
    except ValueError as error:
        raise ValueError(
            f"the variable {name}={value} is no number; unset it, or start the run with torchrun"
        ) from error
