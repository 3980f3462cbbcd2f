"""A model's settings ↔ transformers' config.json. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

from model.config import ModelConfig, RotaryConfig

LLAMA_LIKE = {"position": "rotary", "norm": "rmsnorm", "mlp": "swiglu", "attention_softcap": 0, "logit_softcap": 0}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2LMHeadModel",
        {"position": "learned", "norm": "layernorm", "mlp": "gelu", "attention_softcap": 0, "logit_softcap": 0}
        | {"qk_norm": False, "qkv_bias": False, "window": None},
    ),
    "llama": ("LlamaForCausalLM", LLAMA_LIKE | {"qk_norm": False, "qkv_bias": False, "window": None}),
    "mistral": ("MistralForCausalLM", LLAMA_LIKE | {"qk_norm": False, "qkv_bias": False, "bias": False}),
    "qwen2": ("Qwen2ForCausalLM", LLAMA_LIKE | {"qk_norm": False, "qkv_bias": True, "bias": False}),
    "qwen3": ("Qwen3ForCausalLM", LLAMA_LIKE | {"qk_norm": True, "qkv_bias": False, "bias": False}),
}
"""By transformers' model_type: the class, and what a model must be to be of the family."""

# Settings of a config.json that change no logit of a model that is evaluated: names, ids, training, caching.
WITHOUT_MEANING = {
    "architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache",
    "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "attention_dropout", "resid_pdrop",
    "embd_pdrop", "attn_pdrop", "pretraining_tp", "task_specific_params", "summary_type", "summary_use_proj",
    "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "n_ctx", "gradient_checkpointing",
    "reorder_and_upcast_attn",
}  # fmt: skip

LAYER_TYPES = ("full_attention", "sliding_attention")
T = TypeVar("T")
END = 2**63
"""Numbers of a model are below it."""


def family_of(config: ModelConfig) -> str:
    """The model_type that can express a model.

    Raises:
        ValueError: none can; names what the model has too much.
    """
    if config.position == "learned":
        family = "gpt2"
    elif config.qk_norm:
        family = "qwen3"
    elif config.qkv_bias:
        family = "qwen2"
    else:
        family = "llama" if config.window is None else "mistral"
    name, expected = FAMILIES[family]
    assert config.head_dim is not None
    if family == "gpt2":
        expected = expected | {"n_kv_heads": config.n_heads}
    if family in ("gpt2", "qwen2"):
        expected = expected | {"head_dim": config.dim // config.n_heads}
    unlike = [
        f"model.{field}={getattr(config, field)}" for field in expected if getattr(config, field) != expected[field]
    ]
    if config.attention_scale is not None and not math.isclose(config.attention_scale, config.head_dim**-0.5):
        unlike.append(f"model.attention_scale={config.attention_scale:g}")
    if config.dim % config.n_heads:
        # The matrices would fit, but transformers refuses such a configuration even where head_dim is given.
        unlike.append(f"model.n_heads={config.n_heads} (not a divisor of model.dim={config.dim})")
    if unlike:
        raise ValueError(
            f"transformers' {name} has no {', '.join(unlike)}; only models built like GPT-2, Llama, Mistral or Qwen "
            f"can be exported, so train without or keep the checkpoint"
        )
    return family


def describe(config: ModelConfig, seq_len: int, dtype: str, separator_id: int | None = None) -> dict[str, Any]:
    """The config.json of a model.

    Args:
        seq_len: the length it was trained on, which Llama's weights do not show.
        dtype: of the weights, by torch's name.
        separator_id: the token that begins a document and so ends the one before; None: no tokenizer is known, and ids
            are null, where transformers' defaults would be GPT-2's and Llama's own.
    Raises:
        ValueError: see `family_of`.
    """
    family = family_of(config)
    common = {
        "architectures": [FAMILIES[family][0]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_head,
        "initializer_range": 0.02,
        "dtype": dtype,
        "bos_token_id": separator_id,
        "eos_token_id": separator_id,
        "pad_token_id": None,
    }
    if family == "gpt2":
        return common | {
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
    described = common | {
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
        "attention_dropout": 0.0,
    }
    if family == "llama":
        return described | {"attention_bias": config.bias, "mlp_bias": config.bias}
    if family == "mistral":
        return described | {"sliding_window": config.window}
    if family == "qwen3":
        described["attention_bias"] = False
    windowed = config.window is not None
    return described | {"use_sliding_window": windowed, "sliding_window": config.window, "max_window_layers": 0}


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


class Described:
    """A config.json that is read field by field; what nobody read is refused at the end, for it may mean something."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where, self.read = values, where, set(WITHOUT_MEANING)

    def take(self, name: str, default: Any = None) -> Any:
        """A value; the default where it is null or not there."""
        self.read.add(name)
        value = self.values.get(name)
        return default if value is None else value

    def number(self, name: str, default: Any = None) -> float:
        value = self.take(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < END:
            raise self.refused(name, value, "it must be a number from 0 to 2⁶³")
        return float(value)

    def count(self, name: str, default: Any = None, least: int = 1) -> int:
        """How many of something."""
        value = self.take(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < END:
            raise self.refused(name, value, f"it must be a whole number from {least} to 2⁶³ − 1")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise self.refused(name, value, "it must be true or false")
        return value

    def section(self, name: str) -> dict[str, Any]:
        """Settings inside one; none where it is null or not there."""
        value = self.take(name, {})
        if not isinstance(value, dict):
            raise self.refused(name, value, "it must be an object")
        return value

    def expect(self, name: str, *possible: Any) -> None:
        """Raises ValueError unless the value is one of these, of which the first is the default."""
        if (value := self.take(name, possible[0])) not in possible:
            raise self.refused(name, value, f"only {' or '.join(map(str, possible))}")

    def make(self, kind: type[T], **fields: Any) -> T:
        """Raises ValueError for settings that cannot be together; names the file."""
        try:
            return kind(**fields)
        except ValueError as error:
            raise ValueError(f"{self.where}: {error}") from error

    def end(self) -> None:
        for name, value in self.values.items():
            if name not in self.read and value is not None:
                raise self.refused(name, value, "this setting is not known here")

    def refused(self, name: str, value: Any, why: str) -> ValueError:
        shown = str(value) if len(str(value)) <= 80 else f"{str(value)[:80]}…"
        return ValueError(f"{self.where} has {name}={shown}, which this model cannot be: {why}")


def understand(values: Mapping[str, Any], where: str, name: str = "imported") -> ModelConfig:
    """The settings of a model that transformers describes.

    Args:
        where: how a message names the file. name: the model's.
    Raises:
        ValueError: names the setting that cannot be expressed, and its value.
    """
    described = Described(values, where)
    family = values.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise described.refused("model_type", family, f"only {', '.join(FAMILIES)} can be read")
    read = _understand_gpt2 if family == "gpt2" else _understand_llama
    fields = read(described)
    described.end()
    return described.make(ModelConfig, name=name, vocab_size=described.count("vocab_size"), **fields)


def _understand_gpt2(described: Described) -> dict[str, Any]:
    described.take("vocab_size")
    described.expect("activation_function", "gelu_new", "gelu_pytorch_tanh")
    described.expect("scale_attn_weights", True)
    for name in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        described.expect(name, False)
    dim = described.count("n_embd")
    return {
        "n_layers": described.count("n_layer"),
        "n_heads": described.count("n_head"),
        "dim": dim,
        "ffn_dim": described.count("n_inner", 4 * dim),
        "position": "learned",
        "n_positions": described.count("n_positions"),
        "norm": "layernorm",
        "norm_eps": described.number("layer_norm_epsilon", 1e-5),
        "mlp": "gelu",
        "bias": True,
        "tie_head": described.flag("tie_word_embeddings", True),
    }


def _understand_llama(described: Described) -> dict[str, Any]:
    family = described.values["model_type"]
    described.take("vocab_size")
    described.expect("hidden_act", "silu")
    heads, dim = described.count("num_attention_heads"), described.count("hidden_size")
    if dim % heads:
        raise described.refused("num_attention_heads", heads, f"it must divide hidden_size={dim}")
    head_dim = described.count("head_dim", 128 if family == "qwen3" else dim // heads)
    bias = described.flag("attention_bias", False) if family in ("llama", "qwen3") else False
    if family == "llama":
        described.expect("mlp_bias", bias)
    elif bias:
        raise described.refused("attention_bias", bias, "only false")
    return {
        "n_layers": described.count("num_hidden_layers"),
        "n_heads": heads,
        "n_kv_heads": described.count("num_key_value_heads", heads if family == "llama" else None),
        "head_dim": head_dim,
        "dim": dim,
        "ffn_dim": described.count("intermediate_size"),
        "rotary": _rotary(described),
        "norm_eps": described.number("rms_norm_eps", 1e-6),
        "bias": bias,
        "qkv_bias": family == "qwen2",
        "qk_norm": family == "qwen3",
        "window": _window(described, family),
        "tie_head": described.flag("tie_word_embeddings", False),
    }


def _window(described: Described, family: str) -> int | None:
    """The window that all layers have; one that only some have is refused."""
    layers = described.count("num_hidden_layers")
    window = described.take("sliding_window")
    if window is not None:
        window = described.count("sliding_window")
    is_used, first = family == "mistral", 0
    if family.startswith("qwen"):
        is_used, first = described.flag("use_sliding_window", False), described.count("max_window_layers", 28, least=0)
    types, shown = described.take("layer_types"), "layer_types"
    if types is None:
        windowed, shown = max(layers - first, 0) if is_used and window else 0, "max_window_layers"
    elif isinstance(types, list) and len(types) == layers and all(kind in LAYER_TYPES for kind in types):
        windowed = types.count("sliding_attention")
    else:
        raise described.refused(shown, types, f"it must be {' or '.join(LAYER_TYPES)} for each of {layers} layers")
    if 0 < windowed < layers:
        raise described.refused(shown, described.values.get(shown, first), "all layers have the same window")
    return described.count("sliding_window") if windowed else None


def _rotary(described: Described) -> RotaryConfig:
    """From `rope_parameters`, or from `rope_theta` and `rope_scaling` as files before transformers 5 have them."""
    length = described.count("max_position_embeddings")
    described.expect("partial_rotary_factor", 1.0)
    theta = described.number("rope_theta", 10000.0)
    given = {**described.section("rope_scaling"), **described.section("rope_parameters")}
    rope = Described({name: value for name, value in given.items() if name != "type"}, f"{described.where}: rope")
    rope.expect("partial_rotary_factor", 1.0)
    kind = rope.take("rope_type", given.get("type", "default"))
    theta = rope.number("rope_theta", theta)
    if kind == "default":
        rope.expect("factor", 1.0)
        rope.end()
        return rope.make(RotaryConfig, theta=theta)
    if kind not in ("linear", "yarn", "llama3"):
        raise rope.refused("rope_type", kind, "only default, linear, yarn or llama3")
    fields: dict[str, Any] = {"theta": theta, "scaling": kind, "factor": rope.number("factor")}
    if kind != "linear":
        fields["original_seq_len"] = rope.count("original_max_position_embeddings", length)
    if kind == "yarn":
        rope.expect("truncate", True)
        fields |= {"beta_fast": rope.number("beta_fast", 32), "beta_slow": rope.number("beta_slow", 1)}
    if kind == "llama3":
        fields |= {name: rope.number(name) for name in ("low_freq_factor", "high_freq_factor")}
    rope.end()
    return rope.make(RotaryConfig, **fields)
