"""What each attention backend can be told, and what it refuses: the fields of `configs/attention/*.yaml`.

No torch here: a backend that cannot honour the run is refused before torch loads. Only what PyTorch alone can answer
is left to the backend's constructor.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from importlib.util import find_spec
from math import ceil, gcd

from .spec import AttentionSpec

FLASH_IMPLEMENTATIONS = ("hopper", "triton")
CONTEXT_METHODS = ("ulysses", "all-gather")
SDPA_KERNELS = ("flash", "cudnn", "efficient", "math")


@dataclass
class AttentionConfig:
    """A backend with options, or with something that it cannot do, subclasses this."""

    name: str

    def why_not(self, spec: AttentionSpec) -> str | None:
        """The reason this backend cannot honour the spec, with a remedy; None when it can."""
        return None

    def repeats_keys(self, spec: AttentionSpec) -> bool:
        """Whether it computes with keys and values that are repeated for each query head."""
        return False

    def reads_mask(self, spec: AttentionSpec) -> bool:
        """Whether it reads from an S × S mask in memory which query sees which key."""
        return self.name == "math"


@dataclass
class FlashConfig(AttentionConfig):
    """`attention=flash`: the kernels of `kernels/flash_attention`."""

    name: str = "flash"
    implementation: str = "auto"
    """auto, hopper or triton."""

    def __post_init__(self) -> None:
        if self.implementation not in ("auto", *FLASH_IMPLEMENTATIONS):
            raise ValueError(
                f"attention.implementation={self.implementation!r} is unknown; "
                f"use auto, {', '.join(FLASH_IMPLEMENTATIONS)}"
            )

    def why_not(self, spec: AttentionSpec) -> str | None:
        if find_spec("triton") is None:
            return "flash-gpt's kernels need Triton, which is not installed; use attention=auto or pip install triton"
        if spec.capability is None and not is_triton_interpreted():
            return "flash-gpt's Triton kernels run on NVIDIA GPUs from sm_80 on, not on a CPU; use attention=auto"
        if spec.capability is not None and spec.capability < (8, 0):
            found = "sm_{}{}".format(*spec.capability)
            return f"flash-gpt's Triton kernels run on NVIDIA GPUs from sm_80 on, not on {found}; use attention=auto"
        if spec.head_dim not in range(16, 257, 8):
            return (
                f"flash-gpt's kernels take a head_dim that is a multiple of 8 from 16 to 256, not {spec.head_dim}; "
                f"use attention=auto or change model.head_dim"
            )
        if spec.dtype not in ("bfloat16", "float16", "float32"):
            return f"flash-gpt's kernels compute in bfloat16, float16 and float32, not {spec.dtype}; use attention=auto"
        if self.implementation == "hopper" and not has_hopper_kernels(spec):
            found = "a CPU" if spec.capability is None else "sm_{}{}".format(*spec.capability)
            return (
                f"attention.implementation=hopper computes in bfloat16 and float16 on sm_90, not in {spec.dtype} on "
                f"{found}; use attention.implementation=auto"
            )
        return None


def has_hopper_kernels(spec: AttentionSpec) -> bool:
    """Whether flash-gpt has kernels made for this GPU and dtype, beside the portable ones."""
    return spec.capability == (9, 0) and spec.dtype in ("bfloat16", "float16")


def is_triton_interpreted() -> bool:
    """Whether Triton's kernels run on the CPU, in its interpreter: exact and very slow, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@dataclass
class SdpaConfig(AttentionConfig):
    """`attention=sdpa`: PyTorch's scaled_dot_product_attention, and FlashAttention-2 over document lengths."""

    name: str = "sdpa"
    kernel: str = "auto"
    """auto, flash, cudnn, efficient or math."""

    def __post_init__(self) -> None:
        if self.kernel not in ("auto", *SDPA_KERNELS):
            raise ValueError(f"attention.kernel={self.kernel!r} is unknown; use auto, {', '.join(SDPA_KERNELS)}")

    def why_not(self, spec: AttentionSpec) -> str | None:
        if spec.softcap > 0:
            return f"no SDPA kernel caps scores (softcap={spec.softcap:g}); use attention=auto, flex or math"
        if spec.capability is None and self.kernel in ("cudnn", "efficient"):
            return f"attention.kernel={self.kernel} runs on CUDA only; use attention.kernel=auto or math"
        if spec.capability is None or spec.is_plain:
            return None
        masks = {"documents": spec.masks_documents, "a window": spec.window is not None}
        masked = " and ".join(mask for mask, is_asked in masks.items() if is_asked)
        if self.kernel == "cudnn":
            without = {"documents": "data.document_mask=false", "a window": "model.window=null"}
            remedy = " ".join(without[mask] for mask, is_asked in masks.items() if is_asked)
            return f"PyTorch does not hand {masked} to cuDNN; use attention.kernel=auto, or {remedy}"
        if self.kernel == "flash" and not takes_varlen(spec):
            return (
                f"PyTorch's flash kernel masks {masked} only causally, in bf16 or fp16, from sm_80 on and "
                f"for a head_dim that is a multiple of 8 up to 256; use attention.kernel=auto"
            )
        return None

    def repeats_keys(self, spec: AttentionSpec) -> bool:
        """As PyTorch's cuDNN and efficient kernels want it."""
        return spec.n_kv_heads != spec.n_heads and self.likely(spec) in ("cudnn", "efficient")

    def reads_mask(self, spec: AttentionSpec) -> bool:
        on_cpu = spec.capability is None  # whose flash kernel takes a mask, too
        return not spec.is_plain and (on_cpu or self.likely(spec) in ("efficient", "math"))

    def likely(self, spec: AttentionSpec) -> str:
        """What `sdpa.choose_kernel` will find, where PyTorch cannot be asked."""
        if self.kernel != "auto":
            return self.kernel
        if spec.capability is None:
            return "flash"
        if spec.dtype not in ("bfloat16", "float16") or not (spec.is_plain or takes_varlen(spec)):
            return "efficient"
        return "cudnn" if spec.is_plain and spec.capability >= (9, 0) else "flash"


def takes_varlen(spec: AttentionSpec) -> bool:
    """Whether PyTorch's FlashAttention-2 over cumulative document lengths computes this."""
    is_low_precision = spec.dtype in ("bfloat16", "float16")
    has_kernel = spec.capability is not None and spec.capability >= (8, 0)
    return spec.causal and has_kernel and is_low_precision and spec.head_dim in range(8, 257, 8)


@dataclass
class FlexConfig(AttentionConfig):
    """`attention=flex`: PyTorch's FlexAttention."""

    name: str = "flex"

    def why_not(self, spec: AttentionSpec) -> str | None:
        if spec.capability is not None and spec.head_dim < 16:
            return f"FlexAttention's kernel needs head_dim ≥ 16, not {spec.head_dim}; use attention=sdpa or math"
        return None


ATTENTIONS: dict[str, type[AttentionConfig]] = {
    "auto": AttentionConfig,
    "flash": FlashConfig,
    "sdpa": SdpaConfig,
    "flex": FlexConfig,
    "math": AttentionConfig,
}


def context_method(asked: str, n_heads: int, size: int, head_groups: int = 1) -> str:
    """How `size` ranks that share rows attend (`model.attention.context`); auto: by ulysses where that can be.

    Args:
        asked: auto, ulysses or all-gather. head_groups: in as many groups of heads attention is computed one by one.
    Raises:
        ValueError: the heads forbid what was asked for.
    """
    divides = n_heads % (size * head_groups) == 0
    if asked == "ulysses" and not divides:
        heads = (
            f"{n_heads} heads" if head_groups == 1 else f"each of memory.head_groups={head_groups} of {n_heads} heads"
        )
        raise ValueError(
            f"parallel.context_method=ulysses divides heads evenly, and {heads} cannot be divided among {size} ranks; "
            f"use auto or all-gather"
        )
    return asked if asked != "auto" else "ulysses" if divides else "all-gather"


def context_spec(spec: AttentionSpec, method: str, size: int) -> AttentionSpec:
    """What the backend computes on each of `size` ranks that share rows of `spec`."""
    if method == "all-gather":
        return spec
    kv_heads = spec.n_kv_heads // gcd(spec.n_kv_heads, size)
    return replace(spec, n_heads=spec.n_heads // size, n_kv_heads=kv_heads, seq_len=ceil(spec.seq_len / size) * size)
