"""Flash attention wherever PyTorch users bring it: torch.func, torch.compile and export for any size, sizes of 0, more
queries than keys, V of another head_dim, ALiBi, scores of any size, and gradients of a few inputs alone. Runs on the
GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flash_cases import Case, check, make
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

pytest.importorskip("triton")
from kernels import attention as reference
from kernels import flash_attention, flash_attention_varlen
from kernels.flash_attention import config, op, portable

DEVICE = "cuda" if torch.cuda.is_available() and not portable.INTERPRETED else "cpu"
pytestmark = [
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
    pytest.mark.filterwarnings("ignore:divide by zero encountered in log2:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),  # torch.func uses it
]
close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


def qkv(S: int = 9, S_k: int | None = None, B: int = 2, requires_grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (B, S, 4, 16), (B, S_k or S, 2, 16), (B, S_k or S, 2, 16)
    q, k, v = (torch.randn(shape, device=DEVICE, requires_grad=requires_grad) for shape in shapes)
    return q, k, v


def loss(function: Any, **options: Any) -> Any:
    def of(*inputs: Tensor) -> Tensor:
        out, lse = function(*inputs, **options, return_lse=True)
        return out.square().sum() + lse.sum()

    return of


# torch.func


def test_func_grad_equals_that_of_the_definition():
    inputs = *qkv(), torch.randn(4, device=DEVICE)

    def of(function: Any) -> Any:
        return lambda q, k, v, sinks: loss(function, sinks=sinks, window=5)(q, k, v)

    for ours, theirs in zip(
        *(torch.func.grad(of(f), argnums=(0, 1, 2, 3))(*inputs) for f in (flash_attention, reference)), strict=True
    ):
        close(ours, theirs)


@pytest.mark.parametrize(
    "mapped", ["qkv", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sinks", "v", "starts"))]
)
def test_vmap_equals_that_of_the_definition(mapped):
    """Forward, and each sample's gradients (a gradient of sinks is a sum over a batch, but not over samples)."""
    n = 2
    shapes = [
        (2, 9, n, h, 16) if mapped in ("qkv", name) else (2, 9, h, 16) for name, h in zip("qkv", (4, 2, 2), strict=True)
    ]
    q, k, v = (torch.randn(shape, device=DEVICE) for shape in shapes)
    starts = torch.randint(0, 9, (n, 2, 9) if mapped == "starts" else (2, 9), device=DEVICE).sort(-1).values.int()
    sinks = torch.randn(*((n, 4) if mapped == "sinks" else (4,)), device=DEVICE)
    in_dims = (*(2 if x.dim() == 5 else None for x in (q, k, v)), 0 if starts.dim() == 3 else None,
               0 if sinks.dim() == 2 else None)  # fmt: skip

    def of(function: Any) -> Any:
        return lambda q, k, v, starts, sinks: loss(function, starts=starts, sinks=sinks)(q, k, v)

    for transform in (lambda f: f, lambda f: torch.func.grad(f, argnums=(0, 1, 2, 4))):
        ours, theirs = (
            torch.func.vmap(transform(of(f)), in_dims)(q, k, v, starts, sinks) for f in (flash_attention, reference)
        )
        for x, y in zip(*((x,) if isinstance(x, Tensor) else x for x in (ours, theirs)), strict=True):
            close(x, y)


def test_a_vmap_over_nothing_is_empty():
    q, k, v = (torch.zeros(0, *x.shape, device=DEVICE) for x in qkv())
    assert torch.func.vmap(flash_attention)(q, k, v).shape == q.shape
    grads = torch.func.vmap(torch.func.grad(lambda *x: flash_attention(*x).sum(), argnums=(0, 1)))(q, k, v)
    assert [x.shape for x in grads] == [q.shape, k.shape]


def test_a_gradient_of_a_vmap_equals_that_of_the_definition():
    q, k, v = (torch.randn(3, *x.shape, device=DEVICE) for x in qkv())
    ours, theirs = (
        torch.func.grad(lambda q, f=f: torch.func.vmap(loss(f))(q, k, v).sum())(q) for f in (flash_attention, reference)
    )
    close(ours, theirs)


def test_forward_mode_and_second_derivatives_are_refused_in_words():
    q, k, v = qkv()
    with pytest.raises(RuntimeError, match=r"no forward-mode derivative \(jvp\); use kernels\.attention"):
        torch.func.jvp(lambda q: flash_attention(q, k, v), (q,), (q,))
    first = torch.func.grad(lambda q: flash_attention(q, k, v).sum())
    for second in (torch.func.grad(lambda q: first(q).sum()), lambda q: torch.func.jvp(first, (q,), (q,))):
        with pytest.raises(RuntimeError, match=r"use kernels\.attention"):
            second(q)


# Sizes that are not known when a graph is traced


@pytest.mark.slow
def test_a_compiled_window_does_not_tie_the_graph_to_lengths_above_or_below_it():
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    attend = partial(flash_attention, window=12)
    compiled = torch.compile(attend, backend=counter, fullgraph=True, dynamic=True)
    compiled(*qkv(8))
    once = counter.frame_count
    for S in (33, 12, 5):
        inputs = qkv(S)
        assert torch.equal(compiled(*inputs), attend(*inputs))
    assert counter.frame_count == once


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_model_serves_all_lengths(strict):
    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = flash_attention(q, k, v, window=12)
            assert isinstance(out, Tensor)
            return out

    length = torch.export.Dim("length", min=2, max=4096)
    exported = torch.export.export(Model(), qkv(20), dynamic_shapes=({1: length},) * 3, strict=strict).module()
    for S in (8, 33):
        inputs = qkv(S)
        assert torch.equal(exported(*inputs), Model()(*inputs))


@pytest.mark.slow
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_lengths_that_only_the_data_know_are_traced():
    """Indexing with a mask inside a compiled function: rows for packed attention, and keys of another length."""
    torch.compiler.reset()
    cu_seqlens = torch.tensor([0, 3, 5], dtype=torch.int32, device=DEVICE)

    def attend(x: Tensor, mask: Tensor, other: Tensor) -> Tensor:
        y, z = x[mask], x[other]
        packed = flash_attention_varlen(y, y, y, cu_seqlens, window=4)
        return packed.square().sum() + flash_attention(y[None], z[None], z[None], causal=False).square().sum()

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    for share in (0.3, 0.8):
        masks = (torch.rand(2, 30, device=DEVICE) < share).unbind()
        ours, theirs = (torch.randn(30, 2, 16, device=DEVICE).requires_grad_() for _ in range(2))
        theirs = ours.detach().clone().requires_grad_()
        for function, x in ((compiled, ours), (attend, theirs)):
            function(x, *masks).backward()
        assert torch.equal(ours.grad, theirs.grad)


def test_compiled_autograd_takes_the_gradient_too():
    torch.compiler.reset()
    q, k, v = qkv(requires_grad=True)
    gradients = []
    for compiled in (False, True):
        with (
            torch._dynamo.compiled_autograd._enable(partial(torch.compile, backend="aot_eager"), dynamic=False)
            if compiled
            else nullcontext()
        ):
            flash_attention(q, k, v).square().sum().backward()
        gradients.append(q.grad)
        q.grad = None
    assert torch.equal(*gradients)


# Sizes


@pytest.mark.parametrize(
    "sizes", [{"B": 0}, {"S": 0}, {"S": 0, "S_k": 5}, {"S": 3, "S_k": 0, "causal": False}], ids=str
)
def test_attention_of_nothing_is_empty_or_zero_with_gradients_of_zero(sizes):
    """As F.scaled_dot_product_attention's are, but for a query without keys, where PyTorch has NaN."""
    B, S, causal = sizes.get("B", 2), sizes.get("S", 4), sizes.get("causal", True)
    S_k = sizes.get("S_k", S)
    q, k, v = (torch.randn(B, s, h, 16, device=DEVICE, requires_grad=True) for s, h in ((S, 4), (S_k, 2), (S_k, 2)))
    sinks = torch.randn(4, device=DEVICE, requires_grad=True)
    out, lse = flash_attention(q, k, v, causal=causal, sinks=sinks, return_lse=True)
    assert out.shape == (B, S, 4, 16)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, sinks.detach()[:, None].expand(B, 4, S))
    gradients = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v, sinks))
    for x, gradient in zip((q, k, v), gradients[:3], strict=True):
        assert torch.equal(gradient, torch.zeros_like(x))
    assert torch.equal(gradients[3], torch.full_like(sinks, B * S))


def test_more_queries_than_keys_see_all_of_them():
    q, k, v = qkv(33, 7, requires_grad=True)
    ours = flash_attention(q, k, v, causal=False)
    theirs = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), enable_gqa=True).transpose(1, 2)
    dout = torch.randn_like(ours)
    for x, y in zip(*((out, *torch.autograd.grad(out, (q, k, v), dout)) for out in (ours, theirs)), strict=True):
        close(x, y)


CASES = (
    Case(40, causal=False, extra_keys=-25, window=9),
    Case(70, causal=False, ends=True),
    Case(70, causal=False, ends=True, documents="gaps", sinks=True, softcap=3.0, extra_keys=20),
    Case(70, causal=False, ends=True, documents="short", window=5, layout="misaligned"),
    Case(40, D=192, D_v=128, dtype=torch.float16, heads=(2, 2)),
    Case(33, D=24, D_v=40, layout="heads-first"),
    Case(70, alibi=True),
    Case(70, alibi=True, causal=False, sinks=True, softcap=3.0, extra_keys=9),
    Case(70, alibi=True, documents="long", window=30, dtype=torch.bfloat16, layout="fused"),
    Case(70, alibi=True, causal=False, ends=True, documents="long", dtype=torch.float16),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_is_within_twice_that_of_standard_attention(case):
    """Masks with a second end, V of another head_dim, and slopes, with their gradient."""
    check(flash_attention, make(case, DEVICE))


def test_heads_as_wide_as_those_of_latent_attention():
    dtype = torch.float32 if DEVICE == "cpu" else torch.bfloat16
    check(flash_attention, make(Case(40, D=576, D_v=512, heads=(2, 1), B=1, dtype=dtype), DEVICE))


def test_a_gpu_without_room_for_wide_heads_says_so():
    assert config.why_not_so_wide(576, (9, 0), float32=False) is None
    assert config.why_not_so_wide(512, (8, 6), float32=False) is None
    assert "needs more shared memory than this GPU has" in config.why_not_so_wide(576, (8, 9), float32=False)
    assert "not float32" in config.why_not_so_wide(320, (9, 0), float32=True)


def test_more_tiles_than_a_launch_has_programs_are_refused_in_words(monkeypatch):
    monkeypatch.setattr(portable, "MOST_PROGRAMS", 7)
    flash_attention(*(x[:1] for x in qkv()), implementation="triton")
    with pytest.raises(ValueError, match=r"8 heads .* of 1 tiles are more than the 7 programs .* parts of the batch"):
        flash_attention(*qkv(), implementation="triton")


# Scores of any size


def test_equal_scores_of_any_size_weigh_alike():
    """max · scale has no digits after the point; the difference of two scores has."""
    q, k = torch.full((2, 1, 40, 1, 16), 1e5, dtype=torch.bfloat16, device=DEVICE)
    v = torch.randn(1, 40, 1, 16, device=DEVICE).bfloat16()
    out = flash_attention(q, k, v, causal=False, implementation="triton")
    close(out.float(), v.float().mean(1, keepdim=True).expand_as(out), rtol=1e-2, atol=1e-2)
    assert not flash_attention(q, k, v, implementation="triton").isnan().any()


@pytest.mark.parametrize("size", [1e3, 1e5, 1e8])
def test_scores_of_any_size_have_the_gradients_of_float64(size):
    """Up to twice the error of standard attention in float32, whose scores of 10⁶ are off by hundredths."""
    q, k, v = (torch.randn(1, 40, 2, 16, device=DEVICE).bfloat16().float() for _ in range(3))
    inputs = [q * size, k * size, v]
    dout = torch.randn(1, 40, 2, 16, device=DEVICE)
    results = []
    for function, dtype in (
        (partial(flash_attention, implementation="triton"), torch.float32),
        (reference, torch.float32),
        (reference, torch.float64),
    ):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out = function(*leaves)
        results.append([x.double() for x in (out, *torch.autograd.grad(out, leaves, dout.to(dtype)))])
    for name, ours, standard, exact, unit in zip(("out", "dq", "dk", "dv"), *results, (1, size, size, 1), strict=True):
        # dS is off by the rounding of dP − delta, and multiplies keys and queries of this size.
        allowed = 2 * (standard - exact).abs().max() + 1e-5 * unit * exact.numel() ** 0.5
        assert (ours - exact).abs().max() <= allowed, name


# Gradients that are asked for


@pytest.mark.parametrize(
    ("asked", "kernels"), [("q", {"dq"}), ("kv", {"dkdv"}), ("v", {"dkdv"}), ("qk", {"dq", "dkdv"}), ("s", {"dq"})]
)
def test_only_the_gradients_that_are_asked_for_are_computed(monkeypatch, asked, kernels):
    called = set()
    for name in ("dq", "dkdv"):
        kernel = getattr(portable, name)
        monkeypatch.setattr(portable, name, lambda *a, f=kernel, n=name, **kw: called.add(n) or f(*a, **kw))
    inputs = dict(zip("qkvs", (*qkv(), torch.rand(4, device=DEVICE)), strict=True))
    leaves = {name: x.requires_grad_(name in asked) for name, x in inputs.items()}
    gradients = []
    for function in (partial(flash_attention, implementation="triton"), reference):
        out = function(leaves["q"], leaves["k"], leaves["v"], alibi_slopes=leaves["s"])
        gradients.append(torch.autograd.grad(out.square().sum(), [leaves[name] for name in asked]))
    for ours, theirs in zip(*gradients, strict=True):
        close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert called == kernels


def test_one_side_alone_is_left_to_the_portable_kernels(monkeypatch):
    """Whose dQ, and whose dK and dV, are kernels of their own; the Hopper kernels compute all at once."""
    monkeypatch.setattr(op, "choose_implementation", lambda *_: "hopper")
    monkeypatch.setattr(op, "_gluon_failed", [])
    ran = []

    def call(name: str, part: str, inputs: Any, options: Any) -> Any:
        ran.append(name)
        return getattr(portable, part)(*inputs, **options)

    monkeypatch.setattr(op, "_call", call)
    inputs = qkv()
    for trained in ((0, 1, 2), (0,), (1, 2), (0, 2)):
        q, k, v = (x.detach().requires_grad_(i in trained) for i, x in enumerate(inputs))
        flash_attention(q, k, v).sum().backward()
    assert ran == ["hopper", "hopper", "hopper", "triton", "hopper", "triton", "hopper", "hopper"]


# What is refused


Q = torch.zeros(2, 8, 4, 16)
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "window": ({"window": 4.0}, ValueError, r"window=4\.0: use an int"),
    "causal": ({"causal": None}, ValueError, "causal=None: use True or False"),
    "scale": (
        {"scale": torch.ones(1, requires_grad=True)},
        ValueError,
        r"scale is a tensor: .* q \* scale, scale=1",
    ),
    "softcap": ({"softcap": torch.ones(1)}, ValueError, "softcap is a tensor: pass a number"),
    "no soft cap": ({"softcap": None}, ValueError, "softcap=None: use a cap above 0, or 0 for none"),
    "scale in words": ({"scale": "a"}, ValueError, "scale='a': use a number above 0"),
    "starts as a list": ({"starts": [0] * 8}, TypeError, "starts is of type list; pass a tensor"),
    "scale 0": ({"scale": 0.0}, ValueError, r"scale=0\.0: .*pass -q to flip the scores' sign, 0 \* q for equal ones"),
    "ends": ({"ends": torch.zeros(2, 8).int()}, ValueError, "ends with causal=True: pass causal=False"),
    "ends' shape": ({"ends": torch.zeros(8).int(), "causal": False}, ValueError, r"ends \(8,\) must be \(2, 8\)"),
    "slopes": (
        {"alibi_slopes": torch.zeros(2)},
        ValueError,
        r"alibi_slopes \(2,\) must be \(4,\): one slope",
    ),
    "dropout": ({"dropout_p": 0.1}, TypeError, "dropout_p: flash_attention has no dropout of weights; drop out what"),
    "mask": ({"attn_mask": None}, TypeError, "attn_mask: .*describe it by causal, window, starts and ends, or use"),
    "bias": ({"attn_bias": None}, TypeError, "attn_bias: .*use alibi_slopes, or PyTorch's flex_attention"),
    "is_causal": ({"is_causal": True}, TypeError, "is_causal: .* pass causal"),
    "sliding_window": ({"sliding_window": 4}, TypeError, "sliding_window: .* pass window"),
    "unknown": ({"colour": "red"}, TypeError, "flash_attention has no argument 'colour'"),
}


@pytest.mark.parametrize(("options", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_computed_is_refused_with_what_to_use(options, error, message):
    with pytest.raises(error, match=message):
        flash_attention(Q, Q, Q, **options)


def test_what_the_hopper_kernels_lack_is_said():
    q, v, ends, slopes = Q.to("meta"), torch.zeros(2, 8, 4, 32, device="meta"), torch.zeros(2, 8), torch.zeros(4)
    for inputs, word in {
        (q, q, q, None, slopes, True): "alibi_slopes",
        (q, q, q, ends, None, False): "ends",
        (q, q, v, None, None, True): "one head_dim",
        (q, q[:, :3], q[:, :3], None, None, False): "more queries than keys",
        (torch.zeros(2**18, 4, 16, 16, device="meta"), *[q] * 2, None, None, True): "fewer than 2²⁹ rows",
    }.items():
        assert word in op.hopper_lacks(*inputs)
    assert op.hopper_lacks(q, q, q, ends, None, True) is None, "starts hide padding tokens from causal attention"
    wide, v = (torch.zeros(2, 8, 4, columns, device="meta") for columns in (192, 128))
    assert op.hopper_lacks(wide, wide, v, None, None, True) is None, "latent attention's"
    assert "192 and 128" in str(op.hopper_lacks(v, v, wide, None, None, True))


def test_float64_under_autocast_is_refused_and_not_cast():
    """PyTorch's own attention leaves it alone, too, and computes in it."""
    q = torch.zeros(1, 8, 2, 16, device=DEVICE, dtype=torch.float64)
    with (
        torch.autocast(DEVICE, torch.bfloat16),
        pytest.raises(ValueError, match=r"not torch\.float64; cast q, k and v"),
    ):
        flash_attention(q, q, q)
