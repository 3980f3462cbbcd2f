"""Attention and its companions: tensors in, tensors out. Imports torch (and Triton) only.

Installed elsewhere as `flash_gpt`; inside this repository as `kernels`.
"""

from .flash_attention import (
    FLASH_ATTENTION_OPS,
    flash_attention,
    flash_attention_backward,
    flash_attention_varlen,
    flash_decode,
    intervals_from_cu_seqlens,
    starts_from_cu_seqlens,
    starts_from_separators,
)
from .linear_cross_entropy import linear_cross_entropy
from .reference import attention, cached_pairs, online_softmax, safe_softmax, split_softmax, visible_pairs

__version__ = "0.1.0"

__all__ = [
    "FLASH_ATTENTION_OPS",
    "attention",
    "cached_pairs",
    "flash_attention",
    "flash_attention_backward",
    "flash_attention_varlen",
    "flash_decode",
    "intervals_from_cu_seqlens",
    "linear_cross_entropy",
    "online_softmax",
    "safe_softmax",
    "split_softmax",
    "starts_from_cu_seqlens",
    "starts_from_separators",
    "visible_pairs",
]
