from __future__ import annotations

import pytest

from data.sources import Document, Source
from data.split import choose_split, cuts_tails


def source_of(*texts):
    return Source("a test", "", [lambda: (Document(str(i), text) for i, text in enumerate(texts))])


def sides(texts, fraction):
    split = choose_split(source_of(*texts), fraction)
    found = [pair for text in texts for pair in split(Document("", text))]
    return [text for side, text in found if side == "train"], [text for side, text in found if side == "val"]


def test_split_holds_out_whole_documents_and_loses_none():
    texts = [f"text of {i}\n" for i in range(1000)]
    train, val = sides(texts, 0.1)
    assert not set(train) & set(val)
    assert sorted(train + val) == sorted(texts)
    assert 60 < len(val) < 140
    assert not cuts_tails(choose_split(source_of(*texts), 0.1))


def test_split_of_a_document_does_not_depend_on_the_others():
    texts = [f"text of {i}\n" for i in range(1000)]
    assert sides(texts[::-1], 0.1)[1] == sides(texts, 0.1)[1][::-1]
    assert set(sides(texts[:500], 0.1)[1]) < set(sides(texts, 0.1)[1])


def test_copies_of_a_text_are_on_one_side():
    train, val = sides([f"text of {i % 400}\n" for i in range(800)], 0.3)
    assert not set(train) & set(val)
    assert len(train) + len(val) == 800


def test_a_single_document_is_cut_at_a_line_end():
    text = "".join(f"line {i}\n" for i in range(100))
    (train,), (val,) = sides([text], 0.1)
    assert train + val == text
    assert train.endswith("\n")
    assert 0.1 <= len(val) / len(text) <= 0.2
    assert cuts_tails(choose_split(source_of(text), 0.1))


def test_a_text_without_line_ends_is_cut_at_the_fraction():
    (train,), (val,) = sides(["ab\n" + "x" * 997], 0.1)
    assert (len(train), len(val)) == (900, 100)


def test_no_text_at_all_is_an_error():
    with pytest.raises(ValueError, match="no text in a test: every document is empty"):
        choose_split(source_of(" \n", ""), 0.05)
