"""Starts of documents from cumulative lengths and from separator tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.corpus import TokenStream
from data.packing import PackedRows
from kernels import starts_from_cu_seqlens, starts_from_separators
from model.attention.sdpa import cumulative_lengths


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=8), before=st.integers(0, 4), after=st.integers(0, 4))
def test_each_token_starts_where_its_sequence_does(lengths, before, after):
    """Empty sequences begin nothing; tokens outside see no key up to their own."""
    cu_seqlens = torch.tensor([before, *lengths]).cumsum(0).int()
    *begins, end = cu_seqlens.tolist()
    expected = [begin for begin, n in zip(begins, lengths, strict=True) for _ in range(n)]
    expected = [before] * before + expected + [end + after] * after
    starts = starts_from_cu_seqlens(cu_seqlens, len(expected))
    assert starts.dtype == torch.int32
    assert starts.tolist() == [expected]


def test_cumulative_lengths_and_back():
    """The form that PyTorch's varlen kernel reads, with its repeated end."""
    starts = torch.tensor([[0, 0, 2, 2, 2, 5, 6]], dtype=torch.int32)
    assert torch.equal(starts_from_cu_seqlens(cumulative_lengths(starts, max_documents=9), 7), starts)


def test_a_separator_belongs_to_the_document_that_it_ends():
    tokens = torch.tensor([[5, 9, 5, 5, 9, 9, 5], [9, 5, 5, 5, 5, 5, 9], [5, 5, 5, 5, 5, 5, 5]])
    starts = starts_from_separators(tokens, separator=9)
    assert starts.dtype == torch.int32
    assert starts.tolist() == [[0, 0, 2, 2, 2, 5, 6], [0, 1, 1, 1, 1, 1, 1], [0] * 7]


def test_a_separator_belongs_to_the_document_that_it_begins_when_asked():
    tokens = torch.tensor([[5, 9, 5, 5, 9, 9, 5], [9, 5, 5, 5, 5, 5, 9], [5, 5, 5, 5, 5, 5, 5]])
    starts = starts_from_separators(tokens, separator=9, separator_begins=True)
    assert starts.tolist() == [[0, 1, 1, 1, 4, 5, 5], [0, 0, 0, 0, 0, 0, 6], [0] * 7]


def test_separators_agree_with_the_rows_that_are_trained_on():
    """`data` begins each document with a separator."""
    tokens = np.array([0, 4, 4, 0, 5, 5, 5, 5, 0, 0, 6, 6, 6, 0, 7, 7, 7], dtype=np.uint16)
    rows = PackedRows(TokenStream(tokens, np.flatnonzero(tokens == 0)), seq_len=8, document_mask=True)
    assert len(rows) == 2
    for row in (rows[0], rows[1]):
        starts = starts_from_separators(torch.from_numpy(row.tokens)[None], separator=0, separator_begins=True)
        assert starts[0].tolist() == row.starts.tolist()


def test_nothing_waits_for_the_gpu():
    """On the meta device there are no values: whoever asks for one fails."""
    cu_seqlens = torch.zeros(4, dtype=torch.int32, device="meta")
    assert starts_from_cu_seqlens(cu_seqlens, 10).shape == (1, 10)
    assert starts_from_separators(torch.zeros(2, 7, dtype=torch.int64, device="meta"), 0).shape == (2, 7)


@pytest.mark.parametrize(
    "cu_seqlens", [torch.zeros(3), torch.zeros(3).long(), torch.zeros(1, 3).int(), torch.zeros(1).int()]
)
def test_cumulative_lengths_of_another_form_are_refused(cu_seqlens):
    with pytest.raises(
        ValueError, match=r"cu_seqlens torch\..*: pass int32 \(N \+ 1,\), where each of N sequences begins"
    ):
        starts_from_cu_seqlens(cu_seqlens, 8)


def test_tokens_without_a_batch_are_refused():
    with pytest.raises(ValueError, match=r"tokens \(7,\): pass \(batch, sequence\); tokens\[None\]"):
        starts_from_separators(torch.zeros(7, dtype=torch.int64), 0)
