"""Flash attention as PyTorch sees it: an operator with shapes, a gradient, a FLOP count, and a place in compiled graphs
and checkpoints. Runs on the GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")
from triton.runtime.errors import PTXASError

from kernels import (
    FLASH_ATTENTION_OPS,
    flash_attention,
    flash_attention_varlen,
    starts_from_separators,
)
from kernels.flash_attention import op, portable, problem
from kernels.flash_attention.config import choose_tiles

DEVICE = "cuda" if torch.cuda.is_available() and not portable.INTERPRETED else "cpu"
pytestmark = pytest.mark.gpu if DEVICE == "cuda" else []
B, S, S_K, H, G, D = 2, 20, 24, 4, 2, 16


def qkv(requires_grad: bool = True, seq_len: int = S) -> tuple[Tensor, Tensor, Tensor]:
    """Views: q with the heads first in memory, k and v of one projection."""
    q = torch.randn(B, H, seq_len, D, device=DEVICE).transpose(1, 2)
    k, v = torch.randn(B, seq_len + S_K - S, 2 * G, D, device=DEVICE).split(G, dim=2)
    return q.requires_grad_(requires_grad), k.requires_grad_(requires_grad), v.requires_grad_(requires_grad)


def starts(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, S, (B, S), generator=generator).sort(dim=1).values.int().to(DEVICE)


# starts, ends, sinks, slopes, causal, window, softcap, scale, deterministic, implementation
PLAIN = lambda: (None, None, None, None, True, None, 0.0, 0.25, False, "auto")  # noqa: E731
EVERYTHING = lambda: (  # noqa: E731
    starts(), starts() + 4, *torch.rand(2, H, device=DEVICE), False, 7, 3.0, 0.1, True, "triton"
)  # fmt: skip


@pytest.mark.parametrize(
    ("options", "uses_lse"),
    [
        pytest.param(EVERYTHING, True, id="everything", marks=pytest.mark.slow),
        pytest.param(EVERYTHING, False, id="everything, out alone", marks=pytest.mark.slow),
        pytest.param(PLAIN, True, id="plain", marks=pytest.mark.slow),
        pytest.param(PLAIN, False, id="plain, out alone", marks=pytest.mark.slow),
    ],
)
def test_operators_pass_opcheck(options, uses_lse):
    """PyTorch's own test of schema, autograd registration, fake tensors and tracing with dynamic shapes."""
    arguments = options()
    for x in arguments[2:4]:
        if x is not None:
            x.requires_grad_()
    for operator in (torch.ops.flash_gpt.flash_attention, torch.ops.flash_gpt.flash_attention_backward):
        assert torch.Tag.pt2_compliant_tag in operator.default.tags
    torch.library.opcheck(torch.ops.flash_gpt.flash_attention.default, (*qkv(), *arguments))

    arguments = tuple(x.detach() if isinstance(x, Tensor) else x for x in arguments)
    q, k, v = qkv(requires_grad=False)
    out, lse = op.forward(q, k, v, *arguments)
    dlse = torch.randn_like(lse) if uses_lse else None
    inputs = (torch.randn_like(out), dlse, q, k, v, out, lse, *arguments, [True, not uses_lse, True, True, True])
    torch.library.opcheck(torch.ops.flash_gpt.flash_attention_backward.default, inputs)


def test_shapes_are_known_without_data():
    """On the meta device there are no values: nothing is read from `starts` and nothing waits for the GPU."""
    q, k, v = (x.detach().to("meta").half().requires_grad_() for x in qkv())
    sinks = torch.randn(H, device="meta", requires_grad=True)
    out, lse = flash_attention(q, k, v, starts=starts().to("meta"), sinks=sinks, return_lse=True)
    assert (out.shape, out.dtype) == ((B, S, H, D), torch.float16)
    assert (lse.shape, lse.dtype) == ((B, H, S), torch.float32)
    gradients = torch.autograd.grad((out.sum(), lse.sum()), (q, k, v, sinks))
    assert [(x.shape, x.dtype) for x in gradients] == [(x.shape, x.dtype) for x in (q, k, v, sinks)]


def value_and_gradients(function: Any, *inputs: Tensor, **options: Any) -> list[Tensor]:
    out, lse = function(*inputs, return_lse=True, **options)
    return [out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), inputs)]


def test_compiles_without_a_graph_break_and_once_for_all_batches():
    """Documents, and so all values of `starts`, change from batch to batch; the compiled graph does not."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    sinks = torch.randn(H, device=DEVICE)

    def attend(q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, return_lse: bool = False) -> Any:
        starts_BS = starts_from_separators(tokens, 0)
        return flash_attention(q, k, v, window=9, starts=starts_BS, softcap=2.0, sinks=sinks, return_lse=return_lse)

    compiled = torch.compile(attend, backend=counter, fullgraph=True)
    for seed in range(3):
        torch.manual_seed(seed)
        inputs, tokens = qkv(), torch.randint(0, 5, (B, S), device=DEVICE)
        for ours, theirs in zip(
            value_and_gradients(partial(compiled, tokens=tokens), *inputs),
            value_and_gradients(partial(attend, tokens=tokens), *inputs),
            strict=True,
        ):
            assert torch.equal(ours, theirs)
    assert counter.frame_count == 1


def test_packed_sequences_compile_once_for_all_lengths():
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(flash_attention_varlen, backend=counter, fullgraph=True)
    q = torch.randn(S, H, D, device=DEVICE)
    for bounds in ([0, 4, 20], [0, 11, 17]):
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
        assert torch.equal(compiled(q, q, q, cu_seqlens), flash_attention_varlen(q, q, q, cu_seqlens))
    assert counter.frame_count == 1


@pytest.mark.slow
def test_compiles_for_any_length_when_asked_to():
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(flash_attention, backend=counter, fullgraph=True, dynamic=True)
    compiled(*qkv(seq_len=41), return_lse=True)
    once = counter.frame_count
    for seq_len in (20, 33, 50):
        inputs = qkv(seq_len=seq_len)
        for ours, theirs in zip(
            value_and_gradients(compiled, *inputs), value_and_gradients(flash_attention, *inputs), strict=True
        ):
            assert torch.equal(ours, theirs)
    assert counter.frame_count == once


def test_selective_checkpointing_saves_the_output(monkeypatch):
    """A plain checkpoint runs the kernel again in backward; with FLASH_ATTENTION_OPS it runs once."""
    calls = []
    kernel = portable.forward
    monkeypatch.setattr(portable, "forward", lambda *args, **kwargs: calls.append(1) or kernel(*args, **kwargs))
    projection = torch.nn.Linear(D, D, device=DEVICE)

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attention(projection(q), projection(k), v)
        assert isinstance(out, Tensor)
        return projection(out)

    inputs = qkv()

    def gradients(out: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(out.square().sum(), [*inputs, *projection.parameters()]))

    expected = gradients(layer(*inputs))
    assert len(calls) == 1
    gradients(checkpoint(layer, *inputs, use_reentrant=False))
    assert len(calls) == 3
    save_attention = partial(create_selective_checkpoint_contexts, FLASH_ATTENTION_OPS)
    got = gradients(checkpoint(layer, *inputs, use_reentrant=False, context_fn=save_attention))
    assert len(calls) == 4
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_flops_are_counted_as_for_pytorchs_own_attention():
    """Every query with every key, whatever the mask: forward 2 products, backward 5, 2 FLOPs per multiply-add."""
    q, k, v = qkv()
    with FlopCounterMode(display=False) as counter:
        flash_attention(q, k, v, window=3, starts=starts()).sum().backward()
    product = 2 * B * H * S * S_K * D
    assert counter.get_flop_counts()["Global"] == {
        torch.ops.flash_gpt.flash_attention: 2 * product,
        torch.ops.flash_gpt.flash_attention_backward: 5 * product,
    }


class Functions(TorchFunctionMode):
    """Notes what PyTorch is asked for."""

    def __init__(self, seen: list[Any]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    def __init__(self, seen: list[Any]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class Subclass(Tensor):
    seen: list[Any]

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_whoever_looks_on_sees_the_operators_and_nobody_else_waits_for_the_dispatcher(monkeypatch):
    """Modes, subclasses of Tensor and tracers; else the functions below autograd are called as they are."""
    forward, backward = FLASH_ATTENTION_OPS[0], torch.ops.flash_gpt.flash_attention_backward.default
    inputs, seen = [torch.randn(1, 2, 1, D, device=DEVICE, requires_grad=True) for _ in range(3)], []
    Subclass.seen = seen
    with Functions(seen):
        flash_attention(*inputs)
    assert forward in seen
    seen.clear()
    with Operators(seen):
        flash_attention(*inputs).sum().backward()
    assert {forward, backward} <= set(seen)
    seen.clear()
    flash_attention(*(x.detach().as_subclass(Subclass) for x in inputs))
    assert forward in seen
    graph = torch.jit.trace(flash_attention, tuple(x.detach() for x in inputs), check_trace=False).graph
    assert "flash_gpt::flash_attention" in str(graph)

    def refuse(*_: Any) -> None:
        raise AssertionError("the dispatcher")

    for operator in (forward, backward):
        monkeypatch.setattr(type(operator), "__call__", refuse)
    flash_attention(*inputs).sum().backward()


def test_a_second_derivative_is_refused():
    q, k, v = qkv()
    (gradient,) = torch.autograd.grad(flash_attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"is differentiable once; for second derivatives use kernels\.attention"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("prelude", "environment", "message"),
    [
        ("import sys; sys.modules['triton'] = None", {}, "needs Triton, which is not installed (pip install triton"),
        ("", {"TRITON_INTERPRET": "0"}, "runs on CUDA GPUs, not on CPU tensors; use kernels.attention"),
    ],
    ids=["without Triton", "without its interpreter"],
)
def test_where_the_kernels_cannot_run_importing_works_and_calling_says_why(prelude, environment, message):
    script = f"""{prelude}
import torch, kernels
q = torch.randn(1, 4, 1, 16)
kernels.attention(q, q, q)
try:
    kernels.flash_attention(q, q, q)
except ValueError as error:
    print(error)
"""
    environment = os.environ | environment
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert message in result.stdout
    assert result.stdout.count("\n") == 1


def test_old_gpus_and_other_devices_are_refused_by_name(monkeypatch):
    assert op.why_not_on(torch.device(DEVICE)) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    old_gpu = torch.device("cuda", 99)
    assert "compute capability 8.0 or newer; Tesla T4 has 7.5; use kernels.attention" in op.why_not_on(old_gpu)
    assert "not on mps tensors; use kernels.attention" in op.why_not_on(torch.device("mps"))


@pytest.fixture
def _on_hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every device is an H100, as far as the choice of kernels goes."""
    monkeypatch.setattr(op, "why_not_hopper", lambda device, dtype: None)
    monkeypatch.setattr(op, "_gluon_failed", [])
    op.choose_implementation.cache_clear()
    yield
    op.choose_implementation.cache_clear()


def test_hopper_kernels_serve_16_bit_inputs_on_an_h100_and_nothing_else(monkeypatch):
    gpu = torch.device("cuda", 98)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert op.choose_implementation("auto", gpu, torch.bfloat16) == "triton"
    with pytest.raises(ValueError, match=r"need compute capability 9.0; A100 has 8.0; use implementation='auto'"):
        op.choose_implementation("hopper", gpu, torch.bfloat16)
    op.choose_implementation.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert op.choose_implementation("auto", gpu, torch.float16) == "hopper"
    assert op.choose_implementation("hopper", gpu, torch.bfloat16) == "hopper"
    assert op.choose_implementation("triton", gpu, torch.bfloat16) == "triton"
    assert op.choose_implementation("auto", gpu, torch.float32) == "triton"
    with pytest.raises(ValueError, match=r"in float16 and bfloat16, not torch.float32"):
        op.choose_implementation("hopper", gpu, torch.float32)
    op.choose_implementation.cache_clear()


class FailingKernels:
    """A Triton whose Gluon is not the one that we wrote for."""

    def __init__(self, error: Exception) -> None:
        self.error, self.calls = error, 0

    def forward(self, *_: Any, **__: Any) -> Any:
        self.calls += 1
        raise self.error

    backward = forward


@pytest.mark.usefixtures("_on_hopper")
@pytest.mark.filterwarnings("error:the Hopper kernels")
@pytest.mark.parametrize("error", [AttributeError("no create_async_tma_reduce"), PTXASError("crashed")], ids=repr)
def test_what_does_not_compile_is_said_once_and_the_portable_kernels_run(monkeypatch, error):
    failing = FailingKernels(error)
    kernels = op._kernels
    monkeypatch.setattr(op, "_kernels", lambda name: failing if name == "hopper" else kernels(name))
    q = torch.randn(1, 8, 1, 16, device=DEVICE, requires_grad=True)
    with pytest.warns(UserWarning, match=r"do not compile with Triton .*; the portable kernels run instead"):
        flash_attention(q, q, q).sum().backward()
    flash_attention(q, q, q).sum().backward()  # silently: warnings are errors here
    assert failing.calls == 1
    with pytest.raises(type(error)):
        flash_attention(q, q, q, implementation="hopper")


@pytest.mark.usefixtures("_on_hopper")
def test_an_error_of_the_gpu_is_not_taken_for_one_of_the_compiler(monkeypatch):
    failing = FailingKernels(RuntimeError("CUDA error: out of memory"))
    monkeypatch.setattr(op, "_kernels", lambda name: failing)
    q = torch.randn(1, 8, 1, 16, device=DEVICE)
    with pytest.raises(RuntimeError, match="out of memory"):
        flash_attention(q, q, q)


def test_pytorchs_switch_asks_for_deterministic_gradients(monkeypatch):
    asked = []

    backward = portable.backward
    monkeypatch.setattr(
        portable, "backward", lambda *args, **kwargs: asked.append(kwargs["deterministic"]) or backward(*args, **kwargs)
    )
    q = torch.randn(1, 8, 1, 16, device=DEVICE, requires_grad=True)
    for switch in (False, True):
        torch.use_deterministic_algorithms(switch)
        try:
            flash_attention(q, q, q).sum().backward()
        finally:
            torch.use_deterministic_algorithms(False)
    assert asked == [False, True]


def test_an_lse_that_the_loss_does_not_use_costs_backward_nothing(monkeypatch):
    given = []

    backward = portable.backward

    q = torch.randn(1, 8, 1, 16, device=DEVICE, requires_grad=True)
    out, lse = flash_attention(q, q, q, return_lse=True)
    monkeypatch.setattr(
        portable, "backward", lambda *args, **kwargs: given.append(args[1]) or backward(*args, **kwargs)
    )
    out.sum().backward(retain_graph=True)
    (out.sum() + lse.sum()).backward()
    without, used = given
    assert without is None
    assert torch.equal(used, torch.ones_like(lse))


def test_both_names_of_the_package_work_in_one_process():
    """This folder is `kernels` here and `flash_gpt` where it is installed; both register the same operator."""
    script = """
import sys, torch, kernels
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("flash_gpt", kernels.__file__, submodule_search_locations=kernels.__path__)
flash_gpt = sys.modules["flash_gpt"] = module_from_spec(spec)
spec.loader.exec_module(flash_gpt)
q = torch.randn(1, 4, 1, 16, device=sys.argv[1], requires_grad=True)
for package in (kernels, flash_gpt):
    package.flash_attention(q, q, q).sum().backward()
"""
    subprocess.run([sys.executable, "-c", script, DEVICE], check=True)


def test_rows_too_far_apart_for_offsets_of_32_bits_are_copied():
    """With the sequence first, a tile's last row may lie more than 2³¹ elements after its first."""
    near, far = (torch.empty(200, batch, 8, 256, device="meta").transpose(0, 1) for batch in (8000, 9000))
    assert problem.aligned(near) is near
    assert problem.aligned(far).is_contiguous()


def test_float32_products_are_ieee_unless_pytorch_allows_tf32():
    q = torch.empty(1, 8, 1, 16)
    tiles = choose_tiles("forward", 16, None)
    assert portable._options(q, q, tiles, tma=False)["PRECISION"] == "ieee"
    try:
        torch.set_float32_matmul_precision("high")
        assert portable._options(q, q, tiles, tma=False)["PRECISION"] == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert portable._options(q, q, tiles, tma=False)["PRECISION"] == "ieee"
