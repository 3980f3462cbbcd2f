"""How much memory a training run takes, predicted from its configuration. No torch here.

What layers keep for the backward pass is predicted where a policy says it. Where they keep everything, it depends on
the kernels and the compiler and is not.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from .activations_config import FullConfig, SelectiveConfig
from .arithmetic import parameter_count, score_bytes
from .config import ModelConfig

GIB = 2**30
FLOAT32 = 4


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes, part by part."""

    weights: int
    gradients: int
    optimizer: int
    logits: int
    """The float32 logits that exist at once, and their gradient."""
    scores: int
    """One layer's S × S attention scores, which attention=math alone writes, several times over."""

    @property
    def state(self) -> int:
        """What is held from step to step, whatever the sequence length."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def predict(
    config: ModelConfig, *, optimizer: str, batch_size: int, seq_len: int, writes_scores: bool = False
) -> MemoryPlan:
    """The memory of one process that trains with float32 weights.

    Args:
        optimizer: adamw keeps two moments of each parameter; muon one of the blocks' matrices and two of the rest.
        batch_size: rows per micro-batch. writes_scores: whether attention writes S × S scores to memory.
    """
    count, _, block_matrices = parameter_count(config)
    moments = 2 * count - (block_matrices if optimizer == "muon" else 0)
    tokens = batch_size * seq_len
    tokens_at_once = min(tokens, config.loss_chunk_size or tokens)
    return MemoryPlan(
        weights=FLOAT32 * count,
        gradients=FLOAT32 * count,
        optimizer=FLOAT32 * moments,
        logits=2 * FLOAT32 * tokens_at_once * config.vocab_size,
        scores=score_bytes(config, batch_size, seq_len) if writes_scores else 0,
    )


def kept_by_layers(
    config: ModelConfig, policy: SelectiveConfig, *, tokens: int, product_bytes: int, writes_scores: bool = False
) -> int:
    """Bytes that the layers which a policy is about keep of a micro-batch until its backward pass.

    Args:
        tokens: of the micro-batch. product_bytes: of a number in a matrix product: 2 with bf16, otherwise 4.
        writes_scores: whether attention writes S × S scores, so that memory=full keeps its output alone, and
            memory=selective nothing of it.
    """
    assert config.head_dim is not None
    assert config.n_kv_heads is not None
    H, G, D = config.n_heads, config.n_kv_heads, config.head_dim
    layers = policy.of(config.n_layers)
    output, lse = product_bytes * H * D, 0 if writes_scores else FLOAT32 * H  # of attention
    per_token = layers * FLOAT32 * config.dim  # the layer's input
    if isinstance(policy, FullConfig):
        per_token += sum(policy.keeps_attention(layer, config.n_layers) for layer in range(layers)) * (output + lse)
    else:
        up_width = (2 if config.mlp == "swiglu" else 1) * config.ffn_dim
        per_token += layers * product_bytes * ((H + 2 * G) * D + config.dim + up_width)
        per_token += 0 if writes_scores else layers * (output + lse)
    return tokens * per_token
