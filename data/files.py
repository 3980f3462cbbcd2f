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


def find_root(path: str) -> Path:
    """The file that a path names, or the folder that it names files in.

    Raises:
        ValueError: there is none.
    """
    given = Path(path).expanduser()
    if os.path.exists(given):  # Path's raises where a name is too long or a folder may not be read
        return given
    if next(glob.iglob(str(given), recursive=True), None) is None:
        raise ValueError(f"data.path={path} does not exist: name a file, a folder or a glob")
    return Path(*itertools.takewhile(lambda part: not glob.has_magic(part), given.parts))


def find_files(path: str) -> tuple[Path, list[Path]]:
    """The folder that names are relative to, and the text files that a file, folder or glob stands for.

    Raises:
        ValueError: there are none.
    """
    given, root = Path(path).expanduser(), find_root(path)
    if root.is_file():
        return root.parent, [root]
    if root == given:
        found = list(walk(root, skip=lambda name: name.startswith(".")))
    else:
        found = [Path(match) for match in glob.glob(str(given), recursive=True)]
    files = [file for file in found if kind_of(file) in TEXT_SUFFIXES and file.is_file()]
    if not files:
        raise ValueError(
            f"data.path={path} matches no text files: looked for {' '.join((*PROSE, *RECORDS))}, source code, "
            f"and these compressed ({' '.join(COMPRESSED)})"
        )
    return root, files


def kind_of(path: Path) -> str:
    """The suffix that says what a file holds: that of notes.jsonl.gz is .jsonl."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def walk(root: Path, skip: Callable[[str], bool]) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if not skip(name)]
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
    return COMPRESSED[path.suffix](path) if path.suffix in COMPRESSED else path.open("rb")


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
        return content.decode()
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

    try:
        file = pyarrow.parquet.ParquetFile(path)
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
                for text in batch.column(0).to_pylist():
                    if text is not None:
                        yield f"{name}:{number:08d}", text_of({field: text}, field, f"{path}:{number}")
                    number += 1
        except (OSError, pyarrow.ArrowException) as error:
            raise ValueError(f"{path} is damaged at row {number}: fetch it again or leave it out") from error


def text_of(record: dict[str, Any], field: str, where: str) -> str:
    """The text of a record.

    Raises:
        ValueError: it has none.
    """
    fields = ", ".join(map(repr, record))
    if field not in record:
        raise ValueError(f"{where} has no field {field!r}: set data.field to one of {fields}")
    text = record[field]
    if not isinstance(text, str):
        kind = type(text).__name__
        raise ValueError(f"{where} field {field!r} is {kind}, not text: set data.field to one of {fields}")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{where} field {field!r} holds half a surrogate pair, which is no text: repair the line")
    return text


def hash_files(files: Iterable[Path], cache_dir: str) -> tuple[list[str], int]:
    """SHA-256 of each file, and the bytes of all. Those of large files are remembered by size and time of change.

    Raises:
        ValueError: a file cannot be read.
    """
    memory_file = Path(cache_dir).expanduser() / "file-hashes.json"
    try:
        memory = json.loads(memory_file.read_text(encoding="utf-8"))
        memory = memory if isinstance(memory, dict) else {}
    except (OSError, ValueError):
        memory = {}
    hashes, total, learned = [], 0, False
    for path in files:
        try:
            status = path.stat()
            key, stamp = str(path.resolve()), [status.st_size, status.st_mtime_ns]
            known = memory.get(key)
            if isinstance(known, list) and known[:2] == stamp and status.st_size >= REMEMBERED_BYTES:
                digest = str(known[2])
            else:
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                # A change within the same tick of the clock would go unseen, so what is new is not remembered.
                if status.st_size >= REMEMBERED_BYTES and time.time_ns() - status.st_mtime_ns > 2_000_000_000:
                    memory[key], learned = [*stamp, digest], True
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}") from error
        hashes.append(digest)
        total += status.st_size
    if learned:
        with suppress(OSError):  # then they are hashed again next time
            memory_file.parent.mkdir(parents=True, exist_ok=True)
            part = memory_file.with_suffix(f".{os.getpid()}.part")
            part.write_text(json.dumps(memory), encoding="utf-8")
            part.replace(memory_file)
    return hashes, total
