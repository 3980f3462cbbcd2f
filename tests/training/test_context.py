"""Context parallelism: ranks that share rows compute what one process computes."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from processes import fork_ranks

from model.attention.config import context_method, context_spec
from model.attention.spec import AttentionSpec
from training.config import TrainConfig
from training.parallel.launch import Launch
from training.parallel.split import TOLERANCE, balanced_runs, block_of, first_seen
from training.runtime import method_of

PROGRAM = "tests/training/context_ranks.py"


def test_attention_and_models_equal_those_of_one_process() -> None:
    """12 random cases of attention over two ranks and four, a model over four, and what both exchanges hold; runs:
    test_parallel.py."""
    fork_ranks([PROGRAM, "some_attention", "a_model", "memory"], 4)


@pytest.mark.slow
def test_more_attention_and_models_with_flex_and_flash_and_compiled() -> None:
    """34 random cases, and three models."""
    fork_ranks([PROGRAM, "attention", "models", "flex_and_flash", "compiled"], 4)


# ---- how rows are split


def pairs_of(runs: list[tuple[int, int]], first_BS: np.ndarray) -> int:
    pairs_S = (np.arange(first_BS.shape[1]) + 1 - first_BS).sum(0)
    return int(sum(pairs_S[begin:end].sum() for begin, end in runs))


@pytest.mark.parametrize("seed", range(12))
def test_each_rank_has_as_many_tokens_and_visible_pairs(seed: int) -> None:
    choose = random.Random(seed)
    size, B, window = choose.choice([2, 3, 4, 8]), choose.choice([1, 3]), choose.choice([None, None, 1500])
    S = size * choose.choice([2048, 2052, 4096])
    torch.manual_seed(seed)
    begins = torch.rand(B, S) < 1 / choose.choice([200, 1000, 5000])
    starts = torch.where(begins, torch.arange(S), 0).cummax(1).values.numpy()
    first_BS = first_seen(starts, S, window)
    shares = balanced_runs(first_BS, size)
    assert shares == balanced_runs(first_BS.copy(), size)
    held = np.concatenate([np.arange(begin, end) for share in shares for begin, end in share])
    assert (np.sort(held) == np.arange(S)).all(), "each token is held once"
    assert {sum(end - begin for begin, end in share) for share in shares} == {S // size}
    assert sum(map(len, shares)) < 2 * size
    assert all(end < begin for share in shares for (_, end), (begin, _) in pairwise(share))
    pairs = [pairs_of(share, first_BS) for share in shares]
    # A window is off by a block of the longest documents at most, or by the tolerance; the last has what is left.
    pairs_S = (np.arange(S) + 1 - first_BS).sum(0)
    block = pairs_S.reshape(-1, block_of(S, size)).sum(1).max() / np.mean(pairs)
    assert max(pairs) / np.mean(pairs) <= 1 + size * max(TOLERANCE, block)
    assert max(pairs) / np.mean(pairs) < 1.1


def test_a_causal_row_is_split_from_its_middle() -> None:
    """Of cp = 4: the rank with the middle has one run, the others two that lie around it."""
    S = 4096
    shares = balanced_runs(first_seen(None, S, None), 4)
    assert shares[0] == [(S // 2 - S // 8, S // 2 + S // 8)]
    assert [len(share) for share in shares] == [1, 2, 2, 2]
    pairs = [pairs_of(share, first_seen(None, S, None)) for share in shares]
    assert max(pairs) / np.mean(pairs) < 1.001


def test_a_short_row_is_cut_into_small_blocks() -> None:
    assert [block_of(4 * n, 4) for n in (8192, 4096, 1024, 64, 31, 7)] == [128, 128, 32, 2, 1, 1]


# ---- which method, and refusals


@pytest.mark.parametrize(
    ("asked", "heads", "size", "groups", "method"),
    [
        ("auto", 64, 8, 1, "ulysses"),
        ("auto", 12, 8, 1, "all-gather"),
        ("auto", 8, 4, 4, "all-gather"),
        ("all-gather", 8, 4, 1, "all-gather"),
        ("ulysses", 8, 4, 2, "ulysses"),
    ],
)
def test_the_method_is_ulysses_where_heads_divide(asked: str, heads: int, size: int, groups: int, method: str) -> None:
    assert context_method(asked, heads, size, groups) == method


def test_key_value_heads_are_repeated_as_often_as_they_must() -> None:
    spec = AttentionSpec(24, 2, 64, 1001, "bfloat16")
    for size, heads in ((2, (12, 1)), (4, (6, 1)), (3, (8, 2))):
        inner = context_spec(spec, "ulysses", size)
        assert (inner.n_heads, inner.n_kv_heads) == heads
        assert inner.seq_len == -(-1001 // size) * size
    assert context_spec(spec, "all-gather", 4) == spec


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["parallel.context_method=ulysses", "parallel.context=4"],
            "divides heads evenly, and 2 heads cannot be divided",
        ),
        (
            ["parallel.context=64"],
            "parallel.context=64 ranks cannot share rows of 32 tokens; use parallel.context=32 or",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(config: Callable[..., TrainConfig], words: list[str], line: str) -> None:
    with pytest.raises(ValueError, match=r"parallel\.context") as refused:
        method_of(config(*words))
    assert line in str(refused.value)
    assert "\n" not in str(refused.value)


def test_ranks_that_share_rows_divide_the_processes(config: Callable[..., TrainConfig]) -> None:
    parallel = config("parallel.context=4").parallel
    parallel.check(Launch(size=8))
    with pytest.raises(ValueError, match=r"parallel\.context=4 does not divide the 6 processes of this run"):
        parallel.check(Launch(size=6))


def test_whole_rows_alone_generate() -> None:
    """A world of one is enough to be refused."""
    import torch.distributed as dist

    from model.attention import ATTENTIONS, build_attention
    from model.attention.context import ContextAttention

    spec: Any = AttentionSpec(2, 2, 16, 32, "float32")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert dist.group.WORLD is not None
        inner = build_attention(ATTENTIONS["math"](name="math"), spec)
        attention = ContextAttention(inner, spec, "ulysses", dist.group.WORLD)
        with pytest.raises(ValueError, match="generate in a run without it"):
            attention.prepare(None, 8, 32)
        full = AttentionSpec(2, 2, 16, 32, "float32", causal=False)
        with pytest.raises(ValueError, match="context parallelism is for causal attention"):
            ContextAttention(inner, full, "ulysses", dist.group.WORLD)
    finally:
        dist.destroy_process_group()
