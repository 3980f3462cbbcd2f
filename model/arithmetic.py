"""Parameters and FLOPs of a model, as pure functions of its configuration; its memory is in `model.memory`.

Conventions: a multiply-add is 2 FLOPs; a training step is 3 forward passes (one forward, two backward); recomputation
does not count. N is the number of parameters a token is multiplied with: the weights of every linear layer and of the
output head (tied or not), without embeddings looked up, biases and norms.
"""

from __future__ import annotations

from typing import NamedTuple

from .config import ModelConfig, linear_sizes
from .precision_config import Float8Config, is_in_fp8


class ParameterCount(NamedTuple):
    """How many parameters a model has, by what they do."""

    total: int
    """Every trained number; a tied head counts once."""
    matmul: int
    """N above."""
    block_matrices: int
    """Of the matrices inside the blocks."""


def parameter_count(config: ModelConfig) -> ParameterCount:
    """How many parameters `GPT(config)` has, without building it."""
    assert config.head_dim is not None
    E, V, D, sizes = config.dim, config.vocab_size, config.head_dim, linear_sizes(config)
    layer_matmul = sum(inputs * outputs for inputs, outputs in sizes.values())
    norm = E * (2 if config.norm == "layernorm" and config.bias else 1)
    biased = sizes if config.bias else ["attention.qkv"] if config.qkv_bias else []
    layer_biases = sum(sizes[name][1] for name in biased)
    layer = layer_matmul + layer_biases + 2 * norm + (2 * D if config.qk_norm else 0)

    embeddings = V * E + (config.n_positions * E if config.position == "learned" else 0)
    head = 0 if config.tie_head else V * E
    return ParameterCount(
        total=embeddings + config.n_layers * layer + norm + head,
        matmul=config.n_layers * layer_matmul + V * E,
        block_matrices=config.n_layers * layer_matmul,
    )


def causal_keys(seq_len: int, window: int | None = None) -> float:
    """Keys that a token of a causal row sees on average: (S + 1) / 2, less with a sliding window."""
    w = seq_len if window is None else min(window, seq_len)
    return (w * (w + 1) / 2 + (seq_len - w) * w) / seq_len


def train_flops_per_token(config: ModelConfig, keys_per_token: float) -> float:
    """6 N + 12 · L · H·D · keys: forward and backward FLOPs of one token that sees `keys_per_token` keys on average.

    The two attention products cost 4 · H·D per visible pair forward and twice that backward. What `keys_per_token` is
    makes the convention: S is PaLM's (causality ignored, appendix B of arXiv:2204.02311), S / 2 the causal one, the
    counted average of a batch the work its masks really ask for.
    """
    assert config.head_dim is not None
    attention = 12 * config.n_layers * config.n_heads * config.head_dim * keys_per_token
    return 6 * parameter_count(config).matmul + attention


def float8_flops_per_token(config: ModelConfig, precision: Float8Config) -> float:
    """Those of a token's 6 N that are products with factors in 8 bits."""
    weights = sum(i * o for i, o in linear_sizes(config).values() if is_in_fp8((i, o)))
    return (6 if precision.weight_gradients == "fp8" else 4) * config.n_layers * weights


def score_bytes(config: ModelConfig, batch_size: int, seq_len: int, bytes_per_score: int = 4) -> int:
    """Bytes of one layer's S × S attention scores, which only attention=math writes."""
    return batch_size * config.n_heads * seq_len * seq_len * bytes_per_score
