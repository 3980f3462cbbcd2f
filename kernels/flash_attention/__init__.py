"""Flash attention: the public functions (interface), the PyTorch operators (op), and the kernels below them."""

from .decode import flash_decode
from .documents import intervals_from_cu_seqlens, starts_from_cu_seqlens, starts_from_separators
from .interface import flash_attention, flash_attention_backward, flash_attention_varlen
from .op import FLASH_ATTENTION_OPS

__all__ = [
    "FLASH_ATTENTION_OPS",
    "flash_attention",
    "flash_attention_backward",
    "flash_attention_varlen",
    "flash_decode",
    "intervals_from_cu_seqlens",
    "starts_from_cu_seqlens",
    "starts_from_separators",
]
