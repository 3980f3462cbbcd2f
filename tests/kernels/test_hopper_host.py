"""What the host decides for the Hopper kernels: which compiled kernel a launch takes, and the order of the work."""

from __future__ import annotations

import heapq
import inspect
from collections.abc import Callable, Iterable
from dataclasses import replace
from statistics import mean
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from kernels.flash_attention import hopper
from kernels.flash_attention.hopper import config, host, key_tiles, launches, softcap
from kernels.flash_attention.hopper.backward_pass import backward_kernel
from kernels.flash_attention.hopper.backward_split import dkdv_kernel, dq_kernel
from kernels.flash_attention.hopper.config import Kind
from kernels.flash_attention.hopper.forward_pass import forward_kernel
from kernels.flash_attention.hopper.key_tiles import queries_descend
from kernels.flash_attention.hopper.preprocess import preprocess_kernel
from kernels.flash_attention.hopper.scheduler import TileScheduler, is_interleaved, sort_kernel, tile_of


class Kernel:
    """In the place of a JIT function: what it compiled for, and what was launched without it."""

    def __init__(self) -> None:
        self.compiled: list[tuple[Any, ...]] = []
        self.launched: list[tuple[Any, ...]] = []

    def fn(self) -> None:
        """The function that it was made of."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def compile_and_launch(*args: Any) -> Any:
            self.compiled.append((grid, args))
            return Compiled(self)

        return compile_and_launch


class Compiled:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, stream: self.kernel.launched.append((grid, args))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(host, "_compiled", {})
    monkeypatch.setattr(host, "driver", SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda index: 0)))
    return Kernel()


CPU = torch.device("cpu")


def inputs(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(1, 192, 2, 64, dtype=dtype)


def rows_of(x: torch.Tensor, n_rows: int = 64) -> host.Template:
    return host.rows(x.shape, x.stride(), x.dtype, n_rows)


def launch_of(kernel: Kernel, x: torch.Tensor, programs: int = 7, *numbers: float, **constants: Any) -> host.Launch:
    return host.Launch(kernel, CPU, programs, [rows_of(x)], numbers, **constants)


def test_launches_alike_take_what_was_compiled_and_their_own_arguments(kernel: Kernel) -> None:
    first, second, longer = inputs(), inputs(), torch.zeros(1, 256, 2, 64, dtype=torch.bfloat16)
    launch = launch_of(kernel, first, 7, 192, 0.5, CONFIG=("a", 1), M=64)
    for x in (first, second, second):
        launch(x, x, None)
    launch_of(kernel, longer, 8, 256, 0.25, CONFIG=("a", 1), M=64)(longer, longer, None)
    ((grid, (descriptor, *rest)),) = kernel.compiled
    assert grid == (7,)
    assert descriptor.base is first
    assert rest == [first, None, 192, 0.5, ("a", 1), 64]
    assert [grid for grid, _ in kernel.launched] == [(7, 1, 1), (7, 1, 1), (8, 1, 1)]
    for (_, (descriptor, pointer, absent, *others)), x in zip(kernel.launched, (second, second, longer), strict=True):
        assert descriptor.base is pointer is x
        assert descriptor.shape == (1, 2, x.shape[1], 64)
        assert absent is None
        assert others == ([192, 0.5] if x is second else [256, 0.25]) + [("a", 1), 64]


def test_what_triton_compiles_anew_for_is_compiled_anew(kernel: Kernel) -> None:
    x, numbers = inputs(), torch.zeros(8, dtype=torch.int32)
    launch_of(kernel, x, M=64)(x, numbers)
    launch_of(kernel, x, M=64)(x, None)
    launch_of(kernel, x, M=64)(x, numbers.float())
    launch_of(kernel, x, M=128)(x, numbers)
    half = inputs(torch.float16)
    launch_of(kernel, half, M=64)(half, numbers)
    host.Launch(kernel, torch.device("meta"), 7, [rows_of(x)], (), M=64)(x, numbers)  # another device
    assert len(kernel.compiled) == 6
    other = Kernel()
    launch_of(other, x, M=64)(x, numbers)
    assert len(other.compiled) == 1
    assert not kernel.launched


@pytest.mark.parametrize(
    "kernel", [forward_kernel, backward_kernel, dkdv_kernel, dq_kernel, preprocess_kernel, sort_kernel]
)
def test_no_kernel_is_compiled_for_the_value_of_a_number(kernel: Any) -> None:
    """For compiled kernels are not kept by it."""
    numbers = {
        name for name, parameter in inspect.signature(kernel.fn).parameters.items()
        if "constexpr" not in str(parameter.annotation) and not name.endswith(("_desc", "_ptr"))
    }  # fmt: skip
    never = {"tanh_scale", "scale_log2", "scale"}  # a float's value Triton never compiles for
    found = kernel.do_not_specialize if hasattr(kernel, "do_not_specialize") else kernel.kwargs["do_not_specialize"]
    assert set(found) == numbers - never


def test_tensors_lie_where_compiled_kernels_read_them() -> None:
    x = torch.arange(9, dtype=torch.int32)
    assert host.pointer(None) is None
    assert host.pointer(x) is x
    moved = host.pointer(x[1:])
    assert moved is not None
    assert moved.data_ptr() % 16 == 0
    assert moved.tolist() == x[1:].tolist()


def test_a_descriptor_is_of_its_own_tensor() -> None:
    """A tile's descriptor is checked once, and copied: with the shape, strides and base of the tensor at hand."""
    fused = torch.zeros(1, 192, 3, 2, 64, dtype=torch.bfloat16)
    q, k, _ = fused.unbind(2)
    descriptors = [rows_of(x).of(x) for x in (q, k, q.contiguous(), q)]
    assert [x.base is y for x, y in zip(descriptors, (q, k, q, q), strict=True)] == [True, True, False, True]
    assert descriptors[0].shape == (1, 2, 192, 64)
    assert descriptors[0].strides == descriptors[1].strides == (192 * 384, 64, 384, 1)
    assert descriptors[2].strides == (192 * 128, 64, 128, 1)
    for descriptor in (
        *descriptors,
        host.floats(512, 8, 32).of(torch.zeros(512)),
        host.floats(64, 64).of(torch.zeros(64)),
    ):
        descriptor.__post_init__()  # Triton's own check
    plain = host.plain_rows(k.shape, k.stride(), k.dtype, 64).of(k)
    plain.__post_init__()
    assert plain.base is k


def test_scratch_memory_is_one_allocation_of_aligned_vectors() -> None:
    floats, ints = torch.float32, torch.int32
    scratch = host.Scratch.of(first=(floats, 130), absent=(ints, 0), second=(ints, 3), third=(floats, 128))
    memory, (first, absent, second, third) = scratch.allocate(CPU)
    assert memory.numel() == 256 + 128 + 128
    assert absent is None
    parts = [part for part in (first, second, third) if part is not None]
    assert [part.data_ptr() - memory.data_ptr() for part in parts] == [0, 1024, 1536]
    assert [part.dtype for part in parts] == [torch.float32, torch.int32, torch.float32]


def test_calls_of_ever_new_lengths_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "multiprocessors", lambda device: PROGRAMS)
    launches.forward_launch.cache_clear()
    for length in range(1, launches.CALLS + 10):
        shape = (1, length, 2, 64)
        strides = (host.contiguous_strides(shape),) * 3
        launches.forward_launch(
            launches.Call(CPU, torch.bfloat16, shape, shape, shape, strides, False, False, True, None, 0.0, 0.125)
        )
    assert launches.forward_launch.cache_info().currsize == launches.CALLS
    launches.forward_launch.cache_clear()


def test_kernels_count_on_in_the_memory_of_their_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[str] = []
    stream, capturing = 1, False
    active = SimpleNamespace(get_current_stream=lambda index: stream)
    monkeypatch.setattr(host, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(host, "_counters", {})
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(wait_stream=waited.append))
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: "the thread's")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    first = host.queue_counter(CPU)
    assert first.tolist() == [0]
    assert host.queue_counter(CPU) is first
    assert waited == ["the thread's"]  # that cleared it, once
    stream = 2
    assert host.queue_counter(CPU) is not first
    capturing = True
    graphs = [host.queue_counter(CPU) for _ in range(2)]
    assert graphs[0] is not graphs[1]


CAUSAL = Kind(heads=16, group=1, causal=True, window=False, starts=False, softcap=False)
PROGRAMS = 132


@pytest.mark.parametrize("rounds", [1, 2, 6])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("n_tiles", "n_groups", "group"), [(8, 99, 1), (32, 64, 1), (128, 4, 4), (3, 5, 3), (1, 1, 2)])
def test_the_order_has_every_tile_of_every_head_once(
    n_tiles: int, n_groups: int, group: int, causal: bool, rounds: int
) -> None:
    kind = replace(CAUSAL, group=group, causal=causal)
    interleaved = config.log_interleaved(kind, n_groups, n_tiles * group, rounds * PROGRAMS)
    scheduler = TileScheduler(n_tiles, n_groups, interleaved)
    order = [tile_of.fn(work_tile, scheduler, group, kind) for work_tile in range(n_tiles * n_groups * group)]
    assert sorted(order) == [(head, tile) for head in range(n_groups * group) for tile in range(n_tiles)]
    for head in range(n_groups * group):  # and the longest first
        tiles = [tile for h, tile in order if h == head]
        assert tiles == sorted(tiles)


def last_over_mean(times: Iterable[float]) -> float:
    """When the last program ends, over when they end on average, if who is free takes the next work tile."""
    ends = [0.0] * PROGRAMS
    for time in times:
        heapq.heapreplace(ends, ends[0] + time)
    return max(ends) * PROGRAMS / sum(ends)


@pytest.mark.parametrize(("n_tiles", "n_heads"), [(8, 256), (32, 64), (64, 32), (128, 16)])
def test_with_a_causal_mask_programs_end_at_about_the_same_time(n_tiles: int, n_heads: int) -> None:
    """Where one head's tiles came after another's to the end, they waited up to 7 % of their time for the last ones."""
    scheduler = TileScheduler(n_tiles, n_heads, config.log_interleaved(CAUSAL, n_heads, n_tiles, PROGRAMS))
    tiles = (tile_of.fn(work_tile, scheduler, 1, CAUSAL)[1] for work_tile in range(n_tiles * n_heads))
    assert last_over_mean(n_tiles - tile + 1 for tile in tiles) < 1.035


@pytest.mark.parametrize(("n_tiles", "n_heads"), [(32, 64), (64, 32), (128, 16)])
def test_deterministic_programs_end_at_about_the_same_time_too(
    n_tiles: int, n_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And none waits for an addition of a program that starts later, or long for that of one that has started."""
    monkeypatch.setattr(key_tiles, "is_interleaved", is_interleaved.fn)
    kind = config.backward_config(CAUSAL, 128, True)
    scheduler = TileScheduler(n_tiles, n_heads, config.log_interleaved(CAUSAL, n_heads, n_tiles, PROGRAMS))
    ends = [0.0] * PROGRAMS
    added: dict[tuple[int, int], float] = {}  # when a tile of queries was last added to
    waited = 0.0
    for work_tile in range(n_tiles * n_heads):
        head, tile = tile_of.fn(work_tile, scheduler, 1, kind)
        descending = queries_descend.fn(work_tile, scheduler, kind)
        queries = range(n_tiles - 1, tile - 1, -1) if descending else range(n_tiles - 1 - tile, n_tiles)  # `locate`
        now = ends[0]
        for t in queries:
            arrived = added.get((head, t), 0.0) + 0.5  # an addition takes half as long to arrive as such a tile
            waited += max(0.0, arrived - now - 1)
            now = added[head, t] = max(now + 1, arrived)
        heapq.heapreplace(ends, now + 1)
    assert max(ends) < 1.035 * sum(ends) / PROGRAMS
    assert waited < 0.02 * sum(ends)


@pytest.mark.parametrize("n_heads", [12, 16, 32])
def test_with_documents_programs_end_at_about_the_same_time(n_heads: int) -> None:
    """Their tiles are long and short in any order, and to begin a long one last would cost 3 to 7 %: none does."""
    kind, n_tiles = replace(CAUSAL, starts=True), 128
    _, _, interleaved = config.accumulator_plan(kind, n_heads, n_tiles, PROGRAMS)
    scheduler = TileScheduler(n_tiles, n_heads, interleaved)
    order = [tile_of.fn(work_tile, scheduler, 1, kind)[1] for work_tile in range(n_tiles * n_heads)]
    first = (n_heads - 2**interleaved) * n_tiles  # of the interleaved tiles
    generator, unsorted, as_it_is = torch.Generator().manual_seed(0), [], []
    for _ in range(20):
        cuts = (torch.randperm(n_tiles - 1, generator=generator)[:15] + 1).tolist()
        lengths = [min(end for end in [*cuts, n_tiles] if end > tile) - tile + 2 for tile in range(n_tiles)]
        longest = sorted(lengths, reverse=True)
        unsorted.append(last_over_mean(lengths[place] for place in order))
        as_it_is.append(last_over_mean([lengths[i] for i in order[:first]] + [longest[i] for i in order[first:]]))
    assert mean(as_it_is) < 1.045
    assert mean(unsorted) - mean(as_it_is) > 0.025


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shift", [0, 300])
@pytest.mark.parametrize("n_tiles", [1, 63, 64, 65, 200])
def test_tiles_of_documents_are_sorted_by_the_queries_that_see_them(n_tiles: int, shift: int, causal: bool) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ends = torch.randint(0, 128 * n_tiles, (3, n_tiles, 2), dtype=torch.int32).sort(1).values
    ends[1] = ends[1] // 1024 * 1024  # with many that are as long
    got = torch.full((3, n_tiles), -1, dtype=torch.int32, device=device)
    sort_kernel[(3 * -(-n_tiles // 64),)](ends.to(device), got, shift, n_tiles, N=128, CHUNK=64, CAUSAL=causal)
    first_query = (torch.arange(n_tiles) * 128 - shift).clamp(min=0) if causal else 0
    lengths = ends[:, :, 0] - first_query
    assert torch.equal(got.cpu().long(), lengths.sort(dim=1, descending=True, stable=True).indices)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("starts", [True, False])
@pytest.mark.parametrize("n_tiles", [1, 2, 7, 8, 31, 66, 128, 132, 133, 1000])
@pytest.mark.parametrize("n_heads", [1, 2, 3, 16, 33, 512])
def test_no_work_tile_of_the_backward_waits_for_a_later_one(
    n_tiles: int, n_heads: int, starts: bool, causal: bool
) -> None:
    """For an accumulator: the head before must have left it. To convert sums to dQ: all must have added to them."""
    kind = replace(CAUSAL, causal=causal, starts=starts)
    lag, count, interleaved = config.accumulator_plan(kind, n_heads, n_tiles, min(n_tiles * n_heads, PROGRAMS))
    scheduler = TileScheduler(n_tiles, n_heads, interleaved)
    heads = [tile_of.fn(work_tile, scheduler, 1, kind)[0] for work_tile in range(n_tiles * n_heads)]
    last = {head: work_tile for work_tile, head in enumerate(heads)}  # that adds to a head's sums
    for work_tile, head in enumerate(heads):
        if head >= count:  # `wait_for_accumulator`: until the work tiles that clear it have
            assert (head - count + lag) * n_tiles + n_tiles - 1 < work_tile
        if work_tile // n_tiles >= lag:  # `finish`
            assert last[work_tile // n_tiles - lag] < work_tile


@pytest.mark.parametrize(("D", "D_v"), [(64, 64), (96, 96), (128, 128), (192, 192), (192, 128)])
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("mask", ["causal", "documents", "packed"])
def test_each_launch_has_what_its_kernel_has_parameters_for(
    D: int, D_v: int, deterministic: bool, mask: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[str] = []
    starts = None if mask == "causal" else torch.zeros(2, 300, dtype=torch.int32)
    ends = torch.zeros(2, 300, dtype=torch.int32) if mask == "packed" else None

    def run(launch: host.Launch, *tensors: Any) -> None:
        kernel = launch.kernel
        names = list(inspect.signature(kernel.fn).parameters)
        launched.append(kernel.fn.__name__)
        args = [
            *map(host.Template.of, launch.descriptors, tensors),
            *tensors[len(launch.descriptors) :],
            *launch.numbers,
        ]
        assert names[len(args) :] == list(launch.constants)
        for name, arg in zip(names, args, strict=False):
            if name.endswith("_desc"):
                assert hasattr(arg, "block_shape"), name
                arg.__post_init__()  # Triton's own check
            elif name == "sequence_ends_ptr":
                assert arg is ends
            elif name == "starts_ptr":
                assert arg is starts or (mask == "documents" and arg is None), kernel.fn.__name__
            elif name.endswith("_ptr"):
                assert arg is None or arg.data_ptr() % 16 == 0, name
            else:
                assert type(arg) is (float if name in ("tanh_scale", "scale_log2", "scale") else int), name

    monkeypatch.setattr(host.Launch, "__call__", run)
    monkeypatch.setattr(launches, "multiprocessors", lambda device: PROGRAMS)
    monkeypatch.setattr(host, "queue_counter", lambda device: torch.zeros(1, dtype=torch.int32))
    q, k, v = (torch.zeros(2, 300, *shape, dtype=torch.bfloat16) for shape in ((4, D), (2, D), (2, D_v)))
    options: dict[str, Any] = {"causal": True, "window": None, "softcap": 0.0, "scale": 0.1}
    out, lse = hopper.forward(q, k, v, starts, ends, None, **options)
    assert out.shape == (2, 300, 4, D_v)
    gradients = hopper.backward(
        out, None, q, k, v, out, lse, starts, ends, None, deterministic=deterministic, **options
    )
    assert [x.shape for x in gradients[:3] if x is not None] == [q.shape, k.shape, v.shape]
    sorts = ["sort_kernel"] if starts is not None and not deterministic else []
    backward = ["dkdv_kernel", "dq_kernel"] if D > 128 else [*sorts, "backward_kernel"]
    assert launched == ["forward_kernel", "preprocess_kernel", *backward]


def test_the_soft_caps_series_is_tanh_to_float32s_last_bits():
    near, series = softcap.NEAR.value, softcap.SERIES.value
    x = torch.linspace(1e-3, near, 10_001, dtype=torch.float64)
    tanh = x * sum(c * x ** (2 * i) for i, c in enumerate(series))
    assert ((tanh - x.tanh()) / x.tanh()).abs().max() < 6e-7
