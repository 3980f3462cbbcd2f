"""Files of text: which ones a path stands for, and whether they have changed. `data.readers` says what they hold."""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import os
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from data import disk
from data.progress import bar

PROSE = (".txt", ".md", ".rst", ".tex")
CODE = (
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".java", ".js", ".ts", ".tsx", ".go", ".rs"),
    *(".rb", ".sh", ".lua", ".scala", ".kt", ".swift", ".hs", ".jl", ".r", ".sql", ".html", ".css"),
)
RECORDS = (".jsonl", ".ndjson", ".parquet")
TEXT = (*PROSE, *CODE, *RECORDS)  # and .json where it is packed: the others' are seldom text
PACKED = (".gz", ".bz2", ".xz", ".zst")
REMEMBERED_BYTES = 2**26  # the hashes of larger files are kept: to hash takes a second for each GB
RUN_FOLDER = ("run.lock", "config.yaml")  # what the folder of a run has
SWEEP = "multirun.yaml"  # what that of a sweep has

Paths = str | Sequence[str]


# ---- which files


def expand(path: str) -> Path:
    """A path that may begin with "~" and have $VARIABLES; what is unknown stays as it is, and is then not found."""
    return Path(os.path.expandvars(os.path.expanduser(path)))


def listed(paths: Paths) -> list[str]:
    """One path, or several."""
    return [paths] if isinstance(paths, str) else list(paths)


def find_root(path: str, key: str = "data.path") -> Path:
    """The file or pipe that a path names, or the folder that it names files in.

    Raises:
        ValueError: there is none, or it is a device.
    """
    given = expand(path)
    try:
        if given.exists():
            mode = given.stat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISFIFO(mode)):
                raise ValueError(
                    f"{key}={path} is a device or a terminal: name a file, or pipe text into {key}=/dev/stdin"
                )
            return given
        matches = "\0" not in path and any(glob.iglob(str(given), recursive=True))
    except OSError as error:
        raise ValueError(f"{key}={path} cannot be read: {error.strerror}") from error
    if not matches:
        raise ValueError(f"{key}={path} does not exist: name a file, a folder or a glob")
    return Path(*itertools.takewhile(lambda part: not glob.has_magic(part), given.parts))


@dataclass
class Found:
    """The files that paths stand for: by name, which does not depend on where they lie, and in the order of names.

    left_out: how many were not taken, by reason.
    """

    files: dict[str, Path] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)

    def told(self) -> str | None:
        """What was left out, in one line; None where nothing was."""
        if not self.left_out:
            return None
        ranked = self.left_out.most_common()
        shown = [*ranked[:6], *([("others", sum(count for _, count in ranked[6:]))] if ranked[6:] else [])]
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in shown)
        return f"{len(self.files):,} files are read, {self.left_out.total():,} left out: {reasons}"


def find_files(
    paths: Paths,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    key: str = "data.path",
    kinds: Sequence[str] = TEXT,
) -> Found:
    """The files that files, folders and globs stand for.

    A file that is named itself is taken whatever it is called. Of a folder or a glob, hidden files, what is no regular
    file, other kinds of files than `kinds` (but not one that the glob ends in), and outputs of runs are left out. Links
    are followed; a file that links lead to once more, under a later name, is not taken twice.

    Args:
        include: patterns; only files that match one are taken, and those whatever their suffix.
        exclude: patterns; files that match one are not taken. Both are compared with the name below the folder, and
            with its last part.
    Raises:
        ValueError: there are none, or a folder cannot be read.
    """
    found, taken = Found(), {}
    several = len(listed(paths)) > 1
    for number, path in enumerate(listed(paths)):
        given, root = expand(path), find_root(path, key)
        if not root.is_dir():
            files, root = [root], root.parent
        else:
            kind = kind_of(given) if root != given else ""
            select = _Selection(root, {*kinds, kind} - {""}, include, exclude, found.left_out)
            files = [file for file in (select.walk() if root == given else select.matches(given)) if select.takes(file)]
        for file in files:
            taken[f"{number}/{relative_name(file, root)}" if several else relative_name(file, root)] = file
    names = {os.path.realpath(taken[name]): name for name in sorted(taken, reverse=True)}
    found.files = {name: taken[name] for name in sorted(names.values())}
    if not found.files:
        shown = paths if isinstance(paths, str) else f"[{','.join(paths)}]"
        told = f" ({found.told()})" if found.left_out else ""
        wanted = f"files{told}: looked for {' '.join(kinds)}"
        if kinds is TEXT:
            wanted = (
                f"text files{told}: looked for {' '.join((*PROSE, *RECORDS))}, source code, and these compressed "
                f"({' '.join(PACKED)}); data.include=PATTERN takes others"
            )
        raise ValueError(f"{key}={shown} matches no {wanted}")
    return found


@dataclass
class _Selection:
    """Which files of a folder are taken. What is not is counted in `left_out`."""

    root: Path
    kinds: set[str]
    include: Sequence[str]
    exclude: Sequence[str]
    left_out: Counter[str]

    def walk(self) -> Iterator[Path]:
        for folder, subfolders, names in walk(self.root):
            if SWEEP in names or all(name in names for name in RUN_FOLDER):
                subfolders.clear()
                self.left_out["in folders of runs"] += len(names)
                continue
            if hidden := [name for name in subfolders if name.startswith(".")]:
                self.left_out["hidden folders"] += len(hidden)
                subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            for name in names:
                if name.startswith("."):
                    self.left_out["hidden"] += 1
                else:
                    yield folder / name

    def matches(self, pattern: Path) -> Iterator[Path]:
        @cache
        def is_output(folder: Path) -> bool:
            return (folder / SWEEP).exists() or all((folder / name).exists() for name in RUN_FOLDER)

        for match in map(Path, glob.glob(str(pattern), recursive=True)):
            if os.path.isdir(match):
                continue
            above = itertools.takewhile(lambda folder: folder != self.root.parent, match.parents)
            if any(is_output(folder) for folder in above):
                self.left_out["in folders of runs"] += 1
            else:
                yield match

    def takes(self, path: Path) -> bool:
        if reason := self.reason_against(path):
            self.left_out[reason] += 1
        return reason is None

    def reason_against(self, path: Path) -> str | None:
        with suppress(OSError):  # a link to nowhere is named when it is read
            if not stat.S_ISREG(path.stat().st_mode):
                return "pipes or devices"
        name = relative_name(path, self.root)
        if any(fnmatch(text, pattern) for pattern in self.exclude for text in (name, path.name)):
            return "excluded"
        if self.include:
            included = any(fnmatch(text, pattern) for pattern in self.include for text in (name, path.name))
            return None if included else "not included"
        kind = kind_of(path)
        if kind in self.kinds or (kind == ".json" and is_packed(path) and ".jsonl" in self.kinds):
            return None
        return kind or "without a suffix"


def kind_of(path: Path) -> str:
    """The suffix that says what a file holds: that of notes.jsonl.gz is .jsonl."""
    return (Path(path.stem).suffix if is_packed(path) else path.suffix).lower()


def is_packed(path: Path) -> bool:
    return path.suffix.lower() in PACKED


def walk(root: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """`os.walk` through links, each folder once, in the order of names.

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
        subfolders.sort()
        yield Path(folder), subfolders, sorted(files)


def files_below(root: Path, skip: Callable[[str], bool]) -> Iterator[Path]:
    """The files below a folder, but for folders that are skipped by their name.

    Raises:
        ValueError: a folder cannot be read.
    """
    for folder, subfolders, files in walk(root):
        subfolders[:] = [name for name in subfolders if not skip(name)]
        yield from (folder / name for name in files)


def relative_name(path: Path, root: Path) -> str:
    # A file name need not be valid UTF-8, but what is hashed and written to JSON must be.
    return os.fsencode(path.relative_to(root).as_posix()).decode("utf-8", "backslashreplace")


# ---- whether they have changed


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
        memory = json.loads(memory_file.read_text(encoding="utf-8"))
        memory = memory if isinstance(memory, dict) else {}
    except (OSError, ValueError):
        memory = {}
    hashes, stamps, learned = [], {}, False
    with bar("           hashing", None) as advance:
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
            disk.write_whole(memory_file, json.dumps(memory))
    return hashes, stamps


def _hash_still(path: Path, stamp: Stamp) -> tuple[str, Stamp]:
    """The hash of a file that was the same before and after."""
    for _ in range(3):
        digest, before, stamp = disk.sha256_file(path), stamp, Stamp.of(path)
        if before == stamp:
            return digest, stamp
    raise ValueError(f"{path} is being written: start again when it is complete")
