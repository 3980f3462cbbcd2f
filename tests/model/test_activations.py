"""What blocks keep for the backward pass changes memory, and no bit of what is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from held import Held
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from model import activations
from model.activations_config import FullConfig, MemoryConfig, SelectiveConfig
from model.config import ModelConfig
from model.gpt import GPT
from model.layer_memory import Workload, kept_bytes

S, B = 48, 2
LLAMA = ModelConfig(
    name="llama", n_layers=4, n_heads=4, n_kv_heads=2, dim=64, ffn_dim=96, vocab_size=101, loss_chunk_size=40
)
GPT2 = replace(
    LLAMA, n_kv_heads=4, position="learned", n_positions=S, norm="layernorm", mlp="gelu", bias=True, tie_head=True
)
POLICIES = {
    "selective": SelectiveConfig(),
    "selective, half the layers": SelectiveConfig(layers=0.5),
    "full": FullConfig(),
    "full, half the layers": FullConfig(layers=0.5),
    "full, without attention": FullConfig(keep_attention=0),
}
CONFIGS = {"llama": LLAMA, "gpt2": GPT2, "window": replace(LLAMA, window=7, qk_norm=True)}
FLEX_TOO = (("llama", "flex"), ("gpt2", "flex"))
"""Which by default is tried with a window."""
ALL = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
FEW_HEADS = replace(LLAMA, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16)
"""For flash attention, which Triton's interpreter runs head by head."""
SLOW = pytest.mark.slow
Build = Callable[..., GPT]


def pair(build: Build, policy: MemoryConfig, config: ModelConfig = LLAMA, backend: str = "sdpa") -> tuple[GPT, GPT]:
    """A model that keeps everything, and one with a policy and the same weights."""
    plain, changed = (build(config, backend, seq_len=S, documents=True).train() for _ in range(2))
    changed.load_state_dict(plain.state_dict())
    activations.apply(changed, policy)
    return plain, changed


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, targets, and the starts of documents of 20 and 28 tokens."""
    starts = torch.tensor([0] * 20 + [20] * (S - 20), dtype=torch.int32).repeat(B, 1)
    return torch.randint(101, (B, S)), torch.randint(101, (B, S)), starts


def assert_same_bits(plain: GPT, changed: GPT, micro_batches: int = 2) -> None:
    for _ in range(micro_batches):
        tokens, targets, starts = batch()
        losses = [model(tokens, targets, starts) for model in (plain, changed)]
        assert torch.equal(*losses)
        for loss in losses:
            loss.backward()
    for (name, expected), (theirs, got) in zip(plain.named_parameters(), changed.named_parameters(), strict=True):
        assert name == theirs
        assert expected.grad is not None
        assert got.grad is not None
        assert torch.equal(got.grad, expected.grad), name


@ALL
@pytest.mark.parametrize(
    ("config", "backend"),
    [
        pytest.param(config, backend, id=f"{name}-{backend}", marks=[SLOW] if (name, backend) in FLEX_TOO else [])
        for name, config in CONFIGS.items()
        for backend in ("math", "sdpa", "flex")
    ],
)
def test_loss_and_gradients_are_the_same_bits(
    build_lively: Build, policy: MemoryConfig, backend: str, config: ModelConfig
) -> None:
    """Of memory=full in one tile and one group."""
    if isinstance(policy, FullConfig) and backend != "sdpa":
        config = replace(
            config, qk_norm=False
        )  # the gradient of k, of another layout there, is summed in another order
    assert_same_bits(*pair(build_lively, policy, config, backend))


@ALL
def test_autocast_is_on_in_what_is_computed_again(build_lively: Build, policy: MemoryConfig) -> None:
    plain, changed = pair(build_lively, policy)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(plain, changed)


def test_no_policy_changes_nothing(build_lively: Build) -> None:
    plain, changed = pair(build_lively, MemoryConfig())
    assert [type(block) for block in changed.blocks] == [type(block) for block in plain.blocks]


# Compilation


@pytest.mark.parametrize(
    ("policy", "unit", "n_layers", "graphs"),
    [
        pytest.param(SelectiveConfig(), "model", 2, 1, id="all-model", marks=SLOW),
        pytest.param(SelectiveConfig(layers=0.5), "block", 10, 2, id="half-block"),
        pytest.param(SelectiveConfig(), "block", 10, 2, id="all-block", marks=SLOW),
        pytest.param(SelectiveConfig(layers=0.5), "model", 2, 1, id="half-model", marks=SLOW),
    ],
)
@pytest.mark.parametrize("backend", ["math", pytest.param("sdpa", marks=SLOW)])
def test_compiled_it_is_one_graph_or_one_for_all_blocks_that_keep_the_same(
    build_lively: Build, policy: SelectiveConfig, unit: str, n_layers: int, graphs: int, backend: str
) -> None:
    torch._dynamo.reset()
    plain, changed = pair(build_lively, policy, replace(LLAMA, n_layers=n_layers), backend)
    counter = CompileCounterWithBackend("aot_eager")
    changed.compile(unit, backend=counter, fullgraph=True)
    assert_same_bits(plain, changed, micro_batches=3)
    assert counter.frame_count == graphs + (unit == "block" and policy.layers < 1)
    with torch.no_grad():
        tokens, targets, starts = batch()
        assert torch.equal(changed(tokens, targets, starts), plain(tokens, targets, starts))


# Memory


def held(model: GPT, bf16: bool = False) -> int:
    """Bytes that exist after a forward pass through the blocks."""
    tokens, _, starts = batch()
    positions = torch.arange(S)[None]
    mask = model.attention.prepare(starts, S)
    with Held() as counter, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        hidden = model.hidden(tokens, positions, model.attention, mask)
    assert hidden.requires_grad
    return counter.bytes


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_a_layer_keeps_what_its_policy_says_and_no_more(build_lively: Build, config: ModelConfig, bf16: bool) -> None:
    """The table of docs/long-context.md, by hand."""
    H, G, D, E = config.n_heads, config.n_kv_heads, config.head_dim, config.dim
    U = config.ffn_dim * (2 if config.mlp == "swiglu" else 1)
    r, c = 4, 2 if bf16 else 4
    expected = {
        "full, without attention": r * E,
        "full": r * E + c * H * D + 4 * H,
        "selective": r * E + c * H * D + 4 * H + c * (H + 2 * G) * D + c * E + c * U,
    }
    for name, per_token in expected.items():
        work = Workload(config, POLICIES[name], B, S, product_bytes=c)
        predicted = sum(kept_bytes(work, layer) for layer in range(config.n_layers))
        assert predicted == config.n_layers * B * S * per_token, name
        deep, shallow = (pair(build_lively, POLICIES[name], replace(config, n_layers=n))[1] for n in (6, 2))
        assert held(deep, bf16) - held(shallow, bf16) == 4 * B * S * per_token, name


def kept_when_compiled(model: GPT) -> int:
    """Bytes that the graph of a compiled model keeps for its backward pass, without the weights."""
    torch._dynamo.reset()
    model.compile("model", backend="aot_eager", fullgraph=True)
    loss = model(*batch())
    node = loss.grad_fn
    while not type(node).__name__.startswith("CompiledFunction"):
        node = node.next_functions[0][0]
    weights = {weight.data_ptr() for weight in model.parameters()}
    kept = {x.data_ptr(): x.untyped_storage().nbytes() for x in node.saved_tensors if x.data_ptr() not in weights}
    return sum(kept.values())


def test_compiled_a_layer_keeps_the_same(build_lively: Build) -> None:
    models = [pair(build_lively, SelectiveConfig(), replace(LLAMA, n_layers=n_layers))[1] for n_layers in (3, 1)]
    eager = held(models[0]) - held(models[1])
    assert kept_when_compiled(models[0]) - kept_when_compiled(models[1]) == eager


def test_policies_hold_ever_less(build_lively: Build) -> None:
    order = ["selective", "full", "full, without attention"]
    numbers = [held(pair(build_lively, policy)[1]) for policy in [MemoryConfig(), *(POLICIES[name] for name in order)]]
    assert numbers == sorted(numbers, reverse=True)
    assert len(set(numbers)) == 4
    half = held(pair(build_lively, POLICIES["full, half the layers"])[1])
    assert numbers[2] < half < numbers[0]


TIMES = [("selective", 1), ("full", 1), ("full, without attention", 2)]
"""Policy, and how often attention runs in a step."""


@pytest.mark.parametrize(
    ("backend", "policy", "times"),
    [
        pytest.param(backend, policy, times, marks=[SLOW] if backend == "flash" else [])
        for backend in ("math", "sdpa", "flash")
        for policy, times in TIMES
    ],
)
def test_attention_runs_once_where_its_output_is_kept(
    build_lively: Build, backend: str, policy: str, times: int
) -> None:
    plain, model = pair(build_lively, POLICIES[policy], FEW_HEADS, backend)
    assert_same_bits(plain, model, micro_batches=1)
    with Held() as counter:
        model(*batch()).backward()
    operator = {
        "math": "aten::_softmax",
        "sdpa": "aten::_scaled_dot_product_flash_attention_for_cpu",
        "flash": "flash_gpt::flash_attention",
    }[backend]
    if backend == "math":  # no operator whose results its gradient could read: it attends again for that
        times += 1
    assert counter.calls[operator] == 2 * times


@pytest.mark.parametrize(
    ("policy", "unit", "times"),
    [
        ("selective", "model", 1),
        pytest.param("full", "block", 1, marks=SLOW),
        pytest.param("full, without attention", "block", 2, marks=SLOW),
    ],
)
def test_flash_attention_is_recognised_in_a_compiled_model(
    build_lively: Build, policy: str, unit: str, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    portable = pytest.importorskip("kernels.flash_attention.portable")
    runs, kernel = [], portable.forward
    plain, model = pair(build_lively, POLICIES[policy], FEW_HEADS, "flash")
    model.compile(unit, backend="aot_eager", fullgraph=True)
    tokens, targets, starts = batch()
    assert torch.equal(model(tokens, targets, starts), plain(tokens, targets, starts))
    monkeypatch.setattr(portable, "forward", lambda *args, **kwargs: runs.append(1) or kernel(*args, **kwargs))
    model(*batch()).backward()
    assert len(runs) == 2 * times


@pytest.mark.parametrize("policy", ["selective", "full"])
def test_with_math_attention_what_is_kept_is_predicted_too(build_lively: Build, policy: str) -> None:
    deep, shallow = (pair(build_lively, POLICIES[policy], replace(LLAMA, n_layers=n), "math")[1] for n in (6, 2))
    work = Workload(LLAMA, POLICIES[policy], B, S, product_bytes=4, attention="math")
    predicted = sum(kept_bytes(work, layer) for layer in range(LLAMA.n_layers))
    assert held(deep) - held(shallow) == predicted, "of 4 layers"


@pytest.mark.parametrize(("policy", "times"), TIMES)
def test_flex_attention_runs_once_where_its_output_is_kept(
    build_lively: Build, policy: str, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted inside of it: PyTorch compiles it as soon as somebody listens from outside."""
    module = import_module("torch._higher_order_ops.flex_attention")
    runs, dense = [], module.math_attention
    monkeypatch.setattr(module, "math_attention", lambda *inputs: runs.append(1) or dense(*inputs))
    _, model = pair(build_lively, POLICIES[policy], replace(LLAMA, n_layers=2), "flex")
    model(*batch()).backward()
    assert len(runs) == 2 * times


def test_selective_computes_no_matrix_product_of_a_layer_again(build_lively: Build) -> None:
    calls = []
    for model in pair(build_lively, SelectiveConfig()):
        with Held() as counter:
            model(*batch()).backward()
        calls.append(counter.calls["aten::mm"])
    assert calls[0] == calls[1]


# What is refused


@pytest.mark.parametrize("layers", [0.0, -0.5, 1.5, float("nan")])
@pytest.mark.parametrize("policy", [SelectiveConfig, FullConfig])
def test_a_fraction_of_layers_that_is_none_is_refused_with_what_to_use(
    policy: type[SelectiveConfig], layers: float
) -> None:
    with pytest.raises(ValueError, match=r"memory\.layers=.* use memory=none"):
        policy(layers=layers)


def test_a_fraction_is_of_the_first_layers_and_at_least_one(build_lively: Build) -> None:
    _, model = pair(build_lively, FullConfig(layers=0.3), replace(LLAMA, n_layers=10))
    plain = type(build_lively(LLAMA).blocks[0])
    assert [type(block) is plain for block in model.blocks] == [False] * 3 + [True] * 7
    assert FullConfig(layers=0.01).of(12) == 1
