"""What the GPUs of a run send each other in a step, in bytes, and how long that takes. No torch here.

A collective among n ranks is counted as its ring algorithm sends it: of an all-gather, reduce-scatter or broadcast of B
bytes each rank sends B (n − 1) / n on average, of an all-reduce twice that, of an all-to-all of B bytes of its own
B (n − 1) / n.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd

from model.activations_config import FullConfig
from model.arithmetic import parameter_count
from model.layer_memory import FLOAT32, Workload

NETWORK_BYTES_PER_SECOND = 50e9
"""A GPU's share of what leaves its node: an adapter of 400 Gb/s for each, as makers of such nodes build them in."""
REACHED = 0.8
"""Fraction of a link's rate that large collectives reach. An assumption."""
NODE = 8
"""GPUs of a node."""


@dataclass(frozen=True)
class Arrangement:
    """How the ranks of a run are arranged; see `training.parallel.config`."""

    size: int
    """Ranks, one for each GPU."""
    node: int = NODE
    shards: int = 1
    """Neighbouring ranks that hold one copy of the parameters together."""
    reshards: bool = True
    context: int = 1
    """Neighbouring ranks that share each row."""
    method: str = "ulysses"

    @property
    def replicas(self) -> int:
        """Copies of the parameters."""
        return self.size // self.shards


@dataclass(frozen=True)
class Sent:
    """What one rank sends in a step by one kind of collective, among ranks that are neighbours or are not."""

    collective: str
    what: str
    bytes: float
    is_in_node: bool
    is_hidden: bool
    """Whether it runs beside the computation."""


def sent_in_step(work: Workload, micro_batches: int, ranks: Arrangement) -> list[Sent]:
    """The traffic of a step in bytes that each rank sends; small sums (losses, counts) are left out.

    Args:
        work: of one rank. micro_batches: of one rank.
    """
    return [
        sent for sent in (*_parameters(work, micro_batches, ranks), *_rows(work, micro_batches, ranks)) if sent.bytes
    ]


def _parameters(work: Workload, micro_batches: int, ranks: Arrangement) -> Iterator[Sent]:
    """Weights that are gathered, and gradients that are summed. `training.parallel.fsdp`, `gradients`."""
    count = parameter_count(work.model)
    E, V = work.model.dim, work.model.vocab_size
    tables = V * E * (1 if work.model.tie_head else 2)
    if work.model.position == "learned":
        tables += work.model.n_positions * E
    matrices = count.block_matrices + tables
    small = count.total - matrices if work.is_sharded else count.total
    # Gradients that every rank has whole are summed once a step: beside the backward pass, where blocks are called one
    # by one.
    is_one_graph = work.compiled and not isinstance(work.memory, FullConfig) and not work.is_sharded
    yield _among(ranks, ranks.size, "all-reduce", "gradients", FLOAT32 * small, 2, is_hidden=not is_one_graph)
    if not work.is_sharded:
        return
    of_group, times = ranks.shards, 2 if ranks.reshards else 1
    gathered = micro_batches * work.product_bytes * (times * count.block_matrices + tables)
    yield _among(ranks, of_group, "all-gather", "weights", gathered)
    yield _among(ranks, of_group, "reduce-scatter", "gradients", micro_batches * FLOAT32 * matrices)
    if ranks.replicas > 1:
        shard, share = FLOAT32 * matrices / ranks.shards, 2 * (ranks.replicas - 1) / ranks.replicas
        yield Sent("all-reduce", "gradients of copies", shard * share, ranks.size <= ranks.node, is_hidden=True)
    if work.optimizer == "muon":
        yield _among(ranks, of_group, "all-gather", "Muon's momentum", 2 * count.block_matrices, is_hidden=False)
        yield _among(ranks, of_group, "broadcast", "Muon's updates", FLOAT32 * count.block_matrices, is_hidden=False)


def _rows(work: Workload, micro_batches: int, ranks: Arrangement) -> Iterator[Sent]:
    """What attention exchanges where ranks share rows. `model.attention.context`."""
    model, P, c = work.model, ranks.context, work.product_bytes
    if P == 1:
        return
    assert model.head_dim is not None
    assert model.n_kv_heads is not None
    H, G, D, L = model.n_heads, model.n_kv_heads, model.head_dim, model.n_layers
    again = 0
    if isinstance(work.memory, FullConfig):
        again = sum(not work.memory.keeps_attention(layer, L) for layer in range(work.memory.of(L)))
    tokens = micro_batches * work.tokens
    if ranks.method == "ulysses":
        kv = 2 * G * (P // gcd(G, P))  # repeated until the ranks divide them
        forward, backward = H + kv + H, (H + kv + 2 * H) + (H + kv)
        heads = (L + again) * forward + L * backward
        yield _among(ranks, P, "all-to-all", "heads", tokens * heads * D * c, is_hidden=False)
    else:  # at most: a rank sends others the keys and values that they see, and gets gradients back
        times = (L + again) + 2 * L
        yield _among(ranks, P, "all-to-all", "keys and values", tokens * 2 * G * D * c * P * times, is_hidden=False)


def _among(
    ranks: Arrangement, size: int, collective: str, what: str, nbytes: float, rounds: int = 1, is_hidden: bool = True
) -> Sent:
    """Of neighbouring ranks."""
    return Sent(collective, what, rounds * nbytes * (size - 1) / size, size <= ranks.node, is_hidden)


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
