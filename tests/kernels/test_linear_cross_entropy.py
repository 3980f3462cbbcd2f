"""The chunked head and loss equals logits followed by cross-entropy, in value and gradient."""

from __future__ import annotations

import pytest
import torch

from kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference


def inputs(dtype=torch.float64, n=37, e=8, v=29):
    x = torch.randn(n, e, dtype=dtype, requires_grad=True)
    w = torch.randn(v, e, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, v, (n,))
    targets[[0, 5, n - 1]] = -100
    return x, w, targets


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("chunk_size", [1, 5, 36, 37, 100, 0])
def test_equals_the_definition_for_every_chunk_size(softcap, chunk_size):
    x, w, targets = inputs()
    expected = linear_cross_entropy_reference(x, w, targets, softcap=softcap)
    loss = linear_cross_entropy(x, w, targets, softcap=softcap, chunk_size=chunk_size)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-4)
    # Scaled, as the trainer divides by its tokens.
    expected_grads = torch.autograd.grad(expected / 7, (x, w))
    for grad, expected_grad in zip(torch.autograd.grad(loss / 7, (x, w)), expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chunk_size", [1, 5, 36, 37, 0])
@pytest.mark.parametrize("with_gradients", [True, False])
def test_the_losses_of_the_tokens_are_those_of_the_definition(chunk_size, with_gradients):
    x, w, targets = inputs()
    with torch.set_grad_enabled(with_gradients):
        losses = linear_cross_entropy(x, w, targets, softcap=3.0, chunk_size=chunk_size, reduction="none")
    log_probs = (3.0 * torch.tanh(x @ w.t() / 3.0)).log_softmax(-1)
    kept = targets != -100
    assert losses.shape == targets.shape
    assert (losses[~kept] == 0).all()
    expected = -log_probs[kept, targets[kept]]
    torch.testing.assert_close(losses[kept].double(), expected, rtol=1e-5, atol=1e-5)
    if with_gradients:
        weights = torch.rand(len(expected), dtype=torch.float64)
        expected_grads = torch.autograd.grad((expected * weights).sum(), (x, w))
        for grad, expected_grad in zip(
            torch.autograd.grad((losses[kept] * weights).sum(), (x, w)), expected_grads, strict=True
        ):
            torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-5)


def test_equals_the_definition_without_gradients():
    x, w, targets = inputs()
    with torch.no_grad():
        loss = linear_cross_entropy(x, w, targets, chunk_size=5)
    torch.testing.assert_close(loss, linear_cross_entropy_reference(x, w, targets), rtol=1e-6, atol=1e-4)


def test_bf16_gradients_are_as_accurate_as_pytorchs():
    """The weight's gradient is summed over chunks in float32: many chunks must not cost accuracy."""
    x, w, targets = inputs(torch.float64, n=512, e=32, v=64)
    exact = torch.autograd.grad(linear_cross_entropy_reference(x, w, targets), (x, w))
    low = [t.detach().bfloat16().requires_grad_() for t in (x, w)]
    theirs = torch.autograd.grad(linear_cross_entropy_reference(*low, targets), low)
    ours = torch.autograd.grad(linear_cross_entropy(*low, targets, chunk_size=8), low)
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


def test_softcapped_gradient_passes_gradcheck():
    x, w, targets = inputs(n=6, e=3, v=5)
    # The loss is summed in float32, so finite differences need a wide step.
    torch.autograd.gradcheck(
        lambda x, w: linear_cross_entropy(x, w, targets, softcap=2.0, chunk_size=2), (x, w), eps=1e-2, atol=2e-3
    )
