from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.corpus import TokenStream
from data.packing import PackedRows, row_index, row_order


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
    visited = [row_index(3, 10, position) for position in range(30)]
    assert visited == [*row_order(3, 0, 10), *row_order(3, 1, 10), *row_order(3, 2, 10)]


def test_a_cached_order_cannot_be_overwritten():
    with pytest.raises(ValueError, match="read-only"):
        row_order(0, 0, 8)[0] = 1
