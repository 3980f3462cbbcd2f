"""Attention and its companions: tensors in, tensors out. Imports torch (and Triton) only.

Installed elsewhere as `flash_gpt`; inside this repository as `kernels`.
"""

from .linear_cross_entropy import linear_cross_entropy
from .reference import attention, online_softmax, safe_softmax, split_softmax, visible_pairs

__version__ = "0.1.0"

__all__ = [
    "attention",
    "linear_cross_entropy",
    "online_softmax",
    "safe_softmax",
    "split_softmax",
    "visible_pairs",
]
