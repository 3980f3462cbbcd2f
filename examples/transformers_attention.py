"""A model of Hugging Face transformers trains with our attention; its own gives the same loss.

pip install flash-gpt transformers; python examples/transformers_attention.py, outside of this repository's root: there
the folder `kernels` would be taken for Hugging Face's package of that name.
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: exact, and very slow

from flash_gpt.transformers import register
from transformers import LlamaConfig, LlamaForCausalLM

device = "cuda" if torch.cuda.is_available() else "cpu"
heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
config = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=1, **heads)
tokens = torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(0)).to(device)
padding = torch.ones_like(tokens)
padding[0, :11] = 0  # the first row is shorter, padded on the left
labels = tokens.masked_fill(padding == 0, -100)
labels[0, 11] = -100  # what the last padding predicts has no meaning

losses = {}
for implementation in ("eager", register()):
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(config, attn_implementation=implementation).to(device)
    loss = model(tokens, attention_mask=padding, labels=labels).loss
    loss.backward()
    losses[implementation] = loss.item()
print(losses)
assert abs(losses["eager"] - losses["FlashGPT"]) < 1e-4
