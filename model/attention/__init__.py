"""Attention by name: `build_attention` turns a name and a spec into the backend that honours it, or says why not."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from .config import ATTENTIONS, AttentionConfig

if TYPE_CHECKING:
    from .base import AttentionBackend, AttentionSpec

# In the order `attention=auto` tries them: fastest first. Imported on demand: FlexAttention alone brings PyTorch's
# compiler, 2 s, and the configuration is checked before torch itself is loaded.
BACKENDS = {
    "flash": "FlashAttention",
    "sdpa": "SdpaAttention",
    "flex": "FlexAttention",
    "math": "MathAttention",
}


def load_backend(name: str) -> type[AttentionBackend]:
    """The class behind a name."""
    backend: type[AttentionBackend] = getattr(import_module(f".{name}", __name__), BACKENDS[name])
    return backend


def build_attention(config: AttentionConfig, spec: AttentionSpec) -> AttentionBackend:
    """The backend named by the config; `auto` is the first that can honour the spec.

    Raises:
        ValueError: the name is unknown, or the backend cannot honour the spec (with its reason).
    """
    if config.name == "auto":
        for name in BACKENDS:
            backend, options = load_backend(name), ATTENTIONS[name](name=name)
            if backend.why_not(spec, options) is None:
                return backend(spec, options)
    if config.name not in BACKENDS:
        raise ValueError(f"attention={config.name} is unknown; use {', '.join(ATTENTIONS)}")
    backend = load_backend(config.name)
    reason = backend.why_not(spec, config)
    if reason is not None:
        raise ValueError(f"attention={config.name}: {reason}")
    return backend(spec, config)


__all__ = ["ATTENTIONS", "BACKENDS", "AttentionConfig", "build_attention", "load_backend"]
