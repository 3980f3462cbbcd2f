"""Text in, text out: prompts continued as text that comes in pieces, whole characters at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from .generate import Generator

UNFINISHED = "\ufffd"
"""What a decoder writes for bytes that are not, or not yet, a character."""
MOST_HELD = 8
"""Tokens after which unfinished bytes are taken for what they are: no character has more than 4."""


class Tokenizer(Protocol):
    """What generation needs of a tokenizer."""

    separator_id: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class Piece:
    """What one row has come to say since its last piece."""

    row: int
    text: str
    num_tokens: int
    """Of the continuation so far."""
    finish: str = ""
    """Of the last piece why the row ends: "stop" (a stop string, or the end of a document) or "length"."""


class Continuation:
    """The text of one row's tokens, held back while it may still become another.

    A token may be a part of a character, so only text that further tokens cannot change is given out; and nothing from
    a stop string on, so what may be the beginning of one waits.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, [stop for stop in stops if stop]
        self.num_tokens = 0
        self.is_stopped = False
        # A decoder may treat its first token as the beginning of a text: so it is given some of those before.
        self._ids = list(prompt[-MOST_HELD:])
        self._begin, self._read = 0, len(self._ids)
        self._held = ""

    def add(self, token: int) -> str:
        """The text that is certain now; "" while nothing new is."""
        self.num_tokens += 1
        self._ids.append(token)
        before = self.tokenizer.decode(self._ids[self._begin : self._read])
        now = self.tokenizer.decode(self._ids[self._begin :])
        if now.endswith(UNFINISHED) and len(self._ids) - self._read < MOST_HELD:
            return ""
        self._begin, self._read = self._read, len(self._ids)
        return self._release(now[len(before) :])

    def rest(self) -> str:
        """What was held back, once there is no further token."""
        before = self.tokenizer.decode(self._ids[self._begin : self._read])
        text = self._release(self.tokenizer.decode(self._ids[self._begin :])[len(before) :])
        held, self._held = self._held, ""
        return text + held

    def _release(self, text: str) -> str:
        text = self._held + text
        found = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self.is_stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self.stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that `stop` may begin with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def write(
    generator: Generator,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    *,
    seed: int = 0,
    stops: Sequence[str] = (),
) -> Iterator[Piece]:
    """Continue prompts, all of them at once; the last piece of each row says why it ends.

    Args:
        prompts: token ids (see `encode`), at most one for each of the generator's rows.
        stops: strings that end a row, and are not part of its text. The separator ends one as well.
    Raises:
        ValueError: see `Generator.stream`.
    """
    rows = {row: Continuation(tokenizer, prompt, stops) for row, prompt in enumerate(prompts)}
    for tokens in generator.stream(prompts, num_tokens, seed):
        for row, continuation in list(rows.items()):
            is_end = tokens[row] == tokenizer.separator_id
            text = continuation.rest() if is_end else continuation.add(tokens[row])
            finish = "stop" if is_end or continuation.is_stopped else ""
            if not finish and continuation.num_tokens == num_tokens:
                text += continuation.rest()
                finish = "stop" if continuation.is_stopped else "length"
            if text or finish:
                yield Piece(row, text, continuation.num_tokens, finish)
            if finish:
                del rows[row]
        if not rows:
            return


def encode(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """A prompt as a document begins: after a separator."""
    return [tokenizer.separator_id, *tokenizer.encode(prompt)]
