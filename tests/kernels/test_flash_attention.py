"""Flash attention equals its definition, and refuses what it cannot compute. Runs in Triton's interpreter; on a machine
with a GPU test_flash_gpu.py takes the place of the numerical tests (TRITON_INTERPRET=1 brings these back)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations, product
from typing import Any

import pytest
import torch
from flash_cases import COPYING, DOCUMENTS, LAYOUTS, Case, check, check_rows, copying, make, run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import attention as reference
from kernels import flash_attention, flash_attention_backward
from kernels.flash_attention import op

RUNS_HERE = op.why_not_on(torch.device("cpu")) is None
interpreted = pytest.mark.skipif(not RUNS_HERE, reason="Triton compiles for the GPU here; TRITON_INTERPRET=1 runs this")
implementations = pytest.mark.parametrize("implementation", ["triton"])
# Both are meant: log2(0) of a query that has seen nothing, and exp2 of what the mask then removes.
pytestmark = [
    pytest.mark.filterwarnings("ignore:divide by zero encountered in log2:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning"),
]


@pytest.fixture(autouse=True, scope="module")
def _memory_is_poisoned() -> Iterator[None]:
    """Every allocation begins as NaN, so an element that a kernel forgets to write, or wrongly reads, shows."""

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_nan(*args: Any, **kwargs: Any) -> Tensor:
            x = allocate(*args, **kwargs)
            return x.fill_(math.nan) if x.is_floating_point() else x

        return allocate_nan

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty"),
        ):  # fmt: skip
            patch.setattr(owner, name, poisoned(getattr(owner, name)))
        yield


LENGTHS = (1, 3, 63, 64, 65, 127, 129, 200, 256, 333)
MASKS: dict[str, dict[str, Any]] = {
    "causal": {},
    "full": {"causal": False},
    "window-1": {"window": 1},
    "window": {"window": 50},
    "window-full": {"window": 64, "causal": False},
    "short-documents": {"documents": "short"},
    "long-documents": {"documents": "long"},
    "documents-of-64": {"documents": "of-64"},
    "gaps": {"documents": "gaps"},
    "window-documents": {"window": 70, "documents": "long"},
    "documents-full": {"documents": "long", "causal": False},
}


# Every length meets every mask. The other choices go round, length a and mask b taking the one with the number
# i·a + j·b + a // k: factors found by search, so that every two choices meet in some case.
CHOICES: dict[str, tuple[tuple[Any, ...], int, int, int]] = {
    "D": ((16, 40, 64, 80, 96, 128, 192, 256), 1, 1, 99),
    "heads": (((1, 1), (2, 2), (4, 2), (3, 1), (2, 1)), 1, 2, 99),
    "extra_keys": ((0, 1, 70), 1, 2, 99),
    "softcap": ((0.0, 0.0, 3.0), 0, 1, 3),
    "scale": ((None, None, 0.3), 0, 2, 2),
    "sinks": ((False, True), 0, 1, 2),
    "dtype": ((torch.float32, torch.float32, torch.float16, torch.bfloat16), 1, 1, 2),
    "layout": (LAYOUTS, 0, 1, 3),
}


def grid() -> list[Case]:
    cases = []
    for a, S in enumerate(LENGTHS):
        for b, mask in enumerate(MASKS.values()):
            chosen = {
                name: levels[(i * a + j * b + a // k) % len(levels)] for name, (levels, i, j, k) in CHOICES.items()
            }
            if S <= 3:
                chosen["dtype"] = torch.float32  # in low precision a norm over a handful of numbers is luck
            if mask.get("window") == 1 and chosen["dtype"] != torch.float32:
                # Where one key outweighs the sink dp − delta nearly vanishes, and what rounding `out` does to delta is
                # left: not an error of standard attention, and in every flash attention (see flash_cases._sinks_slack).
                chosen["sinks"] = False
            # The interpreter takes 3 ms for each pair of tiles: long rows come alone.
            cases.append(Case(S, B=1 if S > 128 else 2, **chosen, **mask))
    return cases


def test_every_two_choices_meet_in_the_grid():
    masks = ("causal", "window", "documents")
    cases = [{"mask": tuple(getattr(case, x) for x in masks)} | vars(case) for case in grid()]
    for one, other in combinations(("S", "mask", *CHOICES), 2):
        pairs = product(*({case[name] for case in cases} for name in (one, other)))
        missing = set(pairs) - {(case[one], case[other]) for case in cases}
        if (one, other) == ("S", "dtype"):
            missing = {(S, dtype) for S, dtype in missing if S > 3}
        assert not missing, (one, other)


def features(case: Case) -> set[tuple[str, Any]]:
    mask = (case.causal, case.window, case.documents)
    return {("mask", mask), ("S", case.S)} | {(name, getattr(case, name)) for name in CHOICES}


def few(cases: list[Case]) -> list[Case]:
    """Of the cases, the smallest that have every mask and every choice in rows of more than one token or two."""
    kept, met = list[Case](), set[tuple[str, Any]]()
    for case in sorted(cases, key=lambda case: (case.S < 63, case.B * case.heads[0] * case.S * case.D)):
        if not features(case) <= met:
            kept.append(case)
            met |= features(case)
    return kept


FEW = few(grid())


def test_the_few_cases_have_every_choice():
    assert set().union(*map(features, FEW)) == set().union(*map(features, grid()))


@interpreted
@implementations
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in FEW else pytest.mark.slow) for case in grid()], ids=str
)
def test_error_is_within_twice_that_of_standard_attention(case, implementation):
    check(flash_attention, make(case), implementation=implementation)


@interpreted
@implementations
@pytest.mark.parametrize(
    "mask", [pytest.param(mask, marks=[] if mask in ("causal", "sinks") else pytest.mark.slow) for mask in COPYING]
)
def test_a_head_that_copies_gives_the_value_itself(mask, implementation):
    """One key has nearly all of a row's weight: out is its value, and dP − delta vanishes. Judged row by row."""
    case = replace(COPYING[mask], S=150, dtype=torch.float16)
    for margin, first in ((5, 70), (20, 0), (60, 70)):
        check_rows(flash_attention, copying(case, margin, first), implementation=implementation)


cases = st.builds(
    Case,
    S=st.integers(1, 100),
    B=st.integers(1, 2),
    D=st.sampled_from([16, 24, 64]),
    heads=st.sampled_from([(1, 1), (2, 1), (2, 2)]),
    extra_keys=st.integers(0, 100),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 200),
    documents=st.sampled_from([None, *DOCUMENTS]),
    softcap=st.sampled_from([0.0, 3.0]),
    sinks=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
)


@pytest.mark.slow
@interpreted
@implementations
@settings(max_examples=25, deadline=None)
@given(case=cases)
def test_any_combination_equals_the_definition(implementation, case):
    check(flash_attention, make(case), implementation=implementation)


@interpreted
@implementations
@pytest.mark.parametrize("used", ["out", "lse"])
def test_gradient_through_one_output_alone(used, implementation):
    """Training uses out alone; what the loss does not use contributes nothing."""
    check(flash_attention, make(Case(100, sinks=True)), through=(used,), implementation=implementation)


@interpreted
@implementations
@pytest.mark.parametrize("sinks", [False, True])
def test_a_query_that_sees_nothing_gives_zero_and_no_gradient(sinks, implementation):
    """One row of the batch sees nothing at all, the other but for its last query."""
    inputs = make(Case(70, documents="long", sinks=sinks))
    inputs.options["starts"][0] = 70
    inputs.options["starts"][1] = 69
    results = run(flash_attention, inputs, implementation=implementation)
    assert (results["out"][0] == 0).all()
    assert (results["out"][1, :69] == 0).all()
    expected_lse = inputs.tensors[3][:, None].expand(2, 69) if sinks else torch.full((2, 69), -math.inf)
    torch.testing.assert_close(results["lse"][1, :, :69], expected_lse)
    assert (results["dq"][0] == 0).all()
    assert (results["dq"][1, :69] == 0).all()
    for name in ("dk", "dv"):
        assert (results[name][0] == 0).all()
        assert (results[name][1, :69] == 0).all()
    check(flash_attention, inputs, implementation=implementation)


@interpreted
@implementations
def test_a_sink_of_minus_infinity_is_none(implementation):
    """For a query that sees nothing, too: the first head's."""
    inputs = make(Case(70, documents="gaps", sinks=True))
    inputs.tensors[3][0] = -math.inf
    results = run(flash_attention, inputs, implementation=implementation)
    expected = run(
        flash_attention, replace(inputs, tensors=inputs.tensors[:3], by_head=()), implementation=implementation
    )
    assert results["lse"][:, 0].isinf().any()
    for name in ("out", "dq"):
        assert torch.equal(results[name][:, :, 0], expected[name][:, :, 0]), name
    assert torch.equal(results["lse"][:, 0], expected["lse"][:, 0])
    assert results["dsinks"][0] == 0
    assert results["dsinks"][1] != 0
    assert not results["dk"].isnan().any()


@interpreted
@implementations
@pytest.mark.parametrize("factor", [3e3, 1e-30])
def test_scores_of_any_size_neither_overflow_nor_vanish(factor, implementation):
    inputs = make(Case(90, documents="long"))
    inputs.tensors[0].mul_(factor)
    results = run(flash_attention, inputs, implementation=implementation)
    truth = run(reference, inputs.double())
    for name in ("out", "lse", "dv"):
        torch.testing.assert_close(results[name].double(), truth[name], rtol=1e-3, atol=1e-3 * truth[name].abs().max())


@interpreted
@implementations
def test_deterministic_gradients_are_bitwise_the_same(implementation):
    inputs = make(Case(150, B=1, documents="long", sinks=True))
    runs = [run(flash_attention, inputs, deterministic=True, implementation=implementation) for _ in range(2)]
    for name, x in runs[0].items():
        assert torch.equal(x, runs[1][name]), name


@interpreted
@pytest.mark.parametrize("options", [{}, {"window": 9, "softcap": 2.0, "scale": 0.3}, {"window": 10**6}])
def test_backward_by_itself_is_autograds_bit_for_bit(options):
    q, k, v, dout = (torch.randn(1, S, heads, 16) for S, heads in ((20, 4), (33, 2), (33, 2), (20, 4)))
    starts = torch.arange(20, dtype=torch.int32)[None] // 7 * 7
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = flash_attention(*leaves, starts=starts, return_lse=True, **options)
    expected = torch.autograd.grad(out, leaves, dout)
    got = flash_attention_backward(dout, q, k, v, out.detach(), lse, starts=starts, **options)
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs)


@interpreted
def test_backward_by_itself_takes_views_of_heads():
    """Of every tensor, lse, too."""
    q, k, v, dout = (torch.randn(2, 20, 4, 16) for _ in range(4))
    out, lse = flash_attention(q, k, v, return_lse=True)
    whole = flash_attention_backward(dout, q, k, v, out, lse)
    views = flash_attention_backward(*(x[:, :, 1:3] for x in (dout, q, k, v, out)), lse[:, 1:3])
    for ours, theirs in zip(views, whole, strict=True):
        assert torch.equal(ours, theirs[:, :, 1:3])


def test_backward_by_itself_checks_what_would_be_taken_for_something_else():
    q = torch.zeros(1, 4, 1, 16)
    lse = torch.zeros(1, 1, 4)
    for options, message in (({"causal": None}, "causal=None"), ({"window": 4.0}, r"window=4\.0: use an int")):
        with pytest.raises(ValueError, match=message):
            flash_attention_backward(q, q, q, q, q, lse, **options)
    with pytest.raises(ValueError, match=r"q is torch\.float32, out torch\.float16; pass q, k and v as"):
        flash_attention_backward(q.half(), q, q, q, q.half(), lse)


def test_a_gradient_that_is_not_of_out_is_refused():
    q, k, v = (torch.zeros(1, 4, 1, 16) for _ in range(3))
    lse = torch.zeros(1, 1, 4)
    for dout in (torch.zeros(1, 3, 1, 16), q.half()):
        with pytest.raises(ValueError, match=r"is the gradient of out, \(1, 4, 1, 16\) in torch.float32; pass one of"):
            flash_attention_backward(dout, q, k, v, q, lse)


@interpreted
@implementations
def test_a_window_of_any_size_is_no_window_once_it_hides_nothing(implementation):
    inputs = make(Case(70, B=1, extra_keys=5))
    expected = run(flash_attention, inputs, implementation=implementation)
    for window in (75, 2**31 - 1, 2**62):
        inputs.options["window"] = window
        for name, x in run(flash_attention, inputs, implementation=implementation).items():
            assert torch.equal(x, expected[name]), name


@interpreted
def test_out_is_contiguous_in_the_inputs_dtype_and_lse_float32():
    q = torch.randn(1, 2, 20, 16, dtype=torch.float16).transpose(1, 2)
    out, lse = flash_attention(q, q, q, return_lse=True)
    assert isinstance(flash_attention(q, q, q), Tensor)
    assert out.dtype == torch.float16
    assert out.is_contiguous()
    assert lse.dtype == torch.float32
    assert lse.shape == (1, 2, 20)


@interpreted
def test_strided_sinks_and_expanded_starts_are_read_as_they_are():
    inputs = make(Case(40, documents="of-64", sinks=True))
    expected = run(flash_attention, inputs)
    inputs.tensors[3] = torch.stack([inputs.tensors[3], torch.full((2,), 9.0)], dim=1)[:, 0]
    inputs.options["starts"] = inputs.options["starts"][:1].contiguous().expand(2, -1)
    for name, x in run(flash_attention, inputs).items():
        assert torch.equal(x, expected[name]), name


@interpreted
def test_autocast_casts_as_for_pytorchs_own_attention():
    q, k, v = (torch.randn(1, 33, 2, 16, requires_grad=True) for _ in range(3))
    low = [x.detach().bfloat16() for x in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16):
        out = flash_attention(q, k.bfloat16(), v)
        theirs = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        )
    assert out.dtype == theirs.dtype == torch.bfloat16
    assert torch.equal(out, flash_attention(*low))
    out.sum().backward()
    assert q.grad.dtype == torch.float32


def rows(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


Q = rows(2, 8, 4, 16)
REFUSED: dict[str, tuple[list[Tensor], dict[str, Any], str]] = {
    "three dimensions": ([rows(8, 4, 16)] * 3, {}, r"q \(8, 4, 16\), .* must be \(batch, sequence, heads, head_dim\)"),
    "k unlike v": ([Q, Q, rows(2, 8, 2, 16)], {}, r"v \(2, 8, 2, 16\) do not fit.*\.transpose\(1, 2\)"),
    "batches": ([Q, *[rows(1, 8, 4, 16)] * 2], {}, "do not fit"),
    "head dims": ([Q, *[rows(2, 8, 4, 32)] * 2], {}, "do not fit"),
    "no heads": ([rows(2, 8, 0, 16)] * 3, {}, "0 query heads are not a multiple of 0"),
    "grouped heads": ([Q, *[rows(2, 8, 3, 16)] * 2], {}, "4 query heads are not a multiple of 3 key/value heads"),
    "too few keys": (
        [Q, *[rows(2, 7, 4, 16)] * 2],
        {},
        "8 queries but 7 keys: .*pass a key for every query, or causal=False",
    ),
    "dtypes": ([Q, Q.half(), Q.half()], {}, r"q is torch\.float32, k torch\.float16 .*; cast them to one dtype"),
    "devices": ([Q, Q.to("meta"), Q.to("meta")], {}, "q is on cpu, k on meta .*; move them to one device"),
    "float64": ([Q.double()] * 3, {}, r"float16, bfloat16 and float32, not torch\.float64; cast"),
    "head_dim 20": (
        [rows(1, 8, 1, 20)] * 3,
        {},
        "multiple of 8 from 16 to 576, not 20; pad .* zeros .* pass scale=1/√",
    ),
    "head_dim 8": ([rows(1, 8, 1, 8)] * 3, {}, "not 8; pad q, k and v with zeros"),
    "head_dim 584": ([rows(1, 8, 1, 584)] * 3, {}, r"at most 576, not 584; use kernels\.attention"),
    "strides": ([Q, Q, rows(2, 8, 16, 4).transpose(2, 3)], {}, r"v's last dimension .*; pass v\.contiguous\(\)"),
    "window": ([Q] * 3, {"window": 0}, "window=0: .*use 1 or more, or None"),
    "window of flash-attn": ([Q] * 3, {"window": (128, 0)}, r"window=\(128, 0\): use an int"),
    "window that is a switch": ([Q] * 3, {"window": True}, "window=True: use an int"),
    "causal": ([Q] * 3, {"causal": "yes"}, "causal='yes': use True or False"),
    "softcap": ([Q] * 3, {"softcap": -1.0}, "softcap=-1.0: use a cap above 0, or 0 for none"),
    "infinite softcap": ([Q] * 3, {"softcap": math.inf}, "softcap=inf"),
    "scale 0": ([Q] * 3, {"scale": 0.0}, "scale=0.0: use a number above 0"),
    "scale below 0": ([Q] * 3, {"scale": -0.1}, "scale=-0.1: .*pass -q"),
    "starts' shape": (
        [Q] * 3,
        {"starts": rows(1, 8).int()},
        r"starts \(1, 8\) must be \(2, 8\), .*pass starts\.expand\(2, 8\)",
    ),
    "starts' dtype": ([Q] * 3, {"starts": rows(2, 8).long()}, r"starts is torch\.int64; pass starts\.int\(\)"),
    "starts' device": ([Q] * 3, {"starts": rows(2, 8, device="meta").int()}, r"starts is on meta.*\.to\(q\.device\)"),
    "sinks' shape": ([Q] * 3, {"sinks": rows(2)}, r"sinks \(2,\) must be \(4,\): one logit per query head"),
    "sinks' dtype": ([Q] * 3, {"sinks": rows(4).int()}, r"sinks is torch\.int32; pass float32"),
    "sinks' device": ([Q] * 3, {"sinks": rows(4, device="meta")}, r"sinks is on meta.*\.to\(q\.device\)"),
    "implementation": (
        [Q] * 3,
        {"implementation": "cuda"},
        "implementation='cuda' is unknown; use auto, triton, hopper",
    ),
}


@pytest.mark.parametrize(("qkv", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_refuses_what_does_not_fit_and_says_what_to_do(qkv, options, message):
    with pytest.raises(ValueError, match=message):
        flash_attention(*qkv, **options)


@interpreted
def test_the_hopper_kernels_are_refused_where_there_is_no_such_gpu():
    with pytest.raises(ValueError, match=r"'hopper': .* need an NVIDIA GPU of compute capability 9\.0; use implem"):
        flash_attention(Q, Q, Q, implementation="hopper")
