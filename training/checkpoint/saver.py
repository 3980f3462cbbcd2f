"""Saving beside the training: a snapshot in host memory, then a thread that writes it, on each rank its share."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from data import disk
from training.config import CheckpointConfig
from training.errors import SaveFailed
from training.loggers.base import one_line
from training.parallel.together import RankLost, Together, whose

from . import folder as checkpoints
from .shards import Tensors
from .state import Written


class Saver:
    """Writes the checkpoints of one run, one at a time, and removes those that retention does not keep.

    A save that fails costs a line, not the run: the older checkpoints are untouched. `save(..., wait=True)`, for the
    last save of a process, raises SaveFailed instead. Of several ranks all hear of it, or none.

    Args:
        ranks: that save together: each makes the same calls.
    """

    def __init__(
        self,
        run_dir: Path,
        config: CheckpointConfig,
        notify: Callable[[str], None],
        ranks: Together = checkpoints.ALONE,
    ) -> None:
        self.run_dir, self.config, self.notify, self.ranks = run_dir, config, notify, ranks
        self._snapshot: Tensors = {}
        self._pins = True
        self._thread: Thread | None = None
        self._failure = ""
        self._lost: RankLost | None = None
        self._metrics: SimpleQueue[dict[str, float]] = SimpleQueue()

    def save(self, written: Written, facts: dict[str, Any], wait: bool = False) -> None:
        """Take a snapshot and begin to write it. Waits for the save before, should that still be under way.

        Args: facts: as `checkpoints.write` takes them. wait: come back when the checkpoint is there.
        """
        began = time.perf_counter()
        self.finish()
        copied = self._copy(written.tensors)
        self._thread = Thread(target=self._write, args=(copied, written, facts), name="checkpoint")
        self._thread.start()
        self._metrics.put({"checkpoint/pause_ms": 1000 * (time.perf_counter() - began)})
        if wait:
            self.finish(raises=True)

    def finish(self, raises: bool = False) -> None:
        """Wait for the save under way, and say in one line if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, ""
        if self._lost is not None and raises:
            raise self._lost
        if failure and raises:
            raise SaveFailed(failure)
        if failure:
            self.notify(f"{failure}; training goes on")

    def metrics(self) -> dict[str, float]:
        """Pause, seconds and size of the saves since the last call; the failure of one is said here."""
        if self._thread is not None and not self._thread.is_alive():
            self.finish()
        found: dict[str, float] = {}
        while not self._metrics.empty():
            found |= self._metrics.get()
        return found

    def reserve(self, tensors: Tensors) -> None:
        """Take the host memory that snapshots of these tensors need, and keep it.

        To pin memory takes 0.6 s per GiB on an H100's host: better now, before anything is measured, than in a save.
        """
        for file, group in tensors.items():
            kept = self._snapshot.setdefault(file, {})
            for gone in set(kept) - set(group):
                del kept[gone]
            for name, source in group.items():
                if name not in kept or kept[name].shape != source.shape or kept[name].dtype != source.dtype:
                    kept[name] = self._host_memory(source)

    def _copy(self, tensors: Tensors) -> Callable[[], None]:
        """Begin to copy into the snapshot; what is returned waits until that is done.

        From a GPU the copy runs on a stream of its own into pinned memory. The host does not wait for it; the training
        stream does, because the next update would change what is being read.
        """
        self.reserve(tensors)
        pairs = [
            (self._snapshot[file][name], source.detach())
            for file, group in tensors.items()
            for name, source in group.items()
        ]
        device = next((source.device for _, source in pairs if source.is_cuda), None)
        if device is None:
            for kept, source in pairs:
                kept.copy_(source)
            return lambda: None
        stream, training = torch.cuda.Stream(device), torch.cuda.current_stream(device)
        stream.wait_stream(training)
        with torch.cuda.stream(stream):
            for kept, source in pairs:
                kept.copy_(source, non_blocking=source.is_cuda)
            copied = stream.record_event()
        training.wait_event(copied)
        return copied.synchronize

    def _host_memory(self, source: Tensor) -> Tensor:
        """Memory for a copy: pinned for one that comes from a GPU, where the system has that much of it."""
        try:
            return torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda and self._pins)
        except RuntimeError as error:  # limits on locked memory differ from machine to machine
            if not (source.is_cuda and self._pins):
                raise
            self._pins = False
            self.notify(f"checkpoint no more memory can be pinned, so saves pause training longer: {one_line(error)}")
            return torch.empty(source.shape, dtype=source.dtype)

    def _write(self, copied: Callable[[], None], written: Written, facts: dict[str, Any]) -> None:
        path = checkpoints.path_of(self.run_dir, facts["step"])
        needed = sum(tensor.nbytes for group in self._snapshot.values() for tensor in group.values())

        def prepare() -> None:
            with self._explained(needed):
                copied()
                # Rank 0 asks for room for all: they may share its disk.
                need_space(self._disk, written.num_bytes if self.ranks.is_first else needed)
                # No checkpoint may be older than the lines it counts on.
                for record in written.texts.get(checkpoints.STATE, {}).get("records", ()):
                    disk.sync(self.run_dir / record)

        def save(tensors: dict[str, Tensor], file: Path) -> None:
            with self._explained(needed):
                _save_tensors(tensors, file)

        try:
            began = time.perf_counter()
            self.ranks.each(prepare)
            writers = {file: partial(save, group) for file, group in self._snapshot.items()}
            manifest = checkpoints.write(path, writers, written.texts, facts, self.ranks)
            seconds = time.perf_counter() - began
            self._metrics.put({"checkpoint/save_seconds": seconds, "checkpoint/gib": manifest.num_bytes / 2**30})
            self._failure = self._read_back(path, [*writers, *written.texts]) or self._prune(path)
        except (NotWritten, OSError, SafetensorError) as error:
            why = str(error) if isinstance(error, NotWritten) else save_problem(error, self._disk, needed)
            self._failure = f"checkpoint {path} was not written, older ones are untouched: {whose(error)}{why}"
        except RankLost as error:  # which ends the run, and is told elsewhere
            self._lost = error
        except Exception as error:  # a bug of ours must not end a run that goes well
            self._failure = f"checkpoint {path} was not written: {whose(error)}{type(error).__name__}: {error}"

    @property
    def _disk(self) -> Path:
        return checkpoints.disk_of(self.run_dir)

    @contextmanager
    def _explained(self, needed: int) -> Iterator[None]:
        """What its disk says is told by the rank where it happens."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise NotWritten(save_problem(error, self._disk, needed)) from error

    def _read_back(self, path: Path, names: list[str]) -> str:
        """Whole or not there: what the disk does not give back as it was written goes. Returns what failed.

        Args:
            names: of the files that this rank wrote.
        """
        try:
            self.ranks.each(lambda: checkpoints.verify(path, names))
        except checkpoints.DamagedCheckpoint as damage:
            self.ranks.first(lambda: disk.remove(path))
            what = f"{whose(damage)}{damage}"
            return f"checkpoint {path} did not read back as written and is removed, older ones are untouched: {what}"
        return ""

    def _prune(self, verified: Path) -> str:
        keep = self.config

        def prune() -> str:
            try:
                checkpoints.prune(self.run_dir, keep.keep_last, keep.keep_every, keep.keep_best, verified)
            except OSError as error:
                return f"old checkpoints could not be removed: {error.strerror}"
            except ValueError as error:  # the newest is damaged, or the folder cannot be read
                return f"old checkpoints are not removed: {error}"
            return ""

        return self.ranks.first(prune)


class NotWritten(RuntimeError):
    """Why one rank could not write its share."""


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    save_file(tensors, str(path))  # lets other threads run: they waited 5 ms at most while 0.4 GB were written
    check_written(path, tensors.values())


def check_written(path: Path, tensors: Iterable[Tensor]) -> None:
    """Raises OSError where a file is shorter than its tensors: not every file system tells that it is full."""
    if path.stat().st_size < sum(tensor.nbytes for tensor in tensors):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def need_space(folder: Path, needed: int) -> None:
    """Raises OSError where the disk of a folder has not that many bytes left."""
    if shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def save_problem(error: OSError | SafetensorError, folder: Path, needed: int) -> str:
    """One line: why `needed` bytes could not be written into a folder. safetensors tells system errors as text."""
    if isinstance(error, OSError) and error.errno != errno.ENOSPC:
        return error.strerror or str(error)
    if isinstance(error, OSError) or "os error 28" in str(error):
        free = shutil.disk_usage(folder).free
        sizes = f"{needed / 1e6:,.1f} MB needed, {free / 1e6:,.1f} MB free"
        return f"disk full: {sizes}; free some, or lower checkpoint.keep_last"
    return " ".join(str(error).split())[:300]
