"""Working copies of the weights: cast once, they change no bit of a loss or a gradient. The residual stream in bf16."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model import activations
from model.activations_config import FullConfig, MemoryConfig, SelectiveConfig
from model.config import ModelConfig
from model.gpt import GPT, Block, RMSNorm
from model.linear import Linear, keep_working_copies, refresh

B, S, V = 2, 48, 101
BF16 = torch.bfloat16
LLAMA = ModelConfig(
    name="llama", n_layers=2, n_heads=4, n_kv_heads=2, dim=64, ffn_dim=96, vocab_size=V, loss_chunk_size=40
)
GPT2 = replace(
    LLAMA, n_kv_heads=4, position="learned", n_positions=S, norm="layernorm", mlp="gelu", bias=True, tie_head=True
)
TIED = replace(LLAMA, tie_head=True, qk_norm=True)
Build = Callable[..., GPT]


def with_copies(build: Build, config: ModelConfig, policy: MemoryConfig | None = None) -> tuple[GPT, GPT]:
    """A model whose weights autocast casts, and one with working copies of the same weights."""
    plain, copied = (build(config, "sdpa", seq_len=S).train() for _ in range(2))
    copied.load_state_dict(plain.state_dict())
    for model in (plain, copied):
        activations.apply(model, policy or MemoryConfig())
    keep_working_copies(copied, BF16)
    refresh(copied)
    return plain, copied


def batch() -> tuple[Tensor, Tensor]:
    return torch.randint(V, (B, S)), torch.randint(V, (B, S))


def assert_same_bits(plain: GPT, copied: GPT, micro_batches: int = 3) -> None:
    for _ in range(micro_batches):
        tokens, targets = batch()
        with torch.autocast("cpu", BF16):
            losses = [model(tokens, targets) / 100 for model in (plain, copied)]
        assert torch.equal(*losses)
        for loss in losses:
            loss.backward()
    for (name, expected), got in zip(plain.named_parameters(), copied.parameters(), strict=True):
        assert got.grad is not None
        assert got.grad.dtype is torch.float32
        assert torch.equal(got.grad, expected.grad), name


@pytest.mark.parametrize("policy", [MemoryConfig(), SelectiveConfig(), FullConfig()], ids=lambda policy: policy.name)
@pytest.mark.parametrize("config", [LLAMA, GPT2, TIED], ids=["llama", "gpt2", "tied, qk_norm"])
def test_losses_and_gradients_of_several_micro_batches_are_those_of_autocast(
    build_lively: Build, config: ModelConfig, policy: MemoryConfig
) -> None:
    assert_same_bits(*with_copies(build_lively, config, policy))


@pytest.mark.parametrize("unit", ["model", "block"])
def test_compiled_too(build_lively: Build, unit: str) -> None:
    torch._dynamo.reset()
    plain, copied = with_copies(build_lively, replace(GPT2, n_layers=1), SelectiveConfig())
    for model in (plain, copied):
        model.compile(unit, backend="aot_eager", fullgraph=True)
    assert_same_bits(plain, copied)
    for model in (plain, copied):  # the graph reads the copies as they are then
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.25)
        refresh(model)
    assert_same_bits(plain, copied)


class Casts(TorchDispatchMode):
    """The names of the matrices of a model that are cast."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.owners = {layer.weight.data_ptr(): name for name, layer in linears(model).items()}
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() == "aten::_to_copy" and args[0].data_ptr() in self.owners:
            self.names.add(self.owners[args[0].data_ptr()])
        return func(*args, **(kwargs or {}))


def linears(model: GPT) -> dict[str, Linear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear)}


@pytest.mark.parametrize("policy", [MemoryConfig(), FullConfig()], ids=["none", "full"])
def test_a_forward_and_a_backward_pass_cast_no_weight(build_lively: Build, policy: MemoryConfig) -> None:
    found = []
    for model in with_copies(build_lively, LLAMA, policy):
        with Casts(model) as casts, torch.autocast("cpu", BF16):
            loss = model(*batch())
            loss.backward()
        found.append(casts.names)
    layers = set(linears(model)) - {"head"}  # which is cast inside the operator of the loss
    assert found == [layers, set()], "autocast casts each of them"


def test_what_multiplies_is_the_weight_of_the_last_refresh(build_lively: Build) -> None:
    plain, copied = with_copies(build_lively, GPT2)
    tokens, targets = batch()

    @torch.no_grad()
    def loss(model: GPT) -> Tensor:
        with torch.autocast("cpu", BF16):  # each time anew: it remembers what it has cast
            return model(tokens, targets)

    before = loss(plain)
    with torch.no_grad():
        for block in copied.blocks:
            block.mlp.up.weight.mul_(2)  # type: ignore[union-attr]
    assert torch.equal(loss(copied), before)
    refresh(copied)
    plain.load_state_dict(copied.state_dict())
    assert torch.equal(loss(copied), loss(plain))
    assert not torch.equal(loss(copied), before)


def test_the_operand_has_the_dtype_asked_for_and_its_gradient_is_the_weights() -> None:
    layer = Linear(8, 4)
    assert layer.operand() is layer.weight
    keep_working_copies(layer, BF16)
    refresh(layer)
    assert layer.working is not None
    for dtype in (None, BF16):
        assert layer.operand(dtype).data_ptr() == layer.working.data_ptr()
    assert torch.equal(layer.operand(torch.float32), layer.weight)
    assert torch.equal(layer.operand(torch.float16), layer.weight.half())
    gradient = torch.randn(4, 8).to(BF16)
    layer.operand(BF16).backward(gradient)
    assert layer.weight.grad is not None
    assert torch.equal(layer.weight.grad, gradient.float())


def test_names_of_weights_stay_and_a_tied_head_has_one_copy(build: Build) -> None:
    for config in (LLAMA, GPT2):
        plain, copied = with_copies(build, config)
        assert list(plain.state_dict()) == list(copied.state_dict())
        assert [name for name, _ in plain.named_parameters()] == [name for name, _ in copied.named_parameters()]
        copies = [layer.working for layer in copied.modules() if isinstance(layer, Linear)]
        assert len(copies) == 4 * config.n_layers + 1


@contextmanager
def residual_stream(model: GPT) -> Iterator[list[torch.dtype]]:
    """The dtypes that go into and out of the blocks, of the values and of their gradients."""
    dtypes: list[torch.dtype] = []

    def forward(block: Block, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        for x in (inputs[0], output):
            dtypes.append(x.dtype)
            x.register_hook(lambda grad: dtypes.append(grad.dtype))

    hooks = [block.register_forward_hook(forward) for block in model.blocks]
    yield dtypes
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_the_residual_stream_has_the_dtype_it_is_told(
    build_lively: Build, config: ModelConfig, dtype: torch.dtype
) -> None:
    model = build_lively(config, "sdpa", seq_len=S).train()
    model.residual_dtype = dtype
    tokens, targets = batch()
    with residual_stream(model) as dtypes, torch.autocast("cpu", BF16):
        model(tokens, targets).backward()
    assert dtypes == [dtype] * 8
    assert all(parameter.grad is not None and parameter.grad.dtype is torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_a_bf16_residual_stream_costs_no_more_than_twice_the_error_of_bf16_products(
    build_lively: Build, config: ModelConfig
) -> None:
    """The error of the losses of tokens against float64, as a root mean square."""
    model = build_lively(config, "math", seq_len=S)
    tokens, targets = batch()
    exact = build_lively(config, "math", seq_len=S)
    exact.load_state_dict(model.state_dict())
    truth = exact.double()(tokens, targets, per_token=True)
    errors = []
    for dtype in (torch.float32, BF16):
        model.residual_dtype = dtype
        with torch.no_grad(), torch.autocast("cpu", BF16):
            errors.append((model(tokens, targets, per_token=True) - truth).square().mean().sqrt().item())
    assert errors[0] != errors[1] < 2 * errors[0]


def test_a_norm_of_bf16_numbers_is_computed_in_float32() -> None:
    norm = RMSNorm(64, 1e-5)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(5, 64).to(BF16)
    with torch.autocast("cpu", BF16):
        assert torch.equal(norm(x), norm(x.float()))
    layer_norm = torch.nn.LayerNorm(64)
    with torch.autocast("cpu", BF16):
        assert torch.equal(layer_norm(x).to(BF16), layer_norm(x.float()).to(BF16))
