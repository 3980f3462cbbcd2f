"""The Triton kernel of the loss equals its plain twin: on the GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from compile_process import compiled

from kernels import cross_entropy_kernel
from kernels.flash_attention.portable import INTERPRETED
from kernels.linear_cross_entropy import cross_entropy_, linear_cross_entropy, linear_cross_entropy_reference

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
# The interpreter is NumPy, which warns of what lanes past V compute.
ignored = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
on_this_device = pytest.mark.gpu if DEVICE == "cuda" else ignored
BLOCK = cross_entropy_kernel.BLOCK
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 3.0},
    "z-loss": {"z_loss": 0.05},
    "label smoothing": {"label_smoothing": 0.2},
    "everything": {"softcap": 3.0, "z_loss": 0.05, "label_smoothing": 0.2, "ignore_index": 0},
}
all_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
NOTHING = {"softcap": 0.0, "z_loss": 0.0, "label_smoothing": 0.0, "ignore_index": -100, "with_gradient": True}


def rows(V: int, dtype: torch.dtype = torch.float32, *, C: int = 4, stride: int | None = None) -> tuple[Tensor, Tensor]:
    """Logits whose rows lie `stride` apart, NaN between them, and targets: the last logit of all, one ignored."""
    buffer = torch.full((C, stride or V), float("nan"), dtype=dtype, device=DEVICE)
    logits = buffer[:, :V]
    logits.copy_(4 * torch.randn(C, V))
    targets = torch.randint(0, V, (C,), device=DEVICE)
    targets[0], targets[1] = V - 1, -100
    return logits, targets


def loss_and_gradient(function: Any, logits: Tensor, targets: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Of a copy with the same strides."""
    grad = logits.as_strided((len(logits), logits.stride(0)), (logits.stride(0), 1)).clone()[:, : logits.shape[1]]
    losses = torch.full((len(logits),), float("nan"), device=logits.device)
    function(grad, targets, losses, **NOTHING | options)
    return losses, grad


@on_this_device
@all_options
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(
    ("V", "stride"), [(1, 64), (29, 29), (29, 64), (BLOCK, BLOCK), (BLOCK + 1, BLOCK + 64), (2 * BLOCK - 3, None)]
)
def test_equals_the_plain_twin(V, stride, dtype, options):
    logits, targets = rows(V, dtype, stride=stride)
    if options.get("ignore_index") == 0:
        targets = targets.clamp(min=0)
    (ours, our_grad), (theirs, their_grad) = (
        loss_and_gradient(f, logits, targets, **options) for f in (cross_entropy_kernel.cross_entropy_, cross_entropy_)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(our_grad, their_grad, rtol=1e-3 if dtype == torch.float16 else 1e-5, atol=1e-6)
    assert (our_grad[1] == 0).all()
    assert ours[1] == 0


@on_this_device
def test_without_a_gradient_the_logits_stay():
    logits, targets = rows(29)
    losses, after = loss_and_gradient(cross_entropy_kernel.cross_entropy_, logits, targets, with_gradient=False)
    assert torch.equal(after, logits)
    assert torch.equal(losses, loss_and_gradient(cross_entropy_kernel.cross_entropy_, logits, targets)[0])


@on_this_device
def test_infinite_and_undefined_logits_count_in_their_own_row_alone():
    logits, targets = rows(BLOCK + 7, C=7)
    targets[:] = 5
    logits[0, 3] = float("nan")
    logits[1, 3] = float("inf")
    logits[2, :BLOCK] = -float("inf")  # the first tile of the row
    targets[2] = BLOCK + 1
    logits[3, 3] = -float("inf")
    logits[4] = float("nan")
    targets[4] = -100
    (ours, our_grad), (theirs, their_grad) = (
        loss_and_gradient(f, logits, targets) for f in (cross_entropy_kernel.cross_entropy_, cross_entropy_)
    )
    assert ours.isnan().tolist() == [True, True, False, False, False, False, False]
    assert our_grad.isnan().any(1).tolist() == ours.isnan().tolist()
    torch.testing.assert_close(ours[2:], theirs[2:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(our_grad[2:], their_grad[2:], rtol=1e-5, atol=1e-6)


@on_this_device
@pytest.mark.parametrize("target", [-1, 29, 10**6])
def test_a_target_that_is_no_token_has_an_undefined_loss(target):
    logits, targets = rows(29, stride=64)
    targets[2] = target
    losses, _ = loss_and_gradient(cross_entropy_kernel.cross_entropy_, logits, targets)
    assert losses.isnan().tolist() == [False, False, True, False]


@on_this_device
@all_options
def test_the_whole_loop_runs_through_the_kernel(options, monkeypatch):
    module = sys.modules["kernels.linear_cross_entropy"]
    monkeypatch.setattr(module, "_cross_entropy_on", lambda x: cross_entropy_kernel.cross_entropy_)
    x, w = (torch.randn(n, 8, device=DEVICE, requires_grad=True) for n in (37, 29))
    targets = torch.randint(0, 29, (74,), device=DEVICE)[::2]
    targets[3] = options.get("ignore_index", -100)
    expected = linear_cross_entropy_reference(x, w, targets, **options)
    loss = linear_cross_entropy(x, w, targets, **options, chunk_size=10)
    torch.testing.assert_close(loss, expected)
    for pair in zip(torch.autograd.grad(loss, (x, w)), torch.autograd.grad(expected, (x, w)), strict=True):
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_every_configuration_compiles_and_does_not_spill(architecture):
    found = compiled("cross_entropy", architecture)
    assert len(found) == 6
    for row in found:
        assert row["stack"] <= 8, row  # two registers, on sm_80
        assert row["shared"] <= 65_536, row
        if architecture.startswith("sm_"):
            assert "cp.async.cg" in row["instructions"], "loads are 16 bytes wide and ahead of their use"
            if row["options"] == "plain" and row["dtype"] != "fp32":
                assert row["registers"] <= 80, row  # three programs of 256 threads on an SM


# ---- on a GPU, at real sizes

gpu = pytest.mark.gpu
E_, N_ = 768, 4096


def problem(V: int, dtype: torch.dtype, n: int = N_, e: int = E_) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(n, e, device="cuda", dtype=dtype, requires_grad=True)
    w = torch.empty(V, e, device="cuda", dtype=dtype).normal_(std=2 / e**0.5).requires_grad_()
    targets = torch.randint(0, V, (n,), device="cuda")
    targets[::7] = -100
    return x, w, targets


@gpu
@pytest.mark.parametrize(
    ("V", "dtype"),
    [
        (50304, torch.bfloat16),
        (50257, torch.bfloat16),
        (1000, torch.float16),
        (128256, torch.bfloat16),
        (50257, torch.float32),
    ],
)
@all_options
def test_error_is_within_twice_that_of_the_plain_loss(V, dtype, options):
    if "ignore_index" in options:
        options = options | {"ignore_index": -100}
    x, w, targets = problem(V, dtype, n=1500, e=256)
    exact = [t.detach().double().requires_grad_() for t in (x, w)]
    truth_loss = linear_cross_entropy_reference(*exact, targets, **options)
    truth = [truth_loss.detach(), *torch.autograd.grad(truth_loss, exact)]
    del truth_loss, exact
    plain_loss = linear_cross_entropy_reference(x, w, targets, **options)
    plain = [plain_loss.detach(), *torch.autograd.grad(plain_loss, (x, w))]
    del plain_loss
    loss = linear_cross_entropy(x, w, targets, **options, chunk_size=512)
    ours = [loss.detach(), *torch.autograd.grad(loss, (x, w))]
    for our, their, exactly in zip(ours, plain, truth, strict=True):
        error, allowed = ((t.double() - exactly).norm().item() for t in (our, their))
        assert error <= 2 * allowed + 1e-6 * exactly.norm().item(), (error, allowed)


@gpu
def test_under_autocast_the_weights_gradient_is_a_sum_in_float32():
    """32 products rounded to bf16 would be off by 1e-3; logits of other tiles, rounded differently, by 4e-5."""
    x, w, targets = problem(50304, torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        losses = [linear_cross_entropy(x, w, targets, chunk_size=size) for size in (128, 4000)]
    fine, coarse = (torch.autograd.grad(loss, w)[0] for loss in losses)
    assert fine.dtype == torch.float32
    assert (fine - coarse).norm() < 3e-4 * coarse.norm()


@gpu
def test_the_gradients_are_scaled_in_float32_and_rounded_once():
    """A factor without dimensions would be rounded to bf16 itself, and with it all gradients in the same direction."""
    x, w, targets = problem(1000, torch.bfloat16)
    factor = torch.tensor(1 / 4099, device="cuda")
    loss = linear_cross_entropy(x, w, targets, chunk_size=512)
    unscaled = torch.autograd.grad(loss, (x, w), retain_graph=True)
    scaled = torch.autograd.grad(loss, (x, w), factor)
    assert torch.equal(scaled[0], (unscaled[0].float() * factor).bfloat16())
    error = (scaled[1].double() - unscaled[1].double() * factor.double()).norm() / scaled[1].double().norm()
    assert error < 2**-8


@gpu
def test_the_same_bits_again():
    x, w, targets = problem(50257, torch.bfloat16)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        first, second = (
            [loss, *torch.autograd.grad(loss, (x, w))]
            for loss in (linear_cross_entropy(x, w, targets, chunk_size=512) for _ in range(2))
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@gpu
def test_offsets_past_32_bits_and_more_rows_than_a_grid_axis_counts():
    V, C = 32768, 66_000
    assert V * C > 2**31
    logits = torch.empty(C, V, device="cuda", dtype=torch.bfloat16).normal_()
    targets = torch.randint(0, V, (C,), device="cuda")
    last = slice(C - 100, C)
    expected = [torch.empty(100, device="cuda"), logits[last].clone()]
    cross_entropy_(expected[1], targets[last], expected[0], **NOTHING)
    losses = torch.empty(C, device="cuda")
    cross_entropy_kernel.cross_entropy_(logits, targets, losses, **NOTHING)
    torch.testing.assert_close(losses[last], expected[0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(logits[last], expected[1], rtol=1e-2, atol=1e-6)


@gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("working_copy", [False, True])
def test_temporaries_take_at_most_300_mib(compiled, working_copy):
    """Beyond inputs and gradients, at 16k tokens × 50k vocabulary × 768, with a float32 weight cast here."""
    x, w, targets = problem(50304, torch.bfloat16, n=16384)
    w = w.detach().float().requires_grad_()
    operand = w.detach().bfloat16() if working_copy else None

    def mean(x: Tensor, w: Tensor) -> Tensor:
        return linear_cross_entropy(x, w, targets, operand_VE=operand) / 16384

    function = torch.compile(mean) if compiled else mean

    def step() -> int:
        x.grad = w.grad = None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function(x, w).backward()
        return torch.cuda.max_memory_allocated() - before

    step()  # compiles, and has cuBLAS take its workspace
    taken = step() - (x.numel() * 2 + w.numel() * 4)
    assert taken <= (200 if working_copy else 300) * 2**20, f"{taken / 2**20:.0f} MiB"
