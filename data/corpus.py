"""A corpus: documents, tokenized once and kept on disk under a hash of everything they were made from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from data import disk
from data.config import DataConfig, FileTokenizer, HubData, HubTokenizer, MixData, TokenizerConfig, TokensData
from data.files import expand
from data.prepare import BY_NAME, LONG_DOCUMENT_TOKENS, fill_from_text, prepare, tokenize
from data.prepared import open_prepared
from data.progress import doing
from data.shards import Shards, open_shards
from data.sources import Source, open_source
from data.split import Split, choose_split, is_fair
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


class Text:
    """A source that may have to be read, and how it is split, which is seen only when it is."""

    def __init__(self, config: DataConfig, source: Source) -> None:
        self.config, self.source = config, source
        self.split: Callable[[], Split] = cache(partial(choose_split, source, config.val_fraction))

    @property
    def fingerprint(self) -> str:
        return self.source.fingerprint

    def fill(
        self, folder: Path, tokenizer: Tokenizer, facts: dict[str, Any], notify: Callable[[str], None]
    ) -> dict[str, Any]:
        """Write the token files, and say what is in them. See `data.prepare.Fill`."""
        return fill_from_text(folder, self.source, tokenizer, self.split(), facts, notify)


def open_input(config: DataConfig, notify: Callable[[str], None]) -> Text | Shards:
    """What a configuration names, not read yet.

    Raises:
        ValueError: it is missing or unreachable; one line says what to do.
    """
    return open_shards(config, notify) if isinstance(config, TokensData) else Text(config, open_source(config, notify))


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
    if named is None and any(isinstance(config, TokensData) for _, config in configs.values()):
        raise ValueError(
            f"tokenizer={tokenizer.name} cannot be learned from data=tokens: name the one that made them, such as "
            f"tokenizer=hub tokenizer.path=gpt2"
        )
    folder = expand(data.cache_dir)
    if str(folder).startswith("~"):
        raise ValueError(f"data.cache_dir={data.cache_dir}: there is no home folder (HOME is not set); name a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        inputs = {name: open_input(config, notify) for name, (_, config) in configs.items()}
        texts = [text for text in inputs.values() if isinstance(text, Text)]
        trained = named or train_tokenizer(tokenizer, texts, folder, notify)
        if isinstance(data, HubData) and not data.prepare:
            return _unprepared(texts[0], trained, tokenizer, notify)
        folders = {name: _prepare(what, trained, tokenizer, folder, notify) for name, what in inputs.items()}
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
        for note in _notes(manifests[name]):
            notify(f"           {note}")
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
    config: TokenizerConfig, texts: list[Text], folder: Path, notify: Callable[[str], None]
) -> Tokenizer:
    """A tokenizer trained on the train documents of the sources, or the one that was trained on them before.

    Its file has the SHA-256 of its content in its name, and is made anew where it has another.
    """
    assert config.vocab_size is not None
    fraction = texts[0].config.val_fraction
    settings = [CACHE_FORMAT, config.vocab_size, TRAINING_BYTES, fraction, *(text.fingerprint for text in texts)]
    name = f"tokenizer-{_hash(settings)[:16]}"
    if (found := find_tokenizer(folder, name)) is not None:
        return found
    with disk.alone(folder / name, lambda: notify(f"tokenizer  another process learns {name}; waiting for it")):
        if (found := find_tokenizer(folder, name, notify)) is not None:
            return found
        for text in texts:
            text.split()  # now, and not under the bars of learning
        notify(f"tokenizer  learning {config.vocab_size:,} tokens from the text, once")
        doing("learning the tokenizer")
        trained = Tokenizer.train(training_texts(texts), config.vocab_size)
        for text in texts:
            text.source.check()
        content = trained.to_json()
        file = folder / f"{name}-{disk.sha256(content)[:16]}.json"
        disk.write_whole(file, content)
        return Tokenizer.load(file)


def find_tokenizer(folder: Path, name: str, notify: Callable[[str], None] = lambda line: None) -> Tokenizer | None:
    """The tokenizer of a name in a folder; None where there is none. A damaged one is named."""
    for file in sorted(folder.glob(f"{name}-*.json")):
        if file.stem == f"{name}-{disk.sha256_file(file)[:16]}":
            return Tokenizer.load(file)
        notify(f"tokenizer  {file} is damaged (SHA-256): learning it again")
    return None


def training_texts(texts: list[Text]) -> Iterator[str]:
    """Train documents of all sources, TRAINING_BYTES of them: the same share of each, from its beginning."""
    for text in texts:
        split, taken = text.split(), 0
        for _, document in text.source.documents():
            for side, content in split(document):
                if side == "train":
                    taken += len(content.encode())
                    yield content
            if taken >= TRAINING_BYTES // len(texts):
                break


def _prepare(
    what: Text | Shards, tokenizer: Tokenizer, config: TokenizerConfig, cache_dir: Path, notify: Callable[[str], None]
) -> Path:
    facts = _facts(what, tokenizer, config)
    folder = cache_dir / f"{what.config.name}-{facts['hash'][:16]}"
    prepare(folder, lambda part: what.fill(part, tokenizer, facts, notify), tokenizer, facts, notify)
    return folder


def _facts(what: Text | Shards, tokenizer: Tokenizer, config: TokenizerConfig) -> dict[str, Any]:
    fraction = what.config.val_fraction
    return {
        "source": what.config.name,
        "hash": _hash([CACHE_FORMAT, what.fingerprint, fraction, tokenizer.sha256]),
        "val_fraction": fraction,
        "tokenizer": {"name": config.name, "vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256},
    }


def _unprepared(text: Text, tokenizer: Tokenizer, config: TokenizerConfig, notify: Callable[[str], None]) -> Corpus:
    data, source, split = text.config, text.source, text.split()
    texts: list[str] = []
    taken = 0
    for _, document in (source.held_out or source).documents():
        texts += [part for side, part in split(document) if side == "val" or source.held_out is not None]
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
    manifest = _facts(text, tokenizer, config) | {"prepared": False}
    notify(
        f"data       {data.name} {manifest['hash'][:8]}: trained on as it comes, in its own order, whatever the seed; "
        f"{len(tokens):,} validation tokens from the first {taken / 1e6:.1f} MB"
    )
    trained_on = replace(source, held_out=None)
    if source.held_out is not None:  # none of its documents is held out
        split = Split(data.val_fraction, threshold=0)
    notify("           nothing is kept: a resumed run reads everything again from the beginning")
    return Corpus((Part(data.name, None, 1.0, Unprepared(trained_on, split, tokenizer), val),), tokenizer, manifest)


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


def _notes(manifest: dict[str, Any]) -> list[str]:
    """What a person should know about a prepared source, each time."""
    if "notes" in manifest:
        return list(manifest["notes"])
    older = [str(manifest["note"])] if manifest.get("note") else []
    share, fraction = manifest["val"]["bytes"] / manifest["bytes"], manifest["val_fraction"]
    if not is_fair(share, fraction):
        remedy = "an older version prepared it; remove its folder in data.cache_dir to split it anew"
        why = BY_NAME if manifest["source"] == "stdlib" else remedy
        older.append(f"validation has {share:.1%} of the text, not data.val_fraction={fraction:.1%}: {why}")
    return older


def _summary(manifest: dict[str, Any]) -> str:
    return (
        f"data       {manifest['source']} {manifest['hash'][:8]}: {manifest['documents']:,} documents, "
        f"{manifest['bytes'] / 1e6:.1f} MB, {manifest['train']['tokens']:,} train and {manifest['val']['tokens']:,} "
        f"validation tokens; {manifest['long_documents']:,} documents over {LONG_DOCUMENT_TOKENS:,} tokens"
    )
