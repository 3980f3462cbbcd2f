"""Text comes in whole characters, and ends before a stop string; nothing is lost or said twice."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.tokenizer import SEPARATOR, Tokenizer
from model.config import ModelConfig
from model.generate import Generator
from model.generate_config import SamplingConfig
from model.text import MOST_HELD, Continuation, encode, write

TINY = ModelConfig(name="tiny", n_layers=2, n_heads=4, n_kv_heads=2, dim=64, ffn_dim=96, vocab_size=257)
BYTES = Tokenizer.of_bytes()
WORDS = Tokenizer.train(["a café, ein Gespräch, 日本語のテキスト 👩‍👩‍👧 and more words"] * 4, vocab_size=300)


def pieces(tokenizer: Tokenizer, ids: list[int], stops: tuple[str, ...] = ()) -> list[str]:
    """What each token gives, until the row is stopped; last, what was held back."""
    continuation = Continuation(tokenizer, [tokenizer.separator_id, 5, 6], stops)
    given_out = []
    for token in ids:
        given_out.append(continuation.add(token))
        if continuation.is_stopped:
            return given_out
    return [*given_out, continuation.rest()]


@pytest.mark.parametrize("tokenizer", [BYTES, WORDS], ids=["bytes", "words"])
@given(text=st.text(max_size=30))
def test_the_pieces_are_the_text_and_none_ends_within_a_character(tokenizer, text):
    found = pieces(tokenizer, tokenizer.encode(text))
    assert "".join(found) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in found)


@given(ids=st.lists(st.integers(1, 256), max_size=40))
def test_bytes_that_are_no_characters_come_all_the_same(ids):
    assert "".join(pieces(BYTES, ids)) == BYTES.decode(ids)
    waited = 0
    for piece in pieces(BYTES, ids)[:-1]:
        waited = 0 if piece else waited + 1
        assert waited < MOST_HELD


@given(text=st.text("abc", max_size=30), stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_stop_string_that_is_complete_first(text, stops):
    found = pieces(BYTES, BYTES.encode(text), tuple(stops))
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert "".join(found) == text
        return
    seen = text[: min(ends)]
    assert "".join(found) == seen[: min(seen.find(stop) for stop in stops if stop in seen)]
    assert len(found) == min(ends), "no token is asked for once the string is complete"


def test_only_what_may_begin_a_stop_string_waits():
    assert pieces(BYTES, BYTES.encode("ab\nabc\n\nd"), ("\n\n",)) == ["a", "b", "", "\na", "b", "c", "", ""]


def test_a_decoder_that_drops_a_leading_space_does_not_join_words():
    @dataclass
    class Marked:
        """As SentencePiece's decoders: ▁ is a space, but none begins a text."""

        separator_id: int = 0

        def encode(self, text: str) -> list[int]:
            return [1 + ord(char) for char in text]

        def decode(self, ids) -> str:
            return "".join(chr(i - 1) if i else "" for i in ids).replace("▁", " ").removeprefix(" ")

    tokenizer = Marked()
    assert pieces(tokenizer, tokenizer.encode("▁two▁words")) == [*" two words", ""]


# write


@pytest.fixture
def scripted(monkeypatch):
    """A generator whose rows say what they are told."""

    def of(*texts: str) -> Generator:
        rows = [[*BYTES.encode(text)] for text in texts]

        def stream(self, prompts, num_tokens, seed):
            for step in range(num_tokens):
                yield [row[step] if step < len(row) else BYTES.separator_id for row in rows]

        monkeypatch.setattr(Generator, "stream", stream)
        return object.__new__(Generator)

    return of


def test_each_row_ends_by_itself_and_says_why(scripted):
    generator = scripted("one", "two STOP more", "three is long")
    said, ends = ["", "", ""], {}
    for piece in write(generator, BYTES, [[0], [0], [0]], 10, stops=["STOP"]):
        said[piece.row] += piece.text
        if piece.finish:
            assert piece.row not in ends
            ends[piece.row] = (piece.finish, piece.num_tokens)
    assert said == ["one", "two ", "three is l"]
    assert ends == {0: ("stop", 3), 1: ("stop", 8), 2: ("length", 10)}


def test_what_was_held_back_comes_at_the_end(scripted):
    assert [piece.text for piece in write(scripted("ab\n"), BYTES, [[0]], 10, stops=["\n\n"])] == ["a", "b", "\n"]
    assert [piece.text for piece in write(scripted("ab\n"), BYTES, [[0]], 3, stops=["\n\n"])] == ["a", "b", "\n"]


def test_a_separator_in_a_prompt_is_text():
    assert encode(BYTES, SEPARATOR)[0] == BYTES.separator_id
    assert BYTES.separator_id not in encode(BYTES, SEPARATOR)[1:]


def test_a_model_writes(build_lively):
    generator = Generator(build_lively(TINY), 2, 60, SamplingConfig())
    for _ in range(2):
        texts = ["", ""]
        for piece in write(generator, BYTES, [encode(BYTES, "def"), encode(BYTES, "class A")], 30, seed=1):
            texts[piece.row] += piece.text
        assert all(texts)
