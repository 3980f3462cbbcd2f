"""Every backend computes what `math` computes, or refuses by name and reason."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from kernels.reference import attention as reference
from model.attention import ATTENTIONS, build_attention, load_backend
from model.attention.base import AttentionSpec
from model.attention.config import SdpaConfig
from model.attention.flex import interval_block_mask
from model.attention.sdpa import cumulative_lengths

CPU = torch.device("cpu")
SHAPES = {  # batch, length, query heads, key/value heads, head_dim
    "one-token": (1, 1, 2, 2, 16),
    "odd": (2, 63, 4, 2, 16),
    "one-block": (1, 128, 2, 1, 32),
    "ragged": (2, 333, 3, 3, 16),
}
MASKS = {
    "causal": {},
    "window": {"window": 50},
    "window-1": {"window": 1},
    "documents": {"documents": 0.03},
    "tiny-documents": {"documents": 0.6},
    "window-documents": {"window": 20, "documents": 0.03},
    "softcap": {"softcap": 2.0},
    "everything": {"window": 70, "documents": 0.02, "softcap": 5.0, "scale": 0.2},
}


def random_starts(B: int, S: int, probability: float, device=CPU) -> Tensor:
    """Document starts as the loader gives them: each token begins a document with this probability."""
    begins = torch.rand(B, S, device=device) < probability
    begins[:, 0] = False  # a document cut by the row's beginning starts at 0 all the same
    return torch.where(begins, torch.arange(S, device=device), 0).cummax(1).values.int()


def case(shape, mask, device=CPU, dtype=torch.float64):
    B, S, H, G, D = shape
    starts = random_starts(B, S, mask["documents"], device) if "documents" in mask else None
    options = {name: mask[name] for name in ("window", "softcap", "scale") if name in mask}
    spec = AttentionSpec(H, G, D, S, device, dtype, max_documents=S if starts is not None else None, **options)
    # Views of one fused projection, as the model makes them.
    qkv = torch.randn(B, S, (H + 2 * G) * D, device=device, dtype=dtype).unflatten(-1, (-1, D))
    q, k, v = (x.requires_grad_() for x in qkv.split((H, G, G), dim=2))
    return spec, (q, k, v), starts, options


def forward_and_gradients(function, qkv, grad_out) -> list[Tensor]:
    out = function(*qkv)
    return [out, *torch.autograd.grad(out, qkv, grad_out)]


@pytest.mark.parametrize("name", ["math", "sdpa", "flex"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_backend_equals_the_specification(name, shape, mask):
    spec, qkv, starts, options = case(shape, mask)
    config = ATTENTIONS[name](name=name)
    if load_backend(name).why_not(spec, config):
        assert name == "sdpa"
        assert spec.softcap > 0  # the only refusal on a CPU
        return
    backend = build_attention(config, spec)
    grad_out = torch.randn_like(qkv[0])
    expected = forward_and_gradients(lambda q, k, v: reference(q, k, v, starts=starts, **options), qkv, grad_out)
    got = forward_and_gradients(lambda q, k, v: backend(q, k, v, backend.prepare(starts, q.shape[1])), qkv, grad_out)
    for ours, truth in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["math", "sdpa", "flex"])
def test_low_precision_error_is_within_twice_pytorchs_own(name):
    """Against float64, by the rule of the field: error ≤ 2 × the error of standard attention in the same dtype."""
    spec, qkv, starts, _ = case((2, 200, 4, 2, 32), {"documents": 0.02})
    low = [x.detach().bfloat16().requires_grad_() for x in qkv]
    grad_out = torch.randn_like(qkv[0])
    truth = forward_and_gradients(lambda q, k, v: reference(q, k, v, starts=starts), qkv, grad_out)
    standard = forward_and_gradients(lambda q, k, v: reference(q, k, v, starts=starts), low, grad_out.bfloat16())
    backend = build_attention(ATTENTIONS[name](name=name), replace(spec, dtype=torch.bfloat16))
    got = forward_and_gradients(
        lambda q, k, v: backend(q, k, v, backend.prepare(starts, q.shape[1])), low, grad_out.bfloat16()
    )
    for ours, theirs, exact in zip(got, standard, truth, strict=True):
        assert (ours - exact).norm() <= 2 * (theirs - exact).norm()


def test_block_mask_is_right_for_every_pair_and_skips_what_it_can():
    S, window = 700, 150
    starts = random_starts(2, S, 0.01)
    mask = interval_block_mask(starts, window)
    visible = torch.stack([reference_visible(starts[b], window) for b in range(2)])
    dense = mask.to_dense()[:, 0].bool()
    blocks = torch.nn.functional.pad(visible, (0, 768 - S, 0, 768 - S)).unflatten(1, (6, 128)).unflatten(3, (6, 128))
    assert (dense | ~blocks.any(dim=4).any(dim=2)).all(), "a block with a visible pair is skipped"
    assert dense.sum() <= blocks.any(dim=4).any(dim=2).sum() + 2, "blocks without a visible pair are computed"


def reference_visible(starts_S: Tensor, window: int) -> Tensor:
    t, s = torch.arange(len(starts_S))[:, None], torch.arange(len(starts_S))[None]
    return (s <= t) & (s > t - window) & (s >= starts_S[:, None])


def test_cumulative_lengths_have_a_fixed_shape_and_repeat_the_end():
    starts = torch.tensor([[0, 0, 2, 2, 4], [0, 0, 0, 0, 0]], dtype=torch.int32)
    assert cumulative_lengths(starts, max_documents=4).tolist() == [0, 2, 4, 5, 10, 10, 10, 10, 10]
    assert cumulative_lengths(starts, max_documents=3).shape == (7,)
    assert cumulative_lengths(starts[:1, :2], max_documents=9).tolist() == [0] + [2] * 9


def test_flex_masks_do_not_recompile_from_batch_to_batch():
    """A compiled function that takes a new block mask each batch is traced once."""
    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def attend(q: Tensor, mask: BlockMask) -> Tensor:
        out = flex_attention(q, q, q, block_mask=mask)
        assert isinstance(out, Tensor)
        return out

    q = torch.randn(2, 2, 256, 16)
    for seed in range(4):
        torch.manual_seed(seed)
        attend(q, interval_block_mask(random_starts(2, 256, 0.05), None))
    assert counter.frame_count == 1


PLAIN = AttentionSpec(4, 2, 16, 64, CPU, torch.float32)


def test_flash_says_that_it_is_not_there_yet():
    with pytest.raises(ValueError, match=r"attention=flash: .*not in this version yet; use attention=auto"):
        build_attention(ATTENTIONS["flash"](name="flash"), PLAIN)


def test_sdpa_refuses_a_soft_cap_by_name_and_reason():
    with pytest.raises(
        ValueError, match=r"attention=sdpa: no SDPA kernel caps scores \(softcap=30\); use attention=flex"
    ):
        build_attention(SdpaConfig(), replace(PLAIN, softcap=30.0))


def test_auto_takes_the_first_that_can_and_passes_over_those_that_cannot():
    auto = ATTENTIONS["auto"](name="auto")
    assert build_attention(auto, PLAIN).name == "sdpa"
    assert build_attention(auto, replace(PLAIN, softcap=30.0)).name == "flex"


@pytest.mark.parametrize("kernel", ["cudnn", "efficient"])
def test_cuda_kernels_are_refused_on_a_cpu(kernel):
    with pytest.raises(ValueError, match=rf"attention\.kernel={kernel} runs on CUDA only"):
        build_attention(SdpaConfig(kernel=kernel), PLAIN)


def test_an_unknown_kernel_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"attention\.kernel='fast' is unknown; use auto, flash, cudnn"):
        SdpaConfig(kernel="fast")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "config",
    [
        ATTENTIONS["math"](name="math"),
        ATTENTIONS["flex"](name="flex"),
        *(SdpaConfig(kernel=kernel) for kernel in ("auto", "flash", "cudnn", "efficient", "math")),
    ],
    ids=lambda config: f"{config.name}-{getattr(config, 'kernel', '')}".rstrip("-"),
)
@pytest.mark.parametrize("shape", [(2, 1000, 8, 8, 64), (1, 2048, 8, 2, 128)], ids=["mha", "gqa"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_backend_on_the_gpu_is_within_twice_the_error_of_standard_attention(config, shape, mask):
    spec, qkv, starts, options = case(shape, mask, torch.device("cuda"))
    spec = replace(spec, dtype=torch.bfloat16)
    if load_backend(config.name).why_not(spec, config):
        pytest.skip("refused")
    low = [x.detach().bfloat16().requires_grad_() for x in qkv]
    grad_out = torch.randn_like(qkv[0])
    truth = forward_and_gradients(lambda q, k, v: reference(q, k, v, starts=starts, **options), qkv, grad_out)
    standard = forward_and_gradients(
        lambda q, k, v: reference(q, k, v, starts=starts, **options), low, grad_out.bfloat16()
    )
    backend = build_attention(config, spec)
    got = forward_and_gradients(
        lambda q, k, v: backend(q, k, v, backend.prepare(starts, q.shape[1])), low, grad_out.bfloat16()
    )
    for ours, theirs, exact in zip(got, standard, truth, strict=True):
        # Where a query sees one key, the gradients of q and k are differences of equal numbers: 0 but for rounding.
        floor = 2**-7 * truth[-1].norm() if exact.norm() == 0 else 0.0
        assert (ours - exact).norm() <= 2 * (theirs - exact).norm() + floor
