from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch

from data.corpus import TokenStream
from data.loader import IGNORE_INDEX, Loader, collate, eval_batches
from data.packing import PackedRows, row_order

SEQ_LEN = 4


def packed(rows, document_mask=True):
    """`rows` rows of 4 over documents of 3 tokens; a token id is its place in the stream."""
    tokens = np.arange(rows * SEQ_LEN + 1, dtype=np.uint16)
    return PackedRows(TokenStream(tokens, np.arange(0, len(tokens), 3)), SEQ_LEN, document_mask)


@pytest.fixture
def load():
    """Batches from a loader that is closed at the end of the test."""
    loaders = []

    def load(rows, batch_size, **options):
        loaders.append(Loader(rows, batch_size, **{"seed": 0, "device": "cpu", **options}))
        return loaders[-1]

    yield load
    for loader in loaders:
        loader.close()


def row_ids(batch):
    return (batch.tokens_BS[:, 0] // SEQ_LEN).tolist()


def test_a_batch_stacks_rows_and_counts_visible_pairs(load):
    rows = packed(2)
    batch = collate(rows)
    assert batch.tokens_BS.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert batch.targets_BS.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert batch.starts_BS.tolist() == [[0, 0, 0, 3], [0, 0, 2, 2]]
    assert (batch.tokens_BS.dtype, batch.targets_BS.dtype) == (torch.int64, torch.int64)
    assert batch.starts_BS.dtype == torch.int32
    assert batch.visible_pairs == (1 + 2 + 3 + 1) + (1 + 2 + 1 + 2)
    assert type(batch.visible_pairs) is int
    assert batch.num_tokens == 8
    assert collate(rows, window=2).visible_pairs == (1 + 2 + 2 + 1) + (1 + 2 + 1 + 2)
    assert next(load(rows, 2, window=1)).visible_pairs == 8


def test_without_document_mask_a_batch_is_plain_causal():
    batch = collate(packed(2, document_mask=False))
    assert batch.starts_BS is None
    assert batch.visible_pairs == 2 * (1 + 2 + 3 + 4)
    assert batch.to("cpu").starts_BS is None


def test_a_batch_says_where_in_its_document_each_token_stands():
    batch = collate(packed(2))
    assert batch.positions_BS.tolist() == [[0, 1, 2, 0], [0, 1, 0, 1]]
    assert batch.positions_BS.dtype == torch.int64
    assert collate(packed(2, document_mask=False)).positions_BS.tolist() == [[0, 1, 2, 3]], "the same in every row"
    assert batch.to("meta").positions_BS.is_meta


def test_to_moves_every_tensor():
    batch = collate(packed(2)).to("meta")
    assert {batch.tokens_BS.device.type, batch.targets_BS.device.type, batch.starts_BS.device.type} == {"meta"}


def test_an_epoch_loses_and_doubles_no_row(load):
    batches = islice(load(packed(12), 3), 8)  # two epochs
    visited = [row for batch in batches for row in row_ids(batch)]
    assert sorted(visited[:12]) == sorted(visited[12:]) == list(range(12))
    assert visited[:12] != visited[12:]


def test_order_follows_the_seed_over_epochs_that_end_inside_a_batch(load):
    visited = [row for batch in islice(load(packed(7), 3, seed=5), 7) for row in row_ids(batch)]
    assert visited == [*row_order(5, 0, 7), *row_order(5, 1, 7), *row_order(5, 2, 7)]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_together_read_the_single_process_order(load, world_size):
    single = [row_ids(batch) for batch in islice(load(packed(21), 4), 12)]
    ranks = [load(packed(21), 4 // world_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    together = [[row for loader in ranks for row in row_ids(next(loader))] for _ in range(12)]
    assert together == single


def test_a_loader_resumes_after_the_rows_that_were_taken(load):
    whole = [row_ids(batch) for batch in islice(load(packed(7), 2), 10)]
    assert [row_ids(batch) for batch in islice(load(packed(7), 2, first=12), 4)] == whole[6:]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_thousand_batches_put_back_together_also_after_a_stop_on_other_ranks(load, world_size):
    """1,000 batches of 8 rows by so many ranks; stopped at batch 137, they go on with batches of another size."""
    whole = [row_ids(batch) for batch in islice(load(packed(300), 8), 1000)]
    ranks = [load(packed(300), 8 // world_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    together = [[row for loader in ranks for row in row_ids(next(loader))] for _ in range(137)]
    for loader in ranks:
        loader.close()
    assert together == whole[:137]
    others = [load(packed(300), 4, rank=rank, world_size=3, first=137 * 8) for rank in range(3)]
    rest = [row for _ in range(575) for loader in others for row in row_ids(next(loader))]
    assert rest == [row for batch in whole[137:] for row in batch][: 575 * 12]


def test_an_error_in_the_thread_reaches_the_loop(load, monkeypatch):
    rows = packed(4)
    loader = load(rows, 2)
    assert row_ids(next(loader))
    monkeypatch.setattr(PackedRows, "__getitem__", lambda *_: (_ for _ in ()).throw(OSError("disk gone")))
    with pytest.raises(OSError, match="disk gone"):
        list(loader)
    assert not loader._thread.is_alive()


def test_close_stops_the_thread_and_ends_iteration(load):
    loader = load(packed(4), 2)
    next(loader)
    loader.close()
    loader.close()
    assert not loader._thread.is_alive()
    assert list(loader) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_batches_arrive_on_the_gpu_unchanged(load):
    on_gpu, on_cpu = load(packed(64), 4, device="cuda"), load(packed(64), 4)
    for _ in range(20):
        batch, expected = next(on_gpu), next(on_cpu)
        assert batch.tokens_BS.is_cuda
        assert torch.equal(batch.tokens_BS.cpu(), expected.tokens_BS)
        assert torch.equal(batch.starts_BS.cpu(), expected.starts_BS)


@pytest.mark.parametrize(
    ("batch_size", "max_tokens", "expected"),
    [
        (2, 10**9, [[0, 1], [2, 3], [4, 5], [6]]),
        (2, 16, [[0, 1], [2, 3]]),
        (2, 15, [[0, 1], [2]]),
        (2, 1, [[0]]),  # at least one
        (50, 10**9, [[0, 1, 2, 3, 4, 5, 6]]),  # fewer rows than a batch
    ],
)
def test_evaluation_takes_the_first_rows_in_batches_of_one_shape(batch_size, max_tokens, expected):
    batches = list(eval_batches(packed(7), batch_size, max_tokens))
    assert len({batch.tokens_BS.shape for batch in batches}) == 1
    assert [row_ids(batch)[: len(rows)] for batch, rows in zip(batches, expected, strict=True)] == expected
    assert [batch.num_tokens for batch in batches] == [len(rows) * 4 for rows in expected]
    for batch, rows in zip(batches, expected, strict=True):
        assert (batch.targets_BS[len(rows) :] == IGNORE_INDEX).all()


def test_validation_covers_the_same_tokens_whatever_the_batch_size():
    rows = packed(23)
    seen = {}
    for batch_size in (1, 2, 3, 4, 7, 23, 64):
        batches = list(eval_batches(rows, batch_size, 17 * 4))
        targets = torch.cat([batch.targets_BS[batch.targets_BS != IGNORE_INDEX].flatten() for batch in batches])
        seen[batch_size] = targets.tolist()
        assert sum(batch.num_tokens for batch in batches) == len(targets) == 17 * 4
    assert len(set(map(tuple, seen.values()))) == 1
