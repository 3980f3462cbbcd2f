"""Byte-level byte-pair encoding (Sennrich et al. 2016; bytes as in GPT-2): any text becomes tokens and comes back."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

SEPARATOR = "<|endoftext|>"

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

# SPLIT_PATTERN never joins a line end to a non-blank after it, so text cut there yields the same tokens.
SAFE_CUT = re.compile(r"\n(?=\S)")
PIECE_CHARS = 32_768
# An encoded token costs about 100 bytes until its id is taken out: a batch of 8M characters, some 200 MB.
BATCH_PIECES = 256


class Tokenizer:
    """Text ↔ token ids. Id `separator_id` marks the beginning of a document and is never produced from text."""

    separator_id = 0

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        # Not part of the saved file: without it "<|endoftext|>" inside a document would become the separator.
        backend.encode_special_tokens = True
        self._backend = backend

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn at most `vocab_size` tokens (fewer where the text is small). The same texts give the same tokenizer."""
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[SEPARATOR],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator((piece for text in texts for piece in _pieces(text)), trainer)
        return cls(backend)

    @property
    def vocab_size(self) -> int:
        """Number of token ids, the separator included."""
        return self._backend.get_vocab_size()

    @property
    def dtype(self) -> np.dtype:
        """The smallest unsigned integer type that holds every id."""
        return np.min_scalar_type(self.vocab_size - 1)

    def encode(self, text: str) -> list[int]:
        """Token ids of one text, without a separator."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of many texts, in parallel: one array (tokens,) of `dtype` each, without separators.

        Memory beyond the texts and the result is bounded, however long a text is.
        """
        ids: list[list[np.ndarray]] = [[np.empty(0, self.dtype)] for _ in texts]
        pieces = ((index, piece) for index, text in enumerate(texts) for piece in _pieces(text))
        while batch := list(islice(pieces, BATCH_PIECES)):
            encodings = self._backend.encode_batch_fast([piece for _, piece in batch], add_special_tokens=False)
            for (index, _), encoding in zip(batch, encodings, strict=True):
                ids[index].append(np.array(encoding.ids, self.dtype))
        return [np.concatenate(parts) for parts in ids]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of token ids; separators show as <|endoftext|>, and bytes that are not UTF-8 as U+FFFD."""
        return self._backend.decode([int(token) for token in ids], skip_special_tokens=False)

    def token_bytes(self) -> np.ndarray:
        """(vocab_size,) int32: UTF-8 bytes each token stands for, 0 for the separator. For exact bits per byte."""
        bytes_V = np.zeros(self.vocab_size, np.int32)
        for token, token_id in self._backend.get_vocab().items():
            bytes_V[token_id] = len(token)  # a byte-level token is written with one character per byte
        bytes_V[self.separator_id] = 0
        return bytes_V

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one JSON file, complete or not at all."""
        path = Path(path)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        part.write_text(self._backend.to_str(pretty=True), encoding="utf-8")
        part.replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is missing or is no tokenizer of ours.
        """
        try:
            backend = tokenizers.Tokenizer.from_str(Path(path).read_text(encoding="utf-8"))
        except Exception as error:  # the backend raises bare Exception
            raise ValueError(f"cannot read the tokenizer {path}: {error}") from error
        if backend.token_to_id(SEPARATOR) != cls.separator_id:
            raise ValueError(f"the tokenizer {path} is not ours: {SEPARATOR} must be token {cls.separator_id}")
        return cls(backend)


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces of about PIECE_CHARS characters that encode to the same tokens as the whole."""
    start = 0
    while (cut := SAFE_CUT.search(text, start + PIECE_CHARS)) is not None:
        yield text[start : cut.end()]
        start = cut.end()
    yield text[start:]
