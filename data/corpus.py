"""A corpus: documents, tokenized once and kept on disk under a hash of everything they were made from."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.config import DataConfig, TokenizerConfig
from data.sources import Document, read_documents, train_val_split
from data.tokenizer import Tokenizer

# Raise this when the same inputs come to give other tokens: caches made before are then made anew.
CACHE_FORMAT = 1
LONG_DOCUMENT_TOKENS = 16_384


@dataclass(frozen=True)
class TokenStream:
    """Documents end to end, each beginning with the separator.

    So the separator predicts the first token of its document, and is the target after the last token of the one before.

    tokens: (tokens,) unsigned integers, often a read-only memory map.
    document_starts: (documents,) int64, the index of each document's separator, increasing from 0.
    """

    tokens: np.ndarray
    document_starts: np.ndarray

    def __post_init__(self) -> None:
        assert self.document_starts[0] == 0
        assert self.document_starts[-1] < len(self.tokens)


@dataclass(frozen=True)
class Corpus:
    """A tokenizer, the token streams it made, and the manifest that says what they were made from."""

    train: TokenStream
    val: TokenStream
    tokenizer: Tokenizer
    manifest: dict[str, Any]


def load_corpus(data: DataConfig, tokenizer: TokenizerConfig, notify: Callable[[str], None] = print) -> Corpus:
    """Read the source, and take its tokens from the cache or make them (tokenizer trained on train documents only).

    The cache folder is `<cache_dir>/<source>-<hash>`. It appears complete or not at all, and any number of processes
    may ask for it at once. `notify` receives a line for each thing a user should know.

    Raises:
        ValueError: the source cannot be read (see `read_documents`) or data.cache_dir cannot be written.
    """
    documents = read_documents(data)
    corpus_hash = _corpus_hash(documents, data, tokenizer)
    folder = Path(data.cache_dir).expanduser() / f"{data.name}-{corpus_hash[:16]}"
    if _read_manifest(folder) is None:
        notify(f"data       tokenizing {len(documents):,} documents, once, into {folder}")
        try:
            _build(folder, documents, corpus_hash, data, tokenizer)
        except OSError as error:
            raise ValueError(
                f"data.cache_dir={data.cache_dir} cannot be written ({error.strerror}): "
                "set data.cache_dir to a folder you can write, with space left"
            ) from error
    corpus = _open(folder)
    notify(_summary(corpus.manifest))
    if corpus.manifest["note"]:
        notify(f"           {corpus.manifest['note']}")
    if corpus.tokenizer.vocab_size < tokenizer.vocab_size:
        notify(f"           the text yields only {corpus.tokenizer.vocab_size:,} of {tokenizer.vocab_size:,} tokens")
    return corpus


def _corpus_hash(documents: list[Document], data: DataConfig, tokenizer: TokenizerConfig) -> str:
    settings = [CACHE_FORMAT, data.val_fraction, tokenizer.name, tokenizer.vocab_size]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for document in documents:
        digest.update(hashlib.sha256(document.name.encode()).digest())
        digest.update(hashlib.sha256(document.text.encode()).digest())
    return digest.hexdigest()


def _build(
    folder: Path, documents: list[Document], corpus_hash: str, data: DataConfig, config: TokenizerConfig
) -> None:
    """Write the cache folder beside its place, then move it there."""
    # First of all, so that a folder that cannot be written is known before the slow part.
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        train, val, note = train_val_split(documents, data.val_fraction)
        tokenizer = Tokenizer.train((document.text for document in train), config.vocab_size)
        streams = {"train": _tokenize(tokenizer, train), "val": _tokenize(tokenizer, val)}

        tokenizer.save(part / "tokenizer.json")
        for split, stream in streams.items():
            np.save(part / f"{split}.npy", stream.tokens)
            np.save(part / f"{split}_starts.npy", stream.document_starts)
        splits = {"train": _counts(train, streams["train"]), "val": _counts(val, streams["val"])}
        manifest = {
            "source": data.name,
            "hash": corpus_hash,
            **{count: splits["train"][count] + splits["val"][count] for count in splits["train"]},
            "long_document_tokens": LONG_DOCUMENT_TOKENS,
            **splits,
            "val_fraction": data.val_fraction,
            "note": note,
            "tokenizer": {
                "name": config.name,
                "vocab_size": tokenizer.vocab_size,
                "sha256": hashlib.sha256((part / "tokenizer.json").read_bytes()).hexdigest(),
            },
            "files": {file.name: file.stat().st_size for file in sorted(part.iterdir())},
        }
        (part / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        part.chmod(0o755)  # mkdtemp makes it private; a cache may be shared
        _publish(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _tokenize(tokenizer: Tokenizer, documents: list[Document]) -> TokenStream:
    separator = np.array([tokenizer.separator_id], tokenizer.dtype)
    texts = tokenizer.encode_batch([document.text for document in documents])
    lengths = np.array([1 + len(text) for text in texts], np.int64)
    return TokenStream(
        tokens=np.concatenate([part for text in texts for part in (separator, text)]),
        document_starts=np.cumsum(lengths) - lengths,
    )


def _counts(documents: list[Document], stream: TokenStream) -> dict[str, int]:
    lengths = np.diff(stream.document_starts, append=len(stream.tokens))
    return {
        "documents": len(documents),
        "bytes": sum(len(document.text.encode()) for document in documents),
        "tokens": len(stream.tokens),
        "long_documents": int((lengths > LONG_DOCUMENT_TOKENS).sum()),
    }


def _publish(part: Path, folder: Path) -> None:
    """Move a complete folder to its place. A process that comes second keeps what the first put there."""
    try:
        part.rename(folder)
    except OSError:
        if _read_manifest(folder) is not None:
            return
        damaged = part.with_suffix(".damaged")
        with suppress(OSError):
            folder.rename(damaged)
        part.rename(folder)
        shutil.rmtree(damaged, ignore_errors=True)


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a complete cache folder; None where any of its files is missing or of another size."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        complete = all(os.path.getsize(folder / name) == size for name, size in manifest["files"].items())
    except (OSError, ValueError, KeyError):
        return None
    return manifest if complete else None


def _open(folder: Path) -> Corpus:
    manifest = _read_manifest(folder)
    assert manifest is not None
    train, val = (
        TokenStream(
            np.load(folder / f"{split}.npy", mmap_mode="r"), np.load(folder / f"{split}_starts.npy", mmap_mode="r")
        )
        for split in ("train", "val")
    )
    return Corpus(train, val, Tokenizer.load(folder / "tokenizer.json"), manifest)


def _summary(manifest: dict[str, Any]) -> str:
    return (
        f"data       {manifest['source']} {manifest['hash'][:8]}: {manifest['documents']:,} documents, "
        f"{manifest['bytes'] / 1e6:.1f} MB, {manifest['train']['tokens']:,} train and {manifest['val']['tokens']:,} "
        f"validation tokens; {manifest['long_documents']:,} documents over {LONG_DOCUMENT_TOKENS:,} tokens"
    )
