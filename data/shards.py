"""Shards of tokens that somebody else prepared, as token files of ours: checked against the tokenizer, and split."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data import disk
from data.config import TokensData
from data.files import expand, find_files
from data.hashes import Hashed, hash_tree
from data.prepare import LONG_DOCUMENT_TOKENS, Progressed, StreamWriter, totals_of
from data.prepared import SPLITS
from data.progress import bar
from data.tokenizer import Tokenizer

KINDS = (".bin", ".npy")
HEADER_BYTES = 1024  # 256 int32: what it is, its version, the number of tokens
HEADERS = {20240520: (1, np.uint16), 20240801: (7, np.uint32)}
"""By the first number: the version, and the type of a token. As llm.c and modded-nanogpt write them; of nanoGPT's,
which have no header, a token is a uint16."""
VALIDATION_NAME = re.compile(r"(^|[^a-z])val(id|idation)?([^a-z]|$)")
CHUNK = 2**22  # tokens copied at once


def open_shard(path: Path) -> np.ndarray:
    """The tokens of a shard, memory-mapped: (tokens,) integers.

    Raises:
        ValueError: it is none, or cut short.
    """
    try:
        size = path.stat().st_size
        if path.suffix.lower() == ".npy":
            array = _open_npy(path)
        else:
            with path.open("rb") as file:
                header = np.frombuffer(file.read(HEADER_BYTES)[: size // 4 * 4], np.dtype("<i4"))
            if size >= HEADER_BYTES and int(header[0]) in HEADERS:
                array = _behind_header(path, header, size)
            elif size % 2 == 0 and size:
                array = np.memmap(path, np.dtype("<u2"), "r")
            else:
                raise ValueError(f"{path} has {size:,} bytes, which are no tokens of 2 bytes: fetch it again")
    except (OSError, EOFError) as error:
        raise ValueError(f"cannot read {path}: {error.strerror if isinstance(error, OSError) else error}") from error
    if not len(array):
        raise ValueError(f"{path} holds no tokens: fetch it again or leave it out")
    return array


def _open_npy(path: Path) -> np.ndarray:
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # NumPy has a parser read the header, which raises its own
        raise ValueError(f"{path} is no array, or cut short ({error}): fetch it again or leave it out") from error
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"{path} holds {array.dtype} of shape {array.shape}: a shard is one row of integers")
    return array


def _behind_header(path: Path, header: np.ndarray, size: int) -> np.ndarray:
    version, kind = HEADERS[int(header[0])]
    count, width = int(header[2]), np.dtype(kind).itemsize
    if header[1] != version:
        raise ValueError(f"{path} is of version {header[1]}, and version {version} is read: convert it to .npy")
    if count < 0 or size != HEADER_BYTES + width * count:
        found = (size - HEADER_BYTES) // width
        raise ValueError(f"{path} has {found:,} tokens and its header says {count:,}: it is cut short, fetch it again")
    return np.memmap(path, np.dtype(kind).newbyteorder("<"), "r", HEADER_BYTES, (count,))


@dataclass(frozen=True)
class Shards:
    """Files of tokens to train on, and to validate on; without these a tail of the first is held out."""

    config: TokensData
    train: list[Path]
    val: list[Path]
    hashed: Hashed

    @property
    def fingerprint(self) -> str:
        """Changes with any byte, and with the order of files; not with where they lie."""
        return disk.sha256(f"{self.hashed.sha256} {len(self.train)} {len(self.val)}")

    def fill(
        self, folder: Path, tokenizer: Tokenizer, facts: dict[str, Any], notify: Callable[[str], None]
    ) -> dict[str, Any]:
        """Write the token files, and say what is in them. See `data.prepare.Fill`.

        Raises:
            ValueError: a shard is none, or not of this tokenizer.
        """
        notify(f"data       tokens: copying, once, into {folder.with_suffix('')}")
        shards = {path: open_shard(path) for path in (*self.train, *self.val)}
        lengths = [len(shards[path]) for path in self.train]
        held_from = sum(lengths) if self.val else tail_of([shards[path] for path in self.train], tokenizer, facts)
        done = Progressed()
        writers = {side: StreamWriter(folder, side, tokenizer, done) for side in SPLITS}
        try:
            with bar("copying", self.hashed.size) as advance:
                place = 0
                for path, tokens in shards.items():
                    for chunk in chunks(path, tokens, tokenizer):
                        cut = max(0, held_from - place) if path in self.train else 0
                        for side, part in (("train", chunk[:cut]), ("val", chunk[cut:])):
                            self.write(writers[side], part, tokenizer)
                        place += len(chunk)
                        advance(chunk.nbytes)
            for writer in writers.values():
                writer.flush()
        finally:
            for writer in writers.values():
                writer.close()
        self.hashed.check()
        if not (done.train.tokens and done.val.tokens):
            raise ValueError(
                f"too few tokens in data.path={self.config.path} to hold out "
                f"data.val_fraction={self.config.val_fraction}: add some, or name data.val_path"
            )
        for side in SPLITS:
            starts = np.fromfile(folder / f"{side}_starts.bin", np.int64)
            long = np.diff(starts, append=done.counts(side).tokens) > LONG_DOCUMENT_TOKENS
            done.counts(side).long_documents = int(long.sum())
        whole = f"no {tokenizer.separator} in the shards: all tokens are one document"
        return {
            "text": self.fingerprint,
            **totals_of(done),
            "long_document_tokens": LONG_DOCUMENT_TOKENS,
            **{side: asdict(done.counts(side)) for side in SPLITS},
            "notes": [whole] if done.train.documents == 1 else [],
        }

    @staticmethod
    def write(writer: StreamWriter, ids: np.ndarray, tokenizer: Tokenizer) -> None:
        if not len(ids):
            return
        starts = np.flatnonzero(ids == tokenizer.separator_id)
        if writer.counts.tokens == 0 and (not len(starts) or starts[0] > 0):
            starts = np.append(0, starts)  # the first document, whose separator is behind it or in another shard
        writer.append(ids, starts, int(tokenizer.token_bytes[ids].sum()))


def open_shards(config: TokensData, notify: Callable[[str], None]) -> Shards:
    """The shards that a configuration names.

    Raises:
        ValueError: there are none.
    """

    def look(key: str) -> dict[str, Path]:
        found = find_files(getattr(config, key), key=f"data.{key}", kinds=KINDS)
        if line := found.told():
            notify(f"data       data.{key}: {line}")
        return found.files

    train = look("path")
    if config.val_path is None:
        val = {name: path for name, path in train.items() if VALIDATION_NAME.search(path.stem.lower())}
        if len(val) == len(train):
            val = {}
        if val:
            notify(f"data       data.path: validated on {', '.join(val)}, by name")
    else:
        val = look("val_path")
    held_out = {path.resolve() for path in val.values()}
    train = {name: path for name, path in train.items() if path.resolve() not in held_out}
    if not train:
        raise ValueError("data.val_path holds out all of data.path: name other files, or leave out data.val_path")
    named = {f"train {name}": path for name, path in train.items()} | {
        f"val {name}": path for name, path in val.items()
    }
    return Shards(config, [*train.values()], [*val.values()], hash_tree(named, expand(config.cache_dir)))


def chunks(path: Path, tokens: np.ndarray, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """The tokens of a shard in the tokenizer's type.

    Raises:
        ValueError: the tokenizer has no such token.
    """
    for begin in range(0, len(tokens), CHUNK):
        chunk = np.asarray(tokens[begin : begin + CHUNK])
        unknown = (chunk >= tokenizer.vocab_size) | (chunk < 0)
        if unknown.any():
            place = int(unknown.argmax())
            raise ValueError(
                f"{path} has token {chunk[place]} at place {begin + place:,}, and the tokenizer only "
                f"{tokenizer.vocab_size} ids: set tokenizer.path to the one that made it"
            )
        yield chunk.astype(tokenizer.dtype)


def tail_of(shards: list[np.ndarray], tokenizer: Tokenizer, facts: dict[str, Any]) -> int:
    """Where the last `val_fraction` of all tokens begins: with a document, if one begins near."""
    total = sum(map(len, shards))
    tail = round(total * facts["val_fraction"])
    target, before = total - tail, 0
    for shard in shards:
        first, last = max(0, target - tail - before), min(len(shard), target - before)
        if last > 0 and before + len(shard) >= target:
            starts = np.flatnonzero(shard[first:last] == tokenizer.separator_id)
            return before + first + int(starts[-1]) if len(starts) else target
        before += len(shard)
    return target
