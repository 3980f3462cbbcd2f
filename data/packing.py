"""Rows of a fixed length from token streams, where each row's documents lie, and the order rows are visited in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, Protocol

import numpy as np

from data.corpus import Corpus, TokenStream, Unprepared
from data.prepare import Progressed, batches, tokenize

STREAMED_CHARS = 2**20  # tokenized at once of what was not prepared: a fraction of a second
IGNORE_INDEX = -100
"""As a target: no token, which the loss leaves out."""


class Row(NamedTuple):
    """One training sequence. Token t sees the keys [starts[t], t] and has position t - starts[t] in its document.

    tokens, targets: (S,) int64; targets[t] is the token after tokens[t].
    starts: (S,) int32, nondecreasing, the index in the row of the first token of t's document (0 for a document that
        began in an earlier row); None where rows are read as one continuous text.
    """

    tokens: np.ndarray
    targets: np.ndarray
    starts: np.ndarray | None


class TrainRows(Protocol):
    """What a loader reads: rows in the order of training."""

    seq_len: int

    def at(self, seed: int, position: int) -> Row:
        """The row at a global position of training: a pure function of its arguments."""
        ...

    @property
    def max_documents(self) -> int:
        """The most documents that touch one row, over all rows: the fixed size a row's `cu_seqlens` needs, less one."""
        ...


class Rows(TrainRows, Protocol):
    """Rows that also have an order of their own."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...


def pack(corpus: Corpus, split: str, seq_len: int, document_mask: bool, packing: str = "end_to_end") -> Rows:
    """The rows of a split.

    Raises:
        ValueError: it is too short for one row.
    """
    parts = [(part.weight, PackedRows(getattr(part, split), seq_len, document_mask, packing)) for part in corpus.parts]
    return parts[0][1] if len(parts) == 1 else MixedRows([weight for weight, _ in parts], [rows for _, rows in parts])


def training_rows(corpus: Corpus, seq_len: int, document_mask: bool, packing: str = "end_to_end") -> TrainRows:
    """The rows that are trained on, prepared or not.

    Raises:
        ValueError: there is too little text for one row.
    """
    documents = corpus.parts[0].train
    if isinstance(documents, Unprepared):
        return StreamedRows(documents, seq_len, document_mask)
    return pack(corpus, "train", seq_len, document_mask, packing)


class PackedRows:
    """A stream cut into rows of `seq_len`, each of one or more segments of the stream, and their targets one further.

    packing: "end_to_end": row i is [i·S, i·S + S), every token an input once, save the tail that fills no row.
        "best_fit": documents are cut as little as possible; see `best_fit`.

    Raises:
        ValueError: the stream is too short for one row.
    """

    def __init__(self, stream: TokenStream, seq_len: int, document_mask: bool, packing: str = "end_to_end") -> None:
        self.stream, self.seq_len, self.document_mask = stream, seq_len, document_mask
        self.segments: Segments | None = best_fit(stream, seq_len) if packing == "best_fit" else None
        self._last_order: tuple[tuple[int, int], np.ndarray] | None = None
        """(seed, epoch), and that epoch's order of rows: sorting millions of rows takes a while."""
        if len(self) < 1:
            raise ValueError(
                f"seq_len={seq_len} needs at least {seq_len + 1} tokens and the text to train on has only "
                f"{len(stream.tokens)}: lower seq_len, add text, or change data.val_fraction"
            )

    def __len__(self) -> int:
        if self.segments is not None:
            return len(self.segments.rows) - 1
        return (len(self.stream.tokens) - 1) // self.seq_len

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        if self.segments is not None:
            return self._of_segments(self.segments.of_row(index))
        begin, end = index * self.seq_len, (index + 1) * self.seq_len
        tokens = self.stream.tokens[begin : end + 1].astype(np.int64)
        return Row(tokens[:-1], tokens[1:], self._starts(begin, end) if self.document_mask else None)

    def at(self, seed: int, position: int) -> Row:
        epoch, place = divmod(position, len(self))
        kept = self._last_order
        if kept is None or kept[0] != (seed, epoch):
            self._last_order = kept = (seed, epoch), row_order(seed, epoch, len(self))
        return self[int(kept[1][place])]

    def _of_segments(self, segments: np.ndarray) -> Row:
        stream = self.stream.tokens
        tokens = np.concatenate([stream[begin:end] for begin, end in segments]).astype(np.int64)
        targets = np.empty_like(tokens)
        targets[:-1] = tokens[1:]
        lengths = segments[:, 1] - segments[:, 0]
        # After a segment's last token comes what the stream has there; after the stream's, another separator.
        last = np.cumsum(lengths) - 1
        targets[last] = np.where(segments[:, 1] < len(stream), stream[segments[:, 1] % len(stream)], stream[0])
        starts = np.repeat((last + 1 - lengths).astype(np.int32), lengths)
        return Row(tokens, targets, starts if self.document_mask else None)

    def _starts(self, begin: int, end: int) -> np.ndarray:
        first, last = self._documents(begin, end)
        starts_D = np.maximum(self.stream.document_starts[first:last] - begin, 0)
        lengths_D = np.diff(starts_D, append=end - begin)
        return np.repeat(starts_D.astype(np.int32), lengths_D)

    def _documents(self, begin: int | np.ndarray, end: int | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First and one past the last document that has tokens in [begin, end)."""
        starts = self.stream.document_starts
        return np.searchsorted(starts, begin, side="right") - 1, np.searchsorted(starts, end, side="left")

    @property
    def max_documents(self) -> int:
        if not self.document_mask:
            return 1
        if self.segments is not None:
            return int(np.diff(self.segments.rows).max())
        begin = np.arange(len(self)) * self.seq_len
        first, last = self._documents(begin, begin + self.seq_len)
        return int((last - first).max())

    @property
    def cut_fraction(self) -> float:
        """Of the tokens in documents that would fit into a row, the share that lies in another row than its document's
        beginning, and so cannot see it."""
        lengths, starts = self.stream.document_lengths, np.asarray(self.stream.document_starts)
        fits = lengths <= self.seq_len
        if self.segments is None:
            next_row = (starts // self.seq_len + 1) * self.seq_len
            away = np.maximum(starts + lengths - next_row, 0)
        else:
            begins, ends = self.segments.ends.T
            document = np.searchsorted(starts, begins, side="right") - 1
            away = np.bincount(document, (ends - begins) * (begins != starts[document]), minlength=len(starts))
        return float(away[fits].sum() / max(1, lengths[fits].sum()))


class StreamedRows:
    """Rows of documents that were not prepared, end to end, in the source's own order, epoch after epoch.

    `at` is a pure function of the position if the source gives the same documents each time, but not a cheap one: it
    reads and tokenizes all that comes before, unless that was asked for just now. Positions should increase.

    Raises:
        ValueError: from `at`, where all documents together are too short for a row.
    """

    def __init__(self, documents: Unprepared, seq_len: int, document_mask: bool) -> None:
        self.documents, self.seq_len, self.document_mask = documents, seq_len, document_mask
        self.max_documents = seq_len if document_mask else 1  # none is known before it is read
        self._rows, self._next = self._read(), 0

    def at(self, seed: int, position: int) -> Row:
        if position < self._next:
            self._rows, self._next = self._read(), 0
        row = next(islice(self._rows, position - self._next, None))
        self._next = position + 1
        return row

    def _read(self) -> Iterator[Row]:
        source, split, tokenizer = self.documents.source, self.documents.split, self.documents.tokenizer
        while True:
            number = 0
            tokens, starts = np.empty(0, tokenizer.dtype), np.empty(0, np.int64)
            for *_, batch in batches(source, split, STREAMED_CHARS, Progressed()):
                texts = [text for side, text in batch if side == "train"]
                if not texts:
                    continue
                more, lengths = tokenize(texts, tokenizer)
                starts = np.append(starts, len(tokens) + np.cumsum(lengths) - lengths)
                tokens = np.append(tokens, more)
                if len(tokens) <= self.seq_len:
                    continue
                rows = PackedRows(TokenStream(tokens, starts), self.seq_len, self.document_mask)
                yield from (rows[index] for index in range(len(rows)))
                number += len(rows)
                # What is left begins with a document, or with the rest of one.
                end = len(rows) * self.seq_len
                tokens, starts = tokens[end:], np.append(0, starts[starts > end] - end)
            if number == 0:
                raise ValueError(
                    f"seq_len={self.seq_len} needs at least {self.seq_len + 1} tokens and "
                    f"{source.where} has only {len(tokens)}: lower seq_len"
                )


@dataclass(frozen=True)
class Segments:
    """Which pieces of a stream make up each row: those numbered [rows[i], rows[i + 1]) of `ends`.

    ends: (segments, 2) int64, the first and one past the last token of each. rows: (rows + 1,) int64.
    """

    ends: np.ndarray
    rows: np.ndarray

    def of_row(self, index: int) -> np.ndarray:
        return self.ends[self.rows[index] : self.rows[index + 1]]


def best_fit(stream: TokenStream, seq_len: int) -> Segments:
    """Fill rows of `seq_len` with documents, cutting as few as possible and padding nothing (after Ding et al. 2024,
    arXiv:2404.10830, who pad).

    Documents that are longer than a row give whole rows, in order, and a rest. Then row after row takes the longest
    piece that fits into what is left of it. Where none does, it takes the end of the longest there is: only those few
    tokens then miss what came before them.
    """
    full: list[tuple[int, int]] = []
    by_length: defaultdict[int, list[int]] = defaultdict(list)
    for begin, length in zip(stream.document_starts.tolist(), stream.document_lengths.tolist(), strict=True):
        whole = length - length % seq_len
        full.extend((first, first + seq_len) for first in range(begin, begin + whole, seq_len))
        if whole < length:
            by_length[length - whole].append(begin + whole)
    segments, rows = full, list(range(len(full) + 1))
    # Bit n is set while there is a piece of n tokens: the longest that fits is found in one look.
    lengths = sum(1 << length for length in by_length)
    for pieces in by_length.values():
        pieces.reverse()  # the first one is taken first
    while lengths:
        gap, row = seq_len, []
        while gap and lengths:
            length = (lengths & ((2 << gap) - 1)).bit_length() - 1
            is_cut = length < 0
            if is_cut:
                length = lengths.bit_length() - 1
            pieces = by_length[length]
            begin = pieces.pop()
            if not pieces:
                lengths &= ~(1 << length)
            taken = min(length, gap)
            row.append((begin + length - taken, begin + length))
            gap -= taken
            if is_cut:
                by_length[length - taken].append(begin)
                lengths |= 1 << (length - taken)
        if gap == 0:  # the last one may not be full
            segments.extend(row)
            rows.append(len(segments))
    return Segments(np.array(segments, np.int64).reshape(-1, 2), np.array(rows, np.int64))


class MixedRows:
    """Rows of several parts, each with its share, spread as evenly as whole rows can be."""

    def __init__(self, weights: Sequence[float], parts: Sequence[PackedRows]) -> None:
        self.parts, self.seq_len = parts, parts[0].seq_len
        # The share of part i among the parts from i on.
        self.shares = [weight / sum(weights[i:]) for i, weight in enumerate(weights)]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, index: int) -> Row:
        part, number = self.locate(index)
        return self.parts[part][number % len(self.parts[part])]

    def at(self, seed: int, position: int) -> Row:
        part, number = self.locate(position)
        # Each part in an order of its own.
        return self.parts[part].at(seed + 1_000_003 * part, number)

    def locate(self, position: int) -> tuple[int, int]:
        """(part, number): a position's part, and how many earlier positions are that part's.

        Of the first n positions ⌊n · share⌋ are the first part's; the others are dealt out likewise.
        """
        for part, share in enumerate(self.shares[:-1]):
            before = int(position * share)
            if int((position + 1) * share) > before:
                return part, before
            position -= before
        return len(self.shares) - 1, position

    @property
    def max_documents(self) -> int:
        return max(rows.max_documents for rows in self.parts)


def row_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """(n,) int64: the order of an epoch's n rows, a pure function of (seed, epoch, n).

    Sorts raw Philox output, which NumPy promises never to change, where it may change `permutation`.
    """
    keys = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(n)
    return np.argsort(keys, kind="stable")
