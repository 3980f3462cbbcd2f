from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import packing
from data.corpus import TokenStream
from data.packing import MixedRows, PackedRows, best_fit, row_order


def stream(*lengths):
    """Documents of the given lengths; token ids count 0, 1, 2, ... so that an id is its place in the stream."""
    ends = np.cumsum(lengths)
    return TokenStream(np.arange(ends[-1], dtype=np.uint16), (ends - lengths).astype(np.int64))


def test_rows_of_three_documents():
    # documents:  0 1 2 | 3 4 5 6 7 8 9 | 10 11 12        rows of 4:  0-3, 4-7, 8-11; token 12 is a target only
    rows = PackedRows(stream(3, 7, 3), seq_len=4, document_mask=True)
    assert [row.tokens.tolist() for row in rows] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert [row.targets.tolist() for row in rows] == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]
    assert [row.starts.tolist() for row in rows] == [[0, 0, 0, 3], [0, 0, 0, 0], [0, 0, 2, 2]]
    assert rows.max_documents == 2
    row = rows[0]
    assert (row.tokens.dtype, row.targets.dtype, row.starts.dtype) == (np.int64, np.int64, np.int32)


def test_a_document_that_begins_with_the_row_or_right_after_it():
    rows = PackedRows(stream(4, 4, 1), seq_len=4, document_mask=True)
    assert [row.starts.tolist() for row in rows] == [[0, 0, 0, 0], [0, 0, 0, 0]]
    assert rows.max_documents == 1


def test_documents_of_one_token():
    rows = PackedRows(stream(1, 1, 1, 1, 1), seq_len=4, document_mask=True)
    assert rows[0].starts.tolist() == [0, 1, 2, 3]
    assert rows.max_documents == 4


def test_without_a_document_mask_a_row_has_no_starts():
    rows = PackedRows(stream(3, 7, 3), seq_len=4, document_mask=False)
    assert rows[0].starts is None
    assert rows.max_documents == 1


def test_the_last_row_needs_its_last_target():
    assert len(PackedRows(stream(8), 4, True)) == 1
    assert len(PackedRows(stream(9), 4, True)) == 2
    with pytest.raises(IndexError):
        PackedRows(stream(9), 4, True)[2]


def test_a_stream_too_short_for_a_row_says_what_to_do():
    with pytest.raises(ValueError, match=r"seq_len=8 needs at least 9 tokens .* only 8: lower seq_len"):
        PackedRows(stream(8), 8, True)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=30), st.integers(1, 16))
def test_starts_agree_with_a_loop_over_tokens(lengths, seq_len):
    if sum(lengths) <= seq_len:
        return
    document = np.repeat(np.arange(len(lengths)), lengths)
    rows = PackedRows(stream(*lengths), seq_len, document_mask=True)
    touched = []
    for i, row in enumerate(rows):
        row_document = document[i * seq_len : (i + 1) * seq_len].tolist()
        assert row.starts.tolist() == [row_document.index(one) for one in row_document]
        touched.append(len(set(row_document)))
    assert rows.max_documents == max(touched)
    inputs = np.concatenate([row.tokens for row in rows])
    np.testing.assert_array_equal(inputs, np.arange(len(rows) * seq_len))


# -------------------------------------------------------------------------------------------------- best fit


def test_best_fit_fills_rows_with_whole_documents_where_it_can():
    # rows of 10 from documents of 6, 25, 4, 3, 3, 9: two full rows of the long one, then 9 and the end of what is left
    rows = PackedRows(stream(6, 25, 4, 3, 3, 9), 10, True, "best_fit")
    assert [row.tolist() for row in best_fit(rows.stream, 10).ends] == [
        [6, 16],
        [16, 26],  # the long document, in order; 26 to 31 is its rest
        *([41, 50], [5, 6]),  # nothing of 1 token is there: the end of the 6
        *([0, 5], [26, 31]),
        *([31, 35], [35, 38], [38, 41]),
    ]
    assert rows[2].tokens.tolist() == [*range(41, 50), 5]
    assert rows[2].targets.tolist() == [*range(42, 50), 0, 6]  # after the stream's last token a separator, which is 0
    assert rows[2].starts.tolist() == [0] * 9 + [9]
    assert rows[4].tokens.tolist() == [31, 32, 33, 34, 35, 36, 37, 38, 39, 40]
    assert rows[4].starts.tolist() == [0, 0, 0, 0, 4, 4, 4, 7, 7, 7]
    assert len(rows) == 5
    assert rows.max_documents == 3
    assert rows.cut_fraction == 1 / 25  # one token of the 6
    assert PackedRows(rows.stream, 10, False, "best_fit")[2].starts is None


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=40), st.integers(1, 16))
def test_best_fit_reads_every_token_once_but_the_last_rows_and_predicts_what_follows(lengths, seq_len):
    if sum(lengths) < seq_len:
        return
    tokens = stream(*lengths)
    document = np.repeat(np.arange(len(lengths)), lengths)
    rows = PackedRows(tokens, seq_len, True, "best_fit")
    assert len(rows) == sum(lengths) // seq_len
    inputs = np.concatenate([row.tokens for row in rows])
    assert len(np.unique(inputs)) == len(inputs) == len(rows) * seq_len
    for row in rows:
        follows = np.where(row.tokens + 1 < sum(lengths), row.tokens + 1, 0)
        np.testing.assert_array_equal(row.targets, follows)
        # A segment is a stretch of one document.
        for begin, end in zip(row.starts, np.arange(seq_len), strict=True):
            assert document[row.tokens[begin]] == document[row.tokens[end]]
            assert row.tokens[end] - row.tokens[begin] == end - begin


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=40),
    st.integers(2, 16),
    st.sampled_from(["end_to_end", "best_fit"]),
)
def test_the_cut_fraction_agrees_with_a_loop_over_tokens(lengths, seq_len, packing):
    if sum(lengths) <= seq_len:
        return
    document = np.repeat(np.arange(len(lengths)), lengths)
    rows = PackedRows(stream(*lengths), seq_len, True, packing)
    if len(rows) * seq_len < sum(lengths):
        return  # the loop below sees whole rows only
    fits = [index for index, length in enumerate(lengths) if length <= seq_len]
    begins = np.cumsum(lengths) - lengths
    row_of = {int(token): number for number, row in enumerate(rows) for token in row.tokens}
    cut = sum(row_of[int(t)] != row_of[int(begins[document[t]])] for t in range(len(document)) if document[t] in fits)
    assert rows.cut_fraction == pytest.approx(cut / max(1, sum(lengths[index] for index in fits)))


def test_best_fit_cuts_far_less_of_real_lengths():
    lengths = np.random.default_rng(0).lognormal(7, 1.2, 3000).astype(int) + 1
    end_to_end, best = (PackedRows(stream_of(lengths), 4096, True, packing) for packing in ("end_to_end", "best_fit"))
    assert end_to_end.cut_fraction > 0.15
    assert best.cut_fraction < 0.01
    assert len(best) == len(end_to_end)


def stream_of(lengths):
    ends = np.cumsum(lengths)
    return TokenStream(np.zeros(ends[-1], np.uint16), (ends - lengths).astype(np.int64))


# -------------------------------------------------------------------------------------------------- mixtures


def test_a_mixture_gives_each_part_its_share_at_every_point():
    weights = [5, 3, 2]
    rows = MixedRows(weights, [PackedRows(stream(9, 9), 3, True) for _ in weights])
    where = [rows.locate(position) for position in range(1000)]
    for part, weight in enumerate(weights):
        numbers = [number for p, number in where if p == part]
        assert numbers == list(range(len(numbers)))  # none is left out, none comes twice
        for n in range(1, 1001, 37):
            assert abs(sum(p == part for p, _ in where[:n]) - n * weight / 10) < 2


def test_each_part_of_a_mixture_goes_through_its_own_epochs():
    first, second = PackedRows(stream(4 * 7 + 1), 4, True), PackedRows(stream(4 * 5 + 1), 4, True)
    rows = MixedRows([2, 1], [first, second])
    visited = [(rows.locate(p)[0], rows.at(3, p).tokens[0] // 4) for p in range(63)]
    of_first = [row for part, row in visited if part == 0]
    assert of_first == [
        *row_order(3, 0, 7),
        *row_order(3, 1, 7),
        *row_order(3, 2, 7),
        *row_order(3, 3, 7),
        *row_order(3, 4, 7),
        *row_order(3, 5, 7),
    ]
    of_second = [row for part, row in visited if part == 1]
    assert sorted(of_second[:5]) == sorted(of_second[5:10]) == list(range(5))
    of_equals = MixedRows([1, 1], [first, first])
    by_part = [[of_equals.at(3, p).tokens[0] // 4 for p in range(14) if of_equals.locate(p)[0] == i] for i in (0, 1)]
    assert by_part[0] != by_part[1]
    assert len(rows) == 12
    assert rows[0].tokens[0] == 0
    assert rows.max_documents == 1


# ----------------------------------------------------------------------------------------------------- order


@given(st.integers(0, 2**63), st.integers(0, 1000), st.integers(1, 300))
def test_an_epoch_visits_every_row_once(seed, epoch, n):
    order = row_order(seed, epoch, n)
    np.testing.assert_array_equal(np.sort(order), np.arange(n))


def test_the_order_is_a_fixed_function_of_seed_and_epoch():
    # Written down: a run resumed under another version of NumPy must go on in the same order.
    assert row_order(0, 0, 8).tolist() == [0, 3, 7, 5, 1, 2, 6, 4]
    assert row_order(0, 0, 100).tolist() != row_order(0, 1, 100).tolist()
    assert row_order(0, 0, 100).tolist() != row_order(1, 0, 100).tolist()
    assert row_order(0, 1, 100).tolist() != row_order(1, 0, 100).tolist()


def test_positions_run_on_from_epoch_to_epoch():
    rows = PackedRows(stream(4 * 10 + 1), 4, True)
    visited = [rows.at(3, position).tokens[0] // 4 for position in range(30)]
    assert visited == [*row_order(3, 0, 10), *row_order(3, 1, 10), *row_order(3, 2, 10)]


def test_an_epoch_is_sorted_once_however_many_parts_take_turns(monkeypatch):
    sorted_for = []
    monkeypatch.setattr(packing, "row_order", lambda *args: sorted_for.append(args) or row_order(*args))
    rows = MixedRows([1] * 40, [PackedRows(stream(4 * 6 + 1), 4, True) for _ in range(40)])
    for position in range(240):
        rows.at(0, position)
    assert len(sorted_for) == 40
