"""Flash attention as it really runs: compiled for this GPU, at real sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flash_cases import COPYING, Case, check, check_rows, copying, make, rounding, run
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

pytest.importorskip("triton")

from kernels import flash_attention, flash_attention_varlen, starts_from_separators
from kernels.flash_attention import portable
from kernels.flash_attention.op import why_not_hopper
from kernels.flash_attention.testing import assert_rows_within_twice, assert_within_twice
from kernels.reference import attend
from kernels.reference import attention as reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(portable.INTERPRETED, reason="TRITON_INTERPRET=1: nothing is compiled"),
]
implementations = pytest.mark.parametrize("implementation", ["triton", "hopper"])
# 11 to 45 GiB each: with --dist loadgroup they run one after the other.
large = pytest.mark.xdist_group("large")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# Few heads, dtypes and flags: each combination is compiled anew, seconds each.
PLAIN = Case(2048, D=128, heads=(8, 2), dtype=BF16)
CASES = [
    PLAIN,
    Case(2047, D=64, heads=(8, 8), dtype=BF16, layout="fused"),
    Case(2047, D=64, heads=(4, 1), documents="long", dtype=BF16, layout="fused"),
    Case(1000, D=128, heads=(4, 4), causal=False, dtype=FP16, layout="heads-first"),
    Case(1024, D=64, heads=(4, 2), window=200, dtype=FP16, layout="misaligned"),
    Case(333, D=128, heads=(4, 2), extra_keys=1715, window=512, documents="long", dtype=BF16),
    Case(777, D=96, heads=(6, 2), softcap=30.0, sinks=True, dtype=BF16),
    Case(1500, D=256, heads=(4, 2), dtype=BF16),
    Case(1200, D=192, heads=(2, 2), documents="long", dtype=FP16),
    Case(600, D=80, heads=(3, 1), causal=False, window=100, dtype=BF16),
    Case(500, D=40, heads=(2, 1), documents="gaps", sinks=True, dtype=FP16),
    Case(1024, D=64, heads=(4, 2), documents="of-64", dtype=FP32),
    Case(700, D=128, heads=(4, 2), window=300, documents="long", softcap=3.0, sinks=True, dtype=FP32),
    Case(300, D=256, heads=(2, 1), causal=False, documents="long", dtype=FP32, layout="misaligned"),
    # Hopper's tiles: 128 or 192 queries and 128 keys; one, two and three of them, and a few more.
    *(Case(S, D=128, heads=(2, 2), dtype=BF16) for S in (1, 63, 127, 128, 129, 192, 193, 333)),
    *(Case(S, D=64, heads=(8, 1), dtype=BF16) for S in (64, 65, 191, 257)),
    Case(2500, D=64, heads=(4, 2), window=50, sinks=True, dtype=BF16),
    Case(2500, D=64, heads=(4, 4), causal=False, dtype=BF16),
    Case(190, D=128, heads=(4, 1), extra_keys=1000, causal=False, dtype=BF16),
    Case(900, D=64, heads=(4, 2), softcap=3.0, documents="of-64", dtype=FP16),
    Case(2500, D=64, heads=(4, 2), softcap=20.0, dtype=BF16),  # rows above 2,048 with a cap have tiles of their own
    # Hopper's backward for more than 128 columns: tiles of 64 keys.
    *(Case(S, D=256, heads=(2, 1), dtype=BF16) for S in (1, 64, 65, 129)),
    Case(900, D=256, heads=(4, 2), window=300, documents="long", softcap=30.0, dtype=BF16),
    Case(500, D=192, heads=(4, 1), extra_keys=300, window=200, documents="gaps", sinks=True, dtype=FP16),
    Case(1000, D=136, heads=(2, 2), causal=False, softcap=3.0, dtype=BF16, layout="fused"),
    # More rows · heads than the second and third axes of a grid can count, 65,535.
    Case(16, D=16, B=2200, heads=(32, 32), dtype=BF16),
]


@pytest.fixture(autouse=True)
def _skip_where_not_supported(request: pytest.FixtureRequest) -> None:
    arguments = getattr(request.node, "callspec", None)
    if arguments is None or arguments.params.get("implementation") != "hopper":
        return
    case = arguments.params.get("case", PLAIN)
    reason = why_not_hopper(torch.device("cuda"), case.dtype)
    if reason is not None:
        pytest.skip(reason)


@implementations
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_is_within_twice_that_of_standard_attention(case, implementation):
    check(flash_attention, make(case, "cuda"), implementation=implementation)


@pytest.mark.parametrize("implementation", ["hopper"])
@pytest.mark.parametrize(
    "case",
    [
        *(Case(S, D=192, D_v=128, heads=(2, 1), dtype=BF16) for S in (1, 64, 129, 1500)),
        Case(1000, D=192, D_v=128, heads=(2, 2), causal=False, dtype=FP16),
        Case(1200, D=192, D_v=128, heads=(4, 2), documents="long", sinks=True, dtype=BF16),
        Case(500, D=192, D_v=128, heads=(4, 1), extra_keys=300, window=200, softcap=30.0, dtype=BF16),
        Case(1000, D=192, D_v=128, B=9, heads=(32, 32), dtype=BF16),
    ],
    ids=str,
)
def test_hopper_computes_values_narrower_than_keys(case, implementation):
    """As latent attention has them."""
    check(flash_attention, make(case, "cuda"), implementation=implementation)


SCORES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "a late key": lambda q, k: k[:, -200].mul_(60),
    "a few queries": lambda q, k: q[:, ::97].mul_(500),
    "all": lambda q, k: (q.mul_(20), k.mul_(15)),
    "rising": lambda q, k: k.mul_(torch.linspace(0, 80, k.shape[1], device=k.device)[:, None, None]),
}


@implementations
@pytest.mark.parametrize(
    "case",
    [
        Case(2500, D=64, heads=(4, 2), dtype=BF16),
        Case(2300, D=128, heads=(4, 4), causal=False, sinks=True, dtype=BF16),
        Case(2300, D=128, heads=(4, 1), documents="long", dtype=FP16),
        Case(1500, D=256, heads=(2, 1), window=700, dtype=BF16),
    ],
    ids=str,
)
@pytest.mark.parametrize("scores", SCORES)
def test_scores_far_above_those_before_them(scores, case, implementation):
    """Where the maximum of a row's first keys is no use: exponentials against it are infinite."""
    inputs = make(case, "cuda")
    SCORES[scores](*inputs.tensors[:2])
    ours, truth = check(flash_attention, inputs, implementation=implementation)
    assert (ours["out"] - truth["out"]).norm() < 0.01 * truth["out"].norm()
    torch.testing.assert_close(ours["lse"].double(), truth["lse"], rtol=1e-4, atol=1e-3)


@large
@implementations
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("D", [64, 96, 128, 256])
@pytest.mark.parametrize("mask", COPYING)
def test_a_head_that_copies_gives_the_value_itself(mask, D, dtype, implementation):
    """One key has nearly all of a row's weight: out is its value, and dP − delta vanishes. Judged row by row."""
    case = replace(COPYING[mask], D=D, dtype=dtype)
    for margin, first in ((5, 128), (10, 300), (20, 0), (20, 128), (20, 256), (40, 384), (60, 200)):
        check_rows(flash_attention, copying(case, margin, first, "cuda"), implementation=implementation)


@implementations
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("D", [64, 96, 128])
def test_a_head_that_copies_is_as_exact_as_with_pytorchs_flash_kernel(D, causal, implementation):
    case = replace(COPYING["full"], D=D, causal=causal, dtype=BF16, heads=(2, 2))
    for margin in (5, 10, 20, 40, 60):
        inputs = copying(case, margin, 128, "cuda")
        truth, theirs = run(reference, inputs.double(), ("out",)), run(sdpa_flash(causal), inputs, ("out",))
        del truth["lse"]  # it returns none
        ours = run(flash_attention, inputs, ("out",), implementation=implementation)
        assert_within_twice(ours, theirs, truth)
        assert_rows_within_twice(ours, theirs, truth, rounding(inputs, ("out",)))


@implementations
@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("size", [1e20, 1e30, 1e35])
def test_an_output_is_finite_where_the_true_one_is(size, D, implementation):
    """Sums of values that are weighed with more than 1 overflow where those of a softmax do not."""
    inputs = make(Case(1024, D=D, heads=(4, 2), dtype=BF16), "cuda")
    q, k, v = inputs.tensors
    v.mul_(size / v.abs().max())
    k[:, 700] *= 8  # 40 nats above the others, in some rows
    k[:, 900:].mul_(torch.linspace(1, 4, 124, device="cuda")[:, None, None])
    truth, _ = reference(*(x.double() for x in (q, k, v)), return_lse=True)
    out = flash_attention(q, k, v, implementation=implementation)
    assert out.isfinite().all()
    assert (out.double() - truth).norm() < 0.01 * truth.norm()


def test_hopper_repeats_any_number_of_items():
    """Each program has eight items, of which all but the shortest, every third, or none must be computed again."""
    if (reason := why_not_hopper(torch.device("cuda"), BF16)) is not None:
        pytest.skip(reason)
    inputs = make(Case(4096, D=128, heads=(16, 16), B=2, dtype=BF16), "cuda")
    for heads in (slice(None), slice(None, None, 3), slice(0)):
        q, k, v = (x.clone() for x in inputs.tensors)
        SCORES["rising"](q[:, :, heads], k[:, :, heads])
        for causal in (True, False):
            got, expected = (
                flash_attention(q, k, v, causal=causal, implementation=implementation, return_lse=True)
                for implementation in ("hopper", "triton")
            )
            assert (got[0] - expected[0]).norm() < 0.01 * expected[0].norm()
            torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-3)


@implementations
@pytest.mark.parametrize("causal", [True, False])
def test_rows_of_one_tile_again_and_again(causal, implementation):
    """With so little work in a tile one warp gets ahead of another, which may then wait for a barrier for ever."""
    q, k, v = (x.requires_grad_() for x in make(Case(16, D=16, heads=(32, 32), B=1000, dtype=BF16), "cuda").tensors)
    dout = torch.randn_like(q)
    results = []
    for _ in range(30):
        out = flash_attention(q, k, v, causal=causal, implementation=implementation)
        results.append((out, *torch.autograd.grad(out, (q, k, v), dout)))
    for result in results:
        for x, first in zip(result, results[0], strict=True):
            torch.testing.assert_close(x, first, rtol=0.02, atol=0.01)


@implementations
@pytest.mark.parametrize("D", [64, 128, 256])
def test_nan_goes_where_it_belongs(D, implementation):
    q, k, v = make(Case(1000, D=D, heads=(4, 4), dtype=BF16), "cuda").tensors
    q[0, 500, 1] = torch.nan
    k[1, 900, 2] = torch.nan
    out, lse = flash_attention(q, k, v, implementation=implementation, return_lse=True)
    expected = torch.zeros(2, 1000, 4, dtype=torch.bool, device="cuda")
    expected[0, 500, 1] = True
    expected[1, 900:, 2] = True
    assert torch.equal(out.isnan().any(-1), expected)
    assert torch.equal(out.isnan().all(-1), expected)
    assert torch.equal(lse.isnan(), expected.transpose(1, 2))


@implementations
def test_one_query_of_many_keys(implementation):
    """Decoding."""
    check(flash_attention, make(replace(PLAIN, S=1, extra_keys=4095), "cuda"), implementation=implementation)


@implementations
@pytest.mark.parametrize(
    "case", [Case(131_072, B=1, dtype=BF16), Case(100_003, B=1, documents="long", dtype=BF16)], ids=str
)
def test_long_rows_are_right_wherever_one_looks(case, implementation):
    """A loss on a few queries: their outputs, and every gradient, follow from these rows of S × S alone."""
    inputs = make(case, "cuda")
    rows = torch.cat([torch.arange(4), torch.randint(case.S, (56,)), torch.arange(case.S - 4, case.S)]).unique().cuda()
    inputs.grads["out"] = inputs.grads["out"][:, rows]
    inputs.grads["lse"] = inputs.grads["lse"][:, :, rows]
    starts = inputs.options.pop("starts")
    keys = torch.arange(case.S, device="cuda")
    visible = (keys <= rows[:, None])[None]
    if starts is not None:
        visible = visible & (keys >= starts[:, rows, None])

    def ours(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        out, lse = flash_attention(q, k, v, starts=starts, implementation=implementation, **options)
        return out[:, rows], lse[:, :, rows]

    def standard(q: Tensor, k: Tensor, v: Tensor, return_lse: bool, **_: Any) -> Any:
        return attend(q[:, rows], k, v, visible, return_lse=return_lse)

    assert_within_twice(run(ours, inputs), run(standard, inputs), run(standard, inputs.double()))


@large
@implementations
@pytest.mark.parametrize(
    ("shape", "window", "part"),
    [
        ((17, 8192, 128, 128), None, (slice(-1, None), slice(None))),
        ((1, 2**18 + 64, 64, 128), 512, (slice(None), slice(None), slice(-2, None))),
    ],
    ids=["many rows", "one long row"],
)
def test_offsets_beyond_32_bits(shape, window, part, implementation):
    """The last row, and the last heads of one row, give what they give alone. Views of one projection."""
    B, S, H, D = shape
    assert B * S * H * D > 2**31
    qkv = torch.empty(B, S, 3 * H, D, dtype=BF16, device="cuda").normal_()
    dout = torch.empty(shape, dtype=BF16, device="cuda").normal_()

    def outputs(part: Any) -> list[Tensor]:
        q, k, v = (x[part].detach().requires_grad_() for x in qkv.split(H, dim=2))
        out, lse = flash_attention(q, k, v, window=window, return_lse=True, implementation=implementation)
        return [out, lse.transpose(1, 2), *torch.autograd.grad(out, (q, k, v), dout[part])]

    for name, whole, alone in zip(("out", "lse", "dq", "dk", "dv"), outputs(...), outputs(part), strict=True):
        if (implementation, name) == ("hopper", "dq"):  # summed in any order
            torch.testing.assert_close(whole[part], alone, rtol=2e-2, atol=2e-2)
        else:
            assert torch.equal(whole[part], alone), name


@implementations
@pytest.mark.parametrize(
    "case",
    [
        replace(PLAIN, S=4000, documents="long"),
        replace(PLAIN, S=4096, D=128, heads=(8, 8)),
        replace(PLAIN, S=2000, D=128, causal=False),
        replace(PLAIN, S=3000, D=64, causal=False, window=200),
        replace(PLAIN, S=500, D=128, extra_keys=1500, window=300, documents="gaps", heads=(4, 1)),
        replace(PLAIN, S=2000, D=256),
        replace(PLAIN, S=1500, D=128, extra_keys=700, heads=(32, 8)),
        replace(PLAIN, S=8000, D=96, heads=(4, 4)),
    ],
    ids=str,
)
def test_ten_runs_are_right_and_bitwise_the_same(case, implementation):
    inputs = make(case, "cuda")
    check(flash_attention, inputs, deterministic=True, implementation=implementation)
    first, *others = (
        run(flash_attention, inputs, deterministic=True, implementation=implementation) for _ in range(10)
    )
    for other in others:
        for name, x in first.items():
            assert torch.equal(x, other[name]), name


@implementations
def test_streams_and_graphs_at_the_same_time_get_what_they_get_alone(implementation):
    """The Hopper kernels count in memory that outlives a launch which of its items are taken."""
    inputs = make(Case(2048, D=64, B=2, heads=(16, 16), dtype=BF16), "cuda")

    def step() -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs.tensors]  # gradients arrive on the stream that made them
        out = flash_attention(*leaves, implementation=implementation, deterministic=True)
        return [out, *torch.autograd.grad(out, leaves, inputs.grads["out"])]

    alone = step()
    streams = [torch.cuda.Stream() for _ in range(4)]
    graphs = []
    for stream in streams[:2]:
        graphs.append((torch.cuda.CUDAGraph(), []))
        with torch.cuda.graph(graphs[-1][0], stream=stream):
            graphs[-1][1].extend(step())
    torch.cuda.synchronize()
    results = []
    for _ in range(10):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results.append(step())
                if i > 1:  # not where it was captured
                    graphs[i - 2][0].replay()
    torch.cuda.synchronize()
    for tensors in (*results, *(tensors for _, tensors in graphs)):
        for x, expected in zip(tensors, alone, strict=True):
            assert torch.equal(x, expected)


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


def sdpa_flash(causal: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    """PyTorch's flash kernel, called as ours are."""

    def attention(*qkv: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        return sdpa(*(x.transpose(1, 2) for x in qkv), causal=causal).transpose(1, 2), torch.zeros(())

    return attention


def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    S = q.shape[2]
    causal = create_block_mask(lambda b, h, q_index, k_index: q_index >= k_index, None, None, S, S, device="cuda")
    return torch.compile(flex_attention)(q, k, v, block_mask=causal, enable_gqa=True)


@implementations
@pytest.mark.parametrize("theirs", [sdpa, flex])
def test_error_is_within_twice_that_of_pytorchs_kernels(theirs, implementation):
    inputs = make(PLAIN, "cuda")

    def standard(*qkv: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        out = theirs(*(x.transpose(1, 2) for x in qkv)).transpose(1, 2)
        return out, torch.zeros(())

    truth = run(reference, inputs.double(), ("out",))
    del truth["lse"]  # they do not return theirs
    ours = run(flash_attention, inputs, ("out",), implementation=implementation)
    assert_within_twice(ours, run(standard, inputs, ("out",)), truth)


def test_a_compiled_layer_runs_without_a_graph_break_and_is_compiled_once():
    """Through Inductor: a projection, documents from separators, attention, and their gradients."""
    torch.compiler.reset()
    H, D, S = 4, 64, 1024
    projection = torch.nn.Linear(H * D, 3 * H * D, dtype=BF16, device="cuda")

    def layer(x: Tensor, tokens: Tensor) -> Tensor:
        q, k, v = projection(x).unflatten(-1, (3 * H, D)).split(H, dim=2)
        return flash_attention(q, k, v, starts=starts_from_separators(tokens, 0)).flatten(2)

    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for _ in range(3):
        x = torch.randn(2, S, H * D, dtype=BF16, device="cuda", requires_grad=True)
        tokens = torch.randint(0, 100, (2, S), device="cuda")
        results = []
        for function in (compiled, layer):
            out = function(x, tokens)
            results.append([out, *torch.autograd.grad(out.square().sum(), (x, projection.weight))])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2 * theirs.abs().max().item())
    assert counter.frame_count == 1


def test_a_layer_that_is_compiled_to_graphs_gives_the_same_each_time():
    """What outlives a launch may not lie in the memory of the graphs that torch.compile replays."""
    torch.compiler.reset()
    projection = torch.nn.Linear(256, 3 * 256, dtype=BF16, device="cuda")

    def layer(x: Tensor) -> Tensor:
        q, k, v = projection(x).unflatten(-1, (12, 64)).split(4, dim=2)
        return flash_attention(q, k, v, deterministic=True).flatten(2)

    compiled = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
    x = torch.randn(2, 1024, 256, dtype=BF16, device="cuda")

    def step(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        torch.compiler.cudagraph_mark_step_begin()
        out = function(x)
        return [t.clone() for t in (out, *torch.autograd.grad(out.square().sum(), projection.weight))]

    expected = step(layer)
    for _ in range(6):
        for ours, theirs in zip(step(compiled), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2 * theirs.abs().max().item())


def test_nothing_waits_for_the_gpu():
    q = torch.randn(2000, 4, 64, dtype=BF16, device="cuda", requires_grad=True)
    cu_seqlens = torch.tensor([0, 700, 1990], dtype=torch.int32, device="cuda")
    tokens = torch.randint(0, 100, (1, 2000), device="cuda")

    def step() -> None:
        flash_attention_varlen(q, q, q, cu_seqlens).sum().backward()
        flash_attention(q[None], q[None], q[None], starts=starts_from_separators(tokens, 0)).sum().backward()

    step()  # compiles, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@implementations
def test_memory_beyond_the_inputs_is_the_outputs_and_a_number_per_query(implementation):
    q, k, v = (x.requires_grad_() for x in make(replace(PLAIN, S=32_768), "cuda").tensors)
    dout = torch.randn_like(q)
    row = q.shape[0] * q.shape[1] * q.shape[2] * 4  # float32 per query and head

    def peak(function: Callable[[], Any]) -> tuple[int, Any]:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function()
        return torch.cuda.max_memory_allocated() - before, result

    MiB = 2**20
    forward, out = peak(lambda: flash_attention(q, k, v, implementation=implementation))
    assert forward <= q.nbytes + row + MiB
    backward, _ = peak(lambda: torch.autograd.grad(out, (q, k, v), dout))
    # The Hopper kernels add up dQ in float32 and keep a second number per query.
    extra = 0 if implementation == "triton" else 2 * q.nbytes + row
    assert backward <= q.nbytes + k.nbytes + v.nbytes + row + extra + MiB
