"""Runs the Hopper kernels on a CPU, from their source: a small interpreter of the part of Gluon that they use.

Gluon has none of its own. Here its functions are plain Python on PyTorch's tensors, each partition of a program is a
thread, and barriers block. What is asynchronous on a GPU happens as late as it may: a product reads its operands when
it is waited for. So a tile that is overwritten too early gives wrong numbers here, and a barrier that nobody completes
is reported. Layouts, proxies and their fences, registers and PTX inside of the kernels are left to the compiler and the
GPU.
"""

from __future__ import annotations

import importlib
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch

SECONDS = 20
"""That a thread waits for a barrier before it is taken for stuck."""
PACKAGE = "kernels.flash_attention"
here = threading.local()
"""Of a thread: `program`, `programs`, `pending` products, `partitions` that it has started."""


class Whole(int):
    value = property(int)


class Real(float):
    value = property(float)


def constexpr(x: Any) -> Any:
    return {int: Whole, float: Real}.get(type(x), lambda x: x)(x)


class DType:
    def __init__(self, name: str) -> None:
        self.torch = getattr(torch, name)
        self.primitive_bitwidth = self.torch.itemsize * 8

    def __eq__(self, other: object) -> bool:
        return self.torch == getattr(other, "torch", other)

    def __hash__(self) -> int:
        return hash(self.torch)


class Values(torch.Tensor):
    """A tile in registers, or a number."""

    @property
    def type(self) -> Any:  # type: ignore[override]
        return types.SimpleNamespace(layout=None, is_block=lambda: self.dim() > 0)

    def to(self, dtype: Any, bitcast: bool = False) -> Values:  # type: ignore[override]
        dtype = getattr(dtype, "torch", dtype)
        return self.view(dtype) if bitcast else super().to(dtype)  # type: ignore[no-any-return]

    def __index__(self) -> int:
        return int(self.item())

    # x += y is a new value, whoever else has the old one.
    def __iadd__(self, y: Any) -> Any:
        return self + y

    def __isub__(self, y: Any) -> Any:
        return self - y

    def __imul__(self, y: Any) -> Any:
        return self * y

    def __iand__(self, y: Any) -> Any:
        return self & y


def values(x: Any) -> Values:
    return torch.as_tensor(x).as_subclass(Values)


class Shared:
    """A tile in shared memory: a view."""

    def __init__(self, data: torch.Tensor, dtype: Any) -> None:
        self.data, self.dtype, self.shape, self.layout = data, dtype, list(data.shape), None

    def index(self, i: Any) -> Shared:
        assert 0 <= int(i) < self.shape[0], (int(i), self.shape)
        return Shared(self.data[int(i)], self.dtype)

    def slice(self, start: Any, length: Any, dim: int = 0) -> Shared:
        return Shared(self.data.narrow(dim, int(start), int(length)), self.dtype)

    def reshape(self, shape: list[int]) -> Shared:
        return Shared(self.data.view(shape), self.dtype)

    def permute(self, order: Any) -> Shared:
        return Shared(self.data.permute(*order), self.dtype)

    def load(self, layout: Any = None) -> Values:
        return values(self.data.clone())

    def store(self, x: torch.Tensor) -> None:
        assert x.dtype == self.data.dtype, (x.dtype, self.data.dtype)
        self.data.copy_(x.as_subclass(torch.Tensor).reshape(self.data.shape))

    def reinterpret(self, dtype: DType, shape: list[int], layout: Any) -> Panels:
        return Panels(self.data[0, 0], dtype)


class Panels:
    """A tile of rows as `padding.load_cleared` sees it: 64 columns of four rows at a time."""

    def __init__(self, tile: torch.Tensor, dtype: DType) -> None:
        self.tile, self.dtype = tile, dtype

    def index(self, i: int) -> Panels:
        row, panel = i * 4 % self.tile.shape[0], i * 4 // self.tile.shape[0]
        return Panels(self.tile[row : row + 4, 64 * panel : 64 * panel + 64], self.dtype)

    def load(self, layout: Any) -> Values:
        return values(self.tile.contiguous().view(self.dtype.torch).flatten())

    def store(self, x: torch.Tensor) -> None:
        self.tile.copy_(x.as_subclass(torch.Tensor).view(self.tile.dtype).view(self.tile.shape))


class Barrier:
    """An mbarrier; several, indexed, where `count` is None."""

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.count = self.arrived = self.bytes = self.phase = 0

    def change(self, arrivals: int, n_bytes: int) -> None:
        with self.condition:
            self.arrived += arrivals
            self.bytes += n_bytes
            assert self.arrived <= self.count, "more arrivals than the barrier counts"
            if self.arrived == self.count and self.bytes == 0:
                self.arrived, self.phase = 0, self.phase + 1
                self.condition.notify_all()

    def wait(self, phase: int) -> None:
        with self.condition:
            assert self.condition.wait_for(lambda: self.phase & 1 != phase, SECONDS), "nobody completes a barrier"


class Barriers:
    def __init__(self, n: int) -> None:
        self.shape, self.all = [n, 1], [Barrier() for _ in range(n)]
        self.numbers = torch.zeros(n, 1, dtype=torch.int32)

    def index(self, i: Any) -> Any:
        barrier = self.all[int(i)]
        number = Shared(self.numbers[int(i)], int32)
        barrier.load, barrier.store = number.load, number.store  # type: ignore[attr-defined]  # a queue's slots
        return barrier


class NamedBarrier:
    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.arrived = self.phase = 0

    def arrive(self, threads: int) -> int:
        """The phase that this arrival is of; it ends once so many threads have arrived."""
        with self.condition:
            phase = self.phase
            self.arrived += here.threads
            assert self.arrived <= threads, "more threads than the barrier counts"
            if self.arrived == threads:
                self.arrived, self.phase = 0, phase + 1
                self.condition.notify_all()
            return phase

    def sync(self, threads: int) -> None:
        phase = self.arrive(threads)
        with self.condition:
            assert self.condition.wait_for(lambda: self.phase > phase, SECONDS), "nobody comes to a named barrier"


class Pointer:
    def __init__(self, data: torch.Tensor, at: Any = 0) -> None:
        self.data, self.at = data, at

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.data, self.at + offset)

    def __sub__(self, offset: Any) -> Pointer:
        return Pointer(self.data, self.at - offset)


@dataclass
class Descriptor:
    """TMA's: tiles of a tensor."""

    base: torch.Tensor
    shape: list[int]
    strides: list[int]
    block_shape: list[int]
    layout: Any = None

    @property
    def dtype(self) -> DType:
        return next(d for d in (float32, bfloat16, float16, int32) if d == self.base.dtype)

    def tile(self, at: list[Any]) -> tuple[torch.Tensor, tuple[slice, ...]]:
        """What there is of a tile in the tensor, and where it is in the tile."""
        whole = self.base.as_strided(self.shape, self.strides)
        firsts = [int(i) for i in at]
        ends = [min(i + n, size) for i, n, size in zip(firsts, self.block_shape, self.shape, strict=True)]
        inside = tuple(slice(0, max(end - i, 0)) for i, end in zip(firsts, ends, strict=True))
        return whole[tuple(slice(i, max(end, i)) for i, end in zip(firsts, ends, strict=True))], inside

    def load(self, at: list[Any]) -> Values:
        tile = torch.zeros(self.block_shape, dtype=self.base.dtype)
        part, inside = self.tile(at)
        tile[inside] = part
        return values(tile)


float32, float16, bfloat16, int32, int64 = map(DType, ("float32", "float16", "bfloat16", "int32", "int64"))
adding = threading.Lock()


def load(pointer: Pointer, mask: Any = True, other: Any = 0, volatile: bool = False) -> Values:
    at, mask = torch.as_tensor(pointer.at), torch.as_tensor(mask)
    x = pointer.data[torch.where(mask, at, 0)]
    return values(torch.where(mask, x, torch.as_tensor(other, dtype=x.dtype)))


def store(pointer: Pointer, x: Any, mask: Any = True) -> None:
    at, x, mask = torch.broadcast_tensors(*map(torch.as_tensor, (pointer.at, x, mask)))
    pointer.data[at[mask]] = x[mask].to(pointer.data.dtype).as_subclass(torch.Tensor)


def atomic_add(pointer: Pointer, x: int, mask: Any = True, sem: str = "") -> Values:
    with adding:
        before = values(pointer.data[int(pointer.at)].clone())
        if mask:
            pointer.data[int(pointer.at)] += x
    return before


def mma(a: Any, b: Shared, acc: Values, use_acc: bool = True, is_async: bool = True) -> Values:
    here.pending.append((a, b, acc, use_acc))
    return acc


def mma_wait(pending: int, deps: Any) -> Any:
    while len(here.pending) > pending:
        a, b, acc, use_acc = here.pending.popleft()
        a, b = (x.data if isinstance(x, Shared) else x for x in (a, b))
        product = (a.float() @ b.float()).as_subclass(torch.Tensor)
        acc.copy_(product + acc if use_acc else product)
    return tuple(deps) if len(deps) > 1 else deps[0]


def allocate(dtype: DType, shape: list[int], layout: Any) -> Any:
    if layout == "barriers":
        return Barriers(shape[0])
    return Shared(torch.full(shape, float("nan") if dtype != int32 else -1, dtype=dtype.torch), dtype)


def expect(barrier: Barrier, n_bytes: int, pred: Any = True) -> None:
    if pred:
        barrier.change(1, int(n_bytes))


def async_load(rows: Descriptor, at: list[Any], barrier: Barrier, tile: Shared, pred: Any = True) -> None:
    if pred:
        tile.data.copy_(rows.load(at).as_subclass(torch.Tensor))
        barrier.change(0, -tile.data.numel() * tile.data.itemsize)


def async_store(rows: Descriptor, at: list[Any], tile: Shared) -> None:
    part, inside = rows.tile(at)
    part.copy_(tile.data[inside])


def async_add(rows: Descriptor, at: list[Any], tile: Shared) -> None:
    with adding:
        part, inside = rows.tile(at)
        part.add_(tile.data[inside])


def together(calls: list[tuple[Callable[..., None], tuple[Any, ...], dict[str, Any]]]) -> None:
    """Call functions with arguments at once, each in a thread of its own, where `here` is what is named."""
    failures: list[BaseException] = []

    def run(function: Callable[..., None], arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        here.__dict__.update(named, pending=deque())
        try:
            function(*arguments)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=call, daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def run_partitions(partitions: list[tuple[Callable[..., None], tuple[Any, ...]]], warps: Any, registers: Any) -> None:
    named = {"program": here.program, "programs": here.programs, "barriers": [NamedBarrier() for _ in range(16)]}
    threads = [32 * n for n in (4, *warps)]
    together([(*partition, named | {"threads": n}) for partition, n in zip(partitions, threads, strict=True)])


# What the kernels have in PTX, for the functions of these names. A warp has 16 rows.


def hide(s: Values, n: Values, first: Values, width: Values) -> Values:
    at = n - first[:, None]
    return values(torch.where((at >= 0) & (at < width[:, None]), s, float("-inf")))


def any_of_warp(found: torch.Tensor) -> torch.Tensor:
    return found.view(4, -1).any(1)[:, None].expand(4, found.numel() // 4).reshape(found.shape)


def outweighs(block: Values, row_sum: Values) -> Values:
    return values(any_of_warp(block > row_sum * 0.8).int())


def rounding_excess(p: Values, block: Values, outweighing: Any) -> Values:
    return values(torch.where(torch.as_tensor(outweighing) != 0, p.float().sum(1, keepdim=True) / 4 - block, 0.0))


def not_finite(outs: tuple[Values, ...], row_sum: Values) -> Values:
    finite = torch.stack([out.isfinite().all(1) for out in outs]).all(0)[:, None]
    return values(torch.where(finite, 0.0, float("nan")).expand(row_sum.shape))


IN_PTX = {
    "hide": hide, "outweighs": outweighs, "rounding_excess": rounding_excess, "not_finite": not_finite,
    "rescale_part": lambda x, factor: x * factor[:, None],
    "wait_for_products": lambda: mma_wait(0, (None,)),
    "barrier_arrive": lambda i, threads: here.barriers[int(i)].arrive(threads),
    "barrier_sync": lambda i, threads: here.barriers[int(i)].sync(threads),
}  # fmt: skip


def number(x: Any) -> Any:
    return x if isinstance(x, (int, float)) else x.item()


def whole(x: int) -> Values:
    return values(torch.tensor(x, dtype=torch.int32))


def binary(function: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    def apply(x: Any, y: Any) -> Any:
        dtype = next((z.dtype for z in (x, y) if isinstance(z, torch.Tensor)), torch.int32)
        return values(function(torch.as_tensor(x, dtype=dtype), torch.as_tensor(y, dtype=dtype)))

    return apply


def module(name: str, **contents: Any) -> types.ModuleType:
    made = types.ModuleType(name)
    made.__dict__.update(contents)
    return made


def decorator(function: Any = None, **options: Any) -> Any:
    if function is None:
        return decorator
    function.fn = function
    return function


def layout(*arguments: Any, **options: Any) -> None:
    return None


def language() -> types.ModuleType:
    class SharedLayout:
        get_default_for = staticmethod(layout)

        def __init__(self, *arguments: Any, **options: Any) -> None: ...

    def full(shape: list[int], x: Any, dtype: DType, layout: Any = None) -> Values:
        return values(torch.full([int(n) for n in shape], number(x), dtype=dtype.torch))

    return module(
        "language", constexpr=constexpr, tensor=Values, tuple=tuple, shared_memory_descriptor=Shared,
        float32=float32, float16=float16, bfloat16=bfloat16, int32=int32, int64=int64,
        BlockedLayout=layout, SliceLayout=layout, DotOperandLayout=layout, NVMMADistributedLayout=layout,
        SwizzledSharedLayout=layout, NVMMASharedLayout=SharedLayout,
        allocate_shared_memory=allocate, warp_specialize=run_partitions, num_warps=lambda: 1,
        program_id=lambda axis: whole(here.program), num_programs=lambda axis: whole(here.programs),
        static_range=range, static_assert=lambda condition, *text: None, thread_barrier=lambda: None,
        inline_asm_elementwise=lambda *arguments, **options: None,
        load=load, store=store, atomic_add=atomic_add,
        full=full, zeros=lambda shape, dtype, layout=None: full(shape, 0, dtype),
        arange=lambda first, end, layout=None: values(torch.arange(int(first), int(end), dtype=torch.int32)),
        expand_dims=lambda x, dim: x.unsqueeze(dim),
        where=lambda c, x, y: values(torch.where(torch.as_tensor(c), x, y)),
        minimum=binary(torch.minimum), maximum=binary(torch.maximum), cdiv=lambda a, b: -(-a // b),
        exp2=torch.exp2, log2=torch.log2, convert_layout=lambda x, layout, assert_trivial=False: x,
        to_tensor=whole, sum=lambda x, axis: x.sum(axis, dtype=x.dtype), max=lambda x, axis: x.amax(axis),
        _core=types.SimpleNamespace(builtin=decorator),
    )  # fmt: skip


@contextmanager
def replaced(modules: dict[str, types.ModuleType]) -> Iterator[None]:
    """Python's modules of these names replaced, and those of the kernels imported anew."""
    anew = ("hopper", "intervals", "scores", "problem")
    before = dict(sys.modules)
    for name in before:
        if name.startswith(tuple(f"{PACKAGE}.{part}" for part in anew)):
            del sys.modules[name]
    parent = sys.modules[PACKAGE]
    attributes = {name: parent.__dict__.pop(name) for name in anew if hasattr(parent, name)}
    sys.modules.update(modules)
    try:
        yield
    finally:
        sys.modules.clear()
        sys.modules.update(before)
        for name in anew:
            parent.__dict__.pop(name, None)
        parent.__dict__.update(attributes)


def launch(self: Any, *tensors: Any) -> None:
    """For `host.Launch.__call__`: run a kernel's programs at once."""
    n = len(self.descriptors)
    described = [template.of(x) for template, x in zip(self.descriptors, tensors, strict=False)]
    pointers = [None if x is None else Pointer(x.view(-1)) for x in tensors[n:]]
    numbers = [values(torch.tensor(x)) if isinstance(x, float) else x for x in self.numbers]
    call = partial(self.kernel, **self.constants), (*described, *pointers, *numbers)
    together([(*call, {"program": i, "programs": self.programs}) for i in range(self.programs)])


def allocate_scratch(self: Any, device: torch.device) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """For `host.Scratch.allocate`: tensors in place of addresses. What nobody has written is NaN."""
    memory = torch.full((self.size,), float("nan"))
    firsts = [part[1] // 4 for part in self.parts if part is not None]
    vectors = iter(memory.split([b - a for a, b in pairwise([*firsts, self.size])]))
    return memory, [None if part is None else next(vectors).view(part[0]) for part in self.parts]


def hopper(multiprocessors: int) -> types.ModuleType:
    """`kernels.flash_attention.hopper`, whose launches run kernels here."""
    gl = language()
    mbarrier = module(
        "mbarrier", MBarrierLayout=lambda: "barriers", expect=expect,
        init=lambda barrier, count: setattr(barrier, "count", count),
        arrive=lambda barrier, count: barrier.change(count, 0),
        wait=lambda barrier, phase, pred=True: barrier.wait(int(phase)) if pred else None,
    )  # fmt: skip
    tma = module(
        "tma", async_load=async_load, async_store=async_store, async_atomic_add=async_add, store_wait=lambda n: None
    )
    nvidia = module(
        "hopper", mbarrier=mbarrier, tma=tma, fence_async_shared=lambda: None, warpgroup_mma=mma,
        warpgroup_mma_wait=mma_wait, TensorDescriptor=Descriptor,
    )  # fmt: skip
    core = module("core", _aggregate=decorator)
    gluon = module("gluon", jit=decorator, constexpr_function=decorator, language=gl)
    triton = module("triton", jit=decorator, language=gl, cdiv=gl.cdiv)
    modules = {
        "triton": triton, "triton.language": gl, "triton.language.core": core, "triton.experimental": module("x"),
        "triton.experimental.gluon": gluon, "triton.experimental.gluon.language": gl,
        "triton.experimental.gluon.language.nvidia.hopper": nvidia, "triton.experimental.gluon.nvidia.hopper": nvidia,
        "triton.tools.tensor_descriptor": module("descriptor", TensorDescriptor=Descriptor),
        "triton._C.libtriton": module("libtriton", ir=None), "triton.runtime": module("runtime", driver=None),
    }  # fmt: skip
    modules["triton.experimental"].gluon = gluon  # type: ignore[attr-defined]
    with replaced(modules):
        found = importlib.import_module(f"{PACKAGE}.hopper")
        names = ("compiler", "forward_pass", "host", "launches", "pipeline", "softcap", "softmax", "split_d")
        parts = {name: importlib.import_module(f"{PACKAGE}.hopper.{name}") for name in names}
    for part in parts.values():
        part.__dict__.update({name: function for name, function in IN_PTX.items() if name in part.__dict__})
    softcap, host, launches = (parts[name].__dict__ for name in ("softcap", "host", "launches"))
    softcap["tanh"] = lambda y: torch.tanh(y * (softcap["NEAR"] / 2))
    launches["multiprocessors"] = lambda device: multiprocessors
    host["queue_counter"] = lambda device: torch.zeros(1, dtype=torch.int32)
    host["Launch"].__call__ = launch
    host["Scratch"].allocate = allocate_scratch
    return found
