"""How much memory a training step takes at its peak, part by part, predicted from its configuration. No torch here.

A step has moments at which its memory may be highest: the loss, while all layers still hold what they keep; the
backward pass of each layer, which frees what that layer keeps and makes gradients; and the update. `predict` adds up
what is alive at each of them and returns the highest. What is predicted is PyTorch's `max_memory_allocated`; the
measured peaks that it is held against are in docs/benchmarks/long-context-h200.json.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from .activations_config import SelectiveConfig
from .arithmetic import parameter_count
from .layer_memory import FLOAT32, Workload, kept_bytes, layer_bytes, matrix_sizes, policy_of

GIB = 2**30


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes at the peak, part by part."""

    moment: str
    """When the peak is."""
    weights: int
    copies: int
    """The weights in the dtype of the matrix products."""
    gradients: int
    optimizer: int
    kept: int
    """By the layers for the backward pass."""
    layer: int
    """What exists only while one layer computes: the most at any time."""
    loss: int
    """Logits, and gradients of the head and of its input."""
    batch: int
    """Tokens and positions."""
    host: int = 0
    """Pinned memory of the host: the only part that is not the device's."""

    @property
    def parts(self) -> dict[str, int]:
        """Of the device."""
        return {part.name: getattr(self, part.name) for part in fields(self) if part.name not in ("moment", "host")}

    @property
    def total(self) -> int:
        """Of the device."""
        return sum(self.parts.values())


def state_bytes(work: Workload) -> tuple[int, int, int]:
    """(weights, gradients, moments): what a process needs from step to step whatever its rows are, its shards of them.

    AdamW keeps two moments of each parameter, Muon one of the blocks' matrices and two of the rest.
    """
    count, _, block_matrices = parameter_count(work.model)
    moments = 2 * count - (block_matrices if work.optimizer == "muon" else 0)
    weights, gradients, optimizer = FLOAT32 * count, FLOAT32 * count, work.moment_bytes * moments
    return _shard(work, weights), _shard(work, gradients), _shard(work, optimizer)


def _shard(work: Workload, nbytes: int) -> int:
    return -(-nbytes // work.shards)


def predict(work: Workload) -> MemoryPlan:
    """The memory at the highest moment of a training step."""
    return max(moments(work), key=lambda plan: plan.total)


def moments(work: Workload) -> Iterator[MemoryPlan]:
    """The memory at each moment that may be the highest, in the order of a step."""
    L, whole = work.model.n_layers, work.is_one_graph
    state = weights, all_gradients, optimizer = state_bytes(work)
    if work.state_on_host:
        weights = all_gradients = optimizer = 0
    earlier = all_gradients if work.accumulates else 0
    layers = [kept_bytes(work, layer) for layer in range(L)]
    on_host = getattr(work.memory, "on_host", lambda n: 0)(L)

    def kept(layer: int) -> int:
        """On the device while this layer is the last whose backward pass is still to come: of those that keep on the
        host the one in use and the one before it, which is copied or loaded."""
        return sum(layers[max(0, min(on_host, layer) - 1) : layer + 1])

    resting = MemoryPlan(
        moment="",
        weights=weights,
        copies=0,
        gradients=earlier,
        optimizer=optimizer,
        kept=0,
        layer=0,
        loss=0,
        batch=batch_bytes(work),
        host=sum(layers[:on_host]) + (sum(state) if work.state_on_host else 0),
    )
    # What the last norm reads and gives is kept, too.
    last = work.tokens * (work.residual_bytes + work.product_bytes) * work.model.dim
    yield replace(
        resting,
        moment="the loss",
        copies=copies_bytes(work, L, head=True),
        kept=kept(L - 1) + last,
        loss=loss_bytes(work),
    )
    head = FLOAT32 * work.model.vocab_size * work.model.dim
    new, of_layer = _shard(work, head), FLOAT32 * parameter_count(work.model).block_matrices // L
    # Of a sharded layer the whole gradients are there, once in the weights' dtype and once as they are added up.
    reduced = of_layer + work.product_bytes * of_layer // FLOAT32 if work.is_sharded else 0
    for layer in reversed(range(L)):
        new += _shard(work, of_layer)
        yield replace(
            resting,
            moment=f"the backward pass of layer {layer + 1}",
            copies=copies_bytes(work, layer + 1),
            # One graph gives all gradients at its end; until then they are beside those of earlier micro-batches.
            gradients=0 if work.state_on_host else earlier + new if whole else max(earlier, new),
            kept=kept(layer),
            layer=layer_bytes(work, layer) + reduced,
        )
    copies = copies_bytes(work, 0)
    yield replace(
        resting,
        moment="the gradient of the embedding",
        copies=copies,
        gradients=earlier + all_gradients if whole else all_gradients,
        layer=head if work.model.tie_head else 0,  # one gradient of the two that are added up
    )
    yield replace(resting, moment="the update", copies=copies, gradients=all_gradients, layer=update_bytes(work))


def copies_bytes(work: Workload, layers: int, head: bool = False) -> int:
    """The weights in the dtype of the matrix products, while the last of so many layers computes, or the head.

    A layer that keeps everything keeps its weights' copies, too; the others cast them anew.
    """
    count, L = parameter_count(work.model), work.model.n_layers
    if work.is_sharded:  # gathered: the layer in use and the next one, or all; embedding and head, until the update
        blocks = count.block_matrices // L * (min(2, layers) if work.reshards else layers)
        return work.product_bytes * (blocks + count.total - count.block_matrices)
    if work.in_fp8:
        has_head = head or work.keeps_copies
        return 2 * count.block_matrices + work.product_bytes * (count.matmul - count.block_matrices) * has_head
    if work.keeps_copies:
        return work.product_bytes * count.matmul
    if work.product_bytes == FLOAT32:
        return 0
    keeping = [not isinstance(policy_of(work.memory, layer, L), SelectiveConfig) for layer in range(layers)]
    numbers = count.block_matrices // L * (sum(keeping) if head else sum(keeping[:-1]) + bool(layers))
    return work.product_bytes * (numbers + (count.matmul - count.block_matrices if head else 0))


def loss_bytes(work: Workload) -> int:
    """Logits, in whose place their gradient is written, and the gradients of the head and of its input."""
    V, E, T, c = work.model.vocab_size, work.model.dim, work.tokens, work.product_bytes
    chunk = work.model.loss_chunk_size
    if 0 < chunk < T:
        return c * chunk * V + c * T * E + FLOAT32 * V * E
    # In one piece they are left to autograd: eager, two of float32 and their gradients are there at once; compiled, a
    # gradient of the head that is not cast yet.
    return (c * T * V if work.compiled else 3 * FLOAT32 * T * V) + c * T * E + (FLOAT32 + c) * V * E


def batch_bytes(work: Workload) -> int:
    """Tokens, targets and positions in 64 bits, starts in 32; outside of a compiled graph the angles of positions; and
    an S × S mask."""
    is_rotary = work.model.position == "rotary" and not work.is_one_graph
    assert work.model.head_dim is not None
    return work.tokens * (28 + (FLOAT32 * work.model.head_dim if is_rotary else 0)) + work.mask_pairs


def update_bytes(work: Workload) -> int:
    """Beside the gradients: of Muon's step on a matrix, itself as it was, what its iteration multiplies, and a momentum
    that is bf16 in float32."""
    if work.optimizer != "muon":
        return 0
    return (5 if work.moment_bytes < FLOAT32 else 4) * FLOAT32 * max(matrix_sizes(work.model))
