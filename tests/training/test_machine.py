"""Which GPU there is, known without torch."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from training import machine
from training.machine import Gpu, find_gpu


class Driver:
    """libcuda for a machine with one Hopper, or with what a test changes."""

    init_error = 0
    devices = 1

    def cuInit(self, flags: int) -> int:
        return self.init_error

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:
        device._obj.value = 7
        return 0 if ordinal < self.devices else 101  # CUDA_ERROR_INVALID_DEVICE

    def cuDeviceGetName(self, name: Any, length: int, device: Any) -> int:
        assert device.value == 7
        name.value = b"NVIDIA H100 80GB HBM3"[: length - 1]
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
        assert device.value == 7
        value._obj.value = {75: 9, 76: 0}[attribute]
        return 0

    def cuDeviceTotalMem_v2(self, memory: Any, device: Any) -> int:
        assert device.value == 7
        memory._obj.value = 80 * 2**30
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self.devices
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    return driver


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    build = {"cuda": "13.0", "hip": None}
    monkeypatch.setattr(machine, "_torch_build", lambda: build)
    return build


ask = find_gpu.__wrapped__  # asked anew, where the program asks once


def test_the_gpu_is_the_drivers_first(driver: Driver, build: dict[str, str | None]) -> None:
    gpu = ask()
    assert gpu == Gpu("NVIDIA H100 80GB HBM3", (9, 0))
    assert gpu.memory == 80 * 2**30


def test_a_driver_that_fails_or_shows_no_device_is_no_gpu(driver: Driver, build: dict[str, str | None]) -> None:
    driver.devices = 0  # CUDA_VISIBLE_DEVICES=""
    assert ask() is None
    driver.devices, driver.init_error = 1, 100  # CUDA_ERROR_NO_DEVICE
    assert ask() is None


def test_no_driver_is_no_gpu(build: dict[str, str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert ask() is None


def test_a_torch_for_cpus_has_no_gpu(driver: Driver, build: dict[str, str | None]) -> None:
    build["cuda"] = None
    assert ask() is None


def test_a_torch_for_amd_is_asked_itself(build: dict[str, str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    build.update(cuda=None, hip="7.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ask() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "AMD Instinct MI300X")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 4))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=2**37))
    assert ask() == Gpu("AMD Instinct MI300X", (9, 4))


def test_the_build_is_what_torch_says_of_itself() -> None:
    build = machine._torch_build()
    assert (build["cuda"], build["hip"]) == (torch.version.cuda, torch.version.hip)


@pytest.mark.gpu
def test_the_driver_and_torch_agree() -> None:
    assert ask() == Gpu(torch.cuda.get_device_name(), torch.cuda.get_device_capability())
