"""Batches for the training loop, prepared ahead in a thread, and batches for validation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import count
from queue import SimpleQueue
from threading import Event, Semaphore, Thread

import numpy as np
import torch
from torch import Tensor

from data.packing import IGNORE_INDEX, Row, Rows, TrainRows

PREFETCHED_BATCHES = 4


@dataclass(frozen=True)
class Batch:
    """B rows of S tokens; or a shard of them: S of each row's tokens, and what these count.

    tokens_BS, targets_BS: int64. starts_BS: int32, see `Row`; None for plain causal attention.
    positions_BS: int64, each token's place in its document; (1, S) where it is the same in every row.
    visible_pairs: (query, key) pairs that causal attention, documents and window let through, over the batch.
    num_tokens: B · S, but for the last batch of an evaluation.
    num_targets: targets that are not IGNORE_INDEX.
    split: of a shard, which rank holds which tokens (`model.attention.context`), on the host; starts_BS of a shard are
        those of the whole rows.
    """

    tokens_BS: Tensor
    targets_BS: Tensor
    starts_BS: Tensor | None
    positions_BS: Tensor
    visible_pairs: int
    num_tokens: int
    num_targets: int
    split: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device; from pinned memory the copy overlaps with computation."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=tensor.is_pinned()))

    def pin_memory(self) -> Batch:
        """The batch in page-locked host memory (needs CUDA)."""
        return self.map(Tensor.pin_memory)

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Tell the allocator that a stream uses the batch, which another one brought."""
        for tensor in (self.tokens_BS, self.targets_BS, self.starts_BS, self.positions_BS):
            if tensor is not None:
                tensor.record_stream(stream)

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with what `function` makes of its tensors."""
        starts_BS = None if self.starts_BS is None else function(self.starts_BS)
        return replace(
            self,
            tokens_BS=function(self.tokens_BS),
            targets_BS=function(self.targets_BS),
            starts_BS=starts_BS,
            positions_BS=function(self.positions_BS),
        )


def collate(rows: Iterable[Row], window: int | None = None) -> Batch:
    """Stack rows of one length into a batch on the host; the model's sliding window counts in `visible_pairs`."""
    tokens, targets, starts = zip(*rows, strict=True)
    tokens_BS, targets_BS = np.stack(tokens), np.stack(targets)
    B, S = tokens_BS.shape
    starts_BS = None if starts[0] is None else np.stack(starts)
    positions_BS = np.arange(S)[None] - (0 if starts_BS is None else starts_BS)
    keys_BS = np.broadcast_to(positions_BS + 1, (B, S))
    return Batch(
        tokens_BS=torch.from_numpy(tokens_BS),
        targets_BS=torch.from_numpy(targets_BS),
        starts_BS=None if starts_BS is None else torch.from_numpy(starts_BS),
        positions_BS=torch.from_numpy(positions_BS),
        visible_pairs=int(np.minimum(keys_BS, window or S).sum()),
        num_tokens=B * S,
        num_targets=int((targets_BS != IGNORE_INDEX).sum()),
    )


class Loader:
    """Endless training batches on `device`, in an order that is a pure function of the seed.

    A rank's n-th batch holds the rows at positions [first + (n·world_size + rank)·B, ... + B) of `Rows.at`: the ranks
    together read what one process with a batch of B·world_size reads, epoch after epoch. The whole state is two
    integers, the seed and the rows that all ranks have taken: to resume, on any number of ranks, pass that as `first`.

    A thread prepares batches ahead and, for CUDA, copies them from pinned memory on a stream of its own; what it
    raises, `next` raises. Call `close` at the end.
    """

    def __init__(
        self,
        rows: TrainRows,
        batch_size: int,
        *,
        seed: int,
        device: torch.device | str,
        rank: int = 0,
        world_size: int = 1,
        first: int = 0,
        window: int | None = None,
        shard: Callable[[Batch], Batch] = lambda batch: batch,
    ) -> None:
        """shard: what of a batch this rank computes, where several share rows; asked in the thread, on the host."""
        assert batch_size > 0
        assert 0 <= rank < world_size
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.rank, self.world_size, self.window, self.shard = rank, world_size, window, shard
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._closed = Event()
        self._ready: SimpleQueue[tuple[Batch, torch.cuda.Event | None] | BaseException] = SimpleQueue()
        self._room = Semaphore(PREFETCHED_BATCHES)
        self._thread = Thread(target=self._prefetch, args=(first,), name="loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._closed.is_set():
            raise StopIteration
        item = self._ready.get()
        if isinstance(item, BaseException):
            self.close()
            raise item
        batch, copied = item
        if copied is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(copied)
            batch.record_stream(stream)
        # Last: the thread that wakes takes the interpreter as soon as this one lets go of it, in `wait_event` for
        # instance, and keeps it for 0.4 ms.
        self._room.release()
        return batch

    def close(self) -> None:
        """Stop the thread. Iteration then ends; closing twice is fine."""
        self._closed.set()
        self._room.release()
        self._thread.join()

    def _prefetch(self, first: int) -> None:
        try:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)  # pinning would otherwise open a context on GPU 0
                stream = torch.cuda.Stream()
            for number in count():
                self._room.acquire()
                if self._closed.is_set():
                    return
                batch, copied = self._batch(first, number), None
                if self.device.type == "cuda":
                    with torch.cuda.stream(stream):
                        batch = batch.pin_memory().to(self.device)
                        copied = stream.record_event()
                self._ready.put((batch, copied))
        except BaseException as error:
            self._ready.put(error)

    def _batch(self, first: int, number: int) -> Batch:
        begin = first + (number * self.world_size + self.rank) * self.batch_size
        rows = (self.rows.at(self.seed, n) for n in range(begin, begin + self.batch_size))
        return self.shard(collate(rows, self.window))


def eval_batches(rows: Rows, batch_size: int, max_tokens: int) -> Iterator[Batch]:
    """The first rows in their own order, on the host, as batches of one shape, so that nothing recompiles.

    Takes as many rows as fit into `max_tokens`, at least one: the same ones whatever the batch size. Where they do not
    fill the last batch, it is filled up with rows whose targets are all IGNORE_INDEX and that `num_tokens` leaves out.
    """
    count = min(len(rows), max(1, max_tokens // rows.seq_len))
    batch_size = min(batch_size, count)
    for first in range(0, count, batch_size):
        taken = range(first, min(first + batch_size, count))
        batch = collate(rows[index] for index in [*taken, *[first] * (batch_size - len(taken))])
        batch.targets_BS[len(taken) :] = IGNORE_INDEX
        num_targets = int((batch.targets_BS != IGNORE_INDEX).sum())
        yield replace(batch, num_tokens=len(taken) * rows.seq_len, num_targets=num_targets)
