"""A trained model as Hugging Face transformers reads it: a config.json and a state dict.

Two families: GPT2LMHeadModel and LlamaForCausalLM. transformers itself is not imported, here or anywhere: it would take
this repository's `kernels` folder for the Hugging Face package of that name.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from .config import ModelConfig, RotaryConfig
from .gpt import GPT

FAMILIES: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": {"position": "learned", "norm": "layernorm", "mlp": "gelu"},
    "LlamaForCausalLM": {"position": "rotary", "norm": "rmsnorm", "mlp": "swiglu"},
}
NEITHER: dict[str, Any] = {"qk_norm": False, "window": None, "attention_softcap": 0, "logit_softcap": 0}

GPT2_LAYER = {
    "attention_norm": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.out": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}
# Several names: our one fused matrix holds theirs one below the other.
LLAMA_LAYER = {
    "attention_norm": ["input_layernorm"],
    "attention.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention.out": ["self_attn.o_proj"],
    "mlp_norm": ["post_attention_layernorm"],
    "mlp.gate_up": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.down": ["mlp.down_proj"],
}


def to_huggingface(model: GPT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and model.safetensors of a folder that `AutoModelForCausalLM.from_pretrained` reads.

    A model knows no tokenizer, so the ids of special tokens are null: transformers' defaults would be GPT-2's and
    Llama's own. Whoever saves a tokenizer beside the model fills them in.

    Returns:
        The configuration, made of what JSON has. The weights, contiguous, in the dtype and on the device they have;
        they share memory with the model where they can. A tied head is left out, as transformers does.
    Raises:
        ValueError: neither family can express the model; names what it has too much.
    """
    config = model.config
    if _family(config) == "GPT2LMHeadModel":
        described, weights = _gpt2_config(config), _gpt2_weights(model)
    else:
        described, weights = _llama_config(config, model.attention.spec.seq_len), _llama_weights(model)
    common = {
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_head,
        "initializer_range": 0.02,
        "dtype": str(model.embedding.weight.dtype).removeprefix("torch."),
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    return described | common, {name: tensor.contiguous() for name, tensor in weights.items()}


def _family(config: ModelConfig) -> str:
    family = "GPT2LMHeadModel" if config.position == "learned" else "LlamaForCausalLM"
    assert config.head_dim is not None
    expected = FAMILIES[family] | NEITHER
    if family == "GPT2LMHeadModel":
        expected |= {"n_kv_heads": config.n_heads, "head_dim": config.dim // config.n_heads}
    unlike = [f"model.{name}={getattr(config, name)}" for name in expected if getattr(config, name) != expected[name]]
    if config.attention_scale is not None and not math.isclose(config.attention_scale, config.head_dim**-0.5):
        unlike.append(f"model.attention_scale={config.attention_scale:g}")
    if config.dim % config.n_heads:
        # The matrices would fit, but transformers refuses such a configuration even where head_dim is given.
        unlike.append(f"model.n_heads={config.n_heads} (not a divisor of model.dim={config.dim})")
    if unlike:
        raise ValueError(
            f"transformers' {family} has no {', '.join(unlike)}; only models built like GPT-2 or Llama "
            f"can be exported, so train without or keep the checkpoint"
        )
    return family


def _gpt2_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_positions": config.n_positions,
        "n_embd": config.dim,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_inner": config.ffn_dim,
        "activation_function": "gelu_new",  # their name for the tanh form
        "layer_norm_epsilon": config.norm_eps,
        "scale_attn_weights": True,
        # We train without dropout; their default of 0.1 would switch it on in fine-tuning.
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


def _gpt2_weights(model: GPT) -> dict[str, Tensor]:
    state = model.state_dict()

    def module(ours: str, theirs: str) -> dict[str, Tensor]:
        weight = state[f"{ours}.weight"]
        # Their modules always have biases: zeros say the same where ours has none.
        bias = state.get(f"{ours}.bias", weight.new_zeros(weight.shape[0]))
        # Their linear layers are Conv1D, whose weights are (in, out). A norm's vector is its own transpose.
        return {f"{theirs}.weight": weight.t(), f"{theirs}.bias": bias}

    weights = {"transformer.wte.weight": state["embedding.weight"], "transformer.wpe.weight": state["positions.weight"]}
    for i in range(model.config.n_layers):
        for ours, theirs in GPT2_LAYER.items():
            weights |= module(f"blocks.{i}.{ours}", f"transformer.h.{i}.{theirs}")
    weights |= module("norm", "transformer.ln_f")
    if not model.config.tie_head:
        weights["lm_head.weight"] = state["head.weight"]
    return weights


def _llama_config(config: ModelConfig, seq_len: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": _rope_parameters(config.rotary, config.head_dim),
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
        "attention_dropout": 0.0,
    }


def _rope_parameters(rotary: RotaryConfig, head_dim: int | None) -> dict[str, Any]:
    assert head_dim is not None
    if rotary.scaling == "none":
        return {"rope_type": "default", "rope_theta": rotary.theta}
    if rotary.scaling == "ntk":
        # They have only the dynamic form, whose base moves with the length of the text; ours is a larger base.
        theta = rotary.theta * rotary.factor ** (head_dim / (head_dim - 2))
        return {"rope_type": "default", "rope_theta": theta}
    parameters = {"rope_type": rotary.scaling, "rope_theta": rotary.theta, "factor": rotary.factor}
    if rotary.scaling == "linear":
        return parameters
    parameters["original_max_position_embeddings"] = rotary.original_seq_len
    if rotary.scaling == "yarn":
        return parameters | {"beta_fast": rotary.beta_fast, "beta_slow": rotary.beta_slow}
    return parameters | {"low_freq_factor": rotary.low_freq_factor, "high_freq_factor": rotary.high_freq_factor}


def _llama_weights(model: GPT) -> dict[str, Tensor]:
    state, config = model.state_dict(), model.config
    assert config.head_dim is not None
    assert config.n_kv_heads is not None
    rows = {
        "attention.qkv": [n * config.head_dim for n in (config.n_heads, config.n_kv_heads, config.n_kv_heads)],
        "mlp.gate_up": [config.ffn_dim, config.ffn_dim],
    }
    weights = {"model.embed_tokens.weight": state["embedding.weight"], "model.norm.weight": state["norm.weight"]}
    for i in range(config.n_layers):
        for ours, theirs in LLAMA_LAYER.items():
            for part in ("weight", "bias"):
                fused = state.get(f"blocks.{i}.{ours}.{part}")
                if fused is not None:
                    pieces = fused.split(rows.get(ours, [fused.shape[0]]))
                    weights |= {f"model.layers.{i}.{n}.{part}": p for n, p in zip(theirs, pieces, strict=True)}
    if not config.tie_head:
        weights["lm_head.weight"] = state["head.weight"]
    return weights
