"""A checkpoint on disk: a folder that a manifest vouches for. Needs no torch, and unpickles nothing.

    checkpoints/step-00000200/
        model.safetensors  optimizer.safetensors  …  state.json  config.json  manifest.json

Of a run of several ranks, which all write at once, with model_00003.safetensors and optimizer_00003.safetensors for
what rank 3 writes, state_00003.json for what it alone has, and pieces.json for where each piece of each tensor is.

It is written beside its place under another name, every file and folder is flushed to the disk, the manifest last, and
one rename puts it there. A folder whose manifest does not describe exactly what lies in it is no checkpoint.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data import disk
from data.progress import bar
from training.parallel.together import Together

FORMAT, FORMAT_OF_SHARDS = 2, 3
READABLE = (1, 2, 3)
"""Format 1, of commits up to e18cd2b: the parts that are neither model nor optimizer lie in loop.safetensors."""
STATE, CONFIG, PIECES, MANIFEST = "state.json", "config.json", "pieces.json", "manifest.json"
FILE = re.compile(r"[a-z][a-z0-9_]*\.(safetensors|json)")  # no path leads elsewhere
MOST_MANIFEST_BYTES = 1 << 24  # a file of 1,024 ranks takes half a million
ALONE = Together()
NAME = re.compile(r"step-(\d{8,})")


class DamagedCheckpoint(ValueError):
    """A folder that looks like a checkpoint and is none; the message names the file and the reason."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is, and the size and SHA-256 of each of its files."""

    format: int
    step: int
    tokens: int
    world_size: int
    val_loss: float | None
    """Of the evaluation at this very step; None where there was none."""
    config_sha256: str
    versions: dict[str, str]
    files: dict[str, list[Any]]
    """Name: [bytes, SHA-256]."""

    @property
    def num_bytes(self) -> int:
        return sum(int(size) for size, _ in self.files.values())

    def to_json(self) -> bytes:
        """Exactly one spelling, with its own SHA-256 as the last key: a flipped byte anywhere shows."""
        body = asdict(self)
        return _spell({**body, "sha256": disk.sha256(_spell(body))})

    @staticmethod
    def from_json(data: bytes) -> Manifest:
        """Raises DamagedCheckpoint unless `data` is what `to_json` writes."""
        try:
            body = json.loads(data)
            body.pop("sha256")
            manifest = Manifest(**body)
            same = manifest.to_json() == data
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            same = False
        if not same:
            raise DamagedCheckpoint(f"{MANIFEST} is not what was written")
        if manifest.format not in READABLE:
            raise DamagedCheckpoint(f"{MANIFEST} has format {manifest.format}, this version reads up to {READABLE[-1]}")
        well_formed = (
            isinstance(manifest.files, dict)
            and {STATE, CONFIG} <= set(manifest.files)
            and (PIECES in manifest.files) == (manifest.format == FORMAT_OF_SHARDS)
            and all(FILE.fullmatch(name) and name != MANIFEST for name in manifest.files)
            and all(isinstance(entry, list) and len(entry) == 2 for entry in manifest.files.values())
            and all(_is_count(size) and isinstance(digest, str) for size, digest in manifest.files.values())
            and all(_is_count(getattr(manifest, name)) for name in ("step", "tokens", "world_size"))
            and (manifest.val_loss is None or _is_finite(manifest.val_loss))
            and isinstance(manifest.versions, dict)
        )
        if not well_formed:
            raise DamagedCheckpoint(f"{MANIFEST} does not list the files of a checkpoint")
        return manifest


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_finite(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def _spell(body: dict[str, Any]) -> bytes:
    return (json.dumps(body, indent=1) + "\n").encode()


def read_manifest(folder: Path) -> Manifest:
    """Raises DamagedCheckpoint; looks at no other file."""
    try:
        with disk.open_regular(folder / MANIFEST) as file:
            data = file.read(MOST_MANIFEST_BYTES + 1)
    except OSError as error:
        raise DamagedCheckpoint(f"{MANIFEST}: {error.strerror}") from error
    manifest = Manifest.from_json(data)
    named = NAME.fullmatch(folder.name)
    if named and int(named[1]) != manifest.step:
        raise DamagedCheckpoint(f"{MANIFEST} is that of step {manifest.step}")
    return manifest


def verify(
    folder: Path, only: Iterable[str] | None = None, advance: Callable[[int], None] = lambda amount: None
) -> Manifest:
    """Read every byte of a checkpoint, or `only` some of its files, and compare it with the manifest.

    Args:
        advance: told how many bytes more are read.
    Raises:
        DamagedCheckpoint: names the first file that is missing, has another size or another content.
    """
    manifest = read_manifest(folder)

    def check(name: str) -> None:
        size, digest = manifest.files[name]
        try:
            found = (folder / name).stat().st_size
            if found != size:
                raise DamagedCheckpoint(f"{name} has {found:,} bytes, not {size:,}")
            if disk.sha256_file(folder / name, from_disk=True, advance=advance) != digest:
                raise DamagedCheckpoint(f"{name} has changed since it was written (SHA-256)")
        except OSError as error:
            raise DamagedCheckpoint(f"{name}: {error.strerror}") from error

    with ThreadPoolExecutor() as pool:
        list(pool.map(check, manifest.files if only is None else only))
    return manifest


def weight_files(manifest: Manifest) -> list[str]:
    """What holds the weights, and says where they are."""
    return [name for name in manifest.files if re.fullmatch(r"model(_\d+)?\.safetensors", name) or name == PIECES]


def verify_shown(folder: Path, ranks: Together = ALONE) -> Manifest:
    """`verify`, while a person waits for it: with a bar. Of several ranks each reads its share."""
    manifest = ranks.first(lambda: read_manifest(folder))

    def read() -> None:
        mine = share(manifest, ranks.rank, ranks.size)
        with bar(f"verifying {folder.name}", sum(manifest.files[name][0] for name in mine)) as advance:
            verify(folder, mine, advance)

    ranks.each(read)
    return manifest


def read_json(file: Path) -> dict[str, Any]:
    """Raises ValueError where it is none."""
    try:
        with disk.open_regular(file) as opened:
            values = json.loads(opened.readall())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read as JSON") from error
    return values if isinstance(values, dict) else {}


def share(manifest: Manifest, rank: int, size: int) -> list[str]:
    """The files that one of several ranks reads where all verify a checkpoint: about as many bytes as each other."""
    loads, mine = [0] * size, list[str]()
    for name in sorted(manifest.files, key=lambda name: (-manifest.files[name][0], name)):
        reader = loads.index(min(loads))
        loads[reader] += manifest.files[name][0]
        mine += [name] * (reader == rank)
    return mine


Files = dict[str, list[Any]]
"""Name: [bytes, SHA-256], as in a manifest."""


def write(
    folder: Path,
    tensors: Mapping[str, Callable[[Path], None]],
    texts: dict[str, Any],
    facts: dict[str, Any],
    ranks: Together = ALONE,
) -> Manifest:
    """Write a checkpoint; it is there whole, or not at all.

    Args:
        folder: its place, `checkpoints/step-…`. What may lie there (a damaged checkpoint) is replaced.
        tensors: by the name of a file, what writes it. texts: by the name of a file, its value as JSON or its content.
        facts: the remaining fields of `Manifest`.
        ranks: that write it, each its own `tensors` and `texts`. It is a checkpoint when rank 0 has the size and the
            hash of every file of every rank, and not before.
    Raises:
        OSError and whatever `tensors` raise, on any rank; nothing is left behind then.
    """
    with ExitStack() as stack:
        part = ranks.first(lambda: stack.enter_context(disk.part_of(folder)))
        shares = ranks.gather(lambda: _write_files(part, tensors, texts))
        return ranks.first(lambda: _put_in_place(part, folder, shares, facts))


def _write_files(part: Path, tensors: Mapping[str, Callable[[Path], None]], texts: Mapping[str, Any]) -> Files:
    """What this rank writes, flushed to the disk."""
    part.mkdir(parents=True, exist_ok=True)  # another host may see it late
    like, *_ = texts
    with ThreadPoolExecutor() as pool:
        for name, value in texts.items():
            disk.write_synced(part / name, value if isinstance(value, bytes) else _spell(value))

        def write_tensors(name: str) -> None:
            tensors[name](part / name)
            shutil.copymode(part / like, part / name)  # safetensors lets nobody but the owner read its files

        # The disk and several processors at the same time: what of a save takes long is this.
        list(pool.map(write_tensors, tensors))
        synced = [pool.submit(disk.sync, part / name) for name in tensors]
        names = (*tensors, *texts)
        digests = pool.map(lambda name: disk.sha256_file(part / name), names)
        files = {name: [(part / name).stat().st_size, digest] for name, digest in zip(names, digests, strict=True)}
        for flushed in synced:
            flushed.result()
    return files


def _put_in_place(part: Path, folder: Path, shares: list[Files], facts: dict[str, Any]) -> Manifest:
    files = {name: entry for share in shares for name, entry in share.items()}
    for name, (size, _) in files.items():
        if (found := (part / name).stat().st_size) != size:
            raise OSError(errno.EIO, f"{name} has {found:,} bytes where rank 0 looks, not {size:,}")
    form = FORMAT if PIECES not in files else FORMAT_OF_SHARDS
    manifest = Manifest(format=form, config_sha256=str(files[CONFIG][1]), files=files, **facts)
    disk.write_synced(part / MANIFEST, manifest.to_json())
    disk.sync(part)
    if os.path.lexists(folder):
        replaced = part.with_name(f"{part.name}-replaced")
        os.rename(folder, replaced)
        disk.remove(replaced)
    os.rename(part, folder)
    disk.sync(folder.parent)
    return manifest


# ---- the checkpoints of a run


def checkpoints_of(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def disk_of(run_dir: Path) -> Path:
    """A folder on the disk that takes the checkpoints, which may be another than the run folder's."""
    place = checkpoints_of(run_dir)
    return place if os.path.exists(place) else run_dir


def path_of(run_dir: Path, step: int) -> Path:
    return checkpoints_of(run_dir) / f"step-{step:08}"


def is_checkpoint(path: Path) -> bool:
    """Whether a path means one checkpoint, whatever a copy of it is called, and not a run folder."""
    return bool(NAME.fullmatch(path.resolve().name)) or (path.is_dir() and os.access(path / MANIFEST, os.F_OK))


def candidates(run_dir: Path) -> list[Path]:
    """What is named like a checkpoint, newest first; whether it is one, `verify` tells.

    Raises:
        ValueError: the folder of the checkpoints is there and cannot be read. It may hold some.
    """
    place = checkpoints_of(run_dir)
    try:
        place.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise _unreadable(place, error) from error
    try:
        matches = {path: NAME.fullmatch(path.name) for path in place.iterdir()}
    except OSError as error:
        raise _unreadable(place, error) from error
    steps = {path: int(match[1]) for path, match in matches.items() if match}
    return sorted(steps, key=steps.__getitem__, reverse=True)


def _unreadable(place: Path, error: OSError) -> ValueError:
    why = f"it leads to {os.readlink(place)}" if place.is_symlink() else "it may hold checkpoints"
    return ValueError(f"{place} cannot be read: {error.strerror}; {why}: mend that, or choose another")


def newest(run_dir: Path, notify: Callable[[str], None], ranks: Together = ALONE) -> tuple[Path, Manifest] | None:
    """The newest checkpoint that verifies. A damaged one is named, with the reason, and the one before is tried."""
    for path in ranks.first(lambda: candidates(run_dir)):
        try:
            return path, verify_shown(path, ranks)
        except DamagedCheckpoint as damage:
            notify(f"checkpoint {path} is damaged and not used: {damage}")
    return None


def sweep(run_dir: Path) -> None:
    """Remove what killed saves left behind. Only for who holds the run folder's lock."""
    disk.sweep(checkpoints_of(run_dir))
    disk.sweep(run_dir)


def to_keep(manifests: dict[Path, Manifest], last: int, every: int, best: bool) -> set[Path]:
    """Which of a run's checkpoints retention leaves.

    Args:
        last: how many of the newest (at least one). every: those whose step is a multiple of it (0: none).
        best: that with the lowest validation loss.
    """
    by_step = sorted(manifests, key=lambda path: manifests[path].step)
    kept = set(by_step[-max(1, last) :])
    kept |= {path for path in by_step if every > 0 and manifests[path].step % every == 0}
    measured = {path: loss for path in by_step if (loss := manifests[path].val_loss) is not None}
    if best and measured:
        kept.add(min(measured, key=measured.__getitem__))
    return kept


def readable(paths: Iterable[Path]) -> Iterator[tuple[Path, Manifest]]:
    """Those with a good manifest; the others' content is not looked at."""
    for path in paths:
        with suppress(DamagedCheckpoint):
            yield path, read_manifest(path)


def prune(run_dir: Path, last: int, every: int, best: bool, verified: Path | None = None) -> list[Path]:
    """Remove checkpoints that retention does not keep; returns them.

    Nothing is removed before the newest has verified, so the last good one stays whatever happened to the others. What
    has no good manifest is left for a person to look at.

    Args:
        verified: a checkpoint that was just read, and need not be read again.
    Raises:
        DamagedCheckpoint: the newest is. OSError, ValueError: the folder cannot be read or changed.
    """
    manifests = dict(readable(candidates(run_dir)))
    if not manifests:
        return []
    latest = max(manifests, key=lambda path: manifests[path].step)
    if latest != verified:
        verify(latest)
    surplus = sorted(set(manifests) - to_keep(manifests, last, every, best))
    for path in surplus:
        # Renamed first: a removal that is killed half-way leaves no folder that looks like a checkpoint.
        gone = disk.part_name(path)
        os.rename(path, gone)
        disk.remove(gone)
    return surplus
