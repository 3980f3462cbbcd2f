"""What one layer keeps for its backward pass, and what else it needs while it computes, in bytes. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import NamedTuple

from .activations_config import FullConfig, MemoryConfig, SelectiveConfig
from .arithmetic import score_bytes
from .compile_unit import compile_unit
from .config import ModelConfig, linear_sizes

FLOAT32 = 4


@dataclass(frozen=True)
class Workload:
    """What of a run decides the memory of its steps, in one of its processes."""

    model: ModelConfig
    memory: MemoryConfig
    batch_size: int
    """Rows of a micro-batch."""
    seq_len: int
    accumulates: bool = False
    """Whether a step has several micro-batches, so that gradients are there when one begins."""
    optimizer: str = "adamw"
    moment_bytes: int = 4
    product_bytes: int = 2
    """Of a number in a matrix product: 2 with bf16, otherwise 4."""
    in_fp8: bool = False
    """Whether the factors of blocks' linear layers have 8 bits. Each weight is there twice then, a byte a number."""
    input_bytes: int | None = None
    """Of a number in what a linear layer keeps of its input: 1 where the weight's gradient is a product in fp8; None:
    the input itself is kept."""
    residual_bytes: int = 4
    """Of a number in the residual stream: 2 with precision=bf16-residual, otherwise 4."""
    compiled: bool = True
    attention: str = "flash"
    """The backend that attends: flash, flex, sdpa or math."""
    mask_rows: int = 0
    """Rows for which an S × S mask in memory says which query sees which key."""
    saves: bool = True
    """Whether weights and moments are copied to the host's memory, for checkpoints."""
    ranks: int = 1
    """Of the run."""
    shards: int = 1
    """Ranks that hold one copy of weights, gradients and moments together."""
    reshards: bool = True
    """Whether of sharded weights those of the layer in use are gathered alone, and not those of all layers."""
    state_on_host: bool = False
    """Whether the shards lie in the host's memory."""
    context: int = 1
    """Ranks that share each row; seq_len is this rank's part."""
    context_method: str = "ulysses"
    """How these attend: ulysses or all-gather."""
    reduction_bytes: int = FLOAT32
    """Of a number in which gradients are summed over ranks."""
    sums_queries: bool = True
    """Whether attention's backward sums the gradient of the queries in float32, as the Hopper kernels do."""
    repeats_keys: bool = False
    """Whether attention repeats keys and values for each query head, as SDPA does for cuDNN."""

    @property
    def keeps_lse(self) -> bool:
        """Whether attention's backward takes its output and log-sum-exp, as flash attention's does, or computes
        again."""
        return self.attention == "flash"

    @property
    def writes_scores(self) -> bool:
        """Whether attention writes S × S scores to memory."""
        return self.attention == "math"

    @property
    def scores(self) -> int:
        """Scores of one layer: where ranks share a row each has a part of the heads, or of the queries."""
        return score_bytes(self.model, self.batch_size, self.seq_len, 1) * self.context

    @property
    def mask_pairs(self) -> int:
        """A rank attends to whole rows by Ulysses, and by all-gather from its own queries."""
        ranks = self.context**2 if self.context_method == "ulysses" else self.context
        return self.mask_rows * self.seq_len**2 * ranks

    @property
    def tokens(self) -> int:
        return self.batch_size * self.seq_len

    @property
    def keeps_copies(self) -> bool:
        """Whether the weights' bf16 copies stay from step to step; see `Runtime.working_dtype`."""
        return self.product_bytes < FLOAT32 and self.accumulates and not self.is_sharded

    @property
    def is_sharded(self) -> bool:
        return self.shards > 1 or self.state_on_host

    @property
    def is_one_graph(self) -> bool:
        """Whether training sees the model as one compiled graph, and not blocks one by one."""
        return self.compiled and compile_unit(self.memory, self.is_sharded) == "model"


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
    if work.input_bytes is not None:  # 8-bit copies in place of the inputs of linear layers
        kept += sizes.inputs - 2 * sizes.product - sizes.active
    keeps_scores = work.writes_scores and work.context == 1  # where ranks share rows, attention keeps its inputs
    return work.tokens * kept + keeps_scores * work.scores * (FLOAT32 + work.product_bytes)


def layer_bytes(work: Workload, layer: int) -> int:
    """The most that exists at once while the backward pass of a layer runs, beside what the layer keeps."""
    sizes, policy = _Sizes.of(work), policy_of(work.memory, layer, work.model.n_layers)
    if isinstance(policy, FullConfig):
        return recompute_bytes(work, sizes, policy, policy.keeps_attention(layer, work.model.n_layers))
    # The gradients of the residual stream and of the MLP's first product.
    live = sizes.residual + sizes.up
    if isinstance(policy, SelectiveConfig):  # again: the stream between attention and MLP, its norm, the activation
        live += sizes.residual + sizes.product + sizes.active + sizes.inputs
    if work.in_fp8:  # the gradient of the MLP's first product, as it is and transposed
        live += sizes.up
    if (
        work.model.mlp == "swiglu" and not work.compiled
    ):  # gradients of both halves of that product, and of the activation
        live += sizes.up + sizes.active
    again = isinstance(policy, SelectiveConfig) or work.context > 1
    scores = scores_again(work, work.compiled and work.context == 1) if again else 0
    # And the gradient of the largest matrix before it is cast.
    live_bytes = work.tokens * live + scores + work.product_bytes * max(matrix_sizes(work.model))
    # Where ranks share rows, attention's backward may need more: the gradients of the residual stream, of attention's
    # output, and of q, k and v, and what is exchanged; by then the MLP's first product is gone.
    live = sizes.residual + sizes.output + sizes.qkv - sizes.up
    exchanged = work.tokens * live + exchange_bytes(work) + workspace_bytes(work)
    return max(live_bytes, exchanged) if work.context > 1 else live_bytes


def recompute_bytes(work: Workload, sizes: _Sizes, policy: FullConfig, keeps_attention: bool) -> int:
    """The same of a layer that computes all again: the table of `model.recompute`."""
    T, tile, g = work.tokens, min(policy.tile or work.tokens, work.tokens), policy.head_groups
    kept = sizes.attended if keeps_attention else 0  # of attention; it leaves group by group
    mlp = T * (sizes.residual + sizes.attended - kept)
    mlp += tile * (4 * FLOAT32 * work.model.dim + (3 if work.in_fp8 else 2) * (sizes.up + sizes.active))
    # At the first group all results of attention are there, at the last one all gradients of qkv.
    ends = max(sizes.attended + sizes.qkv // g, sizes.attended // g + sizes.qkv)
    attention = T * (sizes.residual + ends - kept + 3 * sizes.positioned // g) + workspace_bytes(work, g)
    attention += exchange_bytes(work, g)
    return max(mlp, attention + scores_again(work, compiled=False, groups=g))


def scores_again(work: Workload, compiled: bool, groups: int = 1) -> int:
    """S × S numbers of attention=math that is computed again, for a group of heads: weights and their gradients, in
    float32 and as products take them. Compiled, gradients are never there in float32."""
    if not work.writes_scores:
        return 0
    return work.scores // groups * (2 * (FLOAT32 + work.product_bytes) - compiled * (FLOAT32 - work.product_bytes))


def workspace_bytes(work: Workload, groups: int = 1) -> int:
    """What attention's backward takes while it runs: row statistics; with the Hopper kernels sums of dQ; or keys and
    values, and the gradients of both, for each query head.

    The sums are those of some 900 tiles of 128 keys, and of two key heads at least; see `hopper.backward`.
    """
    config = work.model
    assert config.head_dim is not None
    assert config.n_kv_heads is not None
    statistics = work.tokens * config.n_heads // groups * 4 * FLOAT32
    if work.attention == "sdpa":  # which adds a mask in the dtype of products
        statistics += work.mask_pairs * work.product_bytes
    if work.repeats_keys:
        return statistics + 4 * work.tokens * config.n_heads // groups * config.head_dim * work.product_bytes
    if not work.sums_queries or config.head_dim > 128:
        return statistics
    rows = min(2 * work.seq_len + 900 * 128, work.tokens * config.n_kv_heads // groups)
    return statistics + rows * config.n_heads // config.n_kv_heads * config.head_dim * FLOAT32


class Heads(NamedTuple):
    """Of a token, in an exchange by heads for one group of them."""

    qkv: int
    """Queries, keys and values, or their gradients."""
    out: int
    backward: int
    """Queries, keys, values, and what else the backward pass takes."""


def heads_exchanged(work: Workload, groups: int = 1) -> Heads:
    """What `model.attention.context.ulysses` sends: keys and values as often as makes the ranks divide their heads."""
    assert work.model.n_kv_heads is not None
    H, G = work.model.n_heads // groups, work.model.n_kv_heads // groups
    qkv = H + 2 * G * (work.context // gcd(G, work.context))
    return Heads(qkv, H, qkv + H * (2 if work.keeps_lse else 1))


def exchange_bytes(work: Workload, groups: int = 1) -> int:
    """What ranks that share rows hold to exchange what a group of heads needs in its backward pass, at the most."""
    model = work.model
    if work.context == 1:
        return 0
    assert model.head_dim is not None
    assert model.n_kv_heads is not None
    number = model.head_dim * work.product_bytes
    if work.context_method == "ulysses":  # as they are sent, and as they are received
        return 2 * work.tokens * heads_exchanged(work, groups).backward * number
    # Keys and values of the tokens that this rank's see, of a rank with the last of them and two runs at most. While a
    # group of heads attends there are its own, their gradients as they are summed, and those of a run; of two groups
    # (`all_gather.GROUPS`) also what is sent and received of the other.
    seen = work.seq_len * work.context
    if model.window:
        seen = min(seen, work.seq_len + 2 * model.window)
    heads = model.n_kv_heads // groups
    return (5 if heads % 2 == 0 else 6) * work.batch_size * seen * heads * number


def policy_of(policy: MemoryConfig, layer: int, n_layers: int) -> MemoryConfig:
    """The policy of one layer: a policy is about the first layers, the others keep everything."""
    is_about = isinstance(policy, SelectiveConfig) and layer < policy.of(n_layers)
    return policy if is_about else MemoryConfig()


def matrix_sizes(config: ModelConfig) -> list[int]:
    """Numbers in each matrix of a layer: qkv, the projection after attention, the MLP's first and last."""
    return [inputs * outputs for inputs, outputs in linear_sizes(config).values()]


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
    inputs: int
    """The 8-bit inputs of all linear layers, where those are kept instead of the inputs themselves; otherwise 0."""

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
            inputs=(work.input_bytes or 0) * (2 * E + H * D + F),
        )
