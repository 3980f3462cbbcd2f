"""What the GPUs of a run send each other in a step, in bytes, and how long that takes. No torch here.

A collective among n ranks is counted as its ring algorithm sends it: of an all-gather, reduce-scatter or broadcast of B
bytes each rank sends B (n − 1) / n on average, of an all-reduce twice that, of an all-to-all of B bytes of its own
B (n − 1) / n. Where ranks send unequal amounts, it is what the one sends that sends most: the others wait for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from model.activations_config import FullConfig
from model.arithmetic import parameter_count
from model.layer_memory import FLOAT32, Workload, heads_exchanged

from .parallel.split import keys_sent

NETWORK_BYTES_PER_SECOND = 50e9
"""A GPU's share of what leaves its node: an adapter of 400 Gb/s for each, as makers of such nodes build them in."""
REACHED = 0.8
"""Fraction of a link's rate that large collectives reach. An assumption."""
NODE = 8
"""GPUs of a node."""


@dataclass(frozen=True)
class Sent:
    """What one rank sends in a step by one kind of collective, among ranks that are neighbours or are not."""

    collective: str
    what: str
    bytes: float
    is_in_node: bool
    is_hidden: bool
    """Whether it runs beside the computation."""


def sent_in_step(work: Workload, micro_batches: int, node: int = NODE) -> list[Sent]:
    """The traffic of a step in bytes that each rank sends; small sums (losses, counts) are left out.

    Args:
        work: of one rank. micro_batches: of one rank. node: GPUs of a node.
    """
    return [sent for sent in (*_parameters(work, micro_batches, node), *_rows(work, micro_batches, node)) if sent.bytes]


def _parameters(work: Workload, micro_batches: int, node: int) -> Iterator[Sent]:
    """Weights that are gathered, and gradients that are summed. `training.parallel.fsdp`, `gradients`."""
    count = parameter_count(work.model)
    E, V = work.model.dim, work.model.vocab_size
    tables = V * E * (1 if work.model.tie_head else 2)
    if work.model.position == "learned":
        tables += work.model.n_positions * E
    matrices = count.block_matrices + tables
    small = count.total - matrices if work.is_sharded else count.total
    # Gradients that every rank has whole are summed once a step, beside the backward pass where that goes by block.
    hidden = not work.is_one_graph
    yield _among(work.ranks, node, "all-reduce", "gradients", work.reduction_bytes * small, 2, is_hidden=hidden)
    if not work.is_sharded:
        return
    of_group, times = work.shards, 2 if work.reshards else 1
    gathered = micro_batches * work.product_bytes * (times * count.block_matrices + tables)
    yield _among(of_group, node, "all-gather", "weights", gathered)
    reduced = micro_batches * work.reduction_bytes * matrices
    yield _among(of_group, node, "reduce-scatter", "gradients", reduced)
    if (copies := work.ranks // work.shards) > 1:
        shard, share = work.reduction_bytes * matrices / work.shards, 2 * (copies - 1) / copies
        yield Sent("all-reduce", "gradients of copies", shard * share, work.ranks <= node, is_hidden=True)
    if work.optimizer == "muon":
        momentum, updates = 2 * count.block_matrices, FLOAT32 * count.block_matrices
        yield _among(of_group, node, "all-gather", "Muon's momentum", momentum, is_hidden=False)
        yield _among(of_group, node, "broadcast", "Muon's updates", updates, is_hidden=False)


def _rows(work: Workload, micro_batches: int, node: int) -> Iterator[Sent]:
    """What attention exchanges where ranks share rows. `model.attention.context`."""
    model, P, L = work.model, work.context, work.model.n_layers
    if P == 1:
        return
    assert model.head_dim is not None
    assert model.n_kv_heads is not None
    again, groups = 0, 1
    if isinstance(work.memory, FullConfig):
        again = sum(not work.memory.keeps_attention(layer, L) for layer in range(work.memory.of(L)))
        groups = work.memory.head_groups
    forward, head = L + again, micro_batches * model.head_dim * work.product_bytes
    if work.context_method == "ulysses":
        sends = heads_exchanged(work, groups)
        heads = groups * (forward * (sends.qkv + sends.out) + L * (sends.backward + sends.qkv))
        yield _among(P, node, "all-to-all", "heads", work.tokens * heads * head, is_hidden=False)
        return
    # Of rows without documents: with documents a rank sees less of the others'. What the rank sends that sends most.
    tokens = keys_sent(work.seq_len * P, P, model.window)
    others = tokens - np.diag(np.diag(tokens))
    sent, returned = int(others.sum(1).max()), int(others.sum(0).max())
    numbers = work.batch_size * 2 * model.n_kv_heads * head * ((forward + L) * sent + L * returned)
    yield Sent("all-to-all", "keys and values", numbers, node >= P, is_hidden=False)


def _among(
    size: int, node: int, collective: str, what: str, nbytes: float, rounds: int = 1, is_hidden: bool = True
) -> Sent:
    """By a collective of `nbytes` among so many neighbours."""
    return Sent(collective, what, rounds * nbytes * (size - 1) / size, size <= node, is_hidden)


def exposed_seconds(traffic: list[Sent], computing: float, link: float, network: float) -> float:
    """Seconds of a step that GPUs wait for what is sent, beyond what computing hides.

    Args:
        computing: seconds of the step without other GPUs. link: bytes a second between GPUs of a node, each way.
            network: of a GPU to other nodes.
    """
    seconds = dict.fromkeys((True, False), 0.0)
    for sent in traffic:
        seconds[sent.is_hidden] += sent.bytes / (REACHED * (link if sent.is_in_node else network))
    return seconds[False] + max(0.0, seconds[True] - computing)
