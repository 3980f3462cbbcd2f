"""What memory=offload needs of the host is known before anything is pinned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from model.activations_config import FullConfig, OffloadConfig
from model.memory import Workload
from model.precision_config import precision_named
from training import capacity
from training.capacity import check_host, container_limits, host_bytes
from training.config import TrainConfig
from training.errors import OutOfMemory
from training.machine import Gpu
from training.memory import out_of_memory_explained
from training.runtime import Runtime

MakeConfig = Callable[..., TrainConfig]
H200 = Runtime(Gpu("NVIDIA H200", (9, 0), 141 * 10**9), precision_named("bf16"), True)


@pytest.fixture
def work(config: MakeConfig) -> Workload:
    offload = config("memory=offload", "model.n_layers=8", "seq_len=65536")
    return Workload(offload.model, offload.memory, 1, 65536)


def test_the_line_is_drawn_at_the_bytes_of_layers_and_checkpoints(
    work: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = 65536 * (4 * work.model.dim + 2 * work.model.dim + 4 * work.model.n_heads)
    pinned, saved = host_bytes(work)
    assert pinned == 7 * kept, "of eight layers the last stays on the device"
    assert saved > 0
    assert host_bytes(replace(work, saves=False)) == (pinned, 0), "nothing is copied for checkpoints"
    monkeypatch.setattr(capacity, "host_memory", lambda: pinned + saved)
    check_host(work, H200)
    monkeypatch.setattr(capacity, "host_memory", lambda: pinned + saved - 1)
    with pytest.raises(ValueError, match=r"memory\.host=1 keeps .* GiB in the host's memory.*use memory\.host=0\.75"):
        check_host(work, H200)
    monkeypatch.setattr(capacity, "host_memory", lambda: saved)
    with pytest.raises(ValueError, match=r"there are .* GiB; use memory=full"):
        check_host(work, H200)
    monkeypatch.setattr(capacity, "host_memory", lambda: None)
    check_host(work, H200)


def test_the_fraction_that_is_offered_fits(work: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned, saved = host_bytes(work)
    assert isinstance(work.memory, OffloadConfig)
    monkeypatch.setattr(capacity, "host_memory", lambda: pinned // 2 + saved)
    with pytest.raises(ValueError, match=r"use memory\.host=0\.") as raised:
        check_host(work, H200)
    offered = float(str(raised.value).split("use memory.host=")[1].split(",")[0])
    check_host(replace(work, memory=OffloadConfig(host=offered)), H200)


def test_each_process_of_a_node_pins_its_own_and_copies_its_share(
    work: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    (pinned, saved), two = host_bytes(work), replace(work, ranks=2)
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert host_bytes(two) == (2 * pinned, saved)
    monkeypatch.setattr(capacity, "host_memory", lambda: 2 * pinned + saved - 1)
    with pytest.raises(ValueError, match=r"use memory\.host=0\.75"):
        check_host(two, H200)


def test_what_a_state_on_the_host_and_checkpoints_take_is_refused_too(
    work: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned, saved = host_bytes(offloaded := replace(work, memory=FullConfig(), state_on_host=True))
    for there, mine, match in (
        (pinned + saved, offloaded, r"parallel\.offload=true keeps .* use parallel\.offload=false"),
        (saved, replace(work, memory=FullConfig()), r"checkpoints are copied to .* use a smaller model="),
    ):
        monkeypatch.setattr(capacity, "host_memory", lambda there=there: there)
        check_host(mine, H200)
        monkeypatch.setattr(capacity, "host_memory", lambda there=there: there - 1)
        with pytest.raises(ValueError, match=match):
            check_host(mine, H200)


def test_without_a_gpu_it_is_refused_with_what_to_use(work: Workload) -> None:
    with pytest.raises(ValueError, match=r"memory=offload .* no GPU; use memory=full"):
        check_host(work, Runtime(None, precision_named("fp32"), False))


@pytest.mark.parametrize(
    ("groups", "files"),
    [
        ("0::/a/b\n", ["/a/b/memory.max", "/a/memory.max", "//memory.max"]),
        ("0::/\n", ["//memory.max"]),
        (
            "5:cpu,memory:/job\n3:pids:/job\n",
            ["/memory/job/memory.limit_in_bytes", "/memory//memory.limit_in_bytes"],
        ),
    ],
    ids=["version 2", "a container's own", "version 1"],
)
def test_limits_of_the_groups_around_a_process_count(tmp_path: Path, groups: str, files: list[str]) -> None:
    (tmp_path / "cgroup").write_text(groups)
    assert list(container_limits(tmp_path / "cgroup")) == [Path(f"/sys/fs/cgroup{file}") for file in files]


def test_the_smallest_limit_counts_and_the_kernels_largest_number_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["max\n", f"{2**63 - 4096}\n", f"{3 * 2**20}\n", f"{2**40}\n"]
    files = [tmp_path / str(number) for number in range(len(texts) + 1)]
    for file, text in zip(files, texts, strict=False):
        file.write_text(text)
    monkeypatch.setattr(capacity, "container_limits", lambda: files)
    assert capacity.host_memory() == 3 * 2**20


def test_memory_that_cannot_be_pinned_ends_a_run_as_out_of_memory(config: MakeConfig) -> None:
    with (
        pytest.raises(OutOfMemory, match=r"out of host memory: memory\.host: 2 GiB"),
        out_of_memory_explained(config(), H200),
    ):
        raise MemoryError("memory.host: 2 GiB")
