"""What a run ran on: the card's peak, the device, the versions, the commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .cards import peak_tflops


def peak_flops(device_name: str, factors: str, capability: tuple[int, int] | None = None) -> float | None:
    """`cards.peak_tflops` in FLOP/s."""
    peak = peak_tflops(device_name, factors, capability)
    return None if peak is None else peak * 1e12


def describe_device(device: torch.device | str) -> dict[str, Any]:
    """Facts about a device: its name; for a GPU also capability ("9.0"), memory in GiB, number of processors."""
    device = torch.device(device)
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        return {
            "device": str(device),
            "name": gpu.name,
            "capability": f"{gpu.major}.{gpu.minor}",
            "memory_gib": round(gpu.total_memory / 2**30, 1),
            "processors": gpu.multi_processor_count,
        }
    name = platform.processor() or platform.machine()
    return {"device": str(device), "name": name, "processors": os.cpu_count()}


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers; what is not installed is absent."""
    found = {"python": platform.python_version()}
    for package in ("torch", "triton", "numpy", "tokenizers", "hydra-core"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    cudnn = torch.backends.cudnn.version() if torch.version.cuda else None
    toolkits = {"cuda": torch.version.cuda, "cudnn": cudnn, "hip": torch.version.hip}
    return found | {name: str(value) for name, value in toolkits.items() if value}


def git_commit(root: Path) -> str | None:
    """The commit checked out at root, with "+dirty" if files differ from it; None without git, or where root is no
    repository of its own: a copy of the sources inside another repository has no commit."""
    elsewhere = {name for name in os.environ if name.startswith("GIT_")}  # GIT_DIR would name another repository
    environment = {name: value for name, value in os.environ.items() if name not in elsewhere}

    def git(*command: str) -> str:
        result = subprocess.run(
            ["git", "-C", str(root), *command], capture_output=True, text=True, check=True, timeout=10, env=environment
        )
        return result.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return None
        return git("rev-parse", "HEAD") + ("+dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None
