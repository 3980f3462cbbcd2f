"""Real ranks: processes that know each other, as a launcher would start them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from processes import LIMIT_S

ROOT = Path(__file__).resolve().parents[1]


def start(command: Sequence[str], size: int, env: Mapping[str, str] | None = None) -> list[subprocess.Popen[str]]:
    """Begin a Python command on `size` ranks; what each says comes through its pipes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    common = {**os.environ, "MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": str(size)}
    common |= {"LOCAL_WORLD_SIZE": str(size), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(env or {})}
    return [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def run(command: Sequence[str], size: int) -> list[str]:
    """What each rank says until it has ended, without an error."""
    ranks = start(command, size)
    said = [rank.communicate(timeout=LIMIT_S) for rank in ranks]
    for number, (rank, (_, errors)) in enumerate(zip(ranks, said, strict=True)):
        assert rank.returncode == 0, f"rank {number}: {errors}"
    return [out for out, _ in said]
