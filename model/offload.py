"""What layers keep for the backward pass, in pinned host memory: a `Store` as `model.kept` describes it.

A ticket waits on the device until the next one is kept. Then its copy to the host begins on a stream of its own, and
when another one is kept its device memory is free. The last ticket of a forward pass, which the backward pass needs at
once, therefore never leaves. Taking a ticket begins to load the one that was kept before it. Streams wait for each
other's events; the host waits for nothing.

Of PyTorch's own, `torch.autograd.graph.save_on_cpu` copies on the compute stream and loads nothing ahead, and
`CheckpointPolicy.MUST_CPU_OFFLOAD` has no effect up to PyTorch 2.15.
"""

from __future__ import annotations

import sys
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count

import torch
from torch import Tensor

from .kept import TAKEN, Store, Ticket
from .memory import GIB

PAGE = 4096


class HostStore(Store):
    """Holds what layers keep: one for a model, whose tensors lie on one device.

    On a CPU, where there is nothing to save, it takes the same steps without streams.

    Args:
        ahead: tickets that are loaded before they are taken, and then lie on the device beside the one in use.
    """

    def __init__(self, ahead: int = 1) -> None:
        self.ahead = ahead
        self.buffers: HostBuffers | None = None
        self._numbers = count()
        self._kept: weakref.WeakValueDictionary[int, HostTicket] = weakref.WeakValueDictionary()

    def keep(self, tensors: Sequence[Tensor]) -> HostTicket:
        """Hold tensors, which nobody changes any more, until the backward pass.

        Raises:
            MemoryError: the host has no more memory to pin; one line.
        """
        if self.buffers is None:
            self.buffers = HostBuffers(tensors[0].device)
        for number, ticket in enumerate(self.latest()):
            ticket.free_device()
            if number == 0:
                ticket.offload()
        ticket = HostTicket(self, next(self._numbers), tensors)
        self._kept[ticket.number] = ticket
        return ticket

    def latest(self) -> list[HostTicket]:
        """Tickets that are neither taken nor dropped, the latest first."""
        return [ticket for _, ticket in sorted(self._kept.items(), reverse=True)]

    def remove(self, ticket: HostTicket) -> None:
        if self._kept.pop(ticket.number, None) is None:
            raise RuntimeError(TAKEN)


class HostTicket(Ticket):
    """Tensors of a `HostStore`: on the device, on the host, or, while a copy is under way, on both.

    Dropped without `take`, it frees its memory.
    """

    def __init__(self, store: HostStore, number: int, tensors: Sequence[Tensor]) -> None:
        assert store.buffers is not None
        self.store, self.number, self.buffers = store, number, store.buffers
        self._device: list[Tensor] | None = [tensor.detach() for tensor in tensors]
        self._host: list[Tensor] | None = None
        self._computed = self.buffers.now()
        self._wait = _nothing
        """Makes the compute stream wait until the last copy is over."""

    def take(self) -> list[Tensor]:
        """The tensors, on the device. Those of earlier tickets are loaded then."""
        self.store.remove(self)
        earlier = [ticket for ticket in self.store.latest() if ticket.number < self.number]
        for ticket in [self, *earlier[: self.store.ahead]]:
            ticket.load()
        self._wait()
        assert self._device is not None
        tensors, self._device = self._device, None
        self._free_host()
        return tensors

    def offload(self) -> None:
        """Begin the copy to the host; nothing where it was made."""
        if self._host is None:
            assert self._device is not None
            self._host = [self.buffers.like(tensor) for tensor in self._device]
            self._wait = self.buffers.copy(self._host, self._device, after=self._computed)

    def load(self) -> None:
        """Begin the copy to the device; nothing where the tensors are."""
        if self._device is None:
            assert self._host is not None
            # In memory of the compute stream, free once it has done what it was given so far.
            self._device = [torch.empty_like(tensor, device=self.buffers.device) for tensor in self._host]
            self._wait = self.buffers.copy(self._device, self._host, after=self.buffers.now())

    def free_device(self) -> None:
        """Of the two copies keep the host's; nothing where there is none."""
        if self._host is not None:
            self._wait()
            self._device = None

    def _free_host(self) -> None:
        for tensor in self._host or ():
            self.buffers.give_back(tensor)
        self._host = None

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self._wait()  # before the compute stream's next tensor may lie where a copy still reads or writes
            self._free_host()


class HostBuffers:
    """Host memory for one device, pinned where that is a GPU, and the copies between the two.

    A buffer that is given back serves the next tensor of its size. All copies run on one stream, so that the next one
    into a buffer waits for the last one out of it. The memory is freed when nobody holds this object.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = 0
        """Of all buffers."""
        self._unused: dict[int, list[Tensor]] = defaultdict(list)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:
            self._pinned: list[Tensor] = []
            weakref.finalize(self, _unpin, self._pinned, self._stream).atexit = False  # the process's end does it, too

    def like(self, tensor: Tensor) -> Tensor:
        """An uninitialised tensor on the host, laid out as `tensor` is."""
        nbytes = tensor.numel() * tensor.element_size()
        unused = self._unused[nbytes]
        buffer = unused.pop() if unused else self._new(nbytes)
        strides = torch.empty_like(tensor, device="meta").stride()  # a view's gaps are not copied
        return buffer.view(tensor.dtype).as_strided(tensor.shape, strides)

    def give_back(self, tensor: Tensor) -> None:
        """What `like` gave."""
        buffer = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
        self._unused[len(buffer)].append(buffer)

    def now(self) -> torch.cuda.Event | None:
        """This point of the compute stream; None on a CPU."""
        return None if self._stream is None else torch.cuda.current_stream(self.device).record_event()

    def copy(
        self, to: Sequence[Tensor], source: Sequence[Tensor], after: torch.cuda.Event | None
    ) -> Callable[[], None]:
        """Begin to copy all of them after that point; returns what makes the compute stream wait until it is done."""
        if self._stream is None or after is None:
            for there, here in zip(to, source, strict=True):
                there.copy_(here)
            return _nothing
        compute = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(after)
            for there, here in zip(to, source, strict=True):
                there.copy_(here, non_blocking=True)
            return partial(compute.wait_event, self._stream.record_event())

    def _new(self, nbytes: int) -> Tensor:
        try:
            buffer = torch.empty(nbytes, dtype=torch.uint8) if self._stream is None else pinned(nbytes)
        except RuntimeError as error:
            raise MemoryError(
                f"memory.host: {self.bytes / GIB:.1f} GiB of host memory are pinned, and {nbytes / GIB:.1f} GiB more "
                f"could not be ({str(error).splitlines()[0]}); use a smaller memory.host, or memory.keep_attention=0"
            ) from error
        if self._stream is not None:
            self._pinned.append(buffer)
        self.bytes += nbytes
        return buffer[:nbytes]


def pinned(nbytes: int) -> Tensor:
    """At least so many bytes of pinned memory, in whole pages.

    `torch.empty(pin_memory=True)` would take the next power of two of them, and never give them back.

    Raises:
        RuntimeError: there is no more memory, or none that may be pinned.
    """
    size = -(-nbytes // PAGE) * PAGE
    memory = torch.empty(size + PAGE, dtype=torch.uint8)
    begin = -memory.data_ptr() % PAGE
    buffer = memory[begin : begin + size].zero_()  # all cores fetch the pages; the driver would on one
    if code := int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), size, 1)):  # 1: for all devices
        raise torch.cuda.CudaError(code)
    return buffer


def _unpin(buffers: list[Tensor], stream: torch.cuda.Stream) -> None:
    stream.synchronize()
    for buffer in buffers:
        torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())


def _nothing() -> None:
    pass
