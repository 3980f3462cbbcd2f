"""Byte-level byte-pair encoding (Sennrich et al. 2016; bytes as in GPT-2): any text becomes tokens and comes back."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from data import disk
from data.files import expand

SEPARATOR = "<|endoftext|>"
SEPARATORS = (SEPARATOR, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
"""How the end of a text is called in the tokenizers there are: ours, Llama 3's, Llama 2's and Mistral's, Gemma's."""
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")

# How text is cut before merging, in the manner of GPT-4: contractions, words with one leading mark or space, numbers
# of up to three digits, punctuation with the line ends after it, line ends with the blanks before them, other blanks.
SPLIT_PATTERN = (
    r"(?i:'(?:[sdmt]|ll|ve|re))"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)

# Where text can be cut and yield the same tokens: between words, and after a line. So it is with SPLIT_PATTERN and with
# what the tokenizers of GPT-2, Llama 3, Qwen and others split by; `_can_be_cut` looks.
SAFE_CUT = re.compile(r"[^\W\d_](?= [^\W\d_])|(?<=\S)\n(?=[^\W\d_])")
CUT_EXAMPLE = ("word", " word.\n", "word", " word\n", "word")
PIECE_CHARS = 32_768

# What SPLIT_PATTERN takes for one word, however long: letters, marks, white space.
WORD = re.compile(r"[^\W\d_]+|(?:[^\w\s]|_)+|\s+")
LONG_WORD, WORD_PART = 256, 64
LONG_WORDS = re.compile(
    rf"(?<![^\W\d_])[^\W\d_]{{{LONG_WORD},}}|(?<![^\w\s])(?<!_)(?:[^\w\s]|_){{{LONG_WORD},}}|(?<!\s)\s{{{LONG_WORD},}}"
)
LONG_WORDS_CHARS = 2**20
# An encoded token costs about 100 bytes until its id is taken out: a batch of 8M characters, some 200 MB.
BATCH_PIECES = 256


class Tokenizer:
    """Text ↔ token ids. Id `separator_id` marks the beginning of a document and is never produced from text."""

    def __init__(self, backend: tokenizers.Tokenizer, separator: str = SEPARATOR) -> None:
        # Not part of the saved file: without it "<|endoftext|>" inside a document would become the separator.
        backend.encode_special_tokens = True
        backend.no_padding()
        backend.no_truncation()
        separator_id = backend.token_to_id(separator)
        assert separator_id is not None
        self._backend, self.separator, self.separator_id = backend, separator, separator_id

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn at most `vocab_size` tokens (fewer where the text is small). The same texts give the same tokenizer."""
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[SEPARATOR],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend = _byte_level(models.BPE(), split=True)
        pieces = (piece for text in texts for piece in _pieces(text))
        backend.train_from_iterator(shorten_words(pieces), trainer)
        return cls(backend)

    @classmethod
    def of_bytes(cls) -> Tokenizer:
        """Ids 1 to 256 are the bytes, and 0 is the separator."""
        backend = _byte_level(models.BPE(byte_vocabulary(), []), split=False)
        backend.add_special_tokens([SEPARATOR])
        return BytesTokenizer(backend)

    @property
    def vocab_size(self) -> int:
        """Number of token ids, the separator included."""
        return max(self._backend.get_vocab().values()) + 1  # some files leave ids out

    @cached_property
    def sha256(self) -> str:
        """Of all that decides which ids a text has."""
        return disk.sha256(f"{self.separator}\n{self._backend.to_str()}")

    @property
    def dtype(self) -> np.dtype:
        """The smallest unsigned integer type that holds every id."""
        return np.min_scalar_type(self.vocab_size - 1)

    def encode(self, text: str) -> list[int]:
        """Token ids of one text, without a separator."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of many texts, in parallel: one array (tokens,) of `dtype` each, without separators.

        Memory beyond the texts and the result is bounded, however long a text is, and all cores work on it, where it
        can be cut without changing its tokens: almost always; not with SentencePiece's tokenizers.
        """
        dtype = self.dtype
        ids: list[list[np.ndarray]] = [[np.empty(0, dtype)] for _ in texts]
        cut = _pieces if self._can_be_cut else _whole
        pieces = ((index, piece) for index, text in enumerate(texts) for piece in cut(text))
        while batch := list(islice(pieces, BATCH_PIECES)):
            encodings = self._backend.encode_batch_fast([piece for _, piece in batch], add_special_tokens=False)
            for (index, _), encoding in zip(batch, encodings, strict=True):
                ids[index].append(np.array(encoding.ids, dtype))
        return [np.concatenate(parts) for parts in ids]

    @cached_property
    def _can_be_cut(self) -> bool:
        """Whether the tokenizer splits at every `SAFE_CUT` before anything else, whatever is on the other side."""
        splitter, whole = self._backend.pre_tokenizer, "".join(CUT_EXAMPLE)
        if splitter is None:
            return False
        spans = [span for _, span in splitter.pre_tokenize_str(whole)]
        cuts = list(accumulate(map(len, CUT_EXAMPLE)))[:-1]
        if any(begin < cut < end for begin, end in spans for cut in cuts):
            return False
        return self.encode(whole) == [token for piece in CUT_EXAMPLE for token in self.encode(piece)]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of token ids; separators show as <|endoftext|>, and bytes that are not UTF-8 as U+FFFD."""
        return self._backend.decode([int(token) for token in ids], skip_special_tokens=False)

    def count_bytes(self, tokens: np.ndarray, targets: np.ndarray) -> int:
        """UTF-8 bytes of the text that targets stand for, for bits per byte.

        Args:
            tokens, targets: integers of one shape; targets[…, t] follows tokens[…, t]. Negative targets are none.
        """
        are_tokens = targets >= 0
        # What a tokenizer writes before a text, as SentencePiece's do a space, is not the text's.
        begun = (tokens == self.separator_id) & are_tokens & (targets != self.separator_id)
        prefix_bytes = int(self.token_bytes[self.encode("a")].sum()) - 1
        return int(self.token_bytes[targets[are_tokens]].sum()) - prefix_bytes * int(begun.sum())

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """(vocab_size,) int64: UTF-8 bytes each token stands for within a text, 0 for the separator."""
        bytes_V = np.zeros(self.vocab_size, np.int64)
        # Where text becomes bytes first, a token is written with one character per byte; elsewhere as its text, with
        # marks for spaces and word pieces that only the decoder knows, and with <0x0A> for a byte that is no text.
        written_in_bytes = _uses(json.loads(self._backend.to_str()), "ByteLevel")
        anchor = self._anchor()
        before = len(self.decode(anchor).encode())
        for token, token_id in self._backend.get_vocab().items():
            if written_in_bytes:
                bytes_V[token_id] = len(token)
            elif BYTE_TOKEN.fullmatch(token):
                bytes_V[token_id] = 1
            else:
                bytes_V[token_id] = max(0, len(self.decode([*anchor, token_id]).encode()) - before)
        for token_id, added in self._backend.get_added_tokens_decoder().items():
            bytes_V[token_id] = 0 if added.special else len(added.content.encode())
        return bytes_V

    def _anchor(self) -> list[int]:
        """Tokens that a token can follow in the middle of a text: decoders treat the first one differently."""
        return self.encode("a a")[-1:] or [self.separator_id]

    def to_json(self) -> str:
        """What `load` reads."""
        return self._backend.to_str(pretty=True)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one JSON file, complete or not at all."""
        disk.write_whole(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str], separator: str | None = None) -> Tokenizer:
        """Read a tokenizer.json: what `save` wrote, or another of the `tokenizers` library.

        Args:
            separator: the token between documents; None: one of `SEPARATORS` that the file has.
        Raises:
            ValueError: the file is missing, is no tokenizer, or has no such token.
        """
        try:
            backend = tokenizers.Tokenizer.from_str(expand(os.fspath(path)).read_text(encoding="utf-8"))
        except Exception as error:  # the backend raises bare Exception
            raise ValueError(f"cannot read the tokenizer {path}: {error}; name a tokenizer.json") from error
        return cls.wrap(backend, str(path), separator)

    @classmethod
    def wrap(cls, backend: tokenizers.Tokenizer, where: str, separator: str | None) -> Tokenizer:
        """A tokenizer of the library's; see `load`."""
        known = [token for token in SEPARATORS if backend.token_to_id(token) is not None]
        if separator is None and not known:
            raise ValueError(
                f"{where} has none of {', '.join(SEPARATORS)}: name its end of text, tokenizer.separator=…"
            )
        separator = separator or known[0]
        if backend.token_to_id(separator) is None:
            hint = f", for example {known[0]}" if known else ""
            raise ValueError(f"{where} has no token {separator!r}: set tokenizer.separator to one that it has{hint}")
        backend.add_special_tokens([separator])  # in case the file calls it an ordinary one, which text could write
        kind = BytesTokenizer if backend.get_vocab() == byte_vocabulary() else cls
        tokenizer = kind(backend, separator)
        if tokenizer.separator_id in tokenizer.encode(separator):
            raise ValueError(
                f"{where} makes {separator!r} of text that says so: set tokenizer.separator to another token"
            )
        return tokenizer


def shorten_words(texts: Iterable[str]) -> Iterator[str]:
    """The texts, with words of `LONG_WORD` and more characters in parts: to learn from a word takes time that grows
    with the square of its length. Of all such words `LONG_WORDS_CHARS` characters are kept, the others left out."""
    half, room = LONG_WORD // 2, LONG_WORDS_CHARS
    for text in texts:
        # A long word fills a piece between two multiples of half its least length: most texts are done with here.
        if not any(WORD.fullmatch(text, at, at + half) for at in range(0, len(text) - half + 1, half)):
            yield text
            continue
        begin = 0
        for word in LONG_WORDS.finditer(text):
            yield text[begin : word.start()]
            end = min(word.end(), word.start() + room)
            for at in range(word.start(), end, WORD_PART):
                yield text[at : min(end, at + WORD_PART)]
            room -= end - word.start()
            begin = word.end()
        yield text[begin:]


class BytesTokenizer(Tokenizer):
    """`Tokenizer.of_bytes`, without asking the backend, which would look for merges."""

    def encode(self, text: str) -> list[int]:
        return [1 + byte for byte in text.encode()]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(self.dtype) + self.dtype.type(1) for text in texts]


def byte_vocabulary() -> dict[str, int]:
    """The separator, and after it the 256 bytes as ByteLevel writes them."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte if byte in printable else 256 + others.index(byte)) for byte in range(256)}
    return {SEPARATOR: 0, **{characters[byte]: 1 + byte for byte in range(256)}}


def _byte_level(model: models.Model, split: bool) -> tokenizers.Tokenizer:
    """A tokenizer whose alphabet is bytes."""
    backend = tokenizers.Tokenizer(model)
    by_byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, by_byte]) if split else by_byte
    backend.decoder = decoders.ByteLevel()
    return backend


def _whole(text: str) -> Iterator[str]:
    yield text


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces of about PIECE_CHARS characters that encode to the same tokens as the whole."""
    start = 0
    while (cut := SAFE_CUT.search(text, start + PIECE_CHARS)) is not None:
        yield text[start : cut.end()]
        start = cut.end()
    yield text[start:]


def _uses(settings: Any, kind: str) -> bool:
    """Whether a tokenizer.json names a step of a kind among its steps."""
    steps = [settings.get(name) for name in ("pre_tokenizer", "decoder")]
    while steps:
        step = steps.pop()
        if isinstance(step, dict):
            if step.get("type") == kind:
                return True
            steps += step.get("pretokenizers", []) + step.get("decoders", [])
    return False
