"""Ranks that fail or vanish: one line says which it was, and no other rank waits for it.

Each rank counts up a number in the store that all ranks share, and looks at that of the rank after it. Whoever sees
that one stand still, or fails itself, writes a verdict there, once; the others read it and end, wherever they wait. A
rank whose connection breaks says so there, too, and then all look closer.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import torch.distributed as dist

from data.live import LINE
from training.errors import Interrupted, NonFiniteError, OutOfMemory, SaveFailed
from training.terminal import say_error

if TYPE_CHECKING:
    from .world import World

BEAT_SECONDS = 1.0
LOST_SECONDS = 30.0
"""Without a beat, after which a rank is lost. Nothing that it computes keeps its thread from beating."""
SUSPECT_SECONDS = 5.0
"""The same once a connection of some rank has broken."""
GRACE_SECONDS = 10.0
"""That a rank has, after the verdict about another one, to end by itself."""
READING_SECONDS = 5.0
"""For which rank 0, before it ends, waits at most until the others have read the verdict."""
CODES: dict[type[BaseException], int] = {ValueError: 2, OutOfMemory: 3, NonFiniteError: 4, SaveFailed: 5}
DONE = 1 << 40
VERDICT, SUSPICION = "verdict", "suspicion"
STORE_GONE = (RuntimeError, OSError)
"""What the store raises when the process that holds it, that of rank 0 or of its launcher, is gone."""


class Watch:
    """The thread of one rank, from the start of the world to the end of the process.

    Args:
        store: of this thread alone; all ranks' lead to the same place.
    """

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self.store, self.rank, self.size = store, rank, size
        self.next = (rank + 1) % size
        self.is_suspicious = False
        self.is_needed = False
        """While ranks work together; before and after that each may come and go."""
        self._known: tuple[str, int] | None = None
        self._found = ""
        """By the thread; whichever thread leaves first tells it, if it is the verdict."""
        self._told = False
        self._closed = threading.Event()
        self._lock = threading.Lock()
        store.set(f"host/{rank}", socket.gethostname())
        self._thread = threading.Thread(target=self._beat, name="watch", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        with suppress(*STORE_GONE):
            self.store.add(f"beat/{self.rank}", DONE)

    def claim(self, message: str, code: int) -> tuple[str, int]:
        """Write the verdict, unless there is one; returns what it is."""
        with self._lock:
            try:
                if self._known is None:
                    self._know(self.store.compare_set(VERDICT, "", json.dumps([message, code])))
            except STORE_GONE:
                self._known = GONE
            assert self._known is not None
            return self._known

    def verdict(self) -> tuple[str, int] | None:
        """The verdict, once there is one."""
        with self._lock:
            try:
                if self._known is None and self.store.check([VERDICT]):
                    self._know(self.store.get(VERDICT))
            except STORE_GONE:
                self._known = GONE
            return self._known

    def leave(self, message: str, code: int) -> None:
        """End the process at once. Rank 0, whose process may hold the store, waits until the others know why."""
        LINE.end()
        if self._known == GONE and self.rank == 1:  # rank 0 cannot say it
            message = GONE[0]
        with self._lock:  # the main thread may have seen the verdict before the thread that found it has told it
            if self._known is not None and self._found == self._known[0]:
                message = self._found
            tells, self._told = bool(message) and not self._told, self._told or bool(message)
        if tells:
            say_error(message)
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        deadline = time.monotonic() + READING_SECONDS
        with suppress(*STORE_GONE), self._lock:
            while self.rank == 0 and self.store.add("read", 0) < self.size and time.monotonic() < deadline:
                time.sleep(0.05)
        os._exit(code)

    def _know(self, found: bytes) -> None:
        message, code = json.loads(found)
        self._known = message, code
        self.store.add("read", 1)

    def wait_for_verdict(self) -> tuple[str, int] | None:
        """After a connection broke: somebody is lost, or has failed and says so."""
        with suppress(*STORE_GONE), self._lock:
            self.store.set(SUSPICION, "")
        deadline = time.monotonic() + LOST_SECONDS + GRACE_SECONDS
        while time.monotonic() < deadline and self._thread.is_alive():
            if (verdict := self.verdict()) is not None:
                return verdict
            time.sleep(0.1)
        return None

    def _beat(self) -> None:
        seen, since = -1, time.monotonic()
        while not self._closed.wait(BEAT_SECONDS):
            try:
                with self._lock:
                    self.store.add(f"beat/{self.rank}", 1)
                    count = self.store.add(f"beat/{self.next}", 0)
                    self.is_suspicious = self.is_suspicious or self.store.check([SUSPICION])
                if (verdict := self.verdict()) is not None:
                    self._leave(*verdict, is_ours=False)
                now = time.monotonic()
                if count != seen or count >= DONE:
                    seen, since = count, now
                elif self.is_needed and now - since > (SUSPECT_SECONDS if self.is_suspicious else LOST_SECONDS):
                    self._tell(self.next, f"has not answered for {now - since:.0f} s")
            except STORE_GONE:
                if not self.is_needed:
                    return
                self._known = GONE
                self._leave(*GONE, is_ours=True)

    def _tell(self, rank: int, what: str) -> None:
        with self._lock:
            host = self.store.get(f"host/{rank}").decode() if self.store.check([f"host/{rank}"]) else "its host"
        message = self._found = lost(f"rank {rank} on {host}", what)
        told, code = self.claim(message, Interrupted.code)
        self._leave(told, code, is_ours=told == message)

    def _leave(self, message: str, code: int, is_ours: bool) -> None:
        """End the process: its main thread may wait for ever."""
        if self._closed.wait(0 if is_ours else GRACE_SECONDS):
            return
        self.leave(message if is_ours and self._known != GONE else "", code)


def lost(who: str, what: str) -> str:
    return f"{who} is lost: it {what}; the same command goes on from the last checkpoint"


GONE = lost("rank 0", "does not answer"), Interrupted.code


@contextmanager
def watched(world: World) -> Iterator[None]:
    """End with all other ranks: at the end wait for them, and of an error tell it once, with its rank.

    Errors that all ranks have alike are rank 0's to tell.
    """
    watch = world.watch
    if watch is None:
        yield
        return
    watch.is_needed = True
    try:
        try:
            yield
        except Interrupted:
            world.wait()
            watch.is_needed = False
            raise
        world.wait()
        watch.is_needed = False
    except Exception as error:
        is_connection = isinstance(error, dist.DistError) or "gloo" in str(error).lower()
        if is_connection and (verdict := watch.wait_for_verdict()) is not None:
            watch.leave("", verdict[1])
        if watch.rank > 0:
            time.sleep(1.0)
        line = " ".join(str(error).split())
        message = line if watch.rank == 0 else f"rank {watch.rank} on {socket.gethostname()}: {line}"
        told, code = watch.claim(message, CODES.get(type(error), 1))
        if told != message:
            watch.leave("", code)
        if type(error) in CODES:
            watch.leave(message, code)
        raise
