"""From PyTorch's tensors to a running kernel with little work for the host.

An H100 computes a row of 4k tokens in less time than Triton's own launch takes the host, which looks at every argument
anew and checks every descriptor. A `Launch` has all that does not depend on where tensors lie, so a call of a known
shape sets addresses and launches: docs/lab (L6, L27) has the times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor as PlainDescriptor

from .config import padded

Sizes = tuple[int, ...]
"""A tensor's shape, or its strides."""
Pointer: TypeAlias = "Tensor | Part | None"

ELEMENT = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}

ALIGNMENT = 128
"""Numbers of 4 bytes: vectors in one allocation begin at multiples of 512 bytes, as PyTorch's own allocations do."""

_compiled: dict[tuple[Any, ...], Any] = {}
_counters: dict[tuple[int, int], Tensor] = {}


class Template:
    """A tensor descriptor without its tensor.

    Triton's own check of a descriptor takes 10 µs; here it is done once for each tile. So shape and strides must be
    those of a tensor that `problem.aligned` lets through or PyTorch made.
    """

    __slots__ = ("checked", "shape", "strides")

    def __init__(self, checked: Any, shape: Sizes, strides: Sizes) -> None:
        """`checked`: a descriptor of the same tile."""
        self.checked, self.shape, self.strides = checked, shape, strides

    def of(self, base: Pointer) -> Any:
        fields = vars(self.checked).copy()
        fields["base"], fields["shape"], fields["strides"] = base, self.shape, self.strides
        descriptor: Any = object.__new__(type(self.checked))
        descriptor.__dict__ = fields
        return descriptor


class Launch:
    """A kernel's launch on tensors of certain shapes, strides and dtypes, which it is called with.

    Compiled kernels are kept by dtypes and constants. All else that Triton compiles for is the same in every launch:
    tensors lie at multiples of 16 bytes (`pointer`, `problem.aligned`), and the kernels' numbers are below 2³¹
    (`op.hopper_lacks`) and not specialised for.
    """

    def __init__(
        self, kernel: Any, device: torch.device, programs: int, descriptors: Sequence[Template],
        numbers: Sequence[float], **constants: Any,
    ) -> None:  # fmt: skip
        """
        Args:
            descriptors: of the kernel's first parameters. Pointers are the next.
            numbers, constants: the parameters after these, in their order.
        """
        self.kernel, self.device, self.programs, self.descriptors = kernel, device, programs, descriptors
        self.numbers, self.constants = numbers, constants
        self.rest = *numbers, *constants.values()
        self.run: Callable[..., None] | None = None

    def __call__(self, *tensors: Pointer) -> None:
        args = (*map(Template.of, self.descriptors, tensors), *tensors[len(self.descriptors) :], *self.rest)
        if self.run is None:
            dtypes = [None if x is None else x.dtype for x in tensors]
            key = (self.kernel.fn, self.device, *dtypes, *self.constants.values())
            compiled = _compiled.get(key)
            if compiled is None:
                _compiled[key] = self.kernel[(self.programs,)](*args)
                return
            self.run = compiled[self.programs, 1, 1]
        # Without a stream, Triton asks for the device first.
        self.run(*args, stream=driver.active.get_current_stream(self.device.index))


def rows(shape: Sizes, strides: Sizes, dtype: torch.dtype, n_rows: int, n_columns: int | None = None) -> Template:
    """A tensor (B, S, H, D) as TMA reads and writes it: tiles [1, 1, n_rows, n_columns] of (B, H, S, D); all columns,
    padded to `padded(D)` by zeros, unless said otherwise."""
    (B, S, H, D), (b, s, h, d) = shape, strides
    return Template(_rows(dtype, n_rows, n_columns, D), (B, H, S, D), (b, h, s, d))


def plain_rows(shape: Sizes, strides: Sizes, dtype: torch.dtype, n_rows: int) -> Template:
    """The same for kernels in plain Triton."""
    (B, S, H, D), (b, s, h, d) = shape, strides
    return Template(_plain_rows(dtype, n_rows, D), (B, H, S, D), (b, h, s, d))


def floats(count: int, *tile: int) -> Template:
    """So many float32 numbers as TMA reads and writes them: tiles of them, in rows as wide as a tile's, which take 16
    bytes or more."""
    width = tile[-1]
    shape, strides = ((count // width, width), (width, 1)) if len(tile) > 1 else ((count,), (1,))
    return Template(_floats(tile), shape, strides)


class Part:
    """Of `Scratch`: what a kernel asks of a tensor."""

    __slots__ = ("address", "dtype")

    def __init__(self, dtype: torch.dtype, address: int) -> None:
        self.dtype, self.address = dtype, address

    def data_ptr(self) -> int:
        return self.address


class Scratch(NamedTuple):
    """Several vectors of 32-bit numbers in one allocation, since each takes some µs."""

    parts: list[tuple[torch.dtype, int] | None]
    """dtype and first byte of each; None for a vector of no length."""
    size: int
    """Of all, in numbers."""

    @staticmethod
    def of(**vectors: tuple[torch.dtype, int]) -> Scratch:
        """From dtype and length of each."""
        parts, size = list[tuple[torch.dtype, int] | None](), 0
        for dtype, length in vectors.values():
            parts.append((dtype, 4 * size) if length else None)
            size += -(-length // ALIGNMENT) * ALIGNMENT
        return Scratch(parts, size)

    def allocate(self, device: torch.device) -> tuple[Tensor, list[Part | None]]:
        """The memory, as float32 numbers, and its parts, which do not keep it."""
        memory = torch.empty(self.size, dtype=torch.float32, device=device)
        address = memory.data_ptr()
        return memory, [None if part is None else Part(part[0], address + part[1]) for part in self.parts]


def pointer(x: Tensor | None) -> Tensor | None:
    """x as kernels compiled for multiples of 16 bytes read it."""
    return x if x is None or x.data_ptr() % 16 == 0 else x.clone()


def queue_counter(device: torch.device) -> Tensor:
    """int32 [1], 0: what `scheduler.WorkQueue` counts in.

    A kernel leaves it at 0, so the kernels of a stream, which run one after the other, have the same; graphs, which may
    be replayed on any stream, each have one that they clear.
    """
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    key = device.index, driver.active.get_current_stream(device.index)
    if key not in _counters:
        # By a thread of its own: while torch.compile warms up for a graph, what the caller's thread allocates lies in
        # the graph's pool, and may not stay.
        with ThreadPoolExecutor(1) as thread:
            _counters[key] = thread.submit(lambda: torch.zeros(1, dtype=torch.int32, device=device)).result()
        torch.cuda.current_stream(device).wait_stream(torch.cuda.default_stream(device))
    return _counters[key]


def contiguous_strides(shape: Sizes) -> Sizes:
    """Of a tensor (B, S, H, D)."""
    _, S, H, D = shape
    return S * H * D, H * D, D, 1


@cache
def _rows(dtype: torch.dtype, n_rows: int, n_columns: int | None, head_dim: int) -> Any:
    width = n_columns or padded(head_dim)
    block, strides = [1, 1, n_rows, width], [width, width, width, 1]
    layout = gl.NVMMASharedLayout.get_default_for(block, ELEMENT[dtype])
    return TensorDescriptor(torch.empty(0, dtype=dtype), block, strides, block, layout)


@cache
def _plain_rows(dtype: torch.dtype, n_rows: int, head_dim: int) -> Any:
    width = padded(head_dim)
    block, strides = [1, 1, n_rows, width], [width, width, width, 1]
    return PlainDescriptor(torch.empty(0, dtype=dtype), block, strides, block)


@cache
def _floats(tile: tuple[int, ...]) -> Any:
    strides, swizzle = ([tile[-1], 1], 128) if len(tile) > 1 else ([1], 0)
    layout = gl.NVMMASharedLayout(swizzle, element_bitwidth=32, rank=len(tile))
    return TensorDescriptor(torch.empty(0, dtype=torch.float32), list(tile), strides, list(tile), layout)
