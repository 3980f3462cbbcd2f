"""Whether a tokenizer gives back what it reads."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence

from data.tokenizer import Tokenizer


class RoundTrip:
    """What a tokenizer loses of a text, seen at samples of it."""

    SAMPLES, SAMPLE_CHARS = 64, 1000  # of each batch: less than 1 % of it
    MOST_LOST = 0.001
    ENOUGH_CHARS = 20_000

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.characters, self.lost = 0, Counter[str]()

    def add(self, texts: Sequence[str]) -> None:
        """Look at samples of some texts.

        Raises:
            ValueError: more than `MOST_LOST` of the characters do not come back.
        """
        samples = list(self._samples(texts))
        for text, ids in zip(samples, self.tokenizer.encode_batch(samples), strict=True):
            # What is written in two ways may come back in the other one.
            before, after = (unicodedata.normalize("NFC", each) for each in (text, self.tokenizer.decode(ids)))
            self.characters += len(before)
            if before != after:
                self.lost += Counter(before) - Counter(after)
        if self.characters >= self.ENOUGH_CHARS:
            self.finish()

    def finish(self) -> str | None:
        """What is lost, in one line; None where nothing is.

        Raises:
            ValueError: it is too much.
        """
        if not self.lost:
            return None
        share = self.lost.total() / self.characters
        most = " ".join(repr(character) for character, _ in self.lost.most_common(5))
        if share > self.MOST_LOST:
            raise ValueError(
                f"the tokenizer loses {share:.1%} of the characters of this text, most often {most}: "
                f"set tokenizer.path to one that gives back what it reads, or use tokenizer=bpe"
            )
        return f"the tokenizer does not give back {share:.4%} of the characters, most often {most}"

    def _samples(self, texts: Sequence[str]) -> Iterator[str]:
        """Pieces at even distances."""
        step = max(self.SAMPLE_CHARS, sum(map(len, texts)) // self.SAMPLES)
        at = 0
        for text in texts:
            while at < len(text):
                yield text[at : at + self.SAMPLE_CHARS]
                at += step
            at -= len(text)
