"""The run folder: who may write it, and what a run begins with: nothing, or a checkpoint. Needs no torch."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from io import TextIOWrapper
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from .checkpoint import folder as checkpoints
from .checkpoint.folder import DamagedCheckpoint, Manifest
from .config import TrainConfig

# A run that goes on with another value of one of these would be neither the old run nor a new one.
MUST_AGREE = (
    "model",
    "tokenizer",
    "optimizer.name",
    "seq_len",
    "tokens_per_step",
    "seed",
    "data.document_mask",
    "data.packing",
)
MAY_DIFFER = ("model.loss_chunk_size",)  # memory, not meaning

LOCK = "run.lock"
RECORDS = ("metrics.jsonl", "samples.md", "bad-steps.jsonl")
"""Files that grow. A checkpoint holds their sizes; what a run wrote after it is cut when it resumes there."""


def check(config: TrainConfig) -> None:
    """Refuse, before anything slow, a run_dir that cannot be written or continued, and paths that lead nowhere.

    Raises:
        ValueError: one line.
    """
    run = Path(config.run_dir)
    try:
        holds_something = run.exists() and any(path.name != LOCK for path in run.iterdir())
        holds_a_run = (run / LOCK).exists()
    except OSError as error:  # a file, a name that is too long, a folder that may not be read
        raise ValueError(f"run_dir={config.run_dir} cannot be used: {error.strerror}; choose another") from error
    try:
        with TemporaryFile(dir=next(path for path in (run, *run.absolute().parents) if path.exists())):
            pass
    except OSError as error:
        raise ValueError(f"run_dir={config.run_dir} cannot be written: {error.strerror}; choose another") from error
    if holds_something and not holds_a_run:
        raise ValueError(f"run_dir={config.run_dir} already holds something, and no run to resume; choose another")
    if holds_something and config.resume == "none":
        raise ValueError(f"run_dir={config.run_dir} already holds a run; choose another, or resume=auto to continue it")
    for name in ("resume", "init_from"):
        value = getattr(config, name)
        if value is None or value in ("auto", "none"):
            continue
        if not os.path.exists(value):  # Path's raises where a name is too long or a folder may not be read
            raise ValueError(f"{name}={value} does not exist; name a run folder or a checkpoint")
        is_weights = name == "init_from" and os.path.isfile(value)
        if not is_weights and not _checkpoints_at(Path(value)):
            raise ValueError(f"{name}={value} holds no checkpoint; name a run folder or a checkpoint")
    own = checkpoints.candidates(run)
    named = [] if config.resume in ("auto", "none") else _checkpoints_at(Path(config.resume))
    for path, manifest in checkpoints.readable(named if named and (_is_inside(config) or not own) else own):
        with suppress(OSError):
            saved = (path / "config.json").read_bytes()
            if hashlib.sha256(saved).hexdigest() == manifest.config_sha256:
                compare(path, json.loads(saved), asdict(config))
                break


def _checkpoints_at(path: Path) -> list[Path]:
    """The checkpoints that resume=PATH or init_from=PATH may mean, the newest first; none is verified."""
    return [path] if checkpoints.NAME.fullmatch(path.resolve().name) else checkpoints.candidates(path)


def _is_inside(config: TrainConfig) -> bool:
    """Whether resume=PATH lies in run_dir: the run goes back, and does not branch off."""
    return Path(config.resume).resolve().is_relative_to(Path(config.run_dir).resolve())


def compare(path: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """What differs between the configuration of a checkpoint and this run's, and may: "learning_rate 0.001 → 0.0005".

    Raises:
        ValueError: names the first field that must not differ, with both values.
    """
    before, now = dict(_flat(theirs)), dict(_flat(ours))
    changes = []
    for key in sorted(set(before) | set(now)):
        old, new = before.get(key), now.get(key)
        if old == new:
            continue
        if key not in MAY_DIFFER and any(key == field or key.startswith(f"{field}.") for field in MUST_AGREE):
            raise ValueError(
                f"{key}={new} does not fit {path}, which was trained with {key}={old}; "
                f"use that, or init_from={path} for a new run that begins with its weights"
            )
        changes.append(f"{key} {old} → {new}")
    return changes


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


class RunFolder:
    """A run folder that this process alone may write, until `close`.

    Raises:
        ValueError: it cannot be written, or another process holds it.
    """

    def __init__(self, config: TrainConfig) -> None:
        check(config)
        self.config = config
        self.path = Path(config.run_dir)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock: TextIOWrapper = open(self.path / LOCK, "a+", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise ValueError(f"run_dir={config.run_dir} cannot be written: {error.strerror}; choose another") from error
        try:
            # Held by the open file, not by its content: it goes with the process, however that ends.
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.seek(0)
            owner = self._lock.read(200).strip() or "another process"
            self._lock.close()
            raise ValueError(
                f"run_dir={config.run_dir} is being trained by {owner}; stop that, or choose another"
            ) from error
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._lock.flush()
        checkpoints.sweep(self.path)

    def close(self) -> None:
        self._lock.close()

    def checkpoint(self, notify: Callable[[str], None]) -> tuple[Path, Manifest] | None:
        """The verified checkpoint to go on from; None: begin at step 0.

        Raises:
            ValueError: resume names one, and it is damaged, or older than others of this very run folder; or there
                is something to lose, and beginning anew would overwrite it.
        """
        resume = self.config.resume
        if resume in ("auto", "none"):
            newest = checkpoints.newest(self.path, notify)
            damaged = checkpoints.candidates(self.path)
            if newest is None and (damaged or (self.path / "model.safetensors").exists()):
                what = f"{len(damaged)} checkpoints, none of them good" if damaged else "a finished run, no checkpoint"
                raise ValueError(f"run_dir={self.path} holds {what}; choose another, or remove it to begin anew")
            return newest
        inside = _is_inside(self.config)
        if not inside and (own := checkpoints.newest(self.path, notify)):
            notify(f"resume     {self.path} is past resume={resume}, where it began")  # the same command, once more
            return own
        found = find(resume, "resume", notify)
        later = checkpoints.candidates(self.path)[0] if inside else found[0]
        if later.resolve() != found[0].resolve():
            raise ValueError(
                f"resume={resume} is older than {later}; choose another run_dir to branch off there, "
                f"or remove the later checkpoints to go back"
            )
        return found

    def cut_records(self, sizes: dict[str, int], source: Path | None) -> None:
        """Bring the records back to what a checkpoint knew: each step is in them once.

        Args:
            source: run folder of the checkpoint; another than this one gives this one its records.
        """
        for name in RECORDS:
            path = self.path / name
            if source is not None and source.resolve() != self.path.resolve() and (source / name).exists():
                with suppress(OSError):
                    shutil.copyfile(source / name, path)
            if path.exists() and path.stat().st_size > sizes.get(name, 0):
                os.truncate(path, sizes.get(name, 0))

    def record_sizes(self) -> dict[str, int]:
        return {name: (self.path / name).stat().st_size for name in RECORDS if (self.path / name).exists()}


def find(value: str, setting: str, notify: Callable[[str], None]) -> tuple[Path, Manifest]:
    """The checkpoint that resume=PATH or init_from=PATH names: a checkpoint, or a run folder's newest good one.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    path = Path(value)
    if checkpoints.NAME.fullmatch(path.resolve().name):
        try:
            found: tuple[Path, Manifest] | None = path, checkpoints.verify(path)
        except DamagedCheckpoint as damage:
            raise ValueError(f"{setting}={value} is damaged: {damage}; name another checkpoint") from damage
    else:
        found = checkpoints.newest(path, notify)
    if found is None:
        raise ValueError(f"{setting}={value} holds no good checkpoint; name a run folder or a checkpoint")
    return found
