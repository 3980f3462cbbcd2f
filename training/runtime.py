"""The machine at hand: which device, precision and attention a configuration means here."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from model.attention import build_attention
from model.attention.base import AttentionBackend, AttentionSpec

from .config import TrainConfig


@dataclass(frozen=True)
class Runtime:
    """Where and how a run computes: `device`, `precision` and `compile` with every auto decided."""

    device: torch.device
    precision: str
    compile: bool

    @property
    def dtype(self) -> torch.dtype:
        """Of matrix products and attention."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def resolve_runtime(config: TrainConfig) -> Runtime:
    """Decide every `auto` from the machine at hand.

    Raises:
        ValueError: what was asked for is not there.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("this version trains in one process; run python train.py without torchrun")
    has_cuda = torch.cuda.is_available()
    if config.device == "cuda" and not has_cuda:
        raise ValueError(
            "device=cuda, but PyTorch sees no CUDA GPU here; use device=cpu or install a CUDA build of torch"
        )
    device = torch.device("cuda" if has_cuda and config.device != "cpu" else "cpu")
    has_bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if has_bf16 else "fp32"
    if precision == "tf32" and not has_bf16:
        raise ValueError("precision=tf32 needs an NVIDIA GPU from the A100 on; use precision=fp32")
    if precision == "bf16" and device.type == "cuda" and not has_bf16:
        raise ValueError(
            f"precision=bf16 needs an A100 or newer, not {torch.cuda.get_device_name()}; use precision=fp32"
        )
    return Runtime(device, precision, device.type == "cuda" if config.compile == "auto" else bool(config.compile))


def attention_for(config: TrainConfig, runtime: Runtime, max_documents: int | None = None) -> AttentionBackend:
    """The attention backend of this run.

    Args:
        max_documents: most documents in a row, where that is known; any bound does to learn whether a backend can.
    Raises:
        ValueError: the backend that was named cannot do what this run needs of it.
    """
    model = config.model
    assert model.n_kv_heads is not None
    assert model.head_dim is not None
    spec = AttentionSpec(
        n_heads=model.n_heads,
        n_kv_heads=model.n_kv_heads,
        head_dim=model.head_dim,
        seq_len=config.seq_len,
        device=runtime.device,
        dtype=runtime.dtype,
        window=model.window,
        max_documents=(max_documents or config.seq_len) if config.data.document_mask else None,
        softcap=model.attention_softcap,
        scale=model.attention_scale,
    )
    return build_attention(config.attention, spec)
