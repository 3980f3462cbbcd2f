"""Where text comes from: each source is a list of parts that yield documents, and a fingerprint of all of them."""

from __future__ import annotations

import random
import string
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data import disk
from data.config import DataConfig, HubData, StdlibData, SyntheticData, TextData
from data.files import find_files, hash_tree, read_bytes, read_file, relative_name, walk

# Tests are not on every machine, site-packages are the user's, and encodings are tables of numbers.
STDLIB_SKIPPED = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    | {"idlelib", "lib2to3", "encodings", "ensurepip", "turtledemo"}
)


@dataclass(frozen=True)
class Document:
    """One text. `name` says where it comes from; the split hangs on `key`, or on the text itself."""

    name: str
    text: str
    key: str | None = None


@dataclass(frozen=True)
class Source:
    """Text that has not been read yet.

    where: how a message names it.
    fingerprint: changes with any byte of any document, and with their order; not with where they lie.
    parts: functions that read some of the documents each, one document at a time; reading can resume at any part.
    size: bytes to read, where that is known.
    """

    where: str
    fingerprint: str
    parts: Sequence[Callable[[], Iterator[Document]]]
    size: int | None = None

    def documents(self, part: int = 0) -> Iterator[tuple[int, Document]]:
        """(part, document) from a part on; texts of white space alone are left out.

        Raises:
            ValueError: something cannot be read; the message names the file (and line).
        """
        for number in range(part, len(self.parts)):
            for document in self.parts[number]():
                if document.text and not document.text.isspace():
                    yield number, document


def open_source(config: DataConfig) -> Source:
    """The source that a configuration names.

    Raises:
        ValueError: it is missing or unreachable; one line says what to do.
    """
    return OPENERS[config.name](config)


def _open_stdlib(config: StdlibData) -> Source:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = walk(root, skip=lambda name: name in STDLIB_SKIPPED) if root.is_dir() else ()
    files = [path for path in found if path.suffix == ".py"]
    if not files:
        raise ValueError(
            f"data=stdlib: no Python sources in {root} (a zipped or stripped Python): use data=text data.path=..."
        )

    def read(path: Path) -> Iterator[Document]:
        try:
            name = relative_name(path, root)
            yield Document(name, read_bytes(path).decode(), key=name)  # held out under every version of Python alike
        except UnicodeDecodeError:
            return  # a few sources declare another encoding, on purpose

    return _of_files(root, files, read, config)


def _open_text(config: TextData) -> Source:
    root, files = find_files(config.path)

    def read(path: Path) -> Iterator[Document]:
        return (Document(name, text) for name, text in read_file(path, relative_name(path, root), config.field))

    return _of_files(root, files, read, config)


def _of_files(
    root: Path, files: list[Path], read: Callable[[Path], Iterator[Document]], config: StdlibData | TextData
) -> Source:
    files.sort(key=lambda path: relative_name(path, root))
    digest, size = hash_tree(root, files, config.cache_dir)
    fingerprint = disk.sha256(f"{digest} {getattr(config, 'field', '')}")
    where = f"data.path={config.path}" if isinstance(config, TextData) else f"data={config.name}"
    return Source(where, fingerprint, [partial(read, path) for path in files], size)


def _open_hub(config: HubData) -> Source:
    from data.hub import open_hub  # `datasets` takes a second to import

    fingerprint, parts = open_hub(config)
    parts_of = [partial(_as_documents, part) for part in parts]
    return Source(f"data.path={config.path}", fingerprint, parts_of, config.max_bytes)


def _as_documents(read: Callable[[], Iterator[tuple[str, str]]]) -> Iterator[Document]:
    return (Document(name, text) for name, text in read())


def _open_synthetic(config: SyntheticData) -> Source:
    settings = (config.task, config.documents, config.length, config.seed)
    write = {"copy": write_copy, "needle": write_needle}[config.task]

    def read() -> Iterator[Document]:
        for number in range(config.documents):
            # A string seeds by its hash, the same in every Python.
            yield Document(
                f"{config.task}:{number:08d}", write(random.Random(f"{config.seed}:{number}"), config.length)
            )

    fingerprint = disk.sha256(repr(settings))
    return Source("data=synthetic", fingerprint, [read], config.documents * config.length)


def write_copy(rng: random.Random, length: int) -> str:
    """Random letters, a line end, and the same letters again: the second half can be predicted, by who looks back."""
    half = "".join(rng.choices(string.ascii_lowercase, k=(length - 2) // 2))
    return f"{half}\n{half}\n"


def write_needle(rng: random.Random, length: int) -> str:
    """Facts at random places in filler, and then a question about each (after the needle-in-a-haystack test of
    Kamradt 2023): only who looks back that far can know the answers."""
    count = max(1, length // 2048)
    keys = rng.sample(range(10_000), count)
    facts = {f"{key:04d}": f"{rng.randrange(1_000_000):06d}" for key in keys}
    questions = "".join(f"What is the code of {key}? The code of {key} is {code}.\n" for key, code in facts.items())
    lines = [f"The code of {key} is {code}.\n" for key, code in facts.items()]
    room = length - len(questions) - sum(map(len, lines))
    while room > 0:
        words = ("".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9))) for _ in range(10))
        line = " ".join(words)[: max(room - 1, 0)] + "\n"
        lines.append(line)
        room -= len(line)
    rng.shuffle(lines)
    return "".join(lines) + questions


OPENERS: dict[str, Callable[[Any], Source]] = {
    "stdlib": _open_stdlib,
    "text": _open_text,
    "hf": _open_hub,
    "synthetic": _open_synthetic,
}
