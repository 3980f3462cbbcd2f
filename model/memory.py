"""How much memory a training step takes at its peak, part by part, predicted from its configuration. No torch here.

A step has moments at which its memory may be highest: the loss, while all layers still hold what they keep; the
backward pass of each layer, which frees what that layer keeps and makes gradients; and the update. `predict` adds up
what is alive at each of them and returns the highest. What is predicted is PyTorch's `max_memory_allocated`; the
measured peaks that it is held against are in tests/model/memory-h200.json.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from .activations_config import FullConfig, MemoryConfig, SelectiveConfig
from .arithmetic import parameter_count, score_bytes
from .config import ModelConfig

GIB = 2**30
FLOAT32 = 4


@dataclass(frozen=True)
class Workload:
    """What of a run decides the memory of its steps, in one process."""

    model: ModelConfig
    memory: MemoryConfig
    batch_size: int
    """Rows of a micro-batch."""
    seq_len: int
    accumulates: bool = False
    """Whether a step has several micro-batches, so that gradients are there when one begins."""
    optimizer: str = "adamw"
    moment_bytes: int = 4
    rounded_at_once: int = 0
    """Numbers whose moments, where they are bf16, the update has in float32 at a time."""
    product_bytes: int = 2
    """Of a number in a matrix product: 2 with bf16, otherwise 4."""
    residual_bytes: int = 4
    """Of a number in the residual stream: 2 with precision=bf16-residual, otherwise 4."""
    compiled: bool = True
    writes_scores: bool = False
    """Whether attention writes S × S scores to memory, as attention=math does."""
    sums_queries: bool = True
    """Whether attention's backward sums the gradient of the queries in float32, as the Hopper kernels do."""

    @property
    def tokens(self) -> int:
        return self.batch_size * self.seq_len

    @property
    def keeps_copies(self) -> bool:
        """Whether the weights' bf16 copies stay from step to step; see `Runtime.working_dtype`."""
        return self.product_bytes < FLOAT32 and self.accumulates


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
    """(weights, gradients, moments): what a step needs whatever its rows are.

    AdamW keeps two moments of each parameter, Muon one of the blocks' matrices and two of the rest.
    """
    count, _, block_matrices = parameter_count(work.model)
    moments = 2 * count - (block_matrices if work.optimizer == "muon" else 0)
    return FLOAT32 * count, FLOAT32 * count, work.moment_bytes * moments


def predict(work: Workload) -> MemoryPlan:
    """The memory at the highest moment of a training step."""
    return max(moments(work), key=lambda plan: plan.total)


def moments(work: Workload) -> Iterator[MemoryPlan]:
    """The memory at each moment that may be the highest, in the order of a step."""
    L, whole = work.model.n_layers, _is_one_graph(work)
    weights, all_gradients, optimizer = state_bytes(work)
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
        host=sum(layers[:on_host]),
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
    new = head = FLOAT32 * work.model.vocab_size * work.model.dim
    for layer in reversed(range(L)):
        new += FLOAT32 * parameter_count(work.model).block_matrices // L
        yield replace(
            resting,
            moment=f"the backward pass of layer {layer + 1}",
            copies=copies_bytes(work, layer + 1),
            # One graph gives all gradients at its end; until then they are beside those of earlier micro-batches.
            gradients=earlier + new if whole else max(earlier, new),
            kept=kept(layer),
            layer=layer_bytes(work, layer),
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


def kept_bytes(work: Workload, layer: int) -> int:
    """What a layer (0, 1, …) keeps for its backward pass."""
    config, sizes, policy = work.model, _Sizes.of(work), policy_of(work.memory, layer, work.model.n_layers)
    if isinstance(policy, FullConfig):
        attended = sizes.output if work.writes_scores else sizes.attended
        return work.tokens * (sizes.residual + attended * policy.keeps_attention(layer, config.n_layers))
    if isinstance(policy, SelectiveConfig):
        attended = 0 if work.writes_scores else sizes.attended
        return work.tokens * (sizes.residual + attended + sizes.qkv + sizes.product + sizes.up)
    # Before and after attention: the residual stream, and its norm; q and k twice where they are rotated.
    kept = 2 * (sizes.residual + sizes.product + sizes.statistics) + sizes.qkv + sizes.rotated
    kept += sizes.attended + sizes.up + sizes.active
    if config.mlp == "swiglu" and not work.compiled:
        kept += sizes.active  # silu(gate), which a compiler computes again
    scores = score_bytes(config, work.batch_size, work.seq_len, FLOAT32 + work.product_bytes)
    return work.tokens * kept + (scores if work.writes_scores else 0)


def kept_by_layers(
    config: ModelConfig,
    policy: SelectiveConfig,
    *,
    tokens: int,
    product_bytes: int,
    residual_bytes: int = FLOAT32,
    writes_scores: bool = False,
) -> int:
    """Bytes that the layers which a policy is about keep of a micro-batch until its backward pass.

    Args:
        tokens: of the micro-batch. product_bytes: of a number in a matrix product: 2 with bf16, otherwise 4.
        residual_bytes: of a number in the residual stream.
        writes_scores: whether attention writes S × S scores, so that memory=full keeps its output alone, and
            memory=selective nothing of it.
    """
    work = Workload(
        config, policy, 1, tokens, product_bytes=product_bytes, residual_bytes=residual_bytes,
        writes_scores=writes_scores,
    )  # fmt: skip
    return sum(kept_bytes(work, layer) for layer in range(policy.of(config.n_layers)))


def layer_bytes(work: Workload, layer: int) -> int:
    """The most that exists at once while the backward pass of a layer runs, beside what the layer keeps."""
    sizes, policy = _Sizes.of(work), policy_of(work.memory, layer, work.model.n_layers)
    if isinstance(policy, FullConfig):
        return recompute_bytes(work, sizes, policy, policy.keeps_attention(layer, work.model.n_layers))
    # The gradients of the residual stream and of the MLP's first product.
    live = sizes.residual + sizes.up
    if isinstance(policy, SelectiveConfig):  # again: the stream between attention and MLP, its norm, the activation
        live += sizes.residual + sizes.product + sizes.active
    if (
        work.model.mlp == "swiglu" and not work.compiled
    ):  # gradients of both halves of that product, and of the activation
        live += sizes.up + sizes.active
    scores = 0
    if work.writes_scores and isinstance(policy, SelectiveConfig):
        scores = score_bytes(work.model, work.batch_size, work.seq_len, FLOAT32 + work.product_bytes)
    # And the gradient of the largest matrix before it is cast.
    return work.tokens * live + scores + work.product_bytes * max(matrix_sizes(work.model))


def recompute_bytes(work: Workload, sizes: _Sizes, policy: FullConfig, keeps_attention: bool) -> int:
    """The same of a layer that computes all again: the table of `model.recompute`."""
    T, tile, groups = work.tokens, min(policy.tile or work.tokens, work.tokens), policy.head_groups
    live = sizes.residual + (0 if keeps_attention else sizes.attended)  # the gradient of its output; attention again
    of_a_tile = 4 * FLOAT32 * work.model.dim + 2 * (sizes.up + sizes.active)
    mlp = T * (live + (0 if keeps_attention else sizes.qkv)) + tile * of_a_tile
    attention = T * (live + sizes.qkv + 3 * sizes.positioned // groups) + workspace_bytes(work, groups)
    if work.writes_scores:
        attention += score_bytes(work.model, work.batch_size, work.seq_len, FLOAT32 + work.product_bytes) // groups
    return max(mlp, attention)


def workspace_bytes(work: Workload, groups: int = 1) -> int:
    """What attention's backward takes while it runs: row statistics, and with the Hopper kernels sums of dQ.

    The sums are those of some 900 tiles of 128 keys, and of two key heads at least; see `hopper.backward`.
    """
    config = work.model
    assert config.head_dim is not None
    assert config.n_kv_heads is not None
    statistics = work.tokens * config.n_heads // groups * 4 * FLOAT32
    if not work.sums_queries or config.head_dim > 128:
        return statistics
    rows = min(2 * work.seq_len + 900 * 128, work.tokens * config.n_kv_heads // groups)
    return statistics + rows * config.n_heads // config.n_kv_heads * config.head_dim * FLOAT32


def copies_bytes(work: Workload, layers: int, head: bool = False) -> int:
    """The weights in the dtype of the matrix products, while the last of so many layers computes, or the head.

    A layer that keeps everything keeps its weights' copies, too; the others cast them anew.
    """
    count, L = parameter_count(work.model), work.model.n_layers
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
    """Tokens, targets and positions in 64 bits, starts in 32; outside of a compiled graph the angles of positions."""
    is_rotary = work.model.position == "rotary" and not _is_one_graph(work)
    assert work.model.head_dim is not None
    return work.tokens * (28 + (FLOAT32 * work.model.head_dim if is_rotary else 0))


def update_bytes(work: Workload) -> int:
    """Beside the gradients: moments that are bf16, in float32 for a while, of so many numbers at once or of the largest
    parameter; Muon's step on a matrix, itself as it was and what its iteration multiplies."""
    config, matrix = work.model, max(matrix_sizes(work.model))
    is_muon, largest = work.optimizer == "muon", max(config.vocab_size * config.dim, matrix)
    in_float32 = 2 * FLOAT32 * max(work.rounded_at_once, largest) if work.moment_bytes < FLOAT32 else 0
    return max(in_float32, 4 * FLOAT32 * matrix if is_muon else 0)


def matrix_sizes(config: ModelConfig) -> list[int]:
    """Numbers in each matrix of a layer: qkv, the projection after attention, the MLP's first and last."""
    assert config.head_dim is not None
    assert config.n_kv_heads is not None
    up_width = (2 if config.mlp == "swiglu" else 1) * config.ffn_dim
    heads = config.n_heads + 2 * config.n_kv_heads
    return [
        config.dim * width
        for width in (heads * config.head_dim, config.n_heads * config.head_dim, up_width, config.ffn_dim)
    ]


def policy_of(policy: MemoryConfig, layer: int, n_layers: int) -> MemoryConfig:
    """The policy of one layer: a policy is about the first layers, the others keep everything."""
    is_about = isinstance(policy, SelectiveConfig) and layer < policy.of(n_layers)
    return policy if is_about else MemoryConfig()


def _is_one_graph(work: Workload) -> bool:
    return work.compiled and not isinstance(work.memory, FullConfig)


@dataclass(frozen=True)
class _Sizes:
    """Bytes a token of one layer's tensors."""

    residual: int
    product: int
    """A norm's result, or the product of the projection after attention."""
    qkv: int
    positioned: int
    """q and k with their positions."""
    rotated: int
    """The same where the positions are rotary, and these are tensors of their own; otherwise 0."""
    output: int
    """Of attention."""
    attended: int
    """Attention's output and LSE."""
    up: int
    """The MLP's first product."""
    active: int
    """The result of its activation function."""
    statistics: int
    """Of a norm."""

    @classmethod
    def of(cls, work: Workload) -> _Sizes:
        config, c = work.model, work.product_bytes
        assert config.head_dim is not None
        assert config.n_kv_heads is not None
        H, G, D, E, F = config.n_heads, config.n_kv_heads, config.head_dim, config.dim, config.ffn_dim
        return cls(
            residual=work.residual_bytes * E,
            product=c * E,
            qkv=c * (H + 2 * G) * D,
            positioned=c * (H + G) * D,
            rotated=c * (H + G) * D if config.position == "rotary" else 0,
            output=c * H * D,
            attended=c * H * D + FLOAT32 * H,
            up=c * F * (2 if config.mlp == "swiglu" else 1),
            active=c * F,
            statistics=FLOAT32,
        )
