"""What kernels ask a device for before they are launched."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch


@cache
def multiprocessors(device: torch.device) -> int:
    """8 on a CPU, whose interpreter runs one program after the other."""
    return 8 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


@cache
def has_pdl(device: torch.device) -> bool:
    """Programmatic dependent launch, on NVIDIA's GPUs from sm_90 on: a kernel may begin before the one launched before
    it has ended, and waits for it (`gdc_wait`) before it reads what that one writes or writes anything."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def pdl_options(pdl: bool) -> dict[str, Any]:
    """Of a launch; AMD's compiler has no such option."""
    return {"launch_pdl": True} if pdl else {}
