"""Every impossible model is refused in one line that names the field and the remedy."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from model.config import ModelConfig, RotaryConfig

SHAPE = {"name": "test", "n_layers": 2, "n_heads": 4, "dim": 64, "ffn_dim": 128, "vocab_size": 100}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layers": 0}, "model.n_layers=0 must be at least 1"),
        ({"n_heads": 0}, "model.n_heads=0 must be at least 1"),
        ({"dim": -8}, "model.dim=-8 must be at least 1"),
        ({"ffn_dim": 0}, "model.ffn_dim=0 must be at least 1"),
        ({"vocab_size": 0}, "model.vocab_size=0 must be at least 1"),
        ({"n_heads": 5}, "model.n_heads=5 does not divide model.dim=64; choose a divisor or set model.head_dim"),
        ({"n_kv_heads": 3}, "model.n_kv_heads=3 does not divide model.n_heads=4; choose a divisor"),
        ({"n_kv_heads": 8}, "model.n_kv_heads=8 does not divide model.n_heads=4"),
        ({"n_kv_heads": 0}, "model.n_kv_heads=0 does not divide"),
        ({"position": "alibi"}, "model.position='alibi' is unknown; use learned or rotary"),
        ({"norm": "batchnorm"}, "model.norm='batchnorm' is unknown; use rmsnorm or layernorm"),
        ({"mlp": "relu"}, "model.mlp='relu' is unknown; use swiglu or gelu"),
        (
            {"head_dim": 15},
            "model.head_dim=15 is odd: rotary positions need an even one, such as 16",
        ),
        ({"dim": 60}, "model.head_dim=15 is odd"),
        ({"window": 0}, "model.window=0: a token sees at least itself; use 1 or more, or null"),
        ({"attention_scale": 0.0}, "model.attention_scale=0.0 must be above 0; null is 1/√head_dim"),
        ({"attention_softcap": -1.0}, "model.attention_softcap=-1.0 is negative; use 0 to switch it off"),
        ({"logit_softcap": -30.0}, "model.logit_softcap=-30.0 is negative"),
        ({"loss_chunk_size": -1}, "model.loss_chunk_size=-1 is negative"),
    ],
)
def test_an_impossible_model_is_refused_by_field_and_value(change, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        ModelConfig(**SHAPE | change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scaling": "longrope"}, "model.rotary.scaling='longrope' is unknown; use none, linear, ntk, yarn, llama3"),
        ({"factor": 4.0}, "model.rotary.factor=4 does nothing with scaling=none; name a scaling: linear, ntk, yarn"),
        ({"scaling": "yarn", "factor": 0.5}, "model.rotary.factor=0.5 would shorten the context; use 1 or more"),
        ({"theta": 1.0}, "model.rotary.theta=1 must be above 1; 10000 is usual"),
        ({"original_seq_len": 0}, "model.rotary.original_seq_len=0 must be at least 1"),
        ({"beta_slow": 32.0}, "model.rotary.beta_slow=32 must lie between 0 and beta_fast"),
        ({"low_freq_factor": 8.0}, "model.rotary.low_freq_factor=8 must lie between 0 and high_freq_factor"),
    ],
)
def test_an_impossible_rotary_embedding_is_refused_by_field_and_value(options, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        RotaryConfig(**options)
    assert "\n" not in str(error.value)


def test_rows_longer_than_the_learned_positions_are_refused():
    config = ModelConfig(**SHAPE, position="learned", n_positions=512)
    config.check_seq_len(512)
    with pytest.raises(ValueError, match=r"seq_len=513 is beyond .* 512 learned positions; set model.n_positions=513"):
        config.check_seq_len(513)


def test_rotary_positions_have_no_end():
    ModelConfig(**SHAPE).check_seq_len(10**7)


def test_what_is_left_out_follows_from_the_shape():
    config = ModelConfig(**SHAPE)
    assert config.head_dim == 16
    assert config.n_kv_heads == 4


def test_a_given_head_dim_need_not_divide_anything():
    config = ModelConfig(**SHAPE | {"n_heads": 5, "head_dim": 24})
    assert config.head_dim == 24
    assert config.n_kv_heads == 5


def test_learned_positions_allow_an_odd_head_dim():
    assert ModelConfig(**SHAPE | {"head_dim": 15}, position="learned", n_positions=8).head_dim == 15


def test_a_mistake_is_found_before_torch_loads():
    command = "import sys, model.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], cwd=Path(__file__).parents[2]).returncode == 0
