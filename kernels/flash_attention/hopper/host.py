"""From PyTorch's tensors to a running kernel with little work for the host: tensor descriptors, and launches.

A row of 4k tokens keeps an H100 busy for less time than Triton's own way to it takes the host, which looks at every
argument of every launch anew and checks every descriptor: docs/lab (L6) has the times.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor as PlainDescriptor

from .config import padded

Descriptor = TypeVar("Descriptor", TensorDescriptor, PlainDescriptor)

ELEMENT = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}

_compiled: dict[tuple[Any, ...], Any] = {}
_counters: dict[tuple[int, int], Tensor] = {}


def launch(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    """kernel[(programs,)](*args, **constants), the constants in the order of the kernel's parameters.

    What was compiled is kept by all that Triton compiles for, or more: numbers count by their value, where Triton asks
    whether they are 1 or a multiple of 16.
    """
    key = (kernel.fn, torch.cuda.current_device(), *map(_kind, args), *constants.values())
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[programs, 1, 1](*args, *constants.values())
        return
    if len(_compiled) == 4096:  # rows of ever new lengths
        _compiled.clear()
    _compiled[key] = kernel[(programs,)](*args, **constants)


def _kind(x: Any) -> tuple[Any, ...]:
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % 16
    if isinstance(x, (TensorDescriptor, PlainDescriptor)):
        return x.base.dtype, *x.block_shape
    return type(x), x


def rows(x_BSHD: Tensor, n_rows: int, n_columns: int | None = None) -> TensorDescriptor:
    """x as TMA reads and writes it: tiles [1, 1, n_rows, n_columns] of (B, H, S, D); all columns, padded to `padded(D)`
    by zeros, unless said otherwise."""
    return _of(_rows(x_BSHD.shape, x_BSHD.stride(), x_BSHD.dtype, n_rows, n_columns), x_BSHD)


def plain_rows(x_BSHD: Tensor, n_rows: int) -> PlainDescriptor:
    """The same for kernels in plain Triton."""
    return _of(_plain_rows(x_BSHD.shape, x_BSHD.stride(), x_BSHD.dtype, n_rows), x_BSHD)


def floats(x: Tensor, *tile: int) -> TensorDescriptor:
    """A float32 tensor as TMA reads and writes it: tiles of its elements, in rows as wide as a tile's, which take 16
    bytes or more."""
    return _of(_floats(x.numel(), tile), x)


def queue_counter(device: torch.device) -> Tensor:
    """int32 [1], 0: what `scheduler.WorkQueue` counts in.

    A kernel leaves it at 0, so the kernels of a stream, which run one after the other, have the same; graphs, which may
    be replayed on any stream, each have one that they clear.
    """
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    stream = torch.cuda.current_stream(device)
    key = device.index, stream.cuda_stream
    if key not in _counters:
        # By a thread of its own: while torch.compile warms up for a graph, what the caller's thread allocates lies in
        # the graph's pool, and may not stay.
        with ThreadPoolExecutor(1) as thread:
            _counters[key] = thread.submit(lambda: torch.zeros(1, dtype=torch.int32, device=device)).result()
        stream.wait_stream(torch.cuda.default_stream(device))
    return _counters[key]


def _of(blank: Descriptor, base: Tensor) -> Descriptor:
    """The descriptor of a tensor, for which `blank` was checked."""
    descriptor = object.__new__(type(blank))
    descriptor.__dict__.update(blank.__dict__)
    descriptor.base = base
    return descriptor


@lru_cache(maxsize=4096)
def _rows(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, n_rows: int, n_columns: int | None
) -> TensorDescriptor:
    *tiling, block = _tiling(shape, strides, n_rows, n_columns)
    return TensorDescriptor(
        torch.empty(0, dtype=dtype), *tiling, block, gl.NVMMASharedLayout.get_default_for(block, ELEMENT[dtype])
    )


@lru_cache(maxsize=4096)
def _plain_rows(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, n_rows: int) -> PlainDescriptor:
    return PlainDescriptor(torch.empty(0, dtype=dtype), *_tiling(shape, strides, n_rows))


@lru_cache(maxsize=4096)
def _floats(count: int, tile: tuple[int, ...]) -> TensorDescriptor:
    *outer, width = tile
    shape, strides, swizzle = ([count // width, width], [width, 1], 128) if outer else ([count], [1], 0)
    layout = gl.NVMMASharedLayout(swizzle, element_bitwidth=32, rank=len(tile))
    return TensorDescriptor(torch.empty(0, dtype=torch.float32), shape, strides, list(tile), layout)


def _tiling(
    shape: tuple[int, ...], strides: tuple[int, ...], n_rows: int, n_columns: int | None = None
) -> tuple[list[int], list[int], list[int]]:
    B, S, H, D = shape
    b, s, h, d = strides
    return [B, H, S, D], [b, h, s, d], [1, 1, n_rows, n_columns or padded(D)]
