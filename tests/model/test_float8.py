"""Products in 8 bits: errors by format, gradients, numbers at the ends of the range, policies, layouts for the GPU."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from model import activations, float8
from model.activations_config import FullConfig, MemoryConfig, SelectiveConfig
from model.attention import ATTENTIONS, AttentionSpec, build_attention
from model.config import ModelConfig
from model.float8 import E4M3, E5M2, Factor, Float8Linear, product, quantize
from model.gpt import GPT
from model.linear import Linear, keep_working_copies, refresh
from model.precision_config import Float8Config

LLAMA = ModelConfig(name="llama", n_layers=2, n_heads=4, n_kv_heads=2, dim=64, ffn_dim=96, vocab_size=101)
GPT2 = replace(LLAMA, n_kv_heads=4, position="learned", n_positions=48, norm="layernorm", mlp="gelu", bias=True)
MODELS = {"llama": LLAMA, "gpt2": GPT2}
RECIPES = [Float8Config(scaling=s, weight_gradients=w) for s in ("tensorwise", "rowwise") for w in ("fp8", "bfloat16")]
ROUNDING = {E4M3: (2.0**-4, 2.0**-10), E5M2: (2.0**-3, 2.0**-17)}
"""Half a unit in the last place: of the number, and, of the smallest numbers, in units of the scale."""
gpu = pytest.mark.gpu


def in_double(factor: Factor) -> Tensor:
    return factor.values_RK.double() * factor.scale.double()


def error_bound(x: Tensor, factor: Factor) -> Tensor:
    """How far each number may be off, whatever it is."""
    relative, absolute = ROUNDING[factor.values_RK.dtype]
    slack = 4 * torch.finfo(torch.float32).eps
    return (relative + slack) * x.abs().double() + absolute * factor.scale.double()


def product_bound(a: Tensor, ea: Tensor, b: Tensor, eb: Tensor) -> Tensor:
    """The same of a bᵀ, with a few roundings of its float32 sums and of a result in float32."""
    a, b = a.abs().double(), b.abs().double()
    sums = 1e-6 * math.sqrt(a.shape[1]) * ((a + ea) @ (b + eb).t())
    return a @ eb.t() + ea @ b.t() + ea @ eb.t() + sums


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("rowwise", [False, True])
@pytest.mark.parametrize("size", [1.0, 1e-9, 1e-25, 1e4, 1e30])
def test_every_number_is_within_half_a_unit_of_its_format(dtype: torch.dtype, rowwise: bool, size: float) -> None:
    x = size * torch.randn(20, 33) * torch.logspace(-6, 0, 33)
    x[3] = 0
    as_is, scale, transposed, scale_t = quantize(x, dtype, rowwise, transposed=True)
    assert (as_is.shape, transposed.shape) == ((20, 33), (33, 32))
    assert as_is.is_contiguous()
    assert transposed.is_contiguous()
    for numbers, factor in ((x, Factor(as_is, scale)), (x.t(), Factor(transposed[:, :20], scale_t))):
        found = in_double(factor)
        assert (found - numbers.double()).abs().le(error_bound(numbers, factor)).all()
        assert factor.values_RK.float().abs().max() == float8.LARGEST[dtype], "the whole range is used"
    assert transposed[:, 20:].float().eq(0).all()
    for only in ({"as_is": False, "transposed": True}, {}):
        values, own_scale = quantize(x, dtype, rowwise, **only)
        expected = (transposed, scale_t) if only else (as_is, scale)
        assert torch.equal(values.view(torch.uint8), expected[0].view(torch.uint8))
        assert torch.equal(own_scale, expected[1])


@pytest.mark.parametrize("rowwise", [False, True])
def test_zeros_stay_zeros_and_what_is_not_finite_can_be_seen(rowwise: bool) -> None:
    x = Factor(*quantize(torch.zeros(16, 32), E4M3, rowwise))
    w = Factor(*quantize(torch.randn(48, 32), E4M3, rowwise))
    assert product(x, w, torch.float32).eq(0).all()
    for bad in (math.inf, -math.inf, math.nan):
        numbers = torch.randn(16, 32)
        numbers[2, 3] = bad
        found = product(Factor(*quantize(numbers, E4M3, rowwise)), w, torch.float32)
        assert found[2].isnan().all()


def layer_of(config: Float8Config, inputs: int, outputs: int, bias: bool = True) -> Float8Linear:
    """One 8-bit layer, as a block's."""
    model = nn.Module()
    model.blocks = nn.ModuleList([Linear(inputs, outputs, bias)])
    (layer,) = float8.convert(model, config, compile=False)
    refresh(model)
    return layer


@pytest.mark.parametrize("config", RECIPES, ids=lambda c: f"{c.scaling}-{c.weight_gradients}")
@pytest.mark.parametrize("tokens", [32, 21])
def test_outputs_and_gradients_are_within_the_errors_of_their_factors(config: Float8Config, tokens: int) -> None:
    layer, rowwise = layer_of(config, 48, 80), config.scaling == "rowwise"
    x, dy = torch.randn(tokens, 48, requires_grad=True), 1e-7 * torch.randn(tokens, 80)
    y = layer(x)
    y.backward(dy)
    assert layer.bias is not None
    assert x.grad is not None
    assert layer.weight.grad is not None
    x_, w_ = x.detach(), layer.weight.detach()

    def off(matrix: Tensor, dtype: torch.dtype) -> Tensor:
        return error_bound(matrix, Factor(*quantize(matrix, dtype, rowwise)))

    exact = x_.double() @ w_.double().t() + layer.bias.double()
    bound = product_bound(x_, off(x_, E4M3), w_, off(w_, E4M3)) + 1e-6
    assert (y.double() - exact).abs().le(bound).all()
    exact = dy.double() @ w_.double()
    assert (x.grad.double() - exact).abs().le(product_bound(dy, off(dy, E5M2), w_.t(), off(w_.t(), E4M3))).all()
    exact = dy.double().t() @ x_.double()
    bound = product_bound(dy.t(), off(dy.t(), E5M2), x_.t(), off(x_.t(), E4M3))
    if config.weight_gradients == "bfloat16":  # not rounded here, where no autocast is
        bound = 1e-6 * (dy.abs().double().t() @ x_.abs().double())
    elif rowwise:
        bound = bound + 2.0**-8 * (exact.abs() + bound)
    assert (layer.weight.grad.double() - exact).abs().le(bound).all()
    assert layer.weight.grad.dtype is torch.float32
    assert torch.allclose(layer.bias.grad, dy.sum(0))  # type: ignore[arg-type]
    for found, true in ((y, x_ @ w_.t() + layer.bias), (x.grad, dy @ w_), (layer.weight.grad, dy.t() @ x_)):
        assert (found - true).norm() < 0.08 * true.norm()


def test_a_closer_scale_and_bf16_weight_gradients_are_closer() -> None:
    """Where one row is far larger than the others, whose numbers a common scale makes nothing of."""
    x, dy = torch.randn(64, 48), torch.randn(64, 80)
    x[0] *= 1e6
    errors = {}
    for config in RECIPES:
        torch.manual_seed(1)
        layer = layer_of(config, 48, 80, bias=False)
        y = layer(x)
        layer.weight.grad = None
        y.backward(dy)
        true = x @ layer.weight.detach().t()
        assert layer.weight.grad is not None
        gradient = (layer.weight.grad - dy.t() @ x).norm() / (dy.t() @ x).norm()
        errors[config.scaling, config.weight_gradients] = (y - true)[1:].norm() / true[1:].norm(), gradient
    assert errors["rowwise", "fp8"][0] < 0.1 < errors["tensorwise", "fp8"][0]
    assert errors["tensorwise", "bfloat16"][1] < 0.1 * errors["tensorwise", "fp8"][1]


def model_of(config: ModelConfig, recipe: Float8Config | None, policy: MemoryConfig) -> GPT:
    torch.manual_seed(0)
    spec = AttentionSpec.of(config, seq_len=48, dtype="bfloat16")
    model = GPT(config, build_attention(ATTENTIONS["sdpa"](name="sdpa"), spec))
    if recipe is not None:
        keep_working_copies(model, torch.bfloat16)
        float8.convert(model, recipe, compile=False)
    activations.apply(model, policy)
    refresh(model)
    return model


def losses_and_gradients(model: GPT, bf16: bool = True) -> dict[str, Tensor]:
    torch.manual_seed(1)
    tokens, targets = torch.randint(101, (2, 2, 48))
    found = {}
    for number in range(2):  # gradients add up
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(tokens, targets)
        (loss / 96).backward()
        found[f"loss {number}"] = loss.detach()
    return {**found, **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize(
    "recipe", [RECIPES[0], RECIPES[2], RECIPES[1]], ids=["tensorwise", "rowwise", "bf16 gradients"]
)
@pytest.mark.parametrize("name", MODELS)
def test_every_policy_gives_the_same_bits_and_tiles_err_no_more(name: str, recipe: Float8Config) -> None:
    plain = losses_and_gradients(model_of(MODELS[name], recipe, MemoryConfig()))
    assert all(x.isfinite().all() for x in plain.values())
    for policy in (SelectiveConfig(), FullConfig(tile=0), FullConfig(tile=0, keep_attention=0.0)):
        found = losses_and_gradients(model_of(MODELS[name], recipe, policy))
        for key, expected in plain.items():
            assert torch.equal(found[key], expected), (policy, key)
    tiled = losses_and_gradients(model_of(MODELS[name], recipe, FullConfig(tile=20, head_groups=2)))
    for key, true in losses_and_gradients(model_of(MODELS[name], None, MemoryConfig()), bf16=False).items():
        error, allowed = ((x[key] - true).norm() for x in (tiled, plain))
        assert error <= 2 * allowed + 1e-3 * true.norm(), key
        assert allowed < 0.3 * true.norm(), key


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [RECIPES[0], RECIPES[2]], ids=["tensorwise", "rowwise"])
def test_compiled_for_a_cpu_with_pytorchs_own_product_the_numbers_are_nearly_those_of_the_emulation(
    recipe: Float8Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inductor takes the layouts and fuses the rest. PyTorch's product for a CPU is tried with one scale."""
    expected = losses_and_gradients(model_of(GPT2, recipe, MemoryConfig()))
    if recipe.scaling == "tensorwise":

        def scaled_mm(
            a: Factor, b: Factor, dtype: torch.dtype, *, fast: bool = False, bias: Tensor | None = None
        ) -> Tensor:
            scale_b, columns = b.scale.t(), b.values_RK.t()
            return torch._scaled_mm(a.values_RK, columns, a.scale, scale_b, bias, None, dtype, fast)

        monkeypatch.setattr(float8, "product", scaled_mm)
    model = model_of(GPT2, recipe, MemoryConfig())
    torch._dynamo.reset()
    model.compile("model", fullgraph=True)
    found = losses_and_gradients(model)
    for key, true in expected.items():
        assert (found[key] - true).norm() < 0.15 * true.norm(), key


def test_only_what_divides_inside_of_blocks_is_converted() -> None:
    model = model_of(replace(LLAMA, ffn_dim=100), RECIPES[0], MemoryConfig())
    converted = {name for name, layer in model.named_modules() if isinstance(layer, Float8Linear)}
    assert converted == {f"blocks.{n}.attention.{layer}" for n in range(2) for layer in ("qkv", "out")}
    assert model.head.working is not None
    for layer in model.modules():
        if isinstance(layer, Float8Linear):
            assert layer.working is None
            assert set(layer.state_dict()) == {"weight"}, "a checkpoint holds the masters alone"


def test_refresh_quantises_what_the_weights_are_now() -> None:
    model = model_of(LLAMA, RECIPES[0], MemoryConfig())
    layer = model.blocks[0].mlp.down
    assert isinstance(layer, Float8Linear)
    with torch.no_grad():
        layer.weight.mul_(3).add_(0.1)
        kept = copy.deepcopy(layer.forward_values), layer.forward_values.data_ptr()
        refresh(model)
    values, scale, transposed, scale_t = quantize(layer.weight.detach(), E4M3, False, transposed=True)
    for found, expected in zip((*layer.weight_OI, *layer.weight_IO), (values, scale, transposed, scale_t), strict=True):
        assert torch.equal(found.float(), expected.float())
    assert layer.forward_values.data_ptr() == kept[1], "in place"
    assert not torch.equal(layer.forward_values.float(), kept[0].float())


@pytest.mark.parametrize("config", RECIPES, ids=lambda c: f"{c.scaling}-{c.weight_gradients}")
def test_pytorch_takes_the_layouts_of_all_products_on_a_gpu(config: Float8Config) -> None:
    """With tensors that have no data: rows of the first factor, columns of the second, scales of either."""
    rowwise = config.scaling == "rowwise"
    with FakeTensorMode():

        def factor(rows: int, columns: int, dtype: torch.dtype, **which: bool) -> Factor:
            x = torch.empty(rows, columns, dtype=torch.bfloat16, device="cuda")
            return Factor(*quantize(x, dtype, rowwise, **which))

        turned = {"as_is": False, "transposed": True}
        out = torch.bfloat16 if rowwise else torch.float32
        x, w, bias = factor(21, 48, E4M3), factor(80, 48, E4M3), torch.empty(80, dtype=torch.bfloat16, device="cuda")
        assert product(x, w, torch.bfloat16, fast=True, bias=bias).shape == (21, 80)
        assert product(factor(21, 80, E5M2), factor(80, 48, E4M3, **turned), torch.bfloat16).shape == (21, 48)
        dy, x = factor(21, 80, E5M2, **turned), factor(21, 48, E4M3, **turned)
        assert product(dy, x, out).shape == (80, 48)
        assert x.values_RK.shape == (48, 32), "21 tokens are filled up to a multiple of 16"


@gpu
@pytest.mark.parametrize("config", RECIPES, ids=lambda c: f"{c.scaling}-{c.weight_gradients}")
@pytest.mark.parametrize("tokens", [512, 77])
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu_products_are_those_of_the_emulation(config: Float8Config, tokens: int, compiled: bool) -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("fp8 needs Hopper")
    found = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        layer = layer_of(config, 256, 384).to(device)
        x, dy = torch.randn(tokens, 256), torch.randn(tokens, 384)
        x = x.bfloat16().to(device).requires_grad_()  # of float32, Inductor leaves the rounding to bf16 out
        call = torch.compile(layer, dynamic=False) if compiled and device == "cuda" else layer
        with torch.autocast(device, torch.bfloat16):
            y = call(x)
        y.backward(dy.to(device, y.dtype))
        assert layer.weight.grad is not None
        assert layer.bias is not None
        found[device] = [t.detach().float().cpu() for t in (y, x.grad, layer.weight.grad, layer.bias.grad)]  # type: ignore[union-attr]
    for ours, emulated in zip(found["cuda"], found["cpu"], strict=True):
        assert (ours - emulated).norm() < 0.01 * emulated.norm()
