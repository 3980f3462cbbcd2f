"""Saving beside the training: a snapshot in host memory, then a thread that writes it."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterable
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

from . import folder as checkpoints

Tensors = dict[str, dict[str, Tensor]]
"""File name → tensor name → tensor."""


class Saver:
    """Writes the checkpoints of one run, one at a time, and removes those that retention does not keep.

    A save that fails costs a line, not the run: the older checkpoints are untouched. `save(..., wait=True)`, for the
    last save of a process, raises SaveFailed instead.
    """

    def __init__(self, run_dir: Path, config: CheckpointConfig, notify: Callable[[str], None]) -> None:
        self.run_dir, self.config, self.notify = run_dir, config, notify
        self._snapshot: Tensors = {}
        self._pins = True
        self._thread: Thread | None = None
        self._failure = ""
        self._metrics: SimpleQueue[dict[str, float]] = SimpleQueue()

    def save(self, tensors: Tensors, texts: dict[str, Any], facts: dict[str, Any], wait: bool = False) -> None:
        """Take a snapshot and begin to write it. Waits for the save before, should that still be under way.

        Args: as `checkpoints.write`, with the tensors themselves. wait: come back when the checkpoint is there.
        """
        began = time.perf_counter()
        self.finish()
        copied = self._copy(tensors)
        self._thread = Thread(target=self._write, args=(copied, texts, facts), name="checkpoint")
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
            self.notify(f"checkpoint no more memory can be pinned, saves pause training for longer: {one_line(error)}")
            return torch.empty(source.shape, dtype=source.dtype)

    def _write(self, copied: Callable[[], None], texts: dict[str, Any], facts: dict[str, Any]) -> None:
        path = checkpoints.path_of(self.run_dir, facts["step"])
        needed = sum(tensor.nbytes for group in self._snapshot.values() for tensor in group.values())
        try:
            began = time.perf_counter()
            copied()
            need_space(checkpoints.disk_of(self.run_dir), needed)
            for record in texts[checkpoints.STATE]["records"]:  # no checkpoint may be older than the lines it counts on
                disk.sync(self.run_dir / record)
            writers = {file: partial(_save_tensors, group) for file, group in self._snapshot.items()}
            manifest = checkpoints.write(path, writers, texts, facts)
            seconds = time.perf_counter() - began
            self._metrics.put({"checkpoint/save_seconds": seconds, "checkpoint/gib": manifest.num_bytes / 2**30})
        except (OSError, SafetensorError) as error:
            why = save_problem(error, checkpoints.disk_of(self.run_dir), needed)
            self._failure = f"checkpoint {path} was not written, older ones are untouched: {why}"
        except Exception as error:  # a bug of ours must not end a run that goes well
            self._failure = f"checkpoint {path} was not written: {type(error).__name__}: {error}"
        else:
            self._failure = self._read_back(path) or self._prune(path)

    def _read_back(self, path: Path) -> str:
        """Whole or not there: what the disk does not give back as it was written goes. Returns what failed."""
        try:
            checkpoints.verify(path)
        except checkpoints.DamagedCheckpoint as damage:
            disk.remove(path)
            return f"checkpoint {path} did not read back as written and is removed, older ones are untouched: {damage}"
        return ""

    def _prune(self, verified: Path) -> str:
        keep = self.config
        try:
            checkpoints.prune(self.run_dir, keep.keep_last, keep.keep_every, keep.keep_best, verified)
        except OSError as error:
            return f"old checkpoints could not be removed: {error.strerror}"
        except ValueError as error:  # the newest is damaged, or the folder cannot be read
            return f"old checkpoints are not removed: {error}"
        return ""


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
