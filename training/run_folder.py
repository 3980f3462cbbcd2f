"""The run folder: who may write it, and what a run begins with: nothing, or a checkpoint. Needs no torch."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from difflib import get_close_matches
from itertools import chain, count
from pathlib import Path
from typing import BinaryIO

from data import disk

from .checkpoint import fits
from .checkpoint import folder as checkpoints
from .checkpoint.folder import DamagedCheckpoint, Manifest
from .config import TrainConfig
from .parallel.together import Together

LOCK = "run.lock"
RECORDS = ("metrics.jsonl", "samples.md", "bad-steps.jsonl")
"""Files that grow. A checkpoint holds their sizes; what a run wrote after it is cut when it goes on from there."""
NAMED = {
    "resume": "a run folder or a checkpoint",
    "RUN": "a run folder or a checkpoint",
    "init_from": "a run, a checkpoint, a model.safetensors or a model of transformers",
}


def check(config: TrainConfig) -> None:
    """Refuse, before anything slow, a run_dir that cannot be written or continued, and paths that lead nowhere.

    Raises:
        ValueError: one line.
    """
    run = Path(config.run_dir)
    try:
        holds_something = run.exists() and any(path.name != LOCK and not _is_log(path) for path in run.iterdir())
        holds_a_run = (run / LOCK).exists()
    except OSError as error:  # a file, a name that is too long, a folder that may not be read
        raise ValueError(f"run_dir={config.run_dir} cannot be used: {error.strerror}; choose another") from error
    if holds_something and not holds_a_run:
        near = run_nearby(run)
        raise ValueError(
            f"run_dir={config.run_dir} already holds something, and no run to resume; choose another"
            f"{f', or run_dir={near} to go on with that' if near else ''}"
        )
    if holds_something and config.resume == "none":
        raise ValueError(f"run_dir={config.run_dir} already holds a run; choose another, or resume=auto to continue it")
    try:
        disk.need_writable(run)
    except OSError as error:
        raise ValueError(f"run_dir={config.run_dir} cannot be written: {error.strerror}; choose another") from error
    for name in (LOCK, *RECORDS):  # a pipe would be waited for
        if (run / name).exists() and not (run / name).is_file():
            raise ValueError(f"run_dir={config.run_dir} holds {name}, which is no file; remove that, or choose another")
    if holds_a_run:
        with suppress(OSError), open(run / LOCK, "rb") as lock:
            take(lock, config.run_dir, shared=True)
    resume = None if config.resume in ("auto", "none") else config.resume
    for name, value in (("resume", resume), ("init_from", config.init_from)):
        if value is None:
            continue
        if not os.path.exists(value):  # Path's raises where a name is too long or a folder may not be read
            raise ValueError(f"{name}={value} does not exist; name {NAMED[name]}")
        is_weights = name == "init_from" and (os.path.isfile(value) or fits.holds_weights(Path(value)))
        if not is_weights and not _checkpoints_at(value):
            raise ValueError(f"{name}={value} holds no checkpoint; name {NAMED[name]}")
    _check_fits(config, resume)


def run_nearby(path: Path) -> Path | None:
    """The run folder that a path may have meant which is none: the one that it lies in, the newest that lies in it, or
    one beside it with almost its name."""
    for around in (path.parent, path.parent.parent):
        if (around / LOCK).is_file():
            return around
    with suppress(OSError, ValueError):  # of no runs there is no newest
        return max(path.glob(f"*/{LOCK}"), key=lambda lock: lock.stat().st_mtime).parent
    beside = [] if path.exists() else [lock.parent.name for lock in path.parent.glob(f"*/{LOCK}")]
    return next((path.with_name(name) for name in get_close_matches(path.name, beside, n=1, cutoff=0.8)), None)


@contextmanager
def claimed(config: TrainConfig, is_named: bool) -> Iterator[TrainConfig]:
    """The configuration with a run folder that is this run's alone.

    A folder that somebody named is that folder. Of one that is called by its time, another run of the same second may
    have the name; this one is then NAME-2, and is removed again if nothing comes into it.
    """
    if is_named:
        yield config
        return
    try:
        path = make_new(Path(config.run_dir))
    except OSError as error:
        raise ValueError(f"run_dir={config.run_dir} cannot be written: {error.strerror}; choose another") from error
    try:
        yield replace(config, run_dir=str(path))
    finally:
        with suppress(OSError):  # it holds something
            path.rmdir()


def make_new(path: Path) -> Path:
    """Make a folder that was not there, of this name or of this name with a number."""
    for name in chain([path], (path.with_name(f"{path.name}-{number}") for number in count(2))):
        with suppress(FileExistsError):
            name.mkdir(parents=True)
            return name
    raise AssertionError("numbers do not end")


def _is_log(path: Path) -> bool:
    """What this process prints (`> runs/x/train.log`), or a log by its name (`| tee runs/x/train.log`)."""
    if path.suffix in (".log", ".out", ".err"):
        return True
    with suppress(OSError):
        there = path.stat()
        return any(os.path.samestat(there, os.fstat(output)) for output in (1, 2))
    return False


def _check_fits(config: TrainConfig, resume: str | None) -> None:
    """Ask the checkpoint that the run will most likely begin with; only its JSON is read and verified."""
    own = [] if resume and _is_inside(resume, config) else checkpoints.candidates(Path(config.run_dir))
    goes_on = [*own, *(_checkpoints_at(resume) if resume else [])]
    begins_anew = _checkpoints_at(config.init_from) if config.init_from and not goes_on else []
    check_fits = fits.check_resume if goes_on else fits.check_init
    if config.init_from and not goes_on and not begins_anew:
        weights = Path(config.init_from)
        (fits.check_file if weights.is_file() else fits.check_weights)(weights, config)
    for path in goes_on or begins_anew:
        with suppress(DamagedCheckpoint):
            check_fits(path, checkpoints.verify(path, only=[checkpoints.CONFIG, checkpoints.STATE]), config)
            return


def _checkpoints_at(value: str) -> list[Path]:
    """The checkpoints that resume=PATH or init_from=PATH may mean, the newest first; none is verified."""
    path = Path(value)
    return [path] if checkpoints.is_checkpoint(path) else checkpoints.candidates(path)


def _is_inside(resume: str, config: TrainConfig) -> bool:
    """Whether resume=PATH lies in run_dir, or where its checkpoints/ leads: then no branch is made."""
    run, real = Path(config.run_dir), Path(os.path.realpath(resume))
    if Path(os.path.abspath(resume)).is_relative_to(os.path.abspath(run)):
        return True
    return any(real.is_relative_to(os.path.realpath(place)) for place in (run, checkpoints.checkpoints_of(run)))


def take(lock: BinaryIO, run_dir: str, shared: bool = False) -> None:
    """Lock a run folder. It is held by the open file, not by its content: it goes with the process, however that ends.

    Raises:
        ValueError: another process has it, or this file system has no locks.
    """
    try:
        for patience in (0.1, 0.1, 0.1, 0):  # another process may be looking only, or may be dying
            if disk.try_lock(lock, shared):
                return
            time.sleep(patience)
    except OSError as error:
        raise ValueError(f"run_dir={run_dir} cannot be locked: {error.strerror}; choose another disk") from error
    lock.seek(0)
    owner = lock.read(200).decode("utf-8", "replace").strip() or "another process"
    raise ValueError(f"run_dir={run_dir} is being trained by {owner}; stop that, or choose another")


class RunFolder:
    """A run folder that this run alone may write, until `close`: rank 0 holds its lock.

    Args:
        ranks: of the run.
    Raises:
        ValueError: it cannot be written, or another process holds it.
    """

    def __init__(self, config: TrainConfig, ranks: Together = checkpoints.ALONE) -> None:
        self.config, self.ranks = config, ranks
        self.path = Path(config.run_dir)
        self._lock: BinaryIO | None = None
        ranks.first(self._open)

    def _open(self) -> None:
        check(self.config)
        run_dir = self.config.run_dir
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = open(self.path / LOCK, "ab+", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise ValueError(f"run_dir={run_dir} cannot be written: {error.strerror}; choose another") from error
        try:
            take(lock, run_dir)
        except ValueError:
            lock.close()
            raise
        self._lock = lock
        with suppress(OSError):  # on a full disk it stays without a name
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        checkpoints.sweep(self.path)

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()

    def origin(self, checkpoint: Path) -> Path | None:
        """The run folder whose records a checkpoint counts on: this one's for its own, wherever links lead.

        None: it lies in no run folder, like a copy; what happens to lie beside it is not its run's.
        """
        if _is_inside(str(checkpoint), self.config):
            return self.path
        for name in (os.path.abspath(checkpoint), os.path.realpath(checkpoint)):
            path, run = Path(name), Path(name).parent.parent
            is_named = checkpoints.NAME.fullmatch(path.name) and path.parent == checkpoints.checkpoints_of(run)
            if is_named and (run / LOCK).exists():
                return run
        return None

    def checkpoint(self, notify: Callable[[str], None]) -> tuple[Path, Manifest] | None:
        """The verified checkpoint to go on from; None: begin at step 0.

        Raises:
            ValueError: resume names one, and it is damaged, or older than others of this very run folder; or there
                is something to lose, and beginning anew would overwrite it.
        """
        resume, first = self.config.resume, self.ranks.first
        if resume in ("auto", "none"):
            newest = checkpoints.newest(self.path, notify, self.ranks)
            damaged = first(lambda: checkpoints.candidates(self.path))
            if newest is None and (damaged or (self.path / "model.safetensors").exists()):
                what = f"{len(damaged)} checkpoints, none of them good" if damaged else "a finished run, no checkpoint"
                raise ValueError(f"run_dir={self.path} holds {what}; choose another, or remove it to begin anew")
            return newest
        inside = first(lambda: _is_inside(resume, self.config))
        if not inside and (own := checkpoints.newest(self.path, notify, self.ranks)):
            notify(f"resume     {self.path} is past resume={resume}, where it began")  # the same command, once more
            return own
        found = find(resume, "resume", notify, self.ranks)
        candidates = first(lambda: checkpoints.candidates(self.path)) if inside else []
        later = next(iter(candidates), found[0])
        if later.resolve() != found[0].resolve():
            raise ValueError(
                f"resume={resume} is older than {later}; choose another run_dir to branch off there, "
                f"or remove the later checkpoints to go back"
            )
        return found


def find(
    value: str, setting: str, notify: Callable[[str], None], ranks: Together = checkpoints.ALONE
) -> tuple[Path, Manifest]:
    """The checkpoint that resume=PATH or init_from=PATH names: a checkpoint, or a run folder's newest good one.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    path = Path(value)
    if checkpoints.is_checkpoint(path):
        try:
            found: tuple[Path, Manifest] | None = path, checkpoints.verify_shown(path, ranks)
        except DamagedCheckpoint as damage:
            raise ValueError(f"{setting}={value} is damaged: {damage}; name another checkpoint") from damage
    else:
        found = checkpoints.newest(path, notify, ranks)
    if found is None:
        weights = path / "model.safetensors"
        there = f", such as {weights}" if setting == "init_from" and weights.is_file() else ""
        raise ValueError(f"{setting}={value} holds no good checkpoint; name {NAMED[setting]}{there}")
    return found
