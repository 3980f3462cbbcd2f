"""Models of transformers compute with our attention what they compute with their own, or refuse in one line."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from processes import LIMIT_S

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
KERNELS = Path(__file__).parents[2] / "kernels"
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
CASES = {
    "llama-padded-left": ["llama", {}, "left"],
    "gemma2-softcap-window": ["gemma2", {"sliding_window": 9, "head_dim": 16, "attn_logit_softcapping": 2.0}, ""],
}
MORE_CASES = {
    "llama-packed": ["llama", {}, "packed"],
    "mistral-window-padded": ["mistral", {"sliding_window": 9}, "left"],
    "gpt-oss-sinks": ["gpt_oss", {"sliding_window": 9, "head_dim": 16, **EXPERTS}, ""],
    "llama": ["llama", {}, ""],
    "llama-padded-right": ["llama", {}, "right"],
    "llama-padded-left-compiled": ["llama", {}, "left"],
    "mistral-window": ["mistral", {"sliding_window": 9}, ""],
    "mistral-window-packed": ["mistral", {"sliding_window": 9}, "packed"],
    "gpt2": ["gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "attn_pdrop": 0, "resid_pdrop": 0, "embd_pdrop": 0}, ""],
}
REFUSED = {
    "no-cache-of-packed": "pass use_cache=False",
    "dropout": "FlashGPT has no dropout=0.1 of attention weights; set attention_dropout=0",
    "holes": "FlashGPT has no padding between tokens",
    "four-dimensions": "FlashGPT has no mask of four dimensions; pass (B, S), or none",
    "weights": "FlashGPT has no weights to return; leave output_attentions=True out",
    "static-cache": "FlashGPT reads no cache of fixed size",
    "both-ways": "FlashGPT has no mask in which a token sees a later one",
    "own-mask": "FlashGPT has no mask of one's own functions",
    "cu-seqlens-of-rows": "cu_seq_lens_q with 2 rows",
    "name": "name='flash_x': transformers reads \"flash\"",
}

# Runs where of this repository only the kernels can be seen, as `flash_gpt`: `kernels` here would be taken for Hugging
# Face's package of that name.
SCRIPT = """
import json, sys
import torch, transformers
from flash_gpt.transformers import register
from transformers.masking_utils import create_causal_mask, create_chunked_causal_mask

cases, device, dtype = json.loads(sys.argv[1]), sys.argv[2], getattr(torch, sys.argv[3])
name, S = register(), 24
padding = torch.ones(2, S, dtype=torch.int64, device=device)
padding[0, :7] = 0
packed = torch.cat([torch.arange(n) for n in (8, 11, 5)]).expand(2, S).to(device)
tokens = torch.randint(61, (2, S), generator=torch.Generator().manual_seed(1)).to(device)
inputs = {"": {}, "packed": {"position_ids": packed, "use_cache": False}}
inputs |= {"left": {"attention_mask": padding}, "right": {"attention_mask": padding.flip(1)}}

def build(kind, attention, dtype=torch.float32, **settings):
    sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=61)
    sizes |= {} if kind == "gpt2" else dict(num_key_value_heads=2)
    sizes |= dict(eos_token_id=None, bos_token_id=None, pad_token_id=0)
    config = transformers.AutoConfig.for_model(kind, **sizes | settings)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model.to(device, dtype)

def outcome(model, given):
    labels = tokens.clone()
    if "attention_mask" in given:  # what padding predicts is nobody's business
        before = torch.nn.functional.pad(given["attention_mask"], (1, 0))[:, :-1]
        labels[(given["attention_mask"] * before) == 0] = -100
    loss = model(tokens, labels=labels, **given).loss
    loss.backward()
    return loss.item(), torch.cat([parameter.grad.float().flatten() for parameter in model.parameters()])

results = {}
for case, (kind, settings, how) in cases.items():
    models = [
        build(kind, attention, dtype, **settings)
        for attention, dtype in (("eager", torch.float32), ("eager", dtype), (name, dtype))
    ]
    if case.endswith("compiled"):
        models[-1] = torch.compile(models[-1], backend="aot_eager", fullgraph=True)
    (loss, grad), *others = (outcome(model, inputs[how]) for model in models)
    errors = [(abs(other - loss) / loss, ((g - grad).norm() / grad.norm()).item()) for other, g in others]
    results[case] = dict(zip(("eager", "ours"), errors))

ends = torch.tensor([0, 8, 19, 24], dtype=torch.int32, device=device)
one_row = build("llama", name)(tokens[:1], position_ids=packed[:1], cu_seq_lens_q=ends, cu_seq_lens_k=ends).logits
each = [build("llama", "eager")(part).logits for part in tokens[:1].split([8, 11, 5], dim=1)]
results["cu_seqlens"] = (one_row - torch.cat(each, dim=1)).abs().max().item()
config = build("llama", name).config
config.attention_chunk_size = 8
results["chunks"] = create_chunked_causal_mask(config, torch.zeros(1, S, 64, device=device), None, None).tolist()

for kind, settings in (("llama", {}), ("mistral", {"sliding_window": 9})):
    texts = [
        build(kind, attention, **settings).eval().generate(
            tokens[:, :14], attention_mask=padding[:, :14], max_new_tokens=6, do_sample=False
        ).tolist()
        for attention in ("eager", name)
    ]
    results[f"generate-{kind}"] = texts

def bidirectional():
    config = build("llama", name).config
    config.is_causal = False
    embedded = torch.zeros(1, S, 64, device=device)
    create_causal_mask(config, embedded, None, None)

def own_mask():
    embedded = torch.zeros(1, S, 64, device=device)
    create_causal_mask(build("llama", name).config, embedded, None, None, and_mask_function=lambda b, h, q, k: k > 3)

holes = padding.clone()
holes[0, 3:5] = 1
refused = {
    "no-cache-of-packed": lambda: build("llama", name)(tokens, position_ids=packed),
    "dropout": lambda: build("llama", name, attention_dropout=0.1).train()(tokens),
    "holes": lambda: build("llama", name)(tokens, attention_mask=holes),
    "four-dimensions": lambda: build("llama", name)(tokens, attention_mask=torch.ones(2, 1, S, S, device=device)),
    "weights": lambda: build("llama", name)(tokens, output_attentions=True),
    "static-cache": lambda: build("llama", name).generate(tokens, max_new_tokens=2, cache_implementation="static"),
    "both-ways": bidirectional,
    "own-mask": own_mask,
    "cu-seqlens-of-rows": lambda: build("llama", name)(tokens, cu_seq_lens_q=ends),
    "name": lambda: register("flash_x"),
}
for case, do in refused.items():
    try:
        do()
        results[case] = "nothing"
    except ValueError as error:
        results[case] = str(error)
print(json.dumps(results))
"""


def results_on(device: str, dtype: str, cases: dict[str, Any], folder: Path) -> dict[str, Any]:
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    (folder / "flash_gpt").symlink_to(KERNELS)
    environment = os.environ | {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-c", SCRIPT, json.dumps(cases), device, dtype]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """In Triton's interpreter where there is no GPU. One process: importing transformers takes long."""
    return results_on(DEVICE, "float32", CASES, tmp_path_factory.mktemp("transformers"))


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_eager(results, case):
    loss, gradient = results[case]["ours"]
    assert loss < 1e-5
    assert gradient < 1e-4


@pytest.mark.slow
def test_losses_and_gradients_of_more_models_are_those_of_eager(tmp_path):
    found = results_on(DEVICE, "float32", MORE_CASES, tmp_path)
    assert all(found[case]["ours"][0] < 1e-5 and found[case]["ours"][1] < 1e-4 for case in MORE_CASES), found


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_padded_prompts_are_continued_over_a_cache_as_by_eager(results, kind):
    theirs, ours = results[f"generate-{kind}"]
    assert ours == theirs
    assert len(ours[0]) == 20


def test_cumulative_lengths_are_documents(results):
    assert results["cu_seqlens"] < 1e-4


def test_a_chunk_is_where_its_tokens_begin_to_see(results):
    assert results["chunks"] == [[place // 8 * 8 for place in range(24)]]


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_compute_is_refused_in_one_line(results, case):
    assert REFUSED[case] in results[case]
    assert "\n" not in results[case]


@pytest.mark.gpu
def test_in_bf16_errors_are_at_most_twice_those_of_eager(tmp_path):
    cases = CASES | MORE_CASES
    found = results_on("cuda", "bfloat16", cases, tmp_path)
    for case in cases:
        for ours, eager in zip(found[case]["ours"], found[case]["eager"], strict=True):
            assert ours <= 2 * eager + 1e-3, case


def test_registering_is_all_that_needs_transformers():
    """The package needs torch and Triton only."""
    text = (KERNELS / "transformers.py").read_text("utf-8")
    assert not [line for line in text.splitlines() if line.startswith(("import transformers", "from transformers"))]
