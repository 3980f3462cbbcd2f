"""Files of text: which a path stands for, what they hold, and whether they have changed."""

from __future__ import annotations

import bz2
import glob
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from data import disk

PROSE = (".txt", ".md", ".rst", ".tex")
CODE = (
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".java", ".js", ".ts", ".tsx", ".go", ".rs"),
    *(".rb", ".sh", ".lua", ".scala", ".kt", ".swift", ".hs", ".jl", ".r", ".sql", ".html", ".css"),
)
RECORDS = (".jsonl", ".parquet")
TEXT_SUFFIXES = (*PROSE, *CODE, *RECORDS)
COMPRESSED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": lambda path: _open_zstd(path),
}
REMEMBERED_BYTES = 2**26  # the hashes of larger files are kept: to hash takes a second for each GB


def expand(path: str) -> Path:
    """A path that may begin with "~"; that of somebody unknown stays as it is, and is then not found."""
    return Path(os.path.expanduser(path))


def find_root(path: str) -> Path:
    """The file that a path names, or the folder that it names files in.

    Raises:
        ValueError: there is none.
    """
    given = expand(path)
    try:
        if given.exists():
            return given
        matches = "\0" not in path and any(glob.iglob(str(given), recursive=True))
    except OSError as error:
        raise ValueError(f"data.path={path} cannot be read: {error.strerror}") from error
    if not matches:
        raise ValueError(f"data.path={path} does not exist: name a file, a folder or a glob")
    return Path(*itertools.takewhile(lambda part: not glob.has_magic(part), given.parts))


def find_files(path: str) -> tuple[Path, list[Path]]:
    """The folder that names are relative to, and the text files that a file, folder or glob stands for.

    Links are followed. A file that links lead to once more, under a later name, is not taken twice.

    Raises:
        ValueError: there are none, or a folder cannot be read.
    """
    given, root = expand(path), find_root(path)
    if root.is_file():
        return root.parent, [root]
    if root == given:
        found = list(walk(root, skip=lambda name: name.startswith(".")))
    else:
        found = [Path(match) for match in glob.glob(str(given), recursive=True)]
    # No folders; what is no file either, such as a link to nowhere, is named when it is read.
    texts = [path for path in found if kind_of(path) in TEXT_SUFFIXES and not os.path.isdir(path)]
    files = list({os.path.realpath(path): path for path in sorted(texts, reverse=True)}.values())
    if not files:
        raise ValueError(
            f"data.path={path} matches no text files: looked for {' '.join((*PROSE, *RECORDS))}, source code, "
            f"and these compressed ({' '.join(COMPRESSED)})"
        )
    return root, files


def kind_of(path: Path) -> str:
    """The suffix that says what a file holds: that of notes.jsonl.gz is .jsonl."""
    return (Path(path.stem).suffix if is_packed(path) else path.suffix).lower()


def is_packed(path: Path) -> bool:
    return path.suffix.lower() in COMPRESSED


def walk(root: Path, skip: Callable[[str], bool]) -> Iterator[Path]:
    """The files below a folder, through links too, each folder once.

    Raises:
        ValueError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise ValueError(f"cannot read {error.filename}: {error.strerror}") from error

    seen = set()
    for folder, subfolders, files in os.walk(root, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not skip(name))
        yield from (Path(folder, name) for name in files)


def relative_name(path: Path, root: Path) -> str:
    # A file name need not be valid UTF-8, but what is hashed and written to JSON must be.
    return os.fsencode(path.relative_to(root).as_posix()).decode("utf-8", "backslashreplace")


def read_file(path: Path, name: str, field: str) -> Iterator[tuple[str, str]]:
    """(name, text) of each document in a file.

    Raises:
        ValueError: names the file, the line or row, and what is wrong with it.
    """
    kind = kind_of(path)
    if kind == ".parquet":
        yield from _read_parquet(path, name, field)
    elif kind == ".jsonl":
        yield from _read_jsonl(path, name, field)
    else:
        yield name, _decode(read_bytes(path), path)


def read_bytes(path: Path) -> bytes:
    """The content of a file, unpacked."""
    try:
        with _open(path) as file:
            return file.read()
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(_unreadable(path, error)) from error


def _open(path: Path) -> Any:
    """A binary file, unpacked as it is read."""
    return COMPRESSED[path.suffix.lower()](path) if is_packed(path) else path.open("rb")


def _unreadable(path: Path, error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"cannot read {path}: {error.strerror}"
    return f"cannot unpack {path} ({error}): it is damaged or cut short; fetch it again or leave it out"


def _open_zstd(path: Path) -> io.BufferedReader:
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"))


def _decode(content: bytes, where: Path | str) -> str:
    if (nul := content.find(b"\0")) >= 0:
        raise ValueError(f"{where} is binary or UTF-16 (NUL at byte {nul}): convert it to UTF-8 text or leave it out")
    try:
        return content.decode().removeprefix("\ufeff")  # the mark that some editors begin a file with
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 (byte {error.start}): convert it to UTF-8 or leave it out") from error


def _read_jsonl(path: Path, name: str, field: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(_decode(line, where))
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{where} is not valid JSON ({error}): each line must be one JSON object") from error
        if not isinstance(record, dict):
            raise ValueError(f"{where} is a JSON {type(record).__name__}: each line must be one JSON object")
        yield f"{name}:{number:08d}", text_of(record, field, where)


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, unpacked, one at a time; only a line feed ends one."""
    try:
        with _open(path) as file:
            yield from file
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(_unreadable(path, error)) from error


def _read_parquet(path: Path, name: str, field: str) -> Iterator[tuple[str, str]]:
    import pyarrow
    import pyarrow.parquet

    # Parquet is read from its end: what was packed once more is unpacked whole.
    content = pyarrow.BufferReader(read_bytes(path)) if is_packed(path) else path
    try:
        file = pyarrow.parquet.ParquetFile(content)
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path} is no parquet file, or cut short: fetch it again or leave it out") from error
    with file:
        columns = file.schema_arrow.names
        if field not in columns:
            raise ValueError(
                f"{path} has no column {field!r}: set data.field to one of {', '.join(map(repr, columns))}"
            )
        number = 0
        try:
            for batch in file.iter_batches(batch_size=256, columns=[field]):
                for text in batch.column(0):
                    where = f"{path}:{number}"
                    yield f"{name}:{number:08d}", text_of({field: text.as_py()}, field, where)
                    number += 1
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{number} is not UTF-8 (byte {error.start}): repair the row") from error
        except (OSError, pyarrow.ArrowException) as error:
            raise ValueError(f"{path} is damaged at row {number}: fetch it again or leave it out") from error


def text_of(record: dict[str, Any], field: str, where: str) -> str:
    """The text of a record; nothing, where it is null.

    Raises:
        ValueError: it has none.
    """
    fields = ", ".join(map(repr, record))
    if field not in record:
        raise ValueError(f"{where} has no field {field!r}: set data.field to one of {fields}")
    text = "" if record[field] is None else record[field]
    if not isinstance(text, str):
        kind = type(text).__name__
        raise ValueError(f"{where} field {field!r} is {kind}, not text: set data.field to one of {fields}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} field {field!r} holds half a surrogate pair, which is no text: repair the line"
        ) from error
    return text


def hash_tree(root: Path, files: list[Path], cache_dir: str) -> tuple[str, int]:
    """A SHA-256 of the names, below a root, and contents of files, in their order; and the bytes of all.

    Raises:
        ValueError: a file cannot be read.
    """
    hashes, size = hash_files(files, cache_dir)
    digest = hashlib.sha256()
    for path, content in zip(files, hashes, strict=True):
        digest.update(bytes.fromhex(disk.sha256(relative_name(path, root)) + content))
    return digest.hexdigest(), size


def hash_files(files: Iterable[Path], cache_dir: str) -> tuple[list[str], int]:
    """SHA-256 of each file, and the bytes of all. Those of large files are remembered by size and times of change: of
    the content, which may be set to anything, and of the file's entry, which may not.

    Raises:
        ValueError: a file cannot be read.
    """
    memory_file = expand(cache_dir) / "file-hashes.json"
    try:
        memory = json.loads(memory_file.read_text(encoding="utf-8"))
        memory = memory if isinstance(memory, dict) else {}
    except (OSError, ValueError):
        memory = {}
    hashes, total, learned = [], 0, False
    for path in files:
        try:
            status = path.stat()
            key, stamp = str(path.resolve()), [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
            known = memory.get(key)
            if isinstance(known, list) and known[:3] == stamp and status.st_size >= REMEMBERED_BYTES:
                digest = str(known[3])
            else:
                digest = disk.sha256_file(path)
                # A change within the same tick of the clock would go unseen, so what is new is not remembered.
                if status.st_size >= REMEMBERED_BYTES and time.time_ns() - max(stamp[1:]) > 2_000_000_000:
                    memory[key], learned = [*stamp, digest], True
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}") from error
        hashes.append(digest)
        total += status.st_size
    if learned:
        with suppress(OSError):  # then they are hashed again next time
            memory_file.parent.mkdir(parents=True, exist_ok=True)
            disk.write_whole(memory_file, json.dumps(memory))
    return hashes, total
