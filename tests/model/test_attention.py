"""Every backend computes what `math` computes, or refuses by name and reason."""

from __future__ import annotations

import re
import sys
from contextlib import nullcontext
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from kernels import flash_attention
from kernels.reference import attention as reference
from model.attention import ATTENTIONS, AttentionConfig, AttentionSpec, build_attention, choose_attention, sdpa
from model.attention.config import FlashConfig, SdpaConfig, is_triton_interpreted
from model.attention.flex import interval_block_mask
from model.attention.sdpa import cumulative_lengths

CPU = torch.device("cpu")
# Triton asks once, when it is imported, whether to interpret: where there is a GPU, flash runs on that alone.
FLASH_DEVICE = CPU if is_triton_interpreted() else torch.device("cuda")
interpreted = pytest.mark.skipif(not is_triton_interpreted(), reason="flash runs on the GPU of this machine")
ATTENTIONS_HERE = ("math", "sdpa", "flex", "flash")
BACKENDS = ["math", "sdpa", "flex", pytest.param("flash", marks=interpreted)]
SHAPES = {  # batch, length, query heads, key/value heads, head_dim
    "one-token": (1, 1, 2, 2, 16),
    "odd": (2, 63, 4, 2, 16),
    "one-block": (1, 128, 2, 1, 32),
    "ragged": (1, 150, 3, 3, 16),
}
LONG = (2, 333, 3, 3, 16)
SLOW = pytest.mark.slow
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
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    max_documents = S if starts is not None else None
    spec = AttentionSpec(H, G, D, S, name_of(dtype), capability, max_documents=max_documents, **options)
    # Views of one fused projection, as the model makes them.
    qkv = torch.randn(B, S, (H + 2 * G) * D, device=device, dtype=dtype).unflatten(-1, (-1, D))
    q, k, v = (x.requires_grad_() for x in qkv.split((H, G, G), dim=2))
    return spec, (q, k, v), starts, options


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def forward_and_gradients(function, qkv, grad_out) -> list[Tensor]:
    out = function(*qkv)
    return [out, *torch.autograd.grad(out, qkv, grad_out)]


def backends_and_shapes():
    """The interpreter takes long: of the flash kernels' shapes, one by default."""
    for name, (label, shape) in product(ATTENTIONS_HERE, {**SHAPES, "long": LONG}.items()):
        is_slow = label == "long" or (name == "flash" and label != "odd")
        marks = [*([SLOW] if is_slow else []), *([interpreted] if name == "flash" else [])]
        yield pytest.param(name, shape, id=f"{label}-{name}", marks=marks)


@pytest.mark.parametrize(("name", "shape"), list(backends_and_shapes()))
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_backend_equals_the_specification(name, shape, mask):
    dtype = torch.float32 if name == "flash" else torch.float64  # the most precise that it computes in
    spec, qkv, starts, options = case(shape, mask, dtype=dtype)
    config = ATTENTIONS[name](name=name)
    if config.why_not(spec):
        assert name == "sdpa"
        assert spec.softcap > 0  # the only refusal on a CPU
        return
    backend = build_attention(config, spec)
    grad_out = torch.randn_like(qkv[0])
    exact = [x.detach().double().requires_grad_() for x in qkv]
    expected = forward_and_gradients(
        lambda q, k, v: reference(q, k, v, starts=starts, **options), exact, grad_out.double()
    )
    got = forward_and_gradients(lambda q, k, v: backend(q, k, v, backend.prepare(starts, q.shape[1])), qkv, grad_out)
    rtol, atol = (1e-9, 1e-11) if dtype == torch.float64 else (1e-5, 1e-5)
    for ours, truth in zip(got, expected, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), truth, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", BACKENDS)
def test_low_precision_error_is_within_twice_pytorchs_own(name):
    """Against float64, by the rule of the field: error ≤ 2 × the error of standard attention in the same dtype."""
    spec, qkv, starts, _ = case((2, 140, 2, 1, 32), {"documents": 0.02})
    low = [x.detach().bfloat16().requires_grad_() for x in qkv]
    grad_out = torch.randn_like(qkv[0])
    truth = forward_and_gradients(lambda q, k, v: reference(q, k, v, starts=starts), qkv, grad_out)
    standard = forward_and_gradients(lambda q, k, v: reference(q, k, v, starts=starts), low, grad_out.bfloat16())
    backend = build_attention(ATTENTIONS[name](name=name), replace(spec, dtype="bfloat16"))
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


def test_flash_is_one_graph_for_all_batches():
    counter = CompileCounter()
    spec, (q, k, v), _, _ = case((2, 64, 2, 1, 16), {"documents": 0.1}, FLASH_DEVICE, torch.float32)
    backend = build_attention(FlashConfig(), spec)
    compiled = torch.compile(backend, backend=counter, fullgraph=True)
    for _ in range(3):
        mask = backend.prepare(random_starts(2, 64, 0.1, FLASH_DEVICE), 64)
        torch.testing.assert_close(compiled(q, k, v, mask), backend(q, k, v, mask))
    assert counter.frame_count == 1


# ---- what is refused, and what is chosen. Nothing here needs the GPU that it is about

PLAIN = AttentionSpec(4, 2, 64, 64, "bfloat16")
TURING, AMPERE, HOPPER, BLACKWELL = (replace(PLAIN, capability=c) for c in ((7, 5), (8, 0), (9, 0), (10, 0)))
AUTO, FLASH = ATTENTIONS["auto"](name="auto"), FlashConfig()
DOCUMENTS = {"max_documents": 9}

REFUSALS = {
    "flash-cpu": (FLASH, PLAIN, "from sm_80 on, not on a CPU; use attention=auto"),
    "flash-turing": (FLASH, TURING, "from sm_80 on, not on sm_75; use attention=auto"),
    "flash-20": (FLASH, replace(HOPPER, head_dim=20), "a multiple of 8 from 16 to 256, not 20; use attention=auto"),
    "flash-8": (FLASH, replace(HOPPER, head_dim=8), "not 8; use attention=auto"),
    "flash-264": (FLASH, replace(HOPPER, head_dim=264), "not 264; use attention=auto"),
    "flash-float64": (FLASH, replace(HOPPER, dtype="float64"), "float32, not float64; use attention=auto"),
    "hopper-ampere": (
        FlashConfig(implementation="hopper"),
        AMPERE,
        "computes in bfloat16 and float16 on sm_90, not in bfloat16 on sm_80; use attention.implementation=auto",
    ),
    "hopper-float32": (
        FlashConfig(implementation="hopper"),
        replace(HOPPER, dtype="float32"),
        "not in float32 on sm_90; use attention.implementation=auto",
    ),
    "softcap": (SdpaConfig(), replace(PLAIN, softcap=30.0), "no SDPA kernel caps scores (softcap=30); use attention"),
    "cudnn-cpu": (SdpaConfig(kernel="cudnn"), PLAIN, "attention.kernel=cudnn runs on CUDA only"),
    "efficient-cpu": (SdpaConfig(kernel="efficient"), PLAIN, "attention.kernel=efficient runs on CUDA only"),
    "cudnn-documents": (
        SdpaConfig(kernel="cudnn"),
        replace(HOPPER, **DOCUMENTS),
        "does not hand documents to cuDNN; use attention.kernel=auto, or data.document_mask=false",
    ),
    "cudnn-window": (
        SdpaConfig(kernel="cudnn"),
        replace(HOPPER, window=9),
        "does not hand a window to cuDNN; use attention.kernel=auto, or model.window=null",
    ),
    "cudnn-both": (
        SdpaConfig(kernel="cudnn"),
        replace(HOPPER, window=9, **DOCUMENTS),
        "does not hand documents and a window to cuDNN; "
        "use attention.kernel=auto, or data.document_mask=false model.window=null",
    ),
    "sdpa-flash-float32": (
        SdpaConfig(kernel="flash"),
        replace(HOPPER, dtype="float32", **DOCUMENTS),
        "masks documents only causally, in bf16 or fp16, from sm_80 on",
    ),
    "sdpa-flash-turing": (
        SdpaConfig(kernel="flash"),
        replace(TURING, dtype="float16", window=9),
        "masks a window only causally, in bf16 or fp16, from sm_80 on",
    ),
    "flex-8": (ATTENTIONS["flex"](name="flex"), replace(AMPERE, head_dim=8), "needs head_dim ≥ 16, not 8; use"),
}


@pytest.fixture
def _not_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.usefixtures("_not_interpreted")
@pytest.mark.parametrize(("config", "spec", "said"), REFUSALS.values(), ids=REFUSALS)
def test_what_a_backend_cannot_do_is_refused_by_name_with_reason_and_remedy(config, spec, said):
    with pytest.raises(ValueError, match=f"^attention={config.name}: .*{re.escape(said)}"):
        choose_attention(config, spec)
    assert choose_attention(AUTO, spec).why_not(spec) is None, "the remedy is one"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=name_of)
@pytest.mark.parametrize("head_dim", [8, 12, 16, 20, 24, 88, 100, 248, 256, 260, 584])
def test_flash_refuses_what_its_kernels_refuse_and_nothing_else(head_dim, dtype):
    """The rules are written twice, here without torch: this is what holds them together. Heads of 264 to 576, which the
    kernels have for latent attention, some GPUs and 16 bits alone, no model has."""
    spec, qkv, _, _ = case((1, 1, 1, 1, head_dim), {}, FLASH_DEVICE, dtype)
    refused = FLASH.why_not(spec) is not None
    with pytest.raises(ValueError, match=r"head_dim|float64") if refused else nullcontext():
        flash_attention(*qkv)


def test_unknown_implementations_are_refused():
    with pytest.raises(ValueError, match=r"attention.implementation='cuda' is unknown; use auto, hopper, triton"):
        FlashConfig(implementation="cuda")


def test_flash_without_triton_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ValueError, match=r"need Triton, which is not installed; use attention=auto"):
        choose_attention(FLASH, HOPPER)
    assert choose_attention(AUTO, HOPPER).name == "sdpa"


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        (PLAIN, "sdpa"),  # though Triton's interpreter may be on
        (replace(PLAIN, softcap=30.0), "flex"),
        (HOPPER, "flash"),
        (replace(HOPPER, head_dim=256), "flash"),
        (replace(HOPPER, head_dim=192), "sdpa"),  # cuDNN's kernel, which is ahead of ours there
        (replace(HOPPER, dtype="float32"), "sdpa"),
        (BLACKWELL, "sdpa"),
        (AMPERE, "flash"),
        (replace(HOPPER, **DOCUMENTS), "flash"),
        (replace(HOPPER, window=9, softcap=30.0, **DOCUMENTS), "flash"),
        (TURING, "sdpa"),
        (replace(TURING, softcap=30.0), "flex"),
        (replace(TURING, softcap=30.0, head_dim=8), "math"),
    ],
)
def test_auto_takes_the_first_that_can_and_passes_over_those_that_cannot(spec, name):
    assert choose_attention(AUTO, spec).name == name


@pytest.mark.parametrize(
    ("spec", "asked", "kernel"),
    [
        (PLAIN, "auto", "flash"),
        (PLAIN, "math", "math"),
        (HOPPER, "auto", "cudnn"),
        (AMPERE, "auto", "flash"),
        (HOPPER, "efficient", "efficient"),
        (replace(HOPPER, **DOCUMENTS), "auto", "flash-varlen"),
        (replace(AMPERE, window=9), "flash", "flash-varlen"),
        (replace(AMPERE, window=9, dtype="float32"), "auto", "efficient"),
        (replace(AMPERE, window=9, head_dim=20), "auto", "efficient"),
        (replace(TURING, dtype="float16", **DOCUMENTS), "auto", "efficient"),
        (replace(HOPPER, **DOCUMENTS), "math", "math"),
    ],
)
def test_sdpa_pins_the_kernel_asked_for_or_the_fastest(monkeypatch, spec, asked, kernel):
    monkeypatch.setattr(sdpa, "_can_use", lambda *_: True)
    backend = build_attention(SdpaConfig(kernel=asked), spec)
    assert backend.kernel == kernel
    assert backend.describe().startswith(f"PyTorch's {kernel} kernel (")


def test_sdpa_asks_pytorch_about_every_kernel_of_a_gpu(monkeypatch):
    monkeypatch.setattr(sdpa, "_can_use", lambda spec, kernel: kernel == "math")
    assert build_attention(SdpaConfig(), HOPPER).kernel == "math"
    with pytest.raises(ValueError, match=r"attention=sdpa: PyTorch's cudnn kernel refuses .*use attention.kernel=auto"):
        build_attention(SdpaConfig(kernel="cudnn"), HOPPER)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"attention\.kernel='fast' is unknown; use auto, flash, cudnn"):
        SdpaConfig(kernel="fast")
    with pytest.raises(ValueError, match=r"attention=fast is unknown; use auto, flash, sdpa, flex, math"):
        choose_attention(AttentionConfig("fast"), PLAIN)


@pytest.mark.parametrize(
    ("config", "spec", "line"),
    [
        (FLASH, replace(HOPPER, head_dim=128), "flash-gpt's Hopper kernels"),
        (FLASH, replace(HOPPER, head_dim=128, softcap=30.0), "flash-gpt's Hopper kernels"),
        (
            FlashConfig(implementation="triton"),
            replace(HOPPER, head_dim=128),
            "flash-gpt's portable Triton kernels; "
            "tiles of queries × keys: forward 128 × 128, dQ 128 × 64, dK/dV 64 × 64",
        ),
    ],
)
def test_flash_says_which_of_its_kernels_run(config, spec, line):
    assert build_attention(config, spec).describe() == line


@interpreted
def test_flash_says_that_it_is_interpreted():
    assert build_attention(FLASH, PLAIN).describe() == "Triton's interpreter: exact and very slow, for tests"


@pytest.mark.gpu
@pytest.mark.parametrize(
    "config",
    [
        ATTENTIONS["math"](name="math"),
        ATTENTIONS["flex"](name="flex"),
        FlashConfig(),
        *(SdpaConfig(kernel=kernel) for kernel in ("auto", "flash", "cudnn", "efficient", "math")),
    ],
    ids=lambda config: f"{config.name}-{getattr(config, 'kernel', '')}".rstrip("-"),
)
@pytest.mark.parametrize("shape", [(2, 1000, 8, 8, 64), (1, 2048, 8, 2, 128)], ids=["mha", "gqa"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_backend_on_the_gpu_is_within_twice_the_error_of_standard_attention(config, shape, mask):
    spec, qkv, starts, options = case(shape, mask, torch.device("cuda"))
    try:
        backend = build_attention(config, replace(spec, dtype="bfloat16"))
    except ValueError as refusal:
        assert config.name == "sdpa"
        pytest.skip(str(refusal))
    low = [x.detach().bfloat16().requires_grad_() for x in qkv]
    grad_out = torch.randn_like(qkv[0])
    truth = forward_and_gradients(lambda q, k, v: reference(q, k, v, starts=starts, **options), qkv, grad_out)
    standard = forward_and_gradients(
        lambda q, k, v: reference(q, k, v, starts=starts, **options), low, grad_out.bfloat16()
    )
    got = forward_and_gradients(
        lambda q, k, v: backend(q, k, v, backend.prepare(starts, q.shape[1])), low, grad_out.bfloat16()
    )
    for ours, theirs, exact in zip(got, standard, truth, strict=True):
        # Where a query sees one key, the gradients of q and k are differences of equal numbers: 0 but for rounding.
        floor = 2**-7 * truth[-1].norm() if exact.norm() == 0 else 0.0
        assert (ours - exact).norm() <= 2 * (theirs - exact).norm() + floor


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["triton", "auto"])
@pytest.mark.parametrize("max_documents", [None, 8])
def test_a_run_compiles_no_kernels_but_those_compiled_ahead(max_documents, implementation, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    spec = replace(HOPPER, n_heads=4, n_kv_heads=2, head_dim=80, seq_len=16_384, max_documents=max_documents)
    backend = build_attention(FlashConfig(implementation=implementation), spec)
    backend.compile_ahead()
    S = spec.seq_len
    starts = torch.arange(S, device="cuda", dtype=torch.int32)[None] // 4096 * 4096 if max_documents else None
    mask = backend.prepare(starts, S)
    ahead = {folder.name for folder in tmp_path.iterdir()}
    assert ahead
    qkv = torch.randn(1, S, 8, 80, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    q, k, v = qkv.split((4, 2, 2), dim=2)
    backend(q.contiguous(), k.contiguous(), v, mask).sum().backward()
    assert {folder.name for folder in tmp_path.iterdir()} == ahead
