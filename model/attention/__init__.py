"""Attention by name: `build_attention` turns a name and a spec into the backend that honours it, or says why not."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from .config import ATTENTIONS, AttentionConfig, has_hopper_kernels
from .spec import AttentionSpec

if TYPE_CHECKING:
    from .base import AttentionBackend

# Imported on demand: FlexAttention alone brings PyTorch's compiler, 2 s, and what is refused needs no torch at all.
BACKENDS = {
    "flash": "FlashAttention",
    "sdpa": "SdpaAttention",
    "flex": "FlexAttention",
    "math": "MathAttention",
}


def preference(spec: AttentionSpec) -> tuple[str, ...]:
    """The order in which `attention=auto` tries the backends: fastest first."""
    if spec.capability is None:
        return "sdpa", "flex", "math"  # on a CPU, flash is Triton's interpreter: there for those who name it
    # cuDNN: 1.2 times the speed of our portable kernels. Our Hopper kernels are ahead of it up to head_dim 128 and at
    # 256; at 192, forward and backward together take 1.03 (causal) and 1.04 times its time.
    ours_is_faster = has_hopper_kernels(spec) and (spec.head_dim <= 128 or spec.head_dim == 256)
    if spec.capability >= (9, 0) and spec.is_plain and not ours_is_faster:
        return "sdpa", "flash", "flex", "math"
    return "flash", "sdpa", "flex", "math"


def choose_attention(config: AttentionConfig, spec: AttentionSpec) -> AttentionConfig:
    """The backend that the config names, as its options; `auto` is the first that can honour the spec. Needs no torch.

    Raises:
        ValueError: the name is unknown, or the backend cannot honour the spec (with its reason).
    """
    if config.name == "auto":
        options = (ATTENTIONS[name](name=name) for name in preference(spec))
        return next(option for option in options if option.why_not(spec) is None)
    if config.name not in BACKENDS:
        raise ValueError(f"attention={config.name} is unknown; use {', '.join(ATTENTIONS)}")
    reason = config.why_not(spec)
    if reason is not None:
        raise ValueError(f"attention={config.name}: {reason}")
    return config


def build_attention(config: AttentionConfig, spec: AttentionSpec) -> AttentionBackend:
    """The backend named by the config, ready to run.

    Raises:
        ValueError: as `choose_attention`; or PyTorch itself refuses what was asked of it.
    """
    chosen = choose_attention(config, spec)
    backend: type[AttentionBackend] = getattr(import_module(f".{chosen.name}", __name__), BACKENDS[chosen.name])
    return backend(spec, chosen)


__all__ = ["ATTENTIONS", "BACKENDS", "AttentionConfig", "AttentionSpec", "build_attention", "choose_attention"]
