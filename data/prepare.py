"""Text becomes token files: in bounded memory, in parallel, complete or not at all, and going on where a kill left off.

A folder under preparation is called `<name>.part`. Its token files only grow, and after every few megabytes
`progress.json` says how much of them is good and what to read next; whoever comes next cuts them there and goes on.
The folder gets its name when all is written and `manifest.json` says so. What a manifest says is compared with the
files before they are used: damage is named, and they are prepared again.
"""

from __future__ import annotations

import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from data import disk
from data.prepared import FILES, MANIFEST, SPLITS, TOKEN_FILES, is_prepared
from data.progress import bar
from data.round_trip import RoundTrip
from data.sources import Source
from data.split import Split, is_fair
from data.tokenizer import Tokenizer

T = TypeVar("T")

PROGRESS = "progress.json"
BY_NAME = "files are held out by their names, alike under every Python"
LONG_DOCUMENT_TOKENS = 16_384
BATCH_CHARS = 2**23  # text that is tokenized at once; about 200 MB while it is
SAVE_CHARS = 2**25  # text between two savings of progress: some seconds of work


@dataclass
class Counts:
    """Documents, UTF-8 bytes and tokens of one split that were written so far."""

    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    long_documents: int = 0


@dataclass
class Progressed:
    """How far preparation has come: read on after `documents` documents of part `part`.

    checks: CRC-32 of each token file so far.
    """

    part: int = 0
    documents: int = 0
    train: Counts = field(default_factory=Counts)
    val: Counts = field(default_factory=Counts)
    checks: dict[str, int] = field(default_factory=lambda: dict.fromkeys(TOKEN_FILES, 0))

    def counts(self, split: str) -> Counts:
        counts: Counts = getattr(self, split)
        return counts

    @classmethod
    def load(cls, file: Path) -> Progressed:
        """What `save` wrote last; a beginning where there is nothing good."""
        try:
            saved = disk.unsealed(file.read_text(encoding="utf-8"))
            train, val = (Counts(**saved.pop(split)) for split in SPLITS)
            return cls(train=train, val=val, **saved)
        except (OSError, ValueError, TypeError, KeyError):
            return cls()

    def save(self, file: Path) -> None:
        disk.write_whole(file, disk.sealed(asdict(self)))


Fill = Callable[[Path], dict[str, Any]]
"""Writes the token files into a folder, and returns what the manifest is to say of them."""


def prepare(
    folder: Path, fill: Fill, tokenizer: Tokenizer, facts: dict[str, Any], notify: Callable[[str], None]
) -> None:
    """Make the folder, unless it is there and good: train.bin and val.bin, with the tokens; train_starts.bin and
    val_starts.bin, int64, where each document begins; tokenizer.json; manifest.json, with `facts`.

    Raises:
        ValueError: the source cannot be read, or has too little text. Nothing is left behind then.
        OSError: the folder cannot be written. Likewise.
    """
    if is_prepared(folder, facts):
        return
    with disk.alone(folder, lambda: notify(f"data       another process prepares {folder}; waiting for it")):
        if is_prepared(folder, facts, notify):
            return  # another process was first
        part = folder.with_name(f"{folder.name}.part")
        try:
            part.mkdir(parents=True, exist_ok=True)
            made = fill(part)
            tokenizer.save(part / "tokenizer.json")
            for path in {*part.iterdir()} - {part / name for name in FILES}:  # progress, and what a kill left of it
                path.unlink()
            manifest = {
                **facts,
                **made,
                "dtype": str(tokenizer.dtype),
                "files": {name: (part / name).stat().st_size for name in sorted(FILES)},
                "sha256": {name: disk.sha256_file(part / name) for name in sorted(FILES)},
            }
            disk.write_synced(part / MANIFEST, disk.sealed(manifest, indent=2))
            disk.sync(part)
            if folder.exists():  # damaged
                shutil.rmtree(folder)
            part.rename(folder)
            disk.sync(folder.parent)
        except (ValueError, OSError):
            shutil.rmtree(part, ignore_errors=True)
            raise


def fill_from_text(
    folder: Path,
    source: Source,
    tokenizer: Tokenizer,
    split: Split,
    facts: dict[str, Any],
    notify: Callable[[str], None],
) -> dict[str, Any]:
    """A `Fill`, but for the first argument."""
    began = time.perf_counter()
    done = Progressed.load(folder / PROGRESS)
    damaged = [name for name in TOKEN_FILES if not is_good_so_far(folder, name, done, tokenizer)]
    if done == Progressed() and (folder / PROGRESS).exists():
        damaged = [PROGRESS]
    if damaged:
        notify(f"data       {folder / damaged[0]} is damaged: beginning anew")
        done = Progressed()
    resumed = done.train.bytes + done.val.bytes
    verb = f"going on after {resumed / 1e6:.0f} MB, in" if resumed else "tokenizing, once, into"
    notify(f"data       {facts['source']}: {verb} {folder.with_suffix('')}")
    writers = {side: StreamWriter(folder, side, tokenizer, done) for side in SPLITS}
    trip = RoundTrip(tokenizer)

    def flush() -> None:
        for writer in writers.values():
            writer.flush()
        done.save(folder / PROGRESS)

    unsaved = 0
    try:
        with bar("tokenizing", source.size) as advance:
            advance(resumed)
            for part, documents, batch in ahead(batches(source, split, BATCH_CHARS, done)):
                trip.add([text for _, text in batch])
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
    source.check()
    for side in SPLITS:
        if not done.counts(side).tokens:
            what = f"hold out data.val_fraction={facts['val_fraction']}"
            if source.held_out is not None:
                what = "train on" if side == "train" else f"validate on in {source.held_out.where}"
            raise ValueError(f"too little text in {source.where} to {what}: add some")
    if line := trip.finish():
        notify(f"           {line}")
    totals = totals_of(done)
    seconds, new = time.perf_counter() - began, totals["bytes"] - resumed
    if seconds > 5:
        notify(f"           {new / 1e6:,.0f} MB in {seconds:,.0f} s, {new / 1e6 / seconds:.1f} MB/s")
    notes = [_about_the_split(source, split, done.val.bytes / totals["bytes"]), source.bad.told()]
    return {
        "text": source.fingerprint,
        **totals,
        "long_document_tokens": LONG_DOCUMENT_TOKENS,
        **{side: asdict(done.counts(side)) for side in SPLITS},
        "notes": [note for note in notes if note],
    }


def totals_of(done: Progressed) -> dict[str, int]:
    """The counts of both splits together."""
    return {name: asdict(done.train)[name] + asdict(done.val)[name] for name in asdict(done.train)}


def _about_the_split(source: Source, split: Split, share: float) -> str | None:
    """What a person should know about what is held out."""
    if source.held_out is not None:
        return None
    if split.cuts_all:
        return f"too few documents to hold out whole ones: validation is the last {split.fraction:.1%} of each"
    if is_fair(share, split.fraction):
        return None
    why = "its documents are copies of one another, or too short to be cut"
    if source.streamed:
        why = "a stream is split before all of it is read"
    elif split.cut_above == float("inf"):
        why = BY_NAME
    return f"validation has {share:.1%} of the text, not data.val_fraction={split.fraction:.1%}: {why}"


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
    """Appends documents to the token files of a split, from where `done` says on, and keeps its counts and checks."""

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer, done: Progressed) -> None:
        self.tokenizer, self.counts, self.checks = tokenizer, done.counts(split), done.checks
        self.files = {}
        for name in (f"{split}.bin", f"{split}_starts.bin"):
            file = (folder / name).open("ab")
            file.truncate(_size(name, done, tokenizer))
            self.files[name] = file

    def write(self, texts: list[str]) -> None:
        """Append documents, each behind a separator."""
        if texts:
            ids, lengths = tokenize(texts, self.tokenizer)
            self.append(ids, np.cumsum(lengths) - lengths, sum(len(text.encode()) for text in texts))
            self.counts.long_documents += int((lengths > LONG_DOCUMENT_TOKENS).sum())

    def append(self, ids: np.ndarray, starts: np.ndarray, num_bytes: int) -> None:
        """Append tokens, where documents begin in them, and how many bytes of text they stand for."""
        contents = ids.tobytes(), (self.counts.tokens + starts.astype(np.int64)).tobytes()
        for (name, file), content in zip(self.files.items(), contents, strict=True):
            file.write(content)
            self.checks[name] = zlib.crc32(content, self.checks[name])
        self.counts.documents += len(starts)
        self.counts.bytes += num_bytes
        self.counts.tokens += len(ids)

    def flush(self) -> None:
        """Bring everything to the disk."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        for file in self.files.values():
            with suppress(OSError):  # what a full disk did not take has been told of already
                file.close()


def _size(name: str, done: Progressed, tokenizer: Tokenizer) -> int:
    """Bytes of a token file so far."""
    counts = done.counts(name.split("_")[0].split(".")[0])
    return counts.documents * 8 if "_starts" in name else counts.tokens * tokenizer.dtype.itemsize


def is_good_so_far(folder: Path, name: str, done: Progressed, tokenizer: Tokenizer) -> bool:
    """Whether a token file of a half-prepared folder begins with what was written."""
    left, check = _size(name, done, tokenizer), 0
    with suppress(OSError), (folder / name).open("rb") as file:
        while left and (content := file.read(min(left, disk.READ_BYTES))):
            check = zlib.crc32(content, check)
            left -= len(content)
    return left == 0 and check == done.checks[name]
