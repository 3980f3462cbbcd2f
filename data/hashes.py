"""Whether files have changed: SHA-256 of their contents, and stamps that tell of a change without reading them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data import disk
from data.progress import bar

REMEMBERED_BYTES = 2**26  # the hashes of larger files are kept: to hash takes a second for each GB


class Stamp(NamedTuple):
    """What changes with a file: its times of change are of the content, which may be set to anything, and of the
    file's entry, which may not."""

    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, path: Path) -> Stamp:
        status = path.stat()
        return cls(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@dataclass(frozen=True)
class Hashed:
    """Files by name, as they were when they were hashed.

    sha256: of the names and contents, in their order. size: bytes of all.
    """

    sha256: str
    size: int
    stamps: dict[Path, Stamp]

    def check(self, only: Iterable[Path] | None = None) -> None:
        """Raises ValueError where a file is not what was hashed."""
        for path in self.stamps if only is None else only:
            try:
                same = Stamp.of(path) == self.stamps[path]
            except OSError as error:
                raise ValueError(f"cannot read {path}: {error.strerror}") from error
            if not same:
                raise ValueError(
                    f"{path} changed while it was read, and nothing was kept: start again when nothing writes to it"
                )


def hash_tree(files: dict[str, Path], cache: Path) -> Hashed:
    """Hash files by name.

    Raises:
        ValueError: a file cannot be read, or does not stay as it is.
    """
    hashes, stamps = hash_files(files.values(), cache)
    digest = hashlib.sha256()
    for name, content in zip(files, hashes, strict=True):
        digest.update(bytes.fromhex(disk.sha256(name) + content))
    return Hashed(digest.hexdigest(), sum(stamp.size for stamp in stamps.values()), stamps)


def hash_files(files: Iterable[Path], cache: Path) -> tuple[list[str], dict[Path, Stamp]]:
    """SHA-256 of each file, and its stamp. Those of large files are remembered in the folder `cache`.

    Raises:
        ValueError: a file cannot be read, or does not stay as it is.
    """
    memory_file = cache / "file-hashes.json"
    try:
        memory = disk.unsealed(memory_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        memory = {}
    hashes, stamps, learned = [], {}, False
    with bar("hashing", None) as advance:
        for path in files:
            try:
                key, stamp = str(path.resolve()), Stamp.of(path)
                known: Any = memory.get(key)
                if isinstance(known, list) and known[:-1] == list(stamp) and stamp.size >= REMEMBERED_BYTES:
                    digest = str(known[-1])
                else:
                    digest, stamp = _hash_still(path, stamp)
                    advance(stamp.size)
                    # A change within the same tick of the clock would go unseen, so what is new is not remembered.
                    changed = max(stamp.mtime_ns, stamp.ctime_ns)
                    if stamp.size >= REMEMBERED_BYTES and time.time_ns() - changed > 2_000_000_000:
                        memory[key], learned = [*stamp, digest], True
            except OSError as error:
                raise ValueError(f"cannot read {path}: {error.strerror}") from error
            hashes.append(digest)
            stamps[path] = stamp
    if learned:
        with suppress(OSError):  # then they are hashed again next time
            cache.mkdir(parents=True, exist_ok=True)
            disk.write_whole(memory_file, disk.sealed(memory))
    return hashes, stamps


def _hash_still(path: Path, stamp: Stamp) -> tuple[str, Stamp]:
    """The hash of a file that was the same before and after."""
    for _ in range(3):
        digest, before, stamp = disk.sha256_file(path), stamp, Stamp.of(path)
        if before == stamp:
            return digest, stamp
    raise ValueError(f"{path} is being written: start again when it is complete")
