"""What files of text hold: one document, records, tables; plain or packed."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from data import zstd
from data.files import is_packed, kind_of

READ_BYTES = 2**20
UNPACKERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": lambda path: _open_zstd(path),
}

Named = Iterator[tuple[str, str]]
"""(name, text) of documents."""


class BadRecord(ValueError):
    """A line, a row or a whole text that is none; the message says which, and why."""


class BadRecords:
    """What becomes of bad records: the first ends the reading, or they are left out and counted up to a cap.

    A text may be read more than once: a record is counted once.
    """

    def __init__(self, skip: bool = False, most: int = 0) -> None:
        self.skip, self.most = skip, most
        self.messages: dict[str, None] = {}  # in their order

    def add(self, error: BadRecord) -> None:
        """Raises ValueError unless the record is to be left out."""
        if not self.skip:
            raise BadRecord(f"{error}, or set data.bad_records=skip") from error
        self.messages[str(error)] = None
        if len(self.messages) > self.most:
            raise ValueError(
                f"more than data.max_bad_records={self.most:,} records are bad, the last one: {error}"
            ) from error

    def told(self) -> str | None:
        """How many were left out, in one line; None where none was."""
        if not self.messages:
            return None
        return f"{len(self.messages):,} bad records are left out, the first: {next(iter(self.messages))}"


def read_file(path: Path, name: str, field: str, delimiter: str | None = None, bad: BadRecords | None = None) -> Named:
    """(name, text) of each document in a file.

    Args:
        field: of a record, the key or column with the text; "a.b" is b in a.
        delimiter: what separates documents in a file of text; None: a file is one document.
        bad: what becomes of bad records; None: the first is an error.
    Raises:
        ValueError: names the file, the line or row, and what is wrong with it.
    """
    bad, kind = bad or BadRecords(), kind_of(path)
    if kind == ".parquet":
        yield from _read_parquet(path, name, field, bad)
    elif kind in (".jsonl", ".ndjson", ".json"):
        lines = _json_records(path) if kind == ".json" else _lines(path)
        yield from _read_jsonl(path, name, field, lines, bad)
    elif kind in (".csv", ".tsv"):
        yield from _read_csv(path, name, field, "," if kind == ".csv" else "\t", bad)
    elif delimiter is None:
        try:
            yield name, decode(read_bytes(path), path)
        except BadRecord as error:
            bad.add(error)
    else:
        for number, piece in enumerate(_pieces(path, delimiter.encode()), start=1):
            try:
                yield f"{name}:{number:08d}", decode(piece, f"{path} document {number}")
            except BadRecord as error:
                bad.add(error)


def read_bytes(path: Path) -> bytes:
    """The content of a file, unpacked.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        with _open(path) as file:
            return file.read()
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(_unreadable(path, error)) from error


def decode(content: bytes, where: Path | str) -> str:
    """Raises BadRecord where the content is no text."""
    if (nul := content.find(b"\0")) >= 0:
        raise BadRecord(f"{where} is binary or UTF-16 (NUL at byte {nul}): convert it to UTF-8 text or leave it out")
    try:
        return content.decode().removeprefix("\ufeff")  # the mark that some editors begin a file with
    except UnicodeDecodeError as error:
        raise BadRecord(f"{where} is not UTF-8 (byte {error.start}): convert it to UTF-8 or leave it out") from error


def _open(path: Path) -> Any:
    """A binary file, unpacked as it is read."""
    return UNPACKERS[path.suffix.lower()](path) if is_packed(path) else path.open("rb")


def _unreadable(path: Path, error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"cannot read {path}: {error.strerror}"
    return f"cannot unpack {path} ({error}): it is damaged or cut short; fetch it again or leave it out"


def _open_zstd(path: Path) -> io.BufferedReader:
    if zstd.window_of(path) > zstd.PYARROWS_WINDOW:
        return io.BufferedReader(zstd.LongWindowReader(path), READ_BYTES)
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"))


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, unpacked, one at a time; only a line feed ends one."""
    try:
        with _open(path) as file:
            yield from file
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(_unreadable(path, error)) from error


def _pieces(path: Path, delimiter: bytes) -> Iterator[bytes]:
    """What is between delimiters, one piece at a time."""
    content, begin = bytearray(), 0
    try:
        with _open(path) as file:
            while chunk := file.read(READ_BYTES):
                content += chunk
                while (end := content.find(delimiter, begin)) >= 0:
                    yield bytes(content[:end])
                    del content[: end + len(delimiter)]
                    begin = 0
                begin = max(0, len(content) - len(delimiter) + 1)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(_unreadable(path, error)) from error
    yield bytes(content)


# ---- JSON


def _read_jsonl(path: Path, name: str, field: str, lines: Iterator[Any], bad: BadRecords) -> Named:
    for number, line in enumerate(lines, start=1):
        if isinstance(line, bytes) and not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            text = text_of(_parse(line, where), field, where)
        except BadRecord as error:
            bad.add(error)
        else:
            yield f"{name}:{number:08d}", text


def _parse(line: Any, where: str) -> dict[str, Any]:
    try:
        record = json.loads(decode(line, where)) if isinstance(line, bytes) else line
    except BadRecord:
        raise
    except (ValueError, RecursionError) as error:  # no JSON; nested too deep; a number of thousands of digits
        raise BadRecord(f"{where} is not valid JSON ({error}): each line must be one JSON object") from error
    if not isinstance(record, dict):
        raise BadRecord(f"{where} is a JSON {type(record).__name__}: each line must be one JSON object")
    return record


def _json_records(path: Path) -> Iterator[Any]:
    """The lines of a .json file where each is an object, or the items of the array, or the one object, that it is."""
    lines = _lines(path)
    first = list(islice((line for line in lines if line.strip()), 1))
    try:
        is_lines = isinstance(_parse(first[0], ""), dict) if first else True
    except BadRecord:
        is_lines = False
    lines.close()  # type: ignore[attr-defined]
    if is_lines:
        yield from _lines(path)
        return
    try:
        content = json.loads(decode(read_bytes(path), path))
    except BadRecord:
        raise
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): it must be lines of objects, or one array") from error
    yield from content if isinstance(content, list) else [content]


def text_of(record: dict[str, Any], field: str, where: str, columns: Sequence[str] | None = None) -> str:
    """The text of a record; nothing, where it is null.

    Args:
        columns: of the table that the record is a part of, those that hold text; None: it is all there is.
    Raises:
        BadRecord: it has none.
    """
    try:
        found = find_field(record, field)
    except KeyError as error:
        raise BadRecord(f"{where} has no field {field!r}: {_remedy(record, columns)}") from error
    text = "" if found is None else found
    if not isinstance(text, str):
        kind = {"dict": "an object", "list": "a list"}.get(type(text).__name__, type(text).__name__)
        raise BadRecord(f"{where} field {field!r} is {kind}, not text: {_remedy(record, columns)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRecord(
            f"{where} field {field!r} holds half a surrogate pair, which is no text: repair the line"
        ) from error
    return text


def find_field(record: dict[str, Any], field: str) -> Any:
    """The value of a key; of "a.b", where there is no such key, b in a; of "a.0", the first in a.

    Raises:
        KeyError: there is none.
    """
    if field in record:
        return record[field]
    value: Any = record
    for name in field.split("."):
        if isinstance(value, dict):
            value = value[name]
        elif isinstance(value, list) and name.isdecimal() and int(name) < len(value):
            value = value[int(name)]
        else:
            raise KeyError(field)
    return value


def _remedy(record: dict[str, Any], columns: Sequence[str] | None = None) -> str:
    names = list(islice(_text_fields(record), 8)) if columns is None else columns
    if not names:
        return "none of its fields is text: leave it out" if record else "it is empty: leave it out"
    return f"set data.field to {'one of ' if len(names) > 1 else ''}{', '.join(map(repr, names))}"


def _text_fields(value: Any, name: str = "", depth: int = 4) -> Iterator[str]:
    """How to name the fields that hold text."""
    if isinstance(value, str) and name:
        yield name
    elif isinstance(value, dict | list) and depth:
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _text_fields(item, f"{name}.{key}" if name else str(key), depth - 1)


# ---- tables


def _read_csv(path: Path, name: str, field: str, separator: str, bad: BadRecords) -> Named:
    csv.field_size_limit(2**31 - 1)
    try:
        with io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, delimiter=separator, strict=True)
            columns = next(rows, [])
            if field not in columns:
                raise ValueError(f"{path} has no column {field!r}: {_remedy({}, columns)}")
            place = columns.index(field)
            for row in rows:
                if not row:
                    continue
                where = f"{path}:{rows.line_num}"
                if len(row) == len(columns):
                    yield f"{name}:{rows.line_num:08d}", row[place]
                else:
                    bad.add(BadRecord(f"{where} has {len(row)} columns, not {len(columns)}: repair the row"))
    except csv.Error as error:
        raise ValueError(
            f"{path}:{rows.line_num} is no row of a table ({error}): repair it or leave the file out"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (after line {rows.line_num}): convert it or leave it out") from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(_unreadable(path, error)) from error


def _read_parquet(path: Path, name: str, field: str, bad: BadRecords) -> Named:
    import pyarrow
    import pyarrow.parquet

    # Parquet is read from its end: what was packed once more is unpacked whole.
    content = pyarrow.BufferReader(read_bytes(path)) if is_packed(path) else path
    try:
        file = pyarrow.parquet.ParquetFile(content)
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path} is no parquet file, or cut short: fetch it again or leave it out") from error
    with file:
        columns, texts = file.schema_arrow.names, text_columns(file.schema_arrow)
        column = field if field in columns else field.split(".")[0]
        if column not in columns:
            raise ValueError(f"{path} has no column {field!r}: {_remedy({}, texts)}")
        number = 0
        try:
            for batch in file.iter_batches(batch_size=256, columns=[column]):
                for value in batch.column(0):
                    where = f"{path}:{number}"
                    try:
                        text = text_of({column: value.as_py()}, field, where, texts)
                    except UnicodeDecodeError as error:
                        bad.add(BadRecord(f"{where} is not UTF-8 (byte {error.start}): repair the row"))
                    except BadRecord as error:
                        bad.add(error)
                    else:
                        yield f"{name}:{number:08d}", text
                    number += 1
        except (OSError, pyarrow.ArrowException) as error:
            raise ValueError(f"{path} is damaged at row {number}: fetch it again or leave it out") from error


def text_columns(schema: Any) -> list[str]:
    """The columns of an Arrow schema that hold text."""
    return [column.name for column in schema if str(column.type) in ("string", "large_string", "string_view")]
