"""The benchmark compares equal models and prints what it measured."""

from __future__ import annotations

import pytest
import torch

from model.attention import AttentionConfig, AttentionSpec, build_attention
from model.config import ModelConfig
from model.gpt import GPT
from scripts.bench_training.peers import PlainGPT2, figures, markdown

CONFIG = ModelConfig(
    "small", 2, 4, 32, 128, 100, position="learned", n_positions=24, norm="layernorm", mlp="gelu", bias=True,
    tie_head=True,
)  # fmt: skip


def test_the_plain_gpt2_is_our_model_with_our_weights():
    ours = GPT(CONFIG, build_attention(AttentionConfig("math"), AttentionSpec(4, 4, 8, 24, "float32")))
    plain = PlainGPT2(CONFIG)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(std=0.3)  # biases and norms too: at their initial values a mix-up would not show
    plain.load(ours)
    tokens = torch.randint(0, 100, (1, 25))
    theirs = plain(tokens[:, :-1], tokens[:, 1:])
    assert theirs.item() == pytest.approx(ours(tokens[:, :-1], tokens[:, 1:]).item() / 24, rel=1e-5)


def test_figures_follow_from_tokens_per_second():
    # 6 N + 6 · L · d · S: N = 2 · (32·96 + 32·32 + 2·32·128) + 100·32, L = 2, d = 32, S = 24.
    flops = 6 * (2 * (32 * 96 + 32 * 32 + 2 * 32 * 128) + 3200) + 6 * 2 * 32 * 24
    row = figures(tokens_per_second=1200.0, gib=1.5, config=CONFIG, seq_len=24)
    assert row == pytest.approx(
        {"tokens_per_second": 1200, "step_ms": 20, "tflops": 1200 * flops / 1e12, "peak_gib": 1.5}
    )


def test_the_record_names_hardware_versions_commit_and_command():
    facts = {
        "device": {"name": "CARD"},
        "versions": {"torch": "2.13", "triton": "3.7"},
        "commit": "abc",
        "command": "run",
    }
    text = markdown([{"name": "row", **figures(1000.0, 2.0, CONFIG, 24)}], facts, 24)
    for word in ("CARD", "2.13", "3.7", "abc", "    run", "| row | 1,000 | 24.0 |"):
        assert word in text
