"""Sampling text from a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from .attention.config import AttentionConfig
from .attention.math import MathAttention
from .gpt import GPT


@torch.no_grad()
def generate(
    model: GPT,
    prompt: Sequence[int],
    num_tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    stop_id: int | None = None,
    max_context: int = 512,
) -> list[int]:
    """Continue a prompt by sampling.

    The whole context is read again for every token, uncompiled and with `math` attention, whose rows may have any
    length: made for looking at samples during training, not for serving.

    Args:
        prompt: token ids, at least one. num_tokens: how many to add at most.
        temperature: divides the logits; 0 takes the most probable token. top_k: only these many candidates.
        stop_id: sampling ends before this token. max_context: only so many last tokens are read.
    Returns:
        prompt and continuation.
    """
    spec = replace(model.attention.spec, max_documents=None)
    attention = MathAttention(spec, AttentionConfig(name="math"))
    device = spec.device
    generator = torch.Generator(device).manual_seed(seed)
    max_context = min(max_context, spec.seq_len)
    ids = list(prompt)
    for _ in range(num_tokens):
        tokens_BS = torch.tensor([ids[-max_context:]], device=device)
        logits_V = model(tokens_BS, attention=attention)[0, -1].float()
        if temperature == 0:
            next_id = int(logits_V.argmax())
        else:
            values, candidates = logits_V.topk(min(top_k, logits_V.numel()))
            choice = torch.multinomial(torch.softmax(values / temperature, -1), 1, generator=generator)
            next_id = int(candidates[choice])
        if next_id == stop_id:
            break
        ids.append(next_id)
    return ids
