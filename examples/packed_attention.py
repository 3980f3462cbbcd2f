"""Documents of different lengths in one row: attention within each, no padding, no mask in memory.

pip install flash-gpt, and on a machine without a GPU numpy as well: python examples/packed_attention.py
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: exact, and very slow

from flash_gpt import attention, flash_attention, flash_attention_varlen, starts_from_cu_seqlens

device = "cuda" if torch.cuda.is_available() else "cpu"
lengths = torch.tensor([20, 9, 11], device=device)
cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()  # 0, 20, 29, 40
T, H, H_kv, D = 40, 2, 1, 16
torch.manual_seed(0)
q, k, v = (torch.randn(T, heads, D, device=device, requires_grad=True) for heads in (H, H_kv, H_kv))

# By the conventions of the flash-attn package: tokens of all documents end to end.
out = flash_attention_varlen(q, k, v, cu_seqlens)
out.square().sum().backward()

# The same as one row of a batch; `starts` says where each token's document begins.
starts = starts_from_cu_seqlens(cu_seqlens, T)
as_row = flash_attention(q[None], k[None], v[None], starts=starts)
torch.testing.assert_close(as_row[0], out)

# And the definition, which holds T × T scores in memory.
defined = attention(q[None], k[None], v[None], starts=starts)
difference = (defined[0] - out).abs().max()
print(f"{len(lengths)} documents, {T} tokens: largest difference from the definition {difference:.1e}")
