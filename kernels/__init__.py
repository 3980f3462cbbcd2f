"""Exact attention and the output head's loss as functions of tensors. Imports torch and Triton only.

Called `flash_gpt` where it is installed, `kernels` in this repository. docs/library.md lists what there is.

- flash_attention, flash_attention_varlen, flash_attention_backward, flash_decode: kernels in Triton and Gluon;
- linear_cross_entropy: output head and cross-entropy, with a kernel in Triton;
- starts_from_cu_seqlens, starts_from_separators, intervals_from_cu_seqlens: which keys each query sees;
- attention, visible_pairs, cached_pairs, safe_softmax, split_softmax, online_softmax: the definitions in PyTorch.
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
