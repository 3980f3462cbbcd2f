"""Where text comes from: each source is a list of parts that yield documents, and a fingerprint of all of them."""

from __future__ import annotations

import random
import shutil
import stat
import string
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from data import disk
from data.config import DataConfig, HubData, StdlibData, SyntheticData, TextData
from data.files import Found, Paths, expand, files_below, find_files, find_root, listed, relative_name
from data.hashes import Hashed, hash_tree
from data.readers import BadRecords, read_bytes, read_file
from data.recall import write_recall

# Tests are not on every machine, site-packages are the user's, and encodings are tables of numbers.
STDLIB_SKIPPED = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    | {"idlelib", "lib2to3", "encodings", "ensurepip", "turtledemo"}
)


@dataclass(frozen=True)
class Document:
    """One text. `name` says where it comes from; the split hangs on `key`, or on the text itself, unless the source
    says on which `side` the document is: "train" or "val"."""

    name: str
    text: str
    key: str | None = None
    side: str | None = None


@dataclass(frozen=True)
class Source:
    """Text that has not been read yet.

    where: how a message names it.
    fingerprint: changes with any byte of any document, and with their order; not with where they lie.
    parts: functions that read some of the documents each, one document at a time; reading can resume at any part.
    size: bytes to read, where that is known.
    held_out: the text to validate on, where that is a source of its own.
    streamed: reading takes a network, so that nothing is read only to be counted.
    bad: bad records that reading came upon and left out.
    check: raises ValueError where a file is no longer what the fingerprint is of.
    keep: what must live as long as the source.
    """

    where: str
    fingerprint: str
    parts: Sequence[Callable[[], Iterator[Document]]]
    size: int | None = None
    held_out: Source | None = None
    streamed: bool = False
    bad: BadRecords = field(default_factory=BadRecords)
    check: Callable[[], None] = lambda: None
    keep: Any = None

    def documents(self, part: int = 0) -> Iterator[tuple[int, Document]]:
        """(part, document) from a part on; texts of white space alone are left out. What is held out comes last.

        Raises:
            ValueError: something cannot be read; the message names the file (and line).
        """
        for number in range(part, len(self.parts)):
            for document in self.parts[number]():
                if document.text and not document.text.isspace():
                    yield number, document if self.held_out is None else replace(document, side="train")
        if self.held_out is not None:
            for number, document in self.held_out.documents(max(0, part - len(self.parts))):
                yield len(self.parts) + number, replace(document, side="val")

    def validated_on(self, held_out: Source) -> Source:
        """The source with another one to validate on."""

        def check() -> None:
            self.check()
            held_out.check()

        return replace(
            self,
            fingerprint=disk.sha256(f"{self.fingerprint} validated on {held_out.fingerprint}"),
            size=None if self.size is None or held_out.size is None else self.size + held_out.size,
            held_out=held_out,
            check=check,
        )


Notify = Callable[[str], None]


def open_source(config: DataConfig, notify: Notify = lambda line: None) -> Source:
    """The source that a configuration names. `notify` receives a line for what is left out of it.

    Raises:
        ValueError: it is missing or unreachable; one line says what to do.
    """
    return OPENERS[config.name](config, notify)


def _open_stdlib(config: StdlibData, notify: Notify) -> Source:
    root = Path(sysconfig.get_paths()["stdlib"])
    below = files_below(root, skip=lambda name: name in STDLIB_SKIPPED) if root.is_dir() else ()
    files = {relative_name(path, root): path for path in below if path.suffix == ".py"}
    if not files:
        raise ValueError(
            f"data=stdlib: no Python sources in {root} (a zipped or stripped Python): use data=text data.path=..."
        )

    def read(name: str, path: Path) -> Iterator[Document]:
        try:
            yield Document(name, read_bytes(path).decode(), key=name)  # held out under every version of Python alike
        except UnicodeDecodeError:
            return  # a few sources declare another encoding, on purpose

    files = dict(sorted(files.items()))
    hashed = hash_tree(files, expand(config.cache_dir))
    return _of_files("data=stdlib", files, hashed, read)


def _open_text(config: TextData, notify: Notify) -> Source:
    cache = expand(config.cache_dir)
    bad = BadRecords(config.bad_records == "skip", config.max_bad_records)
    delimiter = config.delimiter and config.delimiter.replace("\\n", "\n").replace("\\t", "\t")
    include, exclude = listed(config.include or []), listed(config.exclude or [])

    def look(paths: Paths, key: str) -> tuple[Found, Any]:
        spool, paths = _spooled(paths, key, cache, notify)
        return find_files(paths, include, exclude, key), spool

    def read(name: str, path: Path) -> Iterator[Document]:
        documents = read_file(path, name, config.field, delimiter, bad)
        return (Document(name, text) for name, text in documents)

    def open_files(found: Found, key: str, spool: Any) -> Source:
        if line := found.told():
            notify(f"data       {key}: {line}")
        hashed = hash_tree(found.files, cache)
        shown = ",".join(listed(getattr(config, key.removeprefix("data."))))
        return replace(_of_files(f"{key}={shown}", found.files, hashed, read, settings), keep=spool, bad=bad)

    # Settings that were added later count only where they are set: what was prepared before keeps its fingerprint.
    added = {"delimiter": delimiter, "bad_records": None if config.bad_records == "stop" else config.bad_records}
    settings = f" {config.field}" + "".join(f" {name}={value!r}" for name, value in added.items() if value is not None)
    found, spool = look(config.path, "data.path")
    if config.val_path is None:
        return open_files(found, "data.path", spool)
    val_found, val_spool = look(config.val_path, "data.val_path")
    held_out = {path.resolve() for path in val_found.files.values()}
    found.files = {name: path for name, path in found.files.items() if path.resolve() not in held_out}
    if not found.files:
        raise ValueError("data.val_path holds out all of data.path: name other files, or leave out data.val_path")
    val = open_files(val_found, "data.val_path", val_spool)
    return open_files(found, "data.path", spool).validated_on(val)


def _spooled(paths: Paths, key: str, cache: Path, notify: Notify) -> tuple[TemporaryDirectory[str] | None, Paths]:
    """The paths, with files in the place of pipes: these can be read only once, and a text is read several times. The
    files are gone with the folder that is returned."""
    folder = None
    several = []
    for number, path in enumerate(listed(paths)):
        root = find_root(path, key)
        if stat.S_ISFIFO(root.stat().st_mode):
            folder = folder or TemporaryDirectory(prefix="pipe-", dir=cache)
            copy = Path(folder.name, f"{number}")
            notify(f"data       reading {path} to its end")
            with root.open("rb") as pipe, copy.open("wb") as file:
                shutil.copyfileobj(pipe, file, 2**20)
            path = str(copy)
        several.append(path)
    return folder, several[0] if isinstance(paths, str) else several


def _of_files(
    where: str,
    files: dict[str, Path],
    hashed: Hashed,
    read: Callable[[str, Path], Iterator[Document]],
    settings: str = " ",
) -> Source:
    def read_unchanged(name: str, path: Path) -> Iterator[Document]:
        hashed.check([path])
        yield from read(name, path)
        hashed.check([path])

    parts = [partial(read_unchanged, name, path) for name, path in files.items()]
    return Source(where, disk.sha256(f"{hashed.sha256}{settings}"), parts, hashed.size, check=hashed.check)


def _open_hub(config: HubData, notify: Notify) -> Source:
    from data.hub import open_hub  # `datasets` takes a second to import

    if config.val_split is not None:
        held_out = _open_hub(replace(config, split=config.val_split, val_split=None), notify)
        return _open_hub(replace(config, val_split=None), notify).validated_on(held_out)
    opened = open_hub(config)
    parts_of = [partial(_as_documents, part) for part in opened.parts]
    where = f"data.path={config.path}"
    return Source(where, opened.fingerprint, parts_of, config.max_bytes, streamed=config.streaming, check=opened.check)


def _as_documents(read: Callable[[], Iterator[tuple[str, str]]]) -> Iterator[Document]:
    return (Document(name, text) for name, text in read())


def _open_synthetic(config: SyntheticData, notify: Notify) -> Source:
    settings = (config.task, config.documents, config.length, config.seed)
    held_out = max(1, round(config.documents * config.val_fraction))

    def read() -> Iterator[Document]:
        for number in range(config.documents):
            name = f"{config.task}:{number:08d}"
            rng = random.Random(f"{config.seed}:{number}")  # a string seeds by its hash, the same in every Python
            if config.is_recall:
                side = "val" if number < held_out else "train"  # not by a hash: what fills a row stays together
                progress = 1.0 if side == "val" else (number - held_out) / (config.documents - held_out)
                texts = write_recall(rng, config.length, config.pairs, number, progress)
                yield from (Document(name, text, side=side) for text in texts)
            else:
                yield Document(name, {"copy": write_copy, "needle": write_needle}[config.task](rng, config.length))

    fingerprint = disk.sha256(repr((*settings, config.pairs) if config.is_recall else settings))
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


OPENERS: dict[str, Callable[[Any, Notify], Source]] = {
    "stdlib": _open_stdlib,
    "text": _open_text,
    "hf": _open_hub,
    "synthetic": _open_synthetic,
}
