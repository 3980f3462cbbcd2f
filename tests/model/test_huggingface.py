"""What is exported computes, in transformers, the logits that it computes here."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from processes import LIMIT_S
from safetensors.torch import load_file, save_file

from model.config import ModelConfig, RotaryConfig
from model.huggingface import to_huggingface

SEQ_LEN = 160
GPT2 = ModelConfig(
    name="gpt2",
    n_layers=2,
    n_heads=4,
    dim=96,
    ffn_dim=384,
    vocab_size=211,
    position="learned",
    n_positions=SEQ_LEN,
    norm="layernorm",
    mlp="gelu",
    bias=True,
    tie_head=True,
)
LLAMA = ModelConfig(name="llama", n_layers=2, n_heads=4, dim=96, ffn_dim=256, vocab_size=211)


def scaled(scaling: str) -> ModelConfig:
    """Few pairs turn slowly at a short original length, so θ is small: some pairs below, on and above each ramp.
    Ends of the ramps that are not transformers' defaults show whether they arrive."""
    rotary = RotaryConfig(
        theta=500.0,
        scaling=scaling,
        factor=SEQ_LEN / 64,
        original_seq_len=64,
        beta_fast=6.0,
        beta_slow=0.5,
        low_freq_factor=0.5,
        high_freq_factor=6.0,
    )
    return replace(LLAMA, dim=128, head_dim=None, rotary=rotary)


CASES = {
    "gpt2": GPT2,
    "gpt2-untied": replace(GPT2, tie_head=False),
    "gpt2-without-biases": replace(GPT2, bias=False),
    "gpt2-other-widths": replace(GPT2, ffn_dim=200, norm_eps=0.1),
    "llama": LLAMA,
    "llama-grouped": replace(LLAMA, n_kv_heads=2),
    "llama-one-kv-head": replace(LLAMA, n_kv_heads=1),
    "llama-tied": replace(LLAMA, tie_head=True),
    "llama-biases": replace(LLAMA, bias=True, n_kv_heads=2),
    "llama-wide-heads": replace(LLAMA, head_dim=40, n_kv_heads=2),
    "llama-theta-eps": replace(LLAMA, rotary=RotaryConfig(theta=300.0), norm_eps=0.1),
    "llama-linear": scaled("linear"),
    "llama-ntk": scaled("ntk"),
    "llama-yarn": scaled("yarn"),
    "llama-llama3": scaled("llama3"),
}

# Runs where this repository cannot be seen: `kernels` here would be taken for Hugging Face's package of that name.
READ_WITH_TRANSFORMERS = """
import json, pathlib, sys
import torch, transformers
from safetensors.torch import load_file, save_file

torch.set_num_threads(2)
for folder in sorted(pathlib.Path(".").glob("*/")):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    with torch.no_grad():
        logits = model.eval()(load_file(folder / "tokens.safetensors")["tokens"], use_cache=False).logits
    save_file({"logits": logits}, folder / "logits.safetensors")
    facts = {"class": type(model).__name__, "dtype": str(model.dtype)}
    facts |= {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    (folder / "facts.json").write_text(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def both(tmp_path_factory, build_lively):
    """By case: our logits, theirs, and what they say about loading. One process: importing transformers takes long."""
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    root = tmp_path_factory.mktemp("huggingface")
    ours = {}
    torch.manual_seed(0)
    for name, config in CASES.items():
        model = build_lively(config, seq_len=SEQ_LEN)
        tokens = torch.randint(config.vocab_size, (2, SEQ_LEN))
        with torch.no_grad():
            ours[name] = model(tokens)
        described, weights = to_huggingface(model)
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(described))
        save_file(weights, root / name / "model.safetensors", metadata={"format": "pt"})
        save_file({"tokens": tokens}, root / name / "tokens.safetensors")

    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", "-c", READ_WITH_TRANSFORMERS]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = {name: load_file(root / name / "logits.safetensors")["logits"] for name in CASES}
    facts = {name: json.loads((root / name / "facts.json").read_text()) for name in CASES}
    return ours, theirs, facts, done.stderr


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_transformers(both, name):
    # Two float32 programs that add up in different orders: 2 layers of widths of about 100 leave some 1e-6 at logits of
    # order 1. A wrong eps, rope setting or order of weights moves them by 1e-2 at least.
    ours, theirs, _, _ = both
    assert 0.5 < ours[name].std() < 2
    assert (ours[name] - theirs[name]).abs().max() < 1e-4


@pytest.mark.parametrize("name", CASES)
def test_transformers_finds_every_weight_and_knows_every_setting(both, name):
    _, _, facts, messages = both
    expected = "GPT2LMHeadModel" if name.startswith("gpt2") else "LlamaForCausalLM"
    nothing = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
    assert facts[name] == {"class": expected, "dtype": "torch.float32"} | nothing
    assert "rope_parameters" not in messages  # transformers warns of rope settings it does not know or finds doubtful


def test_a_tied_head_is_written_once(build):
    tied, untied = replace(LLAMA, tie_head=True), replace(LLAMA, tie_head=False)
    assert "lm_head.weight" not in to_huggingface(build(tied))[1]
    assert "lm_head.weight" in to_huggingface(build(untied))[1]


def test_configuration_names_no_special_tokens_and_no_dropout(build):
    for config in (GPT2, LLAMA):
        described, _ = to_huggingface(build(config, seq_len=48))
        assert [described[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [None] * 3
        assert all(value == 0 for name, value in described.items() if name.endswith(("pdrop", "dropout")))
    assert described["max_position_embeddings"] == 48  # the length it was trained on, which Llama's tables do not show


def test_dtype_of_the_weights_is_kept_and_named(build):
    described, weights = to_huggingface(build(LLAMA).bfloat16())
    assert described["dtype"] == "bfloat16"
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (replace(LLAMA, qk_norm=True), "model.qk_norm=True"),
        (replace(LLAMA, window=32), "model.window=32"),
        (replace(LLAMA, attention_softcap=50.0), "model.attention_softcap=50.0"),
        (replace(LLAMA, logit_softcap=30.0), "model.logit_softcap=30.0"),
        (replace(LLAMA, attention_scale=0.5), "model.attention_scale=0.5"),
        (replace(LLAMA, mlp="gelu"), "LlamaForCausalLM has no model.mlp=gelu"),
        (replace(LLAMA, norm="layernorm"), "LlamaForCausalLM has no model.norm=layernorm"),
        (replace(LLAMA, n_heads=5, n_kv_heads=5, head_dim=16), "not a divisor of model.dim=96"),
        (replace(GPT2, mlp="swiglu"), "GPT2LMHeadModel has no model.mlp=swiglu"),
        (replace(GPT2, norm="rmsnorm"), "GPT2LMHeadModel has no model.norm=rmsnorm"),
        (replace(GPT2, n_kv_heads=2), "GPT2LMHeadModel has no model.n_kv_heads=2"),
        (replace(GPT2, head_dim=32), "GPT2LMHeadModel has no model.head_dim=32"),
        (replace(LLAMA, qk_norm=True, window=8), "model.qk_norm=True, model.window=8"),
    ],
)
def test_what_neither_family_has_is_refused_by_name(build, config, named):
    with pytest.raises(ValueError, match="can be exported") as error:
        to_huggingface(build(config))
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_the_usual_attention_scale_may_be_written_out(build):
    to_huggingface(build(replace(LLAMA, attention_scale=24**-0.5)))


def test_exporting_imports_no_transformers():
    assert "transformers" not in sys.modules
