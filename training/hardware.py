"""What a run ran on: the card's peak, the device, the versions, the commit."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

# Dense matrix-multiply peaks in TFLOP/s as (bf16, fp16, tf32), accumulating in fp32, from the makers' data sheets: the
# sparse figure they print in bold is twice these. None: the card has no such unit. The pattern must match the whole
# name, since a suffix changes the chip: "Laptop GPU", "4090 D", "PCIe", "NVL", "MIG 1g.10gb". Only figures we are
# sure of; a card that is not here has no MFU.
Peaks = tuple[float | None, float | None, float | None]
PEAKS: list[tuple[str, tuple[int, int], Peaks]] = [
    # name (without "NVIDIA" or "AMD"), compute capability, (bf16, fp16, tf32)
    (r"Tesla V100-SXM2.*", (7, 0), (None, 125, None)),
    (r"Tesla V100-PCIE.*", (7, 0), (None, 112, None)),
    (r"Tesla T4", (7, 5), (None, 65, None)),
    (r"A[18]00-(SXM4|PCIE)-\d+GB|A[18]00 80GB PCIe", (8, 0), (312, 312, 156)),
    (r"A30", (8, 0), (165, 165, 82)),
    (r"A10", (8, 6), (125, 125, 62.5)),
    (r"A40", (8, 6), (149.7, 149.7, 74.8)),
    (r"RTX A6000", (8, 6), (154.8, 154.8, 77.4)),
    # GeForce: half the rate that fp16 accumulation would give
    (r"GeForce RTX 3090", (8, 6), (71, 71, 35.6)),
    (r"GeForce RTX 4090", (8, 9), (165.2, 165.2, 82.6)),
    (r"GeForce RTX 5090", (12, 0), (209.5, 209.5, 104.8)),
    (r"RTX 6000 Ada Generation", (8, 9), (364.2, 364.2, 182.1)),
    (r"L4", (8, 9), (121, 121, 60)),
    (r"L40", (8, 9), (181, 181, 90.5)),
    (r"L40S", (8, 9), (362, 362, 183)),
    (r"H[18]00( SXM5)? \d+GB HBM3", (9, 0), (989.4, 989.4, 494.7)),
    (r"H100 PCIe", (9, 0), (756, 756, 378)),
    (r"H100 NVL", (9, 0), (835, 835, 417.5)),
    (r"H200", (9, 0), (989.4, 989.4, 494.7)),
    (r"H200 NVL", (9, 0), (835, 835, 417.5)),
    (r"GH200 (120GB|480GB|144G HBM3e)", (9, 0), (989.4, 989.4, 494.7)),
    (r"H20", (9, 0), (148, 148, 74)),
    (r"B200", (10, 0), (2250, 2250, 1125)),
    (r"GB200", (10, 0), (2500, 2500, 1250)),
    (r"B300( SXM6 AC)?", (10, 3), (2250, 2250, 1125)),
    (r"Instinct MI250X", (9, 0), (191.5, 191.5, None)),  # a device is one of the card's two dies
    (r"Instinct MI300X", (9, 4), (1307.4, 1307.4, 653.7)),
    (r"Instinct MI325X", (9, 4), (1307.4, 1307.4, 653.7)),
    (r"Instinct MI355X", (9, 5), (2516.6, 2516.6, None)),
]


def peak_flops(device_name: str, dtype: torch.dtype, capability: tuple[int, int] | None = None) -> float | None:
    """Dense matrix-multiply peak of a card in FLOP/s, or None where we are not sure: no MFU is better than a wrong one.

    device_name as torch.cuda.get_device_name gives it. dtype bfloat16, float16, or float32, meaning TF32. A capability
    that is not the named card's gives None: a virtual or emulated card may borrow a name.
    """
    name = re.sub(r"^(NVIDIA|AMD) ", "", device_name.strip())
    order = (torch.bfloat16, torch.float16, torch.float32)
    for pattern, known_capability, peaks in PEAKS:
        if re.fullmatch(pattern, name) and capability in (None, known_capability) and dtype in order:
            peak = peaks[order.index(dtype)]
            return None if peak is None else peak * 1e12
    return None


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
