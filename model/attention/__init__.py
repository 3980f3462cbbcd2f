"""Attention by name: `build_attention` turns a name and a spec into the backend that honours it, or says why not."""

from __future__ import annotations

from dataclasses import dataclass

from .base import AttentionBackend, AttentionConfig, AttentionSpec
from .flash import FlashAttention
from .flex import FlexAttention
from .math import MathAttention
from .sdpa import SdpaAttention

# In the order `attention=auto` tries them: fastest first.
BACKENDS: dict[str, type[AttentionBackend]] = {
    backend.name: backend for backend in (FlashAttention, SdpaAttention, FlexAttention, MathAttention)
}


@dataclass
class AutoConfig(AttentionConfig):
    name: str = "auto"


CONFIGS: dict[str, type[AttentionConfig]] = {
    "auto": AutoConfig,
    **{name: backend.Config for name, backend in BACKENDS.items()},
}


def build_attention(config: AttentionConfig, spec: AttentionSpec) -> AttentionBackend:
    """The backend named by the config.

    Raises:
        ValueError: the name is unknown, or the backend cannot honour the spec (with its reason).
    """
    if config.name == "auto":
        for backend in BACKENDS.values():
            options = backend.Config(name=backend.name)
            if backend.why_not(spec, options) is None:
                return backend(spec, options)
    if config.name not in BACKENDS:
        raise ValueError(f"attention={config.name} is unknown; use {', '.join(CONFIGS)}")
    backend = BACKENDS[config.name]
    reason = backend.why_not(spec, config)
    if reason is not None:
        raise ValueError(f"attention={config.name}: {reason}")
    return backend(spec, config)


__all__ = ["BACKENDS", "CONFIGS", "AttentionBackend", "AttentionConfig", "AttentionSpec", "build_attention"]
