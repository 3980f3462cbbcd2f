"""A block that is computed again, tile by tile and group by group: its numbers, its memory, its products."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from held import Held
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode

from model import activations
from model.activations_config import FullConfig, MemoryConfig, SelectiveConfig
from model.attention import ATTENTIONS, AttentionSpec, build_attention
from model.config import ModelConfig
from model.gpt import GPT
from model.kept import Store, Ticket
from model.linear import Linear
from model.product import Product
from training.assemble import assemble
from training.parallel.world import World

B, S = 2, 48
LLAMA = ModelConfig(name="llama", n_layers=2, n_heads=4, n_kv_heads=2, dim=64, ffn_dim=96, vocab_size=101)
GPT2 = replace(LLAMA, n_kv_heads=4, position="learned", n_positions=S, norm="layernorm", mlp="gelu", bias=True)
CONFIGS = {
    "llama": LLAMA,
    "gpt2": GPT2,
    "window": replace(LLAMA, window=7, qk_norm=True),
    "soft cap": replace(LLAMA, attention_softcap=3.0, attention_scale=0.4, bias=True),
}
TILED = FullConfig(tile=20, head_groups=2)
Build = Callable[..., GPT]


def batch(n: int = B) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, targets, and the starts of documents of 20 and 28 tokens."""
    starts = torch.tensor([0] * 20 + [20] * (S - 20), dtype=torch.int32).repeat(n, 1)
    return torch.randint(101, (n, S)), torch.randint(101, (n, S)), starts


def with_policy(model: GPT, policy: FullConfig) -> GPT:
    changed = copy.deepcopy(model)
    activations.apply(changed, policy)
    return changed


def gradients(model: GPT, batches: Sequence[tuple[Tensor, ...]], bf16: bool = False) -> dict[str, Tensor]:
    for inputs in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(*inputs)
        loss.backward()
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == parameter.dtype
        found[name] = parameter.grad
    return found


def assert_within_twice(got: dict[str, Tensor], plain: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    """The 2x rule, gradient by gradient; a few roundings of float32 are granted where `plain` has none by luck."""
    for name, exact in truth.items():
        error, allowed = ((x[name].double() - exact).norm().item() for x in (got, plain))
        limit = 2 * allowed + 4 * torch.finfo(torch.float32).eps * exact.norm().item()
        assert error <= limit, f"{name}: error {error:.2e}, the plain model's is {allowed:.2e}"


def assert_close(got: Tensor, expected: Tensor) -> None:
    assert (got - expected).norm() < 1e-5 * expected.norm()


# Numbers


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-residual"])
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        pytest.param(name, backend, marks=[pytest.mark.slow] if backend == "flex" and name != "window" else [])
        for name in CONFIGS
        for backend in ("math", "sdpa", "flex")
    ],
)
def test_tiles_and_groups_are_within_twice_the_error_of_the_plain_model(
    build_lively: Build, name: str, backend: str, precision: str
) -> None:
    """With documents, two micro-batches, and one layer of two that attends again."""
    if (name, backend) == ("soft cap", "sdpa"):
        pytest.skip("no SDPA kernel caps scores")
    plain = build_lively(CONFIGS[name], backend, seq_len=S, documents=True)
    truth = build_lively(CONFIGS[name], "math", seq_len=S, documents=True).double()
    truth.load_state_dict(plain.state_dict())
    plain.residual_dtype = torch.bfloat16 if precision == "bf16-residual" else None
    tiled = with_policy(plain, replace(TILED, keep_attention=0.5))
    batches, bf16 = [batch(), batch()], precision != "fp32"
    exact = gradients(truth, batches)
    assert_within_twice(gradients(tiled, batches, bf16), gradients(plain, batches, bf16), exact)


def test_with_flash_attention_too(build_lively: Build) -> None:
    inputs = [tuple(x[:1] for x in batch())]
    plain = build_lively(replace(LLAMA, n_layers=1), "sdpa", seq_len=S, documents=True)
    tiled = build_lively(replace(LLAMA, n_layers=1), "flash", seq_len=S, documents=True)
    tiled.load_state_dict(plain.state_dict())
    got = gradients(with_policy(tiled, TILED), inputs)
    for name, expected in gradients(plain, inputs).items():
        assert_close(got[name], expected)


def test_groups_of_heads_change_no_bit(build_lively: Build) -> None:
    model, batches = build_lively(LLAMA, "sdpa", seq_len=S, documents=True), [batch()]
    whole, halves = (gradients(with_policy(model, FullConfig(head_groups=n)), batches) for n in (1, 2))
    for name, gradient in whole.items():
        assert torch.equal(halves[name], gradient), name


def test_gradients_of_tiles_are_added_up_in_float32() -> None:
    """Of 128 tiles of 2 tokens. A running sum in bf16 has 8 times the error of one product in bf16."""
    layer = Linear(32, 48)
    product = Product.of(layer, torch.bfloat16)
    x, dy = (torch.randn(256, width).bfloat16() for width in (32, 48))
    for start in range(0, 256, 2):
        product.add_gradients(dy[start : start + 2], x[start : start + 2])
    exact = dy.double().T @ x.double()
    assert (layer.weight.grad - exact).norm() < 1.5 * ((dy.T @ x).double() - exact).norm()
    assert_close(layer.bias.grad, dy.double().sum(0).float())


def test_a_weight_that_is_frozen_gets_no_gradient(build_lively: Build) -> None:
    model = with_policy(build_lively(GPT2, "sdpa", seq_len=S), TILED)
    frozen = [model.blocks[0].mlp.up.weight, model.blocks[0].attention.qkv.bias, model.blocks[1].mlp_norm.weight]
    for parameter in frozen:
        parameter.requires_grad_(False)
    model(*batch()[:2]).backward()
    assert all(parameter.grad is None for parameter in frozen)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_gradient_of_a_plain_sum_is_not_written_over(build_lively: Build) -> None:
    """It is one number, expanded."""
    plain = build_lively(LLAMA, "sdpa", seq_len=S)
    tokens, found = batch()[0], []
    for model in (plain, with_policy(plain, TILED)):
        model.hidden(tokens, torch.arange(S)[None], model.attention, None).sum().backward()
        found.append(model.blocks[0].mlp.down.weight.grad)
    assert_close(*found)


def test_several_forward_passes_may_precede_the_backward_passes(build_lively: Build) -> None:
    model, batches = build_lively(LLAMA, "sdpa", seq_len=S, documents=True), [batch(), batch()]
    expected = gradients(with_policy(model, TILED), batches)
    model = with_policy(model, TILED)
    losses = [model(*inputs) for inputs in batches]
    for loss in losses:
        loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name


# Without gradients


@pytest.mark.parametrize("backend", ["math", "sdpa", "flex"])
def test_evaluation_in_tiles_gives_the_losses_of_the_plain_model(build_lively: Build, backend: str) -> None:
    plain = build_lively(LLAMA, backend, seq_len=S, documents=True)
    tiled, inputs = with_policy(plain, TILED), batch()
    with torch.no_grad():
        losses = tiled(*inputs, per_token=True)
        torch.testing.assert_close(losses, plain(*inputs, per_token=True))
    assert losses.shape == (B, S)
    assert not losses.requires_grad


def test_another_attention_gets_all_heads_at_once(build_lively: Build) -> None:
    """A cache of keys and values would not know which heads it gets."""
    model, heads = with_policy(build_lively(LLAMA, "sdpa", seq_len=S), TILED), []

    class Counting(type(model.attention)):
        def __call__(self, q_BSHD: Tensor, *rest: Any) -> Tensor:
            heads.append(q_BSHD.shape[2])
            return super().__call__(q_BSHD, *rest)

    tokens, other = batch()[0], copy.copy(model.attention)
    other.__class__ = Counting
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, attention=other), model(tokens))
    assert heads == [4, 4]


# Memory and work


def run_block(build: Build, config: ModelConfig, policy: FullConfig, length: int, mode: Any) -> list[Any]:
    """`mode.peak` after the forward and after the backward pass of one block; its gradients are there before."""
    model = with_policy(build(config, "sdpa", seq_len=length), policy)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    angles = torch.rand(2, 1, length, 1, config.head_dim // 2).unbind()
    peaks = []
    with mode:
        x = torch.randn(1, length, config.dim).requires_grad_()
        y_edge = get_gradient_edge(model.blocks[0](x, model.attention, None, angles))
        peaks.append(mode.peak)
        mode.peak = 0
        torch.autograd.backward(y_edge, torch.randn(1, length, config.dim))
        peaks.append(mode.peak)
    return peaks


@pytest.mark.parametrize(("keep_attention", "groups"), [(1, 1), (1, 4), (0, 1), (0, 2)])
def test_what_exists_of_all_tokens_is_what_the_module_says(
    build_lively: Build, keep_attention: float, groups: int
) -> None:
    config = replace(LLAMA, n_kv_heads=4, n_layers=1)
    policy = FullConfig(tile=8, head_groups=groups, keep_attention=keep_attention)
    E = HD = GD = config.dim
    H = config.n_heads
    long, short = (run_block(build_lively, config, policy, length, Held()) for length in (512, 256))
    forward, backward = ((more - less) / 256 / 4 for more, less in zip(long, short, strict=True))
    lse = H if keep_attention else H / groups
    assert forward == E + HD + lse + max((2 * HD + 3 * GD) / groups, E)
    assert backward == 2 * E + (HD + 2 * GD) + (4 * HD + 3 * GD + H) / groups


class Products(TorchDispatchMode):
    """How often each shape was the result of a matrix product."""

    peak = 0

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[tuple[int, ...], int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.counts[tuple(result.shape)] = self.counts.get(tuple(result.shape), 0) + 1
        return result


@pytest.mark.parametrize("keep_attention", [0, 1])
def test_products_are_computed_twice_and_the_last_of_the_mlp_once(build_lively: Build, keep_attention: int) -> None:
    config = replace(LLAMA, n_layers=1, n_heads=6, n_kv_heads=3, head_dim=8)
    products = Products()
    run_block(build_lively, config, FullConfig(keep_attention=keep_attention), 40, products)
    E, F, HD, W = config.dim, config.ffn_dim, 48, 96
    U = 2 * F
    assert products.counts == {
        (40, W): 3 - keep_attention + 1,  # qkv; F is W, too: the gradient of down's input
        (40, E): 2 + 1 + 2,  # out twice, down once; the gradients of the norms' outputs
        (40, U): 2,  # the MLP's first product
        (40, HD): 1,  # the gradient of out's input
        (W, E): 1,
        (E, HD): 1,
        (U, E): 1,
        (E, F): 1,
    }


def test_nothing_of_the_mlp_exists_for_all_tokens(build_lively: Build) -> None:
    config = replace(LLAMA, n_layers=1, ffn_dim=640)
    products = Products()
    run_block(build_lively, config, FullConfig(tile=16), 256, products)
    assert max(shape[0] for shape in products.counts if shape[1] in (640, 1280) and shape[0] != config.dim) == 16


# What is kept


class Recording(Store):
    def __init__(self) -> None:
        self.kept: list[list[Tensor]] = []

    def keep(self, tensors: Sequence[Tensor]) -> Ticket:
        self.kept.append(list(tensors))
        return super().keep(tensors)


def test_the_input_is_kept_as_it_is_and_attention_of_the_last_layers(build_lively: Build) -> None:
    model = with_policy(build_lively(replace(LLAMA, n_layers=4), "sdpa", seq_len=S), replace(TILED, keep_attention=0.5))
    store, inputs = Recording(), []
    for block in model.blocks:
        block.store = store
        block.register_forward_pre_hook(lambda block, args: inputs.append(args[0]))
    loss = model(*batch()[:2])
    assert [kept[0].data_ptr() for kept in store.kept] == [x.data_ptr() for x in inputs]
    of_two_heads = [(B, 2, S, 16), (B, 2, S)]
    shapes = [[tuple(x.shape) for x in kept[1:]] for kept in store.kept]
    assert shapes == [[], [], of_two_heads * 2, of_two_heads * 2]
    assert loss.requires_grad


def test_attention_is_asked_for_its_log_sum_exp_where_it_is_kept(build_lively: Build) -> None:
    """PyTorch's memory-efficient and cuDNN operators return one only where a gradient is asked for."""
    model = with_policy(build_lively(LLAMA, "sdpa", seq_len=S), FullConfig(keep_attention=0.5))
    asked = []

    class Watching(type(model.attention)):
        def __call__(self, q_BSHD: Tensor, *rest: Any) -> Tensor:
            asked.append(q_BSHD.requires_grad and torch.is_grad_enabled())
            return super().__call__(q_BSHD, *rest)

    model.attention.__class__ = Watching
    loss = model(*batch()[:2])
    assert asked == [False, True], "the first layer keeps nothing of it"
    loss.backward()
    assert asked[2:] == [True] * 3


@pytest.mark.parametrize("backward", [True, False])
def test_what_is_kept_is_freed_by_the_backward_pass_or_with_the_graph(build_lively: Build, backward: bool) -> None:
    model = with_policy(build_lively(LLAMA, "sdpa", seq_len=S), TILED)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    tickets = []
    store = Store()
    for block in model.blocks:
        block.store = store
    store.keep = lambda tensors: tickets.append([weakref.ref(x) for x in tensors]) or Ticket(tensors)
    loss = model(*batch()[:2])
    kept = [ref for refs in tickets for ref in refs]
    assert len(kept) == 2 * (1 + 2 * 2)
    assert all(ref() is not None for ref in kept)
    if backward:
        loss.backward()
    else:
        del loss
    assert all(ref() is None for ref in kept)


def test_a_second_backward_pass_is_refused(build_lively: Build) -> None:
    loss = with_policy(build_lively(LLAMA, "sdpa", seq_len=S), TILED)(*batch()[:2])
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward pass through the same layers"):
        loss.backward()


def test_a_ticket_gives_back_what_it_got_once() -> None:
    tensors = [torch.randn(3, 4).T, torch.randn(2)]
    ticket = Store().keep(tensors)
    taken = ticket.take()
    assert all(x is y for x, y in zip(taken, tensors, strict=True))
    freed = weakref.ref(tensors.pop())
    del taken
    assert freed() is None
    with pytest.raises(RuntimeError, match="second backward"):
        ticket.take()


# Compilation


@pytest.mark.slow
def test_pieces_are_compiled_once_for_all_layers_and_lengths(build_lively: Build) -> None:
    torch._dynamo.reset()
    plain = build_lively(replace(LLAMA, n_layers=6), "sdpa", seq_len=S, documents=True)
    tiled, counter = with_policy(plain, TILED), CompileCounterWithBackend("aot_eager")
    tiled.compile("block", backend=counter, fullgraph=True)
    batches = [batch(), batch()]
    gradients(tiled, batches[:1])
    compiled = counter.frame_count
    got = gradients(tiled, batches[1:])
    assert counter.frame_count == compiled
    for parameter, expected in gradients(plain, batches).items():
        assert_close(got[parameter], expected)
    for length in (41, 37, 23):
        with torch.no_grad():
            inputs = [x[:, :length].contiguous() for x in batch()]
            torch.testing.assert_close(tiled(*inputs), plain(*inputs))
    # The loss once for each length. Each piece with and without a graph, and each of these for any length beside.
    assert counter.frame_count <= (1 + 3) + 2 * 2 * 3


# What is refused


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"keep_attention": 1.5}, r"memory\.keep_attention=1\.5 is no fraction; use 0 to 1"),
        ({"keep_attention": float("nan")}, r"memory\.keep_attention=nan"),
        ({"tile": -1}, r"memory\.tile=-1 is negative; use a number of tokens, or 0"),
        ({"head_groups": 0}, r"memory\.head_groups=0 must be at least 1"),
    ],
)
def test_fields_that_make_no_sense_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        FullConfig(**fields)


def test_groups_that_do_not_divide_the_heads_are_refused(build_lively: Build) -> None:
    with pytest.raises(ValueError, match=r"memory\.head_groups=4 does not divide model\.n_kv_heads=2; use a divisor"):
        activations.apply(build_lively(LLAMA), FullConfig(head_groups=4))


def test_which_layers_keep_attention() -> None:
    def keeping(policy: FullConfig) -> list[int]:
        return [layer for layer in range(policy.of(8)) if policy.keeps_attention(layer, 8)]

    assert keeping(FullConfig()) == list(range(8))
    assert keeping(FullConfig(keep_attention=0.25)) == [6, 7]
    assert keeping(FullConfig(layers=0.5, keep_attention=0.5)) == [2, 3]
    assert keeping(FullConfig(keep_attention=0)) == []


# On a GPU

GPU_MODEL = ModelConfig(
    name="gpu", n_layers=6, n_heads=8, n_kv_heads=4, dim=512, ffn_dim=2048, vocab_size=1000, loss_chunk_size=2048
)
GPU_POLICIES = {
    "none": MemoryConfig(),
    "selective": SelectiveConfig(),
    "full": FullConfig(tile=1024, head_groups=2),
    "full, without attention": FullConfig(tile=1024, head_groups=2, keep_attention=0),
}


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("backend", ["flash", "sdpa", "flex"])
def test_on_a_gpu_8k_tokens_take_ever_less_memory_and_give_the_same_gradients(backend: str, compile: bool) -> None:
    capability = torch.cuda.get_device_capability()
    spec = AttentionSpec(8, 4, 64, 8192, "bfloat16", capability=capability, max_documents=16)
    attention, device = build_attention(ATTENTIONS[backend](name=backend), spec), torch.device("cuda")
    starts = (torch.arange(8192, dtype=torch.int32, device=device) // 1000 * 1000)[None]
    tokens, targets = torch.randint(1000, (2, 1, 8192), device=device)
    found, peaks = {}, []
    for policy_name, policy in GPU_POLICIES.items():
        model = assemble(GPU_MODEL, attention, World(device), seed=0, compile=compile, memory=policy)
        for _ in range(2):  # the first one compiles, and makes the gradients' memory
            torch.cuda.reset_peak_memory_stats()
            model.zero_grad(set_to_none=False)
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(tokens, targets, starts)
            loss.backward()
        peaks.append(torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated())
        found[policy_name] = loss.item(), {name: p.grad.cpu() for name, p in model.named_parameters()}
        del model, loss
    assert peaks == sorted(set(peaks), reverse=True), peaks
    loss, expected = found.pop("none")
    for other, got in found.values():
        assert other == pytest.approx(loss, rel=1e-3)
        for name, gradient in got.items():
            assert (gradient - expected[name]).norm() < 0.05 * expected[name].norm(), name


@pytest.mark.gpu
def test_on_a_gpu_weight_gradients_are_added_up_in_float32_without_a_copy() -> None:
    layer = Linear(2048, 8192, bias=False).cuda()
    product = Product.of(layer, torch.bfloat16)
    x, dy = (torch.randn(4096, width, device="cuda").bfloat16() for width in (2048, 8192))
    layer.weight.grad = torch.full_like(layer.weight, 3.0)
    product.add_gradients(dy, x)  # cuBLAS allocates its workspace
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    product.add_gradients(dy, x)
    assert torch.cuda.max_memory_allocated() == before
    exact = 3 + 2 * (dy.double().T @ x.double())
    assert (layer.weight.grad - exact).norm() < 1e-5 * exact.norm()
