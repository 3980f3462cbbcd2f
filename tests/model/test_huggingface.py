"""What is exported computes, in transformers, the logits that it computes here; and the other way round."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
from omegaconf import OmegaConf
from processes import LIMIT_S
from safetensors.torch import load_file, save_file

from model.config import ModelConfig, RotaryConfig
from model.huggingface.settings import describe, understand
from model.huggingface.weights import from_theirs, to_theirs

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
    "mistral": replace(LLAMA, window=24, n_kv_heads=2),
    "qwen2": replace(LLAMA, qkv_bias=True, n_kv_heads=2, tie_head=True),
    "qwen2-window": replace(LLAMA, qkv_bias=True, window=24),
    "qwen3": replace(LLAMA, qk_norm=True, head_dim=40, n_kv_heads=2, norm_eps=0.01),
    "qwen3-yarn-window": replace(scaled("yarn"), qk_norm=True, window=24),
}
CLASSES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
CLASSES |= {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# What transformers itself saves, by its own settings: the other direction.
THEIRS = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 160},
    "gpt2-inner": {"n_embd": 64, "n_layer": 1, "n_head": 2, "n_positions": 160, "n_inner": 100},
    "llama": {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "llama-llama3": {
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 4.0,
            "low_freq_factor": 0.5,
            "high_freq_factor": 6.0,
            "original_max_position_embeddings": 64,
        },
    },
    "llama-linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.5}},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 24},
    "mistral-full": {"num_key_value_heads": 4, "sliding_window": None},
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen2-window": {
        "num_key_value_heads": 2,
        "use_sliding_window": True,
        "sliding_window": 24,
        "max_window_layers": 0,
    },
    "qwen3": {
        "num_key_value_heads": 2,
        "head_dim": 40,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 500.0,
            "factor": 2.5,
            "original_max_position_embeddings": 64,
        },
    },
}
LLAMA_SIZES = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA_SIZES |= {"max_position_embeddings": SEQ_LEN}

# Runs where this repository cannot be seen: `kernels` here would be taken for Hugging Face's package of that name.
READ_WITH_TRANSFORMERS = """
import json, math, pathlib, sys
import torch, transformers
from safetensors.torch import load_file, save_file

torch.set_num_threads(2)
for folder in sorted(pathlib.Path("ours").glob("*/")):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    with torch.no_grad():
        logits = model.eval()(load_file(folder / "tokens.safetensors")["tokens"], use_cache=False).logits
    save_file({"logits": logits}, folder / "logits.safetensors")
    facts = {"class": type(model).__name__, "dtype": str(model.dtype)}
    facts |= {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    (folder / "facts.json").write_text(json.dumps(facts))

for name, settings in json.loads(pathlib.Path("theirs.json").read_text()).items():
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(name.partition("-")[0], vocab_size=211, **settings),
        attn_implementation="eager",
    ).eval()
    for parameter in model.parameters():  # so that no bias is 0, no norm 1, and no logit is near 0
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 0.2
        torch.nn.init.normal_(parameter, std=scale)
        if parameter.dim() == 1:
            parameter.data += 0.8
    tokens = torch.randint(211, (2, 160))
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits
    model.save_pretrained(f"theirs/{name}")
    save_file({"logits": logits, "tokens": tokens}, f"theirs/{name}/logits.safetensors")
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
        folder = root / "ours" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(describe(config, SEQ_LEN, "float32")))
        weights = dict(to_theirs(config, model.state_dict()))
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        save_file({"tokens": tokens}, folder / "tokens.safetensors")
    settings = {name: ({} if name.startswith("gpt2") else LLAMA_SIZES) | own for name, own in THEIRS.items()}
    (root / "theirs.json").write_text(json.dumps(settings))

    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", "-c", READ_WITH_TRANSFORMERS]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = {name: load_file(root / "ours" / name / "logits.safetensors")["logits"] for name in CASES}
    facts = {name: json.loads((root / "ours" / name / "facts.json").read_text()) for name in CASES}
    return ours, theirs, facts, done.stderr, root / "theirs"


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_transformers(both, name):
    # Two float32 programs that add up in different orders: 2 layers of widths of about 100 leave some 1e-6 at logits of
    # order 1. A wrong eps, rope setting or order of weights moves them by 1e-2 at least.
    ours, theirs, *_ = both
    assert 0.5 < ours[name].std() < 2
    assert (ours[name] - theirs[name]).abs().max() < 1e-4


@pytest.mark.parametrize("name", CASES)
def test_transformers_finds_every_weight_and_knows_every_setting(both, name):
    _, _, facts, messages, _ = both
    expected = CLASSES[name.partition("-")[0]]
    nothing = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
    assert facts[name] == {"class": expected, "dtype": "torch.float32"} | nothing
    assert "rope_parameters" not in messages  # transformers warns of rope settings it does not know or finds doubtful


@pytest.mark.parametrize("name", THEIRS)
def test_a_model_of_transformers_has_its_logits_here(both, build, name):
    folder = both[-1] / name
    config = understand(json.loads((folder / "config.json").read_text()), "config.json")
    state = from_theirs(config, load_file(folder / "model.safetensors"), str(folder))
    model = build(config, seq_len=SEQ_LEN)
    assert {key: tensor.shape for key, tensor in state.items()} == {
        key: tensor.shape for key, tensor in model.named_parameters()
    }
    model.load_state_dict(state, strict=False)
    found = load_file(folder / "logits.safetensors")
    with torch.no_grad():
        assert 0.3 < found["logits"].std() < 10
        assert (model(found["tokens"]) - found["logits"]).abs().max() < 1e-4 * found["logits"].std()


@pytest.mark.parametrize("name", CASES)
def test_there_and_back_is_the_same_model(build_lively, name):
    config = CASES[name]
    described, state = describe(config, SEQ_LEN, "float32"), build_lively(config).state_dict()
    again = understand(described, "config.json", name=config.name)
    expected = config
    if config.position == "learned":  # theirs always have biases, and rotary settings that nobody reads are ours
        expected = replace(config, bias=True)
    if config.rotary.scaling == "ntk":
        expected = replace(config, rotary=RotaryConfig(theta=500.0 * 2.5 ** (32 / 30)))
    if config.rotary.scaling in ("linear", "yarn", "llama3"):  # only what the scaling reads
        used = {"linear": "", "yarn": "original_seq_len beta_fast beta_slow"}
        names = ["theta", "scaling", "factor"]
        names += used.get(config.rotary.scaling, "original_seq_len low_freq_factor high_freq_factor").split()
        expected = replace(config, rotary=RotaryConfig(**{field: getattr(config.rotary, field) for field in names}))
    assert again == expected
    back = from_theirs(again, dict(to_theirs(config, state)), "here")
    for key, tensor in back.items():
        assert torch.equal(tensor, state[key] if key in state else torch.zeros_like(tensor)), key


def test_a_tied_head_is_written_once(build):
    for config, written in ((replace(LLAMA, tie_head=True), False), (replace(LLAMA, tie_head=False), True)):
        assert ("lm_head.weight" in dict(to_theirs(config, build(config).state_dict()))) == written


def test_configuration_names_no_special_tokens_and_no_dropout():
    for config in (GPT2, LLAMA):
        described = describe(config, 48, "float32")
        assert [described[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [None] * 3
        assert all(value == 0 for name, value in described.items() if name.endswith(("pdrop", "dropout")))
    assert described["max_position_embeddings"] == 48  # the length it was trained on, which Llama's tables do not show
    assert describe(LLAMA, 48, "bfloat16", separator_id=3)["eos_token_id"] == 3


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (replace(LLAMA, qk_norm=True, bias=True), "Qwen3ForCausalLM has no model.bias=True"),
        (replace(LLAMA, qk_norm=True, qkv_bias=True), "Qwen3ForCausalLM has no model.qkv_bias=True"),
        (replace(LLAMA, window=32, bias=True), "MistralForCausalLM has no model.bias=True"),
        (replace(LLAMA, qkv_bias=True, head_dim=40), "Qwen2ForCausalLM has no model.head_dim=40"),
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
        (replace(LLAMA, logit_softcap=3.0, mlp="gelu"), "model.mlp=gelu, model.logit_softcap=3.0"),
    ],
)
def test_what_no_family_has_is_refused_by_name(config, named):
    with pytest.raises(ValueError, match="can be exported") as error:
        describe(config, SEQ_LEN, "float32")
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_the_usual_attention_scale_may_be_written_out():
    describe(replace(LLAMA, attention_scale=24**-0.5), SEQ_LEN, "float32")


@pytest.mark.parametrize(
    ("family", "change", "named"),
    [
        ("llama", {"model_type": "gemma2"}, "model_type=gemma2"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act=gelu"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True"),
        ("llama", {"attention_bias": True, "mlp_bias": False}, "mlp_bias=False"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("llama", {"new_setting": 3}, "new_setting=3"),
        ("llama", {"num_hidden_layers": "two"}, "num_hidden_layers=two"),
        ("llama", {"model_type": ["llama"]}, "model_type=['llama']"),
        ("llama", {"num_hidden_layers": -1}, "num_hidden_layers=-1"),
        ("llama", {"num_hidden_layers": 2.5}, "num_hidden_layers=2.5"),
        ("llama", {"num_attention_heads": 0, "head_dim": None}, "num_attention_heads=0"),
        ("llama", {"num_attention_heads": 5}, "num_attention_heads=5"),
        ("llama", {"num_hidden_layers": True}, "num_hidden_layers=True"),
        ("llama", {"rms_norm_eps": math.nan}, "rms_norm_eps=nan"),
        ("llama", {"rope_theta": math.inf}, "rope_theta=inf"),
        ("llama", {"rope_scaling": "yarn"}, "rope_scaling=yarn"),
        ("llama", {"rope_parameters": ["yarn"]}, "rope_parameters=['yarn']"),
        ("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings=no"),
        ("llama", {"new_setting": [3] * 1000}, "new_setting=[3, 3, "),
        ("gpt2", {"n_layer": 0}, "n_layer=0"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type=dynamic"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}}, "mscale=0.7"),
        ("qwen3", {"attention_bias": True}, "attention_bias=True"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "max_window_layers=1"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types="),
        ("qwen3", {"layer_types": ["sliding_attention"] * 2}, "sliding_window=None"),
        ("qwen3", {"layer_types": ["full_attention"] * 3}, "layer_types="),
        ("qwen3", {"layer_types": ["some_attention"] * 2}, "layer_types="),
        ("qwen3", {"layer_types": "full_attention"}, "layer_types=full_attention"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": "all"}, "sliding_window=all"),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": "all"}, "max_window_layers=all"),
        ("gpt2", {"activation_function": "relu"}, "activation_function=relu"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
    ],
)
def test_what_this_model_cannot_be_is_refused_by_name_and_value(family, change, named):
    config = {"llama": LLAMA, "qwen3": replace(LLAMA, qk_norm=True), "gpt2": GPT2}[family]
    with pytest.raises(ValueError, match="which this model cannot be") as error:
        understand(describe(config, SEQ_LEN, "float32") | change, "x/config.json")
    assert f"has {named}" in str(error.value)
    assert "x/config.json" in str(error.value)
    assert len(str(error.value)) < 250


# Values that a setting might have by mistake; 2⁶² is a size, but one for which nothing may be counted through.
ODD = ["x", [], ["x"], [[]], {}, {"rope_type": []}, {"factor": 2}, True, False, -1, 0, 1, 1.5]
ODD += [math.inf, -math.inf, math.nan, 10**30, 10**400, 2**62]


@pytest.mark.parametrize("name", ["gpt2", "llama-yarn", "llama-llama3", "mistral", "qwen2-window", "qwen3"])
def test_any_value_of_any_setting_is_understood_or_refused_in_one_line(name):
    described = describe(CASES[name], SEQ_LEN, "float32")
    names = {*described, "layer_types", "sliding_window", "rope_scaling", "rope_theta", "n_inner", "head_dim"}
    changes = [{field: value} for value in ODD for field in sorted(names)]
    if rope := described.get("rope_parameters"):
        changes += [{"rope_parameters": rope | {field: value}} for value in ODD for field in [*rope, "type"]]
    for change in changes:
        found = understood(described | change)
        if isinstance(found, str):
            assert re.fullmatch(r"x/config\.json.+", found), change
        else:
            saved = OmegaConf.merge(OmegaConf.structured(ModelConfig), asdict(found))
            assert OmegaConf.to_object(saved) == found, change


def understood(described):
    """The model, or what is said instead."""
    try:
        return understand(described, "x/config.json")
    except ValueError as error:
        return str(error)


def test_rope_settings_of_older_files_are_read():
    described = describe(LLAMA, SEQ_LEN, "float32")
    del described["rope_parameters"]
    assert understand(described, "here").rotary == RotaryConfig()
    assert understand(described | {"rope_theta": 5e5, "rope_scaling": None}, "here").rotary == RotaryConfig(theta=5e5)
    old = {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}
    expected = RotaryConfig(theta=1e6, scaling="yarn", factor=4.0, original_seq_len=64)
    assert understand(described | old, "here").rotary == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"), r"no tensor model\.layers\.1\.mlp\.up_proj"),
        (lambda weights: weights.update({"model.extra.weight": torch.zeros(2)}), r"a tensor model\.extra\.weight"),
        (
            lambda weights: weights.update({"model.layers.0.self_attn.k_proj.weight": torch.zeros(48, 96)}),
            r"self_attn\.k_proj\.weight is \(48, 96\), and its config\.json asks for 96 rows",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(build, change, message):
    weights = dict(to_theirs(LLAMA, build(LLAMA).state_dict()))
    change(weights)
    with pytest.raises(ValueError, match=message):
        from_theirs(LLAMA, weights, "here")


def test_exporting_imports_no_transformers():
    assert "transformers" not in sys.modules
