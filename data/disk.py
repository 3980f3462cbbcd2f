"""The disk: files that are there whole or not at all, SHA-256, seals and locks. Once, for everybody; needs no torch."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

READ_BYTES = 1 << 24  # at once: a thread that hashes asks for the interpreter, which trains, only so often


# ---- writing


def write_whole(path: Path, data: bytes | str, flush: bool = True) -> None:
    """Write a file whole or not at all; text as UTF-8. What was there before stays until the new file is on the disk.

    Args:
        flush: wait until it is there. False is for what can be made again: a power cut may leave it empty.
    Raises:
        OSError: it cannot be written. Nothing is left behind then.
    """
    with replacing(path, flush) as part:
        part.write_bytes(data.encode() if isinstance(data, str) else data)


@contextmanager
def replacing(path: Path, flush: bool = True) -> Iterator[Path]:
    """A name to write a file under. At the end the file is flushed to the disk and renamed to `path`.

    Raises:
        OSError: it cannot be flushed or renamed. After this or any other error nothing is left behind.
    """
    part = part_name(path)
    try:
        yield part
        if flush:
            sync(part)
        os.replace(part, path)
        if flush:
            sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def part_of(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder`, which is gone afterwards: renamed by the caller, or removed."""
    part = part_name(folder)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)


def part_name(path: Path) -> Path:
    """The name of a file or folder while this process writes it: hidden, and beside its place."""
    return path.with_name(f".{path.name}.part-{os.getpid()}")


PART = re.compile(r"\..+\.part-\d+(-replaced)?")


def sweep(folder: Path) -> None:
    """Remove what killed processes were writing in a folder. Only for who holds the folder's lock."""
    with suppress(OSError):
        for path in folder.iterdir():
            if PART.fullmatch(path.name):
                remove(path)


def remove(path: Path) -> None:
    """Remove a file, a folder with what is in it, or a link and not what it leads to. What cannot be removed stays."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def write_synced(path: Path, data: bytes | str) -> None:
    """Write a file in place, and see it on the disk: for files of a folder that is renamed when it is whole."""
    with open(path, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk: a rename alone does not survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sealed(body: dict[str, Any], indent: int | None = None) -> str:
    """JSON that ends with its own SHA-256, so that a change anywhere shows."""
    return json.dumps({**body, "seal": sha256(json.dumps(body))}, indent=indent) + "\n"


# ---- reading


def unsealed(text: str, optional: bool = False) -> dict[str, Any]:
    """What `sealed` wrote.

    Args:
        optional: a text without a seal is good, too; older versions wrote none.
    Raises:
        ValueError: it is something else.
    """
    try:
        body = json.loads(text)
        seal = body.pop("seal", sha256(json.dumps(body)) if optional else None)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError("no JSON object") from error
    if seal != sha256(json.dumps(body)):
        raise ValueError("not what was written")
    return dict(body)


def sha256(data: bytes | str) -> str:
    """The SHA-256 of bytes, or of a text as UTF-8, in hexadecimal digits."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def open_regular(path: Path) -> FileIO:
    """Open a file for reading, unbuffered. A pipe or a device in its place keeps nobody waiting.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "no regular file", str(path))
    return FileIO(descriptor)


def sha256_file(path: Path, from_disk: bool = False, advance: Callable[[int], None] = lambda amount: None) -> str:
    """The SHA-256 of a regular file.

    Args:
        from_disk: read what the disk gives back, not what the page cache still holds.
        advance: told how many bytes more are read.
    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with open_regular(path) as file:
        buffer = memoryview(bytearray(min(READ_BYTES, os.fstat(file.fileno()).st_size + 1)))
        if from_disk and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            advance(count)
    return digest.hexdigest()


# ---- locks


def try_lock(file: IO[Any], shared: bool = False) -> bool:
    """Lock an open file, unless another process holds it: then False. The lock belongs to the open file, whatever the
    file contains, and goes with the process, however that ends.

    Args:
        shared: any number of processes may hold a shared lock, and none then an exclusive one.
    Raises:
        OSError: this file system has no locks.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def alone(target: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Only one process at a time makes a file or folder. `waiting` is called where another one does so now.

    Raises:
        OSError: the folder of `target` cannot be written, or its file system has no locks.
    """
    with target.with_name(f".{target.name}.lock").open("a") as file:
        if not try_lock(file):
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def need_writable(folder: Path) -> None:
    """Raises OSError where a folder, or the one in which it will be made, takes no files."""
    with TemporaryFile(dir=next(path for path in (folder, *folder.absolute().parents) if path.exists())):
        pass
