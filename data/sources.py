"""Where text comes from: each source is a function from its config to documents, plus the train/validation split."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.config import DataConfig, StdlibData, TextData

TEXT_SUFFIXES = (".txt", ".py", ".md", ".jsonl")

# Tests are not on every machine, site-packages are the user's, and encodings are tables of numbers.
STDLIB_SKIPPED = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    | {"idlelib", "lib2to3", "encodings", "ensurepip", "turtledemo"}
)


@dataclass(frozen=True)
class Document:
    """One text. `name` is its path relative to the source, the same on every machine; the split hangs on it."""

    name: str
    text: str


def read_documents(config: DataConfig) -> list[Document]:
    """The documents of a source, sorted by name; those of white space alone are left out.

    Raises:
        ValueError: the source is missing, unreadable or holds no text; the message names the file (and line).
    """
    documents = [document for document in READERS[config.name](config) if not document.text.isspace() and document.text]
    if not documents:
        raise ValueError(f"no text in {getattr(config, 'path', config.name)}: every document is empty")
    return sorted(documents, key=lambda document: document.name)


def train_val_split(
    documents: list[Document], val_fraction: float
) -> tuple[list[Document], list[Document], str | None]:
    """Split into (train, val, note): each document goes to one side by a hash of its name, so that adding documents
    moves no other.

    With so few documents that a side would be empty, the last `val_fraction` of each document is held out instead,
    from the end of a line if one is near; the note says so and is None otherwise.

    Raises:
        ValueError: the text is too short to be split at all.
    """
    # Copies of a text follow the first of them: no held-out text is ever trained on under another name.
    first_name: dict[str, str] = {}
    train: list[Document] = []
    val: list[Document] = []
    for document in documents:
        held_out = _hash_fraction(first_name.setdefault(document.text, document.name)) < val_fraction
        (val if held_out else train).append(document)
    if train and val:
        return train, val, None

    halves = [_cut_tail(document, val_fraction) for document in documents]
    train = [head for head, _ in halves if head.text.strip()]
    val = [tail for _, tail in halves if tail.text.strip()]
    if not train or not val:
        raise ValueError(f"too little text to hold out data.val_fraction={val_fraction}: add text to data.path")
    note = f"too few documents to hold out whole ones: validation is the last {val_fraction:.1%} of each"
    return train, val, note


def _hash_fraction(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def _cut_tail(document: Document, fraction: float) -> tuple[Document, Document]:
    text, tail = document.text, round(len(document.text) * fraction)
    target = len(text) - tail
    # At most twice the fraction goes to validation; a longer line than that is cut within.
    cut = text.rfind("\n", max(0, target - tail), target) + 1 or target
    return Document(document.name, text[:cut]), Document(document.name, text[cut:])


# ---------------------------------------------------------------------------------------------------- sources


def _read_stdlib(config: StdlibData) -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in _walk(root, skip=lambda name: name in STDLIB_SKIPPED) if path.suffix == ".py"]
    if not files:
        raise ValueError(
            f"data=stdlib: no Python sources in {root} (a zipped or stripped Python): use data=text data.path=..."
        )
    for path in files:
        try:
            yield Document(_name(path, root), _read_bytes(path).decode())
        except UnicodeDecodeError:
            continue  # a few sources declare another encoding, on purpose


def _read_text(config: TextData) -> Iterator[Document]:
    root, files = _find_files(config.path)
    for path in files:
        text, name = _decode(path), _name(path, root)
        if path.suffix == ".jsonl":
            yield from _read_jsonl(path, name, text, config.field)
        else:
            yield Document(name, text)


READERS: dict[str, Callable[[Any], Iterator[Document]]] = {"stdlib": _read_stdlib, "text": _read_text}


def _find_files(path: str) -> tuple[Path, list[Path]]:
    """The folder that names are relative to, and the text files that a file, folder or glob stands for."""
    given = Path(path).expanduser()
    if given.is_file():
        return given.parent, [given]
    if given.is_dir():
        root, found = given, list(_walk(given, skip=lambda name: name.startswith(".")))
    elif glob.has_magic(path):
        fixed = next(i for i, part in enumerate(given.parts) if glob.has_magic(part))
        root, found = Path(*given.parts[:fixed]), [Path(match) for match in glob.glob(str(given), recursive=True)]
    else:
        raise ValueError(f"data.path={path} does not exist: name a file, a folder or a glob")
    files = [file for file in found if file.suffix in TEXT_SUFFIXES and file.is_file()]
    if not files:
        raise ValueError(f"data.path={path} matches no text files: looked for {' '.join(TEXT_SUFFIXES)}")
    return root, files


def _walk(root: Path, skip: Callable[[str], bool]) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if not skip(name)]
        yield from (Path(folder, name) for name in files)


def _name(path: Path, root: Path) -> str:
    # A file name need not be valid UTF-8, but what is hashed and written to JSON must be.
    return os.fsencode(path.relative_to(root).as_posix()).decode("utf-8", "backslashreplace")


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error


def _decode(path: Path) -> str:
    content = _read_bytes(path)
    if (nul := content.find(b"\0")) >= 0:
        raise ValueError(f"{path} is binary or UTF-16 (NUL at byte {nul}): convert it to UTF-8 text or leave it out")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}): convert it to UTF-8 or leave it out") from error


def _read_jsonl(path: Path, name: str, content: str, field: str) -> Iterator[Document]:
    # Not splitlines(): JSON strings may hold U+2028 and other characters that it takes for line ends.
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{where} is not valid JSON ({error}): each line must be one JSON object") from error
        if not isinstance(record, dict):
            raise ValueError(f"{where} is a JSON {type(record).__name__}: each line must be one JSON object")
        if field not in record:
            raise ValueError(f"{where} has no field {field!r}: set data.field to one of {', '.join(map(repr, record))}")
        text = record[field]
        if not isinstance(text, str):
            kind = type(text).__name__
            raise ValueError(
                f"{where} field {field!r} is {kind}, not text: set data.field to one of {', '.join(map(repr, record))}"
            )
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"{where} field {field!r} holds half a surrogate pair, which is no text: repair the line")
        yield Document(f"{name}:{number:08d}", text)
