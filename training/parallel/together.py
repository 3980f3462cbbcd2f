"""All ranks at the same piece of work, beside the training: a checkpoint that each writes its share of, or reads.

Without torch in a world of one, so that the scripts that look after checkpoints need none.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")
LONGEST_S = 3600.0
"""For which a rank may be at its share while the others wait: a checkpoint on a slow disk. A rank that dies is noticed
at once, whatever this is: `training.parallel.watch`."""


class RankLost(RuntimeError):
    """The connection to another rank has broken. `training.parallel.watch` says which rank is lost."""


class _Failed(NamedTuple):
    error: Exception


class Together:
    """Every rank calls the same methods in the same order, from one thread at a time. One rank works alone.

    Args:
        group: of processes that can exchange objects; of its own, because a thread uses it beside the training. Two
            threads need two.
    """

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None) -> None:
        self.rank, self.size, self.group = rank, size, group

    @classmethod
    def of(cls, rank: int, size: int) -> Together:
        """With a group of its own. Collective."""
        if size == 1:
            return cls()
        import torch.distributed as dist

        return cls(rank, size, dist.new_group(backend="gloo", timeout=timedelta(seconds=LONGEST_S)))

    @contextmanager
    def _connected(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, OSError) as error:
            raise RankLost(f"the gloo connection to another rank has broken: {error}") from error

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def each(self, work: Callable[[], T]) -> T:
        """Do `work` on every rank, and return here what it returned here.

        Raises:
            Exception: on every rank what `work` raised on the lowest of those where it did, with that as its `rank`.
        """
        return self._done(work, gathers=False)[0]

    def gather(self, work: Callable[[], T]) -> list[T]:
        """`each`, and what it returned on every rank, by rank: on rank 0; elsewhere only here."""
        return self._done(work, gathers=True)

    def first(self, work: Callable[[], T]) -> T:
        """Do `work` on rank 0, and return or raise on every rank what it did there."""
        if self.size == 1:
            return work()
        done: Any = self._from_first(self._tried(work) if self.is_first else None)
        self._raise(done)
        return done

    def _done(self, work: Callable[[], T], gathers: bool) -> list[T]:
        if self.size == 1:
            return [work()]
        import torch.distributed as dist

        mine: Any = self._tried(work)
        sent = mine if gathers or isinstance(mine, _Failed) else None
        every: list[Any] | None = [None] * self.size if self.is_first else None
        with self._connected():
            dist.gather_object(sent, every, dst=0, group=self.group)
        self._raise(self._from_first(next((each for each in every or [] if isinstance(each, _Failed)), None)))
        return every if gathers and every is not None else [mine]

    def _tried(self, work: Callable[[], object]) -> object:
        try:
            return work()
        except Exception as error:
            error.rank = self.rank  # type: ignore[attr-defined]
            try:
                pickle.loads(pickle.dumps(error))
            except Exception:  # not every library's exception can be sent
                sent = RuntimeError(f"{type(error).__name__}: {error}")
                sent.rank = self.rank  # type: ignore[attr-defined]
                return _Failed(sent)
            return _Failed(error)

    def _from_first(self, value: object) -> object:
        import torch.distributed as dist

        values = [value]
        with self._connected():
            dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    @staticmethod
    def _raise(done: object) -> None:
        if isinstance(done, _Failed):
            raise done.error


def whose(error: Exception) -> str:
    """ "rank 3: " for an error of `Together`; "" for one of a process that works alone."""
    rank = getattr(error, "rank", None)
    return "" if rank is None else f"rank {rank}: "
