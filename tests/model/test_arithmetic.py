"""The formulas against models that exist, PyTorch's own FLOP counter, published sizes and hand counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.activations_config import MemoryConfig
from model.arithmetic import causal_keys, float8_flops_per_token, parameter_count, score_bytes, train_flops_per_token
from model.config import ModelConfig
from model.layer_memory import Workload
from model.memory import state_bytes
from model.precision_config import Float8Config

LLAMA = ModelConfig(name="llama", n_layers=3, n_heads=4, dim=32, ffn_dim=48, vocab_size=101)
GPT2 = replace(LLAMA, name="gpt2", position="learned", n_positions=40, norm="layernorm", mlp="gelu", bias=True)
# By hand, with E = 32: N = layers × (q + k + v + out + feed-forward) + head.
MODELS = {
    "llama": (LLAMA, 3 * (4 * 32 * 32 + 3 * 32 * 48) + 101 * 32),
    "llama-tied": (replace(LLAMA, tie_head=True), 3 * (4 * 32 * 32 + 3 * 32 * 48) + 101 * 32),
    "llama-grouped": (replace(LLAMA, n_kv_heads=1), 3 * (2 * 32 * 32 + 2 * 32 * 8 + 3 * 32 * 48) + 101 * 32),
    "llama-wide-heads": (
        replace(LLAMA, head_dim=20, n_kv_heads=2),
        3 * (2 * 32 * 80 + 2 * 32 * 40 + 3 * 32 * 48) + 101 * 32,
    ),
    "llama-qk-norm": (replace(LLAMA, qk_norm=True), 3 * (4 * 32 * 32 + 3 * 32 * 48) + 101 * 32),
    "llama-qkv-bias": (replace(LLAMA, qkv_bias=True), 3 * (4 * 32 * 32 + 3 * 32 * 48) + 101 * 32),
    "llama-biases": (replace(LLAMA, bias=True, n_kv_heads=2), 3 * (3 * 32 * 32 + 3 * 32 * 48) + 101 * 32),
    "gpt2": (GPT2, 3 * (4 * 32 * 32 + 2 * 32 * 48) + 101 * 32),
    "gpt2-tied": (replace(GPT2, tie_head=True), 3 * (4 * 32 * 32 + 2 * 32 * 48) + 101 * 32),
    "gpt2-without-biases": (replace(GPT2, bias=False), 3 * (4 * 32 * 32 + 2 * 32 * 48) + 101 * 32),
    "mixed": (replace(GPT2, mlp="swiglu", norm="rmsnorm"), 3 * (4 * 32 * 32 + 3 * 32 * 48) + 101 * 32),
}

GPT2_124M = ModelConfig(
    name="gpt2-124m",
    n_layers=12,
    n_heads=12,
    dim=768,
    ffn_dim=3072,
    vocab_size=50257,
    position="learned",
    n_positions=1024,
    norm="layernorm",
    mlp="gelu",
    bias=True,
    tie_head=True,
)
LLAMA_8B = ModelConfig(
    name="llama-8b", n_layers=32, n_heads=32, n_kv_heads=8, dim=4096, ffn_dim=14336, vocab_size=128256
)
LLAMA_1B = replace(LLAMA_8B, n_layers=16, dim=2048, head_dim=64, ffn_dim=8192, tie_head=True)


@pytest.mark.parametrize(("config", "matmul"), MODELS.values(), ids=MODELS)
def test_parameters_are_those_of_the_model(build, config, matmul):
    count = parameter_count(config)
    assert count.total == sum(parameter.numel() for parameter in build(config).parameters())
    assert count.matmul == matmul


def test_published_sizes():
    assert parameter_count(GPT2_124M).total == 124_439_808
    assert parameter_count(LLAMA_8B).total == 8_030_261_248
    assert parameter_count(LLAMA_1B).total == 1_235_814_400


@pytest.mark.parametrize(("config", "_matmul"), MODELS.values(), ids=MODELS)
def test_forward_flops_are_what_pytorch_counts(build, config, _matmul):
    B, S = 2, 24
    model = build(config, seq_len=S)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(B, S, dtype=torch.int64))
    # Standard attention computes all S keys of every query; forward is a third of a training step.
    assert counter.get_total_flops() * 3 == B * S * train_flops_per_token(config, S)


@pytest.mark.parametrize("chunk_size", [0, 20])
def test_training_flops_are_what_pytorch_counts(build, chunk_size):
    B, S = 2, 24
    config = replace(LLAMA, n_kv_heads=2, loss_chunk_size=chunk_size)
    model = build(config, seq_len=S)
    tokens = torch.zeros(B, S, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(tokens, tokens).backward()
    assert counter.get_total_flops() == B * S * train_flops_per_token(config, S)


def test_training_flops_by_hand():
    # GPT-2: N = 12 · 12 · 768² + 50257 · 768 = 123,532,032, and 12 · 12 layers · 768 = 110,592 per key.
    assert train_flops_per_token(GPT2_124M, 0) == 6 * 123_532_032
    assert train_flops_per_token(GPT2_124M, 1024) == 854_438_400
    assert train_flops_per_token(GPT2_124M, 512) == 797_815_296
    # Grouping saves parameters but no attention.
    # N = 16 · (2 · 2048² + 2 · 2048 · 512 + 3 · 2048 · 8192) + 128256 · 2048
    assert train_flops_per_token(LLAMA_1B, 0) == 6 * 1_235_746_816
    assert train_flops_per_token(LLAMA_1B, 1) - train_flops_per_token(LLAMA_1B, 0) == 12 * 16 * 2048


@pytest.mark.parametrize("seq_len", [1, 2, 7, 64])
@pytest.mark.parametrize("window", [None, 1, 2, 5, 7, 64, 1000])
def test_causal_keys_are_those_counted_one_by_one(seq_len, window):
    keys = sum(1 for t in range(seq_len) for s in range(t + 1) if window is None or s > t - window)
    assert causal_keys(seq_len, window) == keys / seq_len


def test_memory_by_hand():
    # 2 rows × 4 heads × 10 × 10 scores.
    assert score_bytes(LLAMA, batch_size=2, seq_len=10) == 3200
    assert score_bytes(LLAMA, batch_size=2, seq_len=10, bytes_per_score=2) == 1600
    # The same for grouped heads: every query head has scores of its own.
    assert score_bytes(replace(LLAMA, n_kv_heads=1), batch_size=1, seq_len=1) == 16
    # Weight, gradient and two moments of 4 bytes each.
    weights = 4 * 124_439_808
    assert state_bytes(Workload(GPT2_124M, MemoryConfig(), 1, 1024)) == (weights, weights, 2 * weights)


def test_the_share_of_fp8_counts_the_layers_of_blocks_whose_sizes_divide() -> None:
    config = ModelConfig(name="x", n_layers=3, n_heads=4, dim=64, ffn_dim=100, vocab_size=1000)
    products = 64 * 3 * 64 + 64 * 64  # not the MLP's, 64 → 200 and 100 → 64, nor the head
    assert float8_flops_per_token(config, Float8Config()) == 6 * 3 * products
    assert float8_flops_per_token(config, Float8Config(weight_gradients="bfloat16")) == 4 * 3 * products
