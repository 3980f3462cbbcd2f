"""The chunked head and loss equals logits followed by cross-entropy, in value and gradient, and is one operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference

OPERATOR = torch.ops.flash_gpt.linear_cross_entropy.default
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 3.0},
    "z-loss": {"z_loss": 0.05},
    "label smoothing": {"label_smoothing": 0.2},
    "ignore_index": {"ignore_index": 3},
    "everything": {"softcap": 3.0, "z_loss": 0.05, "label_smoothing": 0.2, "ignore_index": 3},
}
all_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def inputs(dtype=torch.float64, n=37, e=8, v=29, ignore_index=-100):
    x = torch.randn(n, e, dtype=dtype, requires_grad=True)
    w = torch.randn(v, e, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, v, (n,))
    targets[[0, 5, n - 1]] = ignore_index
    return x, w, targets


def definition(x, w, targets, *, ignore_index=-100, softcap=0.0, z_loss=0.0, label_smoothing=0.0):
    """Each token's loss, by the formulas of the papers."""
    logits = x @ w.t()
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    log_probs = logits.log_softmax(-1)
    kept = targets != ignore_index
    own = log_probs.gather(1, torch.where(kept, targets, 0)[:, None])[:, 0]
    losses = -(1 - label_smoothing) * own - label_smoothing * log_probs.mean(-1)
    return (losses + z_loss * logits.exp().sum(-1).log() ** 2) * kept


@all_options
@pytest.mark.parametrize("chunk_size", [1, 5, 36, 37, 100, 0])
def test_equals_the_definition_for_every_chunk_size(options, chunk_size):
    x, w, targets = inputs(ignore_index=options.get("ignore_index", -100))
    expected = definition(x, w, targets, **options).sum()
    loss = linear_cross_entropy(x, w, targets, **options, chunk_size=chunk_size)
    torch.testing.assert_close(loss, expected)
    # Scaled, as the trainer divides by its tokens.
    expected_grads = torch.autograd.grad(expected / 7, (x, w))
    for grad, expected_grad in zip(torch.autograd.grad(loss / 7, (x, w)), expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad)


@all_options
@pytest.mark.parametrize("chunk_size", [1, 5, 37, 0])
@pytest.mark.parametrize("with_gradients", [True, False])
def test_the_losses_of_the_tokens_are_those_of_the_definition(options, chunk_size, with_gradients):
    x, w, targets = inputs(ignore_index=options.get("ignore_index", -100))
    expected = definition(x, w, targets, **options)
    with torch.set_grad_enabled(with_gradients):
        losses = linear_cross_entropy(x, w, targets, **options, chunk_size=chunk_size, reduction="none")
    torch.testing.assert_close(losses, expected, check_dtype=False)
    assert (losses[targets == options.get("ignore_index", -100)] == 0).all()
    if with_gradients:
        weights = torch.rand(len(expected), dtype=torch.float64)
        expected_grads = torch.autograd.grad((expected * weights).sum(), (x, w))
        for grad, expected_grad in zip(
            torch.autograd.grad((losses * weights).sum(), (x, w)), expected_grads, strict=True
        ):
            torch.testing.assert_close(grad, expected_grad)


def test_equals_the_definition_without_gradients():
    x, w, targets = inputs()
    with torch.no_grad():
        loss = linear_cross_entropy(x, w, targets, chunk_size=5)
    torch.testing.assert_close(loss, definition(x, w, targets).sum())


@all_options
def test_bf16_gradients_are_as_accurate_as_pytorchs(options):
    """The weight's gradient is summed over chunks in float32: many chunks must not cost accuracy."""
    x, w, targets = inputs(torch.float64, n=512, e=32, v=64, ignore_index=options.get("ignore_index", -100))
    exact = torch.autograd.grad(linear_cross_entropy_reference(x, w, targets, **options), (x, w))
    low = [t.detach().bfloat16().requires_grad_() for t in (x, w)]
    theirs = torch.autograd.grad(linear_cross_entropy_reference(*low, targets, **options), low)
    ours = torch.autograd.grad(linear_cross_entropy(*low, targets, **options, chunk_size=8), low)
    for our, their, truth in zip(ours, theirs, exact, strict=True):
        assert (our - truth).norm() <= 2 * (their - truth).norm()


def test_autocast_computes_in_bf16_and_returns_float32_gradients():
    x, w, targets = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(x, w, targets, chunk_size=5)
    with torch.no_grad():
        expected = linear_cross_entropy_reference(x.bfloat16(), w.bfloat16(), targets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    loss.backward()
    assert w.grad is not None
    assert w.grad.dtype == torch.float32
    assert (w.grad.bfloat16() != w.grad).any(), "was rounded to bf16"


def test_a_copy_of_the_weight_takes_the_casts_place_and_gets_no_gradient():
    x, w, targets = inputs(torch.float32)
    x_low, copy = x.detach().bfloat16().requires_grad_(), w.detach().bfloat16().requires_grad_()
    cast = torch.autograd.grad(linear_cross_entropy(x_low, w, targets, chunk_size=5), (x_low, w))
    loss = linear_cross_entropy(x_low, w, targets, operand_VE=copy, chunk_size=5)
    given = torch.autograd.grad(loss, (x_low, w, copy), allow_unused=True)
    assert all(torch.equal(*pair) for pair in zip(cast, given, strict=False))
    assert given[2] is None
    with torch.no_grad():
        other = linear_cross_entropy(x_low, w, targets, operand_VE=2 * copy, chunk_size=5)
    assert not torch.equal(other, loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_backward_pass_scales_in_place(dtype):
    x, w, targets = inputs(torch.float32)
    x = x.detach().to(dtype).requires_grad_()
    loss, grad_x, grad_w = OPERATOR(x, w, None, targets, 5, -100, 0.0, 0.0, 0.0, False, True, True)
    expected = (grad_x.float() * torch.tensor(1 / 7)).to(dtype)
    own, places = grad_w.clone(), (grad_x.data_ptr(), grad_w.data_ptr())
    scaled = torch.autograd.grad(loss, (x, w), torch.tensor(1 / 7))
    assert tuple(grad.data_ptr() for grad in scaled) == places
    assert torch.equal(scaled[0], expected)
    torch.testing.assert_close(scaled[1], own / 7)


def test_a_graph_that_is_kept_gives_the_same_gradients_again():
    x, w, targets = inputs()
    loss = linear_cross_entropy(x, w, targets, chunk_size=5)
    first = torch.autograd.grad(loss / 7, (x, w), retain_graph=True)
    second = torch.autograd.grad(loss / 7, (x, w))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.parametrize("wanted", ["x", "w"])
def test_one_gradient_alone_costs_one_product_less(wanted):
    x, w, targets = inputs()
    both = dict(zip("xw", torch.autograd.grad(linear_cross_entropy(x, w, targets, chunk_size=5), (x, w)), strict=True))
    tensors = {"x": x.detach(), "w": w.detach()}
    tensors[wanted].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        loss = linear_cross_entropy(*tensors.values(), targets, chunk_size=5)
        (grad,) = torch.autograd.grad(loss, tensors[wanted])
    assert torch.equal(grad, both[wanted])
    assert counter.get_total_flops() == 2 * (2 * 37 * 8 * 29)


@pytest.mark.parametrize("chunk_size", [5, 0])
def test_without_a_single_target_loss_and_gradients_are_zero(chunk_size):
    x, w, targets = inputs()
    loss = linear_cross_entropy(x, w, targets.fill_(-100), z_loss=0.1, label_smoothing=0.1, chunk_size=chunk_size)
    assert loss == 0
    assert all((grad == 0).all() for grad in torch.autograd.grad(loss, (x, w)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_token_that_is_not_finite_spoils_its_own_gradient_alone(value):
    x, w, targets = inputs()
    x = x.detach()
    x[7] = value
    loss = linear_cross_entropy(x.requires_grad_(), w, targets, chunk_size=5)
    assert loss.isnan()
    (grad,) = torch.autograd.grad(loss, x)
    assert grad.isnan().any(1).nonzero().tolist() == [[7]]


def test_logits_beyond_their_dtype_do_not_matter_where_the_token_is_ignored():
    x, w, targets = inputs(torch.float16)
    x = x.detach()
    x[5] = 60000
    assert (x[5] @ w.t()).isinf().any()
    loss = linear_cross_entropy(x.requires_grad_(), w, targets, z_loss=0.1, softcap=5.0, chunk_size=5)
    assert loss.isfinite()
    for grad in torch.autograd.grad(loss, (x, w)):
        assert grad.isfinite().all()


@pytest.mark.parametrize("layout", ["transposed", "every other token", "one row for all"])
def test_any_layout_of_the_hidden_states_gives_the_same(layout):
    x, w, targets = inputs()
    stored = {
        "transposed": x.detach().t().contiguous().t(),
        "every other token": x.detach().repeat_interleave(2, 0)[::2],
        "one row for all": x.detach()[:1].expand(37, 8),
    }[layout]
    assert not stored.is_contiguous()
    losses = [
        linear_cross_entropy(each.requires_grad_(), w, targets, chunk_size=5) for each in (stored, stored.contiguous())
    ]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, w)[0] for loss in losses))


def test_softcapped_gradient_passes_gradcheck():
    x, w, targets = inputs(n=6, e=3, v=5)
    torch.autograd.gradcheck(
        lambda x, w: linear_cross_entropy(x, w, targets, softcap=2.0, z_loss=0.1, label_smoothing=0.1, chunk_size=2),
        (x, w),
    )


def test_the_operator_passes_opcheck():
    """PyTorch's own test of schema, autograd registration, fake tensors and tracing with dynamic shapes."""
    x, w, targets = inputs(torch.float32, n=12)
    assert torch.Tag.pt2_compliant_tag in OPERATOR.tags
    x_low = x.detach().bfloat16().requires_grad_()
    for arguments in (
        (x, w, None, targets, 5, -100, 3.0, 0.1, 0.1, False, True, True),
        (x_low, w, w.detach().bfloat16(), targets, 5, -100, 0.0, 0.0, 0.0, False, False, True),
        (x.detach(), w.detach(), None, targets, 5, -100, 0.0, 0.0, 0.0, True, False, False),
    ):
        torch.library.opcheck(OPERATOR, arguments)


def test_is_one_node_of_one_graph_whatever_the_length():
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def of_chunks(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(x, w, targets, z_loss=0.1, chunk_size=5)

    compiled = torch.compile(of_chunks, backend=counter, fullgraph=True, dynamic=True)
    graphs = []
    for n in (37, 55, 4096):
        x, w, targets = inputs(n=n)
        expected, loss = of_chunks(x, w, targets), compiled(x, w, targets)
        assert torch.equal(loss, expected)
        for pair in zip(torch.autograd.grad(loss, (x, w)), torch.autograd.grad(expected, (x, w)), strict=True):
            assert torch.equal(*pair)
        graphs.append(counter.graphs[-1])
    assert graphs[0] is graphs[-1]
    assert sum(node.target is OPERATOR for node in graphs[0].graph.nodes) == 1


def test_equals_pytorchs_own():
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("this PyTorch has no linear_cross_entropy")
    x, w, targets = inputs()
    theirs = F.linear_cross_entropy(x, w, targets, reduction="sum", label_smoothing=0.2)
    torch.testing.assert_close(linear_cross_entropy(x, w, targets, label_smoothing=0.2, chunk_size=5), theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_NE": torch.zeros(2, 3, 8)}, r"x \(2, 3, 8\) and weight \(29, 8\) do not fit"),
        ({"weight_VE": torch.zeros(29, 9)}, r"x \(37, 8\) and weight \(29, 9\) do not fit"),
        ({"targets_N": torch.zeros(36, dtype=torch.int64)}, r"targets \(36,\), torch.int64, must be int64 \(37,\)"),
        ({"targets_N": torch.zeros(37, dtype=torch.int32)}, "torch.int32, must be int64"),
        ({"operand_VE": torch.zeros(8, 29)}, r"operand \(8, 29\) is no copy of weight \(29, 8\)"),
        ({"softcap": -1.0}, "softcap=-1.0 is negative"),
        ({"z_loss": -1e-4}, "z_loss=-0.0001 is negative"),
        ({"chunk_size": -1}, "chunk_size=-1 is negative"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0 must lie in"),
        ({"reduction": "mean"}, "reduction='mean' is unknown; use sum or none"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(change, message):
    x, w, targets = inputs()
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{"x_NE": x, "weight_VE": w, "targets_N": targets, **change})
