from __future__ import annotations

import pytest

from data.sources import Document, Source
from data.split import choose_split, is_fair


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
    assert not choose_split(source_of(*texts), 0.1).cuts_all


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
    assert choose_split(source_of(text), 0.1).cuts_all


def test_a_text_without_line_ends_is_cut_at_the_fraction():
    (train,), (val,) = sides(["ab\n" + "x" * 997], 0.1)
    assert (len(train), len(val)) == (900, 100)


def test_no_text_at_all_is_an_error():
    with pytest.raises(ValueError, match="no text in a test: every document is empty"):
        choose_split(source_of(" \n", ""), 0.05)


def prose(size, seed):
    """Lines of text, `size` bytes of them."""
    return "".join(f"line {number} of text {seed}\n" for number in range(size // 15))[:size]


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.3])
@pytest.mark.parametrize(
    "sizes",
    [
        [1_000_000, 1000],  # a book and a letter
        [1000, 1_000_000],
        [1_000_000] + [500] * 400,
        [400_000, 300_000, 200_000] + [20_000] * 20,
        [10**6 // (rank + 1) for rank in range(200)],
        [30_000] * 7,
        [30_000],
    ],
)
def test_the_held_out_share_is_within_a_factor_of_two_whatever_the_sizes(sizes, fraction):
    texts = [prose(size, seed) for seed, size in enumerate(sizes)]
    train, val = sides(texts, fraction)
    share = sum(map(len, val)) / sum(map(len, texts))
    assert is_fair(share, fraction)
    assert sum(map(len, train)) + sum(map(len, val)) == sum(map(len, texts))


def test_a_split_that_is_fair_by_hash_is_the_one_it_always_was():
    texts = [f"text of {i}\n" for i in range(1000)]
    whole = choose_split(source_of(*texts), 0.1)
    assert (whole.threshold, whole.cut_above) == (0.1, float("inf"))
    uneven = choose_split(source_of(prose(10**6, 0), *texts), 0.1)
    assert uneven.cut_above < 10**6
    assert len(list(uneven(Document("", prose(10**6, 0))))) == 2
    assert len(list(uneven(Document("", texts[0])))) == 1


def test_copies_that_no_split_of_whole_documents_suits_give_their_ends():
    texts = [prose(2000, 1)] * 90 + [prose(2000, 2)] * 10
    for fraction in (0.05, 0.3):
        _, val = sides(texts, fraction)
        assert is_fair(sum(map(len, val)) / sum(map(len, texts)), fraction)


def test_what_has_keys_is_split_by_them_whatever_the_sizes():
    documents = [Document(str(i), prose(10**6 if i == 3 else 100, i), key=str(i)) for i in range(60)]
    split = choose_split(Source("a test", "", [lambda: iter(documents)]), 0.05)
    assert (split.threshold, split.cut_above) == (0.05, float("inf"))


def test_of_a_stream_only_the_beginning_is_read_to_choose_a_split(monkeypatch):
    monkeypatch.setattr("data.split.STREAM_BYTES", 5000)
    read = []

    def documents():
        for number in range(1000):
            read.append(number)
            yield Document(str(number), prose(100, number))

    split = choose_split(Source("a test", "", [documents], streamed=True), 0.1)
    assert split.threshold == 0.1
    assert len(read) == 50


def test_text_to_validate_on_is_all_held_out_and_nothing_else_is():
    own = source_of(*(f"text {i}" for i in range(50)))
    source = own.validated_on(source_of(*(f"held out {i}" for i in range(9))))
    split = choose_split(source, 0.5)
    found = [(side, text) for _, document in source.documents() for side, text in split(document)]
    assert [side for side, _ in found] == ["train"] * 50 + ["val"] * 9
    assert all(text.startswith("held out") for side, text in found if side == "val")
    assert [part for part, _ in source.documents(1)] == [1] * 9
    assert source.fingerprint not in (own.fingerprint, "")
