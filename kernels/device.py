"""What kernels ask a device for before they are launched."""

from __future__ import annotations

from functools import cache

import torch


@cache
def multiprocessors(device: torch.device) -> int:
    """8 on a CPU, whose interpreter runs one program after the other."""
    return 8 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


@cache
def capability_of(device: torch.device) -> tuple[int, int] | None:
    """Of the GPU; None in the interpreter, and (0, 0) for a GPU that is not NVIDIA's, whatever PyTorch calls it."""
    if device.type == "cpu":
        return None
    return torch.cuda.get_device_capability(device) if torch.version.hip is None else (0, 0)
