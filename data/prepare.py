"""Text becomes token files: in bounded memory, in parallel, complete or not at all, and going on where a kill left off.

A folder under preparation is called `<name>.part`. Its token files only grow, and after every few megabytes
`progress.json` says how much of them is good and what to read next; whoever comes next cuts them there and goes on.
The folder gets its name when all is written and `manifest.json` says so.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from data import disk
from data.sources import Source
from data.split import Split, choose_split, cuts_tails
from data.tokenizer import Tokenizer

T = TypeVar("T")

SPLITS = ("train", "val")
FILES = (*(name for split in SPLITS for name in (f"{split}.bin", f"{split}_starts.bin")), "tokenizer.json")
LONG_DOCUMENT_TOKENS = 16_384
BATCH_CHARS = 2**23  # text that is tokenized at once; about 200 MB while it is
SAVE_CHARS = 2**25  # text between two savings of progress: some seconds of work


@dataclass
class Counts:
    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    long_documents: int = 0


@dataclass
class Progressed:
    """How far preparation has come: read on after `documents` documents of part `part`."""

    part: int = 0
    documents: int = 0
    train: Counts = field(default_factory=Counts)
    val: Counts = field(default_factory=Counts)

    def counts(self, split: str) -> Counts:
        counts: Counts = getattr(self, split)
        return counts

    @classmethod
    def load(cls, file: Path) -> Progressed:
        """What `save` wrote last; a beginning where there is nothing good."""
        try:
            saved = json.loads(file.read_text(encoding="utf-8"))
            return cls(saved["part"], saved["documents"], *(Counts(**saved[split]) for split in SPLITS))
        except (OSError, ValueError, TypeError, KeyError):
            return cls()

    def save(self, file: Path) -> None:
        disk.write_whole(file, json.dumps(asdict(self)))


def prepare(
    folder: Path,
    source: Source,
    tokenizer: Tokenizer,
    val_fraction: float,
    facts: dict[str, Any],
    notify: Callable[[str], None],
) -> None:
    """Make the folder, unless it is there: train.bin and val.bin, with the tokens; train_starts.bin and val_starts.bin,
    int64, where each document begins; tokenizer.json; manifest.json, with `facts`.

    Raises:
        ValueError: the source cannot be read, or has too little text. Nothing is left behind then.
        OSError: the folder cannot be written. Likewise.
    """
    if read_manifest(folder) is not None:
        return
    with disk.alone(folder, lambda: notify(f"data       another process prepares {folder}; waiting for it")):
        if read_manifest(folder) is not None:
            return  # another process was first
        part = folder.with_name(f"{folder.name}.part")
        try:
            part.mkdir(parents=True, exist_ok=True)
            _fill(part, source, tokenizer, val_fraction, facts, notify)
            if folder.exists():  # damaged, or it would have a manifest
                shutil.rmtree(folder)
            disk.sync(part)
            part.rename(folder)
            disk.sync(folder.parent)
        except (ValueError, OSError):
            shutil.rmtree(part, ignore_errors=True)
            raise


def _fill(
    folder: Path,
    source: Source,
    tokenizer: Tokenizer,
    val_fraction: float,
    facts: dict[str, Any],
    notify: Callable[[str], None],
) -> None:
    began = time.perf_counter()
    progress_file = folder / "progress.json"
    done = Progressed.load(progress_file)
    resumed = done.train.bytes + done.val.bytes
    verb = f"going on after {resumed / 1e6:.0f} MB, in" if resumed else "tokenizing, once, into"
    notify(f"data       {facts['source']}: {verb} {folder.with_suffix('')}")
    split = choose_split(source, val_fraction)
    writers = {side: StreamWriter(folder, side, tokenizer, done.counts(side)) for side in SPLITS}

    def flush() -> None:
        for writer in writers.values():
            writer.flush()
        done.save(progress_file)

    unsaved = 0
    try:
        with _bar(source.size) as advance:
            advance(resumed)
            for part, documents, batch in ahead(batches(source, split, BATCH_CHARS, done)):
                for side, writer in writers.items():
                    writer.write([text for to, text in batch if to == side])
                done.part, done.documents = part, documents
                characters = sum(len(text) for _, text in batch)
                advance(characters)
                unsaved += characters
                if unsaved >= SAVE_CHARS:
                    flush()
                    unsaved = 0
        flush()
    finally:
        for writer in writers.values():
            writer.close()
    for side in SPLITS:
        if not done.counts(side).tokens:
            raise ValueError(
                f"too little text in {source.where} to hold out data.val_fraction={val_fraction}: add some"
            )

    tokenizer.save(folder / "tokenizer.json")
    files = sorted(folder / name for name in FILES)
    for path in set(folder.iterdir()) - set(files):  # progress.json, and what a kill left of it
        path.unlink()
    totals = {name: asdict(done.train)[name] + asdict(done.val)[name] for name in asdict(done.train)}
    tails = f"too few documents to hold out whole ones: validation is the last {val_fraction:.1%} of each"
    manifest = {
        **facts,
        **totals,
        "long_document_tokens": LONG_DOCUMENT_TOKENS,
        "train": asdict(done.train),
        "val": asdict(done.val),
        "note": tails if cuts_tails(split) else None,
        "dtype": str(tokenizer.dtype),
        "files": {path.name: path.stat().st_size for path in files},
        "sha256": {path.name: disk.sha256_file(path) for path in files},
    }
    disk.write_synced(folder / "manifest.json", json.dumps(manifest, indent=2) + "\n")
    seconds, new = time.perf_counter() - began, totals["bytes"] - resumed
    if seconds > 5:
        notify(f"           {new / 1e6:,.0f} MB in {seconds:,.0f} s, {new / 1e6 / seconds:.1f} MB/s")


def batches(
    source: Source, split: Split, characters: int, done: Progressed
) -> Iterator[tuple[int, int, list[tuple[str, str]]]]:
    """(part, documents of it so far, (side, text) of documents with so many characters), from where `done` says."""
    batch: list[tuple[str, str]] = []
    size, at, number = 0, done.part, 0
    skip = done.documents
    for part, document in source.documents(done.part):
        if part != at:
            at, number, skip = part, 0, 0
        number += 1
        if number <= skip:
            continue
        batch.extend(split(document))
        size += len(document.text)
        if size >= characters:
            yield at, number, batch
            batch, size = [], 0
    if batch:
        yield at, number, batch


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The items, each made in a thread while the one before is used: reading then costs tokenizing no time."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item


def tokenize(texts: list[str], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Documents as token ids end to end, each behind a separator: (tokens,) of the tokenizer's type; and their lengths:
    (documents,) int64."""
    encoded = tokenizer.encode_batch(texts)
    separator = np.array([tokenizer.separator_id], tokenizer.dtype)
    ids = np.concatenate([part for one in encoded for part in (separator, one)])
    return ids, np.array([1 + len(tokens) for tokens in encoded], np.int64)


class StreamWriter:
    """Appends documents to the token files of a split, from `counts` on, and keeps the counts."""

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer, counts: Counts) -> None:
        self.tokenizer, self.counts = tokenizer, counts
        self.files = []
        for name, size in (
            (f"{split}.bin", counts.tokens * tokenizer.dtype.itemsize),
            (f"{split}_starts.bin", counts.documents * 8),
        ):
            path = folder / name
            if (path.stat().st_size if path.exists() else 0) < size:
                raise ValueError(f"{path} is shorter than its progress says: remove {folder} and prepare again")
            file = path.open("ab")
            file.truncate(size)
            self.files.append(file)

    def write(self, texts: list[str]) -> None:
        """Append documents, each behind a separator."""
        if not texts:
            return
        ids, lengths = tokenize(texts, self.tokenizer)
        tokens, starts = self.files
        tokens.write(ids.tobytes())
        starts.write((self.counts.tokens + np.cumsum(lengths) - lengths).tobytes())
        self.counts.documents += len(texts)
        self.counts.bytes += sum(len(text.encode()) for text in texts)
        self.counts.tokens += int(lengths.sum())
        self.counts.long_documents += int((lengths > LONG_DOCUMENT_TOKENS).sum())

    def flush(self) -> None:
        """Bring everything to the disk."""
        for file in self.files:
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        for file in self.files:
            with suppress(OSError):  # what a full disk did not take has been told of already
                file.close()


@contextmanager
def _bar(size: int | None) -> Iterator[Callable[[int], None]]:
    """A progress bar where there is a terminal."""
    columns = (TextColumn("          "), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=size)
        yield lambda amount: bar.advance(task, amount)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a complete folder; None where any of its files is missing or of another size."""
    try:
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        complete = all(os.path.getsize(folder / name) == size for name, size in manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest if complete else None


def open_prepared(folder: Path) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], dict[str, Any]]:
    """Tokens and document starts of each split, memory-mapped, and the manifest."""
    manifest = read_manifest(folder)
    assert manifest is not None
    streams: dict[str, tuple[np.ndarray, np.ndarray]] = {
        split: (
            np.memmap(folder / f"{split}.bin", np.dtype(manifest["dtype"]), "r"),
            np.memmap(folder / f"{split}_starts.bin", np.int64, "r"),
        )
        for split in SPLITS
    }
    return streams, manifest


def damaged_files(folder: Path) -> list[str]:
    """The names of files that are not what the manifest says, byte for byte. Reads everything."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return [name for name, digest in manifest["sha256"].items() if disk.sha256_file(folder / name) != digest]
