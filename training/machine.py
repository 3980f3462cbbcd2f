"""The GPU of this machine, asked of its driver: torch's own answer costs the import of torch, 1 to 3 s."""

from __future__ import annotations

import ctypes
import os
import runpy
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# CUDA driver API, CUdevice_attribute
COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR = 75, 76


@dataclass(frozen=True)
class Gpu:
    """A GPU as its driver describes it; no torch."""

    name: str
    capability: tuple[int, int]
    """Compute capability: (9, 0) is Hopper."""
    memory: int | None = field(default=None, compare=False)
    """Bytes."""
    count: int | None = field(default=None, compare=False)
    """GPUs of this machine that processes can see."""


supposed: Gpu | None = None
"""A GPU that need not be here: `scripts.plan` names one before anybody asks."""


@cache
def find_gpu() -> Gpu | None:
    """The GPU that torch will use, the first that is visible (CUDA_VISIBLE_DEVICES); None without one.

    None also where the torch that is installed was built for a CPU. Whether a CUDA build works with this driver, only
    torch can tell: `Runtime.device` asks it.
    """
    if supposed is not None:
        return supposed
    build = _torch_build()
    if build["cuda"]:
        return _ask_driver()
    if build["hip"]:  # AMD's runtime has no such stable interface: here torch is waited for
        import torch

        if torch.cuda.is_available():
            memory = torch.cuda.get_device_properties(0).total_memory
            return Gpu(torch.cuda.get_device_name(), torch.cuda.get_device_capability(), memory)
    return None


def _torch_build() -> dict[str, Any]:
    """torch/version.py, run without torch: `cuda` and `hip` are the versions it was built for, or None."""
    torch = find_spec("torch")
    if torch is None or torch.origin is None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")
    return runpy.run_path(str(Path(torch.origin).with_name("version.py")))


def _ask_driver() -> Gpu | None:
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return None
    device, major, minor, count = ctypes.c_int(), ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    memory = ctypes.c_size_t()
    name = ctypes.create_string_buffer(256)
    failed = (  # error codes; 0 goes on to the next
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(device), 0)  # where no device is visible, it ends here
        or driver.cuDeviceGetName(name, len(name), device)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), COMPUTE_CAPABILITY_MAJOR, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), COMPUTE_CAPABILITY_MINOR, device)
        or driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
        or driver.cuDeviceGetCount(ctypes.byref(count))
    )
    return None if failed else Gpu(name.value.decode(), (major.value, minor.value), memory.value, count.value)
