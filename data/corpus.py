"""A corpus: documents, tokenized once and kept on disk under a hash of everything they were made from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data import disk
from data.config import DataConfig, FileTokenizer, HubData, HubTokenizer, MixData, TokenizerConfig
from data.files import expand
from data.prepare import LONG_DOCUMENT_TOKENS, open_prepared, prepare, tokenize
from data.sources import Source, open_source
from data.split import Split, choose_split
from data.tokenizer import Tokenizer

# Raise this when the same inputs come to give other tokens: caches made before are then made anew.
CACHE_FORMAT = 4
VALIDATION_BYTES = 2**24  # of a stream that is not prepared: what of it is held out, is evaluated on
TRAINING_BYTES = 2**26  # of text to learn a tokenizer from: 20 s on two cores; more changes little


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

    @property
    def document_lengths(self) -> np.ndarray:
        """(documents,) int64: tokens of each, its separator included."""
        return np.diff(self.document_starts, append=len(self.tokens))


@dataclass(frozen=True)
class Unprepared:
    """Documents that are read and tokenized only when they are trained on."""

    source: Source
    split: Split
    tokenizer: Tokenizer


@dataclass(frozen=True)
class Part:
    """One source's tokens, the folder they lie in, if they do, and its share of what is trained on."""

    name: str
    folder: Path | None
    weight: float
    train: TokenStream | Unprepared
    val: TokenStream


@dataclass(frozen=True)
class Corpus:
    """A tokenizer, the token streams it made, and the manifest that says what they were made from."""

    parts: tuple[Part, ...]
    tokenizer: Tokenizer
    manifest: dict[str, Any]


def load_corpus(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    notify: Callable[[str], None] = print,
    model_vocab_size: int | None = None,
) -> Corpus:
    """Take the tokens of a source from the cache, or make them.

    `data.cache_dir` has a folder `<source>-<hash>` for each source, and a file for each tokenizer that was trained.
    Each appears complete or not at all, and any number of processes may ask for it at once. `notify` receives a line
    for each thing a user should know.

    Raises:
        ValueError: the source or the tokenizer cannot be read, data.cache_dir cannot be written, or the tokenizer has
            more ids than `model_vocab_size`, where that is given.
    """
    named = load_named_tokenizer(tokenizer)  # first of all, like the cache: known before the slow part
    if named is not None and model_vocab_size is not None and named.vocab_size > model_vocab_size:
        where = f"tokenizer.path={tokenizer.path}" if isinstance(tokenizer, FileTokenizer) else "the tokenizer"
        raise ValueError(
            f"{where} has {named.vocab_size} ids, more than model.vocab_size={model_vocab_size}: "
            f"set model.vocab_size={named.vocab_size} or more, or take another tokenizer"
        )
    configs = data.sources() if isinstance(data, MixData) else {data.name: (1.0, data)}
    cache = expand(data.cache_dir)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        sources = {name: (config, open_source(config)) for name, (_, config) in configs.items()}
        if isinstance(data, HubData) and not data.prepare:
            ((_, source),) = sources.values()
            trained = named or train_tokenizer(data, tokenizer, [source], cache, notify)
            return _unprepared(data, source, trained, tokenizer, notify)
        trained = named or train_tokenizer(data, tokenizer, [source for _, source in sources.values()], cache, notify)
        folders = {
            name: _prepare(config, source, trained, tokenizer, cache, notify)
            for name, (config, source) in sources.items()
        }
    except OSError as error:
        raise ValueError(
            f"data.cache_dir={data.cache_dir} cannot be written ({error.strerror}): "
            "set data.cache_dir to a folder you can write, with space left"
        ) from error
    parts, manifests = [], {}
    for name, folder in folders.items():
        streams, manifests[name] = open_prepared(folder)
        train, val = (TokenStream(*streams[split]) for split in ("train", "val"))
        parts.append(Part(name, folder, configs[name][0], train, val))
        notify(_summary(manifests[name]))
        if manifests[name]["note"]:
            notify(f"           {manifests[name]['note']}")
    if tokenizer.vocab_size is not None and trained.vocab_size < tokenizer.vocab_size:
        notify(f"           the text yields only {trained.vocab_size:,} of {tokenizer.vocab_size:,} tokens")
    manifest = manifests[data.name] if len(configs) == 1 and data.name in manifests else _mixture(configs, manifests)
    return Corpus(tuple(parts), trained, manifest)


def load_named_tokenizer(config: TokenizerConfig) -> Tokenizer | None:
    """The tokenizer that there is before any text; None for "bpe", which is trained.

    Raises:
        ValueError: it cannot be read.
    """
    if config.name == "bytes":
        return Tokenizer.of_bytes()
    if isinstance(config, HubTokenizer):
        from data.hub import fetch_tokenizer

        return Tokenizer.wrap(fetch_tokenizer(config), f"tokenizer.path={config.path}", config.separator)
    if isinstance(config, FileTokenizer):
        return Tokenizer.load(config.path, config.separator)
    return None


def train_tokenizer(
    data: DataConfig, config: TokenizerConfig, sources: list[Source], cache: Path, notify: Callable[[str], None]
) -> Tokenizer:
    """A tokenizer trained on the train documents of the sources, or the one that was trained on them before."""
    assert config.vocab_size is not None
    settings = [CACHE_FORMAT, config.vocab_size, TRAINING_BYTES, data.val_fraction, *(s.fingerprint for s in sources)]
    file = cache / f"tokenizer-{_hash(settings)[:16]}.json"
    if not file.is_file():
        with disk.alone(file, lambda: notify(f"tokenizer  another process learns {file}; waiting for it")):
            if not file.is_file():
                notify(f"tokenizer  learning {config.vocab_size:,} tokens from the text, once")
                Tokenizer.train(training_texts(sources, data.val_fraction), config.vocab_size).save(file)
    return Tokenizer.load(file)


def training_texts(sources: list[Source], val_fraction: float) -> Iterator[str]:
    """Train documents of all sources, TRAINING_BYTES of them: the same share of each, from its beginning."""
    for source in sources:
        split, taken = choose_split(source, val_fraction), 0
        for _, document in source.documents():
            for side, text in split(document):
                if side == "train":
                    taken += len(text.encode())
                    yield text
            if taken >= TRAINING_BYTES // len(sources):
                break


def _prepare(
    data: DataConfig,
    source: Source,
    tokenizer: Tokenizer,
    config: TokenizerConfig,
    cache: Path,
    notify: Callable[[str], None],
) -> Path:
    facts = _facts(data, source, tokenizer, config)
    folder = cache / f"{data.name}-{facts['hash'][:16]}"
    prepare(folder, source, tokenizer, data.val_fraction, facts, notify)
    return folder


def _facts(data: DataConfig, source: Source, tokenizer: Tokenizer, config: TokenizerConfig) -> dict[str, Any]:
    return {
        "source": data.name,
        "hash": _hash([CACHE_FORMAT, source.fingerprint, data.val_fraction, tokenizer.sha256]),
        "val_fraction": data.val_fraction,
        "tokenizer": {"name": config.name, "vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256},
    }


def _unprepared(
    data: DataConfig, source: Source, tokenizer: Tokenizer, config: TokenizerConfig, notify: Callable[[str], None]
) -> Corpus:
    split = choose_split(source, data.val_fraction)
    texts: list[str] = []
    taken = 0
    for _, document in source.documents():
        texts += [text for side, text in split(document) if side == "val"]
        taken += len(document.text.encode())
        if taken >= VALIDATION_BYTES:
            break
    if not texts:
        raise ValueError(
            f"data.val_fraction={data.val_fraction} holds out nothing of the first {taken / 1e6:.1f} MB of "
            f"{source.where}: raise it"
        )
    tokens, lengths = tokenize(texts, tokenizer)
    val = TokenStream(tokens, np.cumsum(lengths) - lengths)
    manifest = _facts(data, source, tokenizer, config) | {"prepared": False}
    notify(
        f"data       {data.name} {manifest['hash'][:8]}: trained on as it comes, in its own order, whatever the seed; "
        f"{len(tokens):,} validation tokens from the first {taken / 1e6:.1f} MB"
    )
    notify("           nothing is kept: a run that goes on reads again, from the beginning, all it was trained on")
    return Corpus((Part(data.name, None, 1.0, Unprepared(source, split, tokenizer), val),), tokenizer, manifest)


def _mixture(configs: dict[str, tuple[float, DataConfig]], manifests: dict[str, dict[str, Any]]) -> dict[str, Any]:
    weights = {name: weight for name, (weight, _) in configs.items()}
    total = sum(weights.values())
    return {
        "source": "mix",
        "hash": _hash([[name, weights[name], manifest["hash"]] for name, manifest in manifests.items()]),
        **{count: sum(m[count] for m in manifests.values()) for count in ("documents", "bytes", "tokens")},
        "tokenizer": next(iter(manifests.values()))["tokenizer"],
        "shares": {name: weight / total for name, weight in weights.items()},
        "parts": manifests,
    }


def _hash(settings: list[Any]) -> str:
    return disk.sha256(json.dumps(settings))


def _summary(manifest: dict[str, Any]) -> str:
    return (
        f"data       {manifest['source']} {manifest['hash'][:8]}: {manifest['documents']:,} documents, "
        f"{manifest['bytes'] / 1e6:.1f} MB, {manifest['train']['tokens']:,} train and {manifest['val']['tokens']:,} "
        f"validation tokens; {manifest['long_documents']:,} documents over {LONG_DOCUMENT_TOKENS:,} tokens"
    )
