"""Files of text: which a path stands for. `data.readers` says what they hold, `data.hashes` whether they change."""

from __future__ import annotations

import glob
import itertools
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

PROSE = (".txt", ".md", ".rst", ".tex")
CODE = (
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".java", ".js", ".ts", ".tsx", ".go", ".rs"),
    *(".rb", ".sh", ".lua", ".scala", ".kt", ".swift", ".hs", ".jl", ".r", ".sql", ".html", ".css"),
)
RECORDS = (".jsonl", ".ndjson", ".parquet")
TEXT = (*PROSE, *CODE, *RECORDS)  # and .json where it is packed: the others' are seldom text
PACKED = (".gz", ".bz2", ".xz", ".zst")
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
        hidden = self.left_out["hidden folders"]
        others = self.left_out - Counter({"hidden folders": hidden})
        if not others:
            return f"left out {hidden:,} hidden folders" if hidden else None
        ranked = others.most_common()
        shown = [*ranked[:6], *([("others", sum(count for _, count in ranked[6:]))] if ranked[6:] else [])]
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in shown)
        folders = f", and {hidden:,} hidden folders" if hidden else ""
        return f"left out {others.total():,} of {others.total() + len(self.files):,} files: {reasons}{folders}"


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
        told = f" ({line})" if (line := found.told()) else ""
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
