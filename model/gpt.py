"""The transformer. GPT-2 and Llama are the same page with different choices.

Shape suffixes: B batch, S sequence, E model width, H query heads, G key/value heads, D head dimension, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import linear_cross_entropy

from .attention.base import AttentionBackend
from .config import ModelConfig
from .rotary import attention_scaling, inverse_frequencies, rotate

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Rotation = tuple[Tensor, Tensor] | None


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.head_dim is not None
        assert config.n_kv_heads is not None
        self.heads = (config.n_heads, config.n_kv_heads, config.n_kv_heads)
        self.head_dim = config.head_dim
        self.qkv = nn.Linear(config.dim, sum(self.heads) * self.head_dim, bias=config.bias)
        self.out = nn.Linear(config.n_heads * self.head_dim, config.dim, bias=config.bias)
        self.q_norm = nn.RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x_BSE: Tensor, attend: Attend, rotation: Rotation) -> Tensor:
        q_BSHD, k_BSGD, v_BSGD = self.qkv(x_BSE).unflatten(-1, (-1, self.head_dim)).split(self.heads, dim=2)
        q_BSHD, k_BSGD = self.q_norm(q_BSHD).to(v_BSGD.dtype), self.k_norm(k_BSGD).to(v_BSGD.dtype)
        if rotation is not None:
            q_BSHD, k_BSGD = rotate(q_BSHD, *rotation), rotate(k_BSGD, *rotation)
        return self.out(attend(q_BSHD, k_BSGD, v_BSGD).flatten(2))


class GELU(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.dim, config.ffn_dim, bias=config.bias)
        self.down = nn.Linear(config.ffn_dim, config.dim, bias=config.bias)

    def forward(self, x_BSE: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_BSE), approximate="tanh"))


class SwiGLU(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.dim, 2 * config.ffn_dim, bias=config.bias)
        self.down = nn.Linear(config.ffn_dim, config.dim, bias=config.bias)

    def forward(self, x_BSE: Tensor) -> Tensor:
        gate, up = self.gate_up(x_BSE).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def _norm(config: ModelConfig) -> nn.Module:
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.dim, config.norm_eps)
    return nn.LayerNorm(config.dim, config.norm_eps, bias=config.bias)


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = _norm(config)
        self.attention = Attention(config)
        self.mlp_norm = _norm(config)
        self.mlp = SwiGLU(config) if config.mlp == "swiglu" else GELU(config)

    def forward(self, x_BSE: Tensor, attend: Attend, rotation: Rotation) -> Tensor:
        x_BSE = x_BSE + self.attention(self.attention_norm(x_BSE), attend, rotation)
        return x_BSE + self.mlp(self.mlp_norm(x_BSE))


class GPT(nn.Module):
    """A decoder-only language model whose attention is any `AttentionBackend`."""

    frequencies: Tensor  # of the rotary embedding

    def __init__(self, config: ModelConfig, attention: AttentionBackend) -> None:
        super().__init__()
        self.config = config
        self.attention = attention
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        if config.position == "learned":
            self.positions = nn.Embedding(config.n_positions, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = _norm(config)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_head:
            self.head.weight = self.embedding.weight
        if config.position == "rotary":
            assert config.head_dim is not None
            self.register_buffer("frequencies", inverse_frequencies(config.rotary, config.head_dim), persistent=False)
        self._decode: Callable[..., Tensor] = self.decode
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """GPT-2's initialisation: N(0, 0.02²), and 0.02 / √(2 · layers) where a layer adds to the residual stream."""
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                is_residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
                nn.init.normal_(parameter, std=residual_std if is_residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the transformer, for each shape by itself; the mask is still prepared eagerly, once per batch."""
        # Otherwise rows of validation that are shorter than those of training would make PyTorch compile the latter,
        # which come second, for any length.
        self._decode = torch.compile(self.decode, *args, **{"dynamic": False, **kwargs})

    def forward(
        self,
        tokens_BS: Tensor,
        targets_BS: Tensor | None = None,
        starts_BS: Tensor | None = None,
        attention: AttentionBackend | None = None,
    ) -> Tensor:
        """Logits, or with targets the summed loss.

        Args:
            tokens_BS: int64. targets_BS: int64, −100 where no loss is wanted.
            starts_BS: int32, index in its row of the first token of each token's document. Attention does not cross
                documents, and positions count from there. None: a row is one document.
            attention: another backend for this call only (generation uses one that fits its short rows).
        Returns:
            logits (B, S, V) without targets; with targets Σ −log p(target) in nats, a float32 scalar.
        """
        attention = attention or self.attention
        decode = self._decode if attention is self.attention else self.decode
        return decode(tokens_BS, targets_BS, starts_BS, attention, attention.prepare(starts_BS, tokens_BS.shape[1]))

    def decode(
        self,
        tokens_BS: Tensor,
        targets_BS: Tensor | None,
        starts_BS: Tensor | None,
        attention: AttentionBackend,
        mask: Any,
    ) -> Tensor:
        config = self.config

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, k, v, mask)

        positions_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)[None]
        if starts_BS is not None:
            positions_BS = positions_BS - starts_BS
        x_BSE = self.embedding(tokens_BS)
        rotation = None
        if config.position == "learned":
            x_BSE = x_BSE + self.positions(positions_BS)
        else:
            angles_BS1F = (positions_BS[..., None].float() * self.frequencies)[:, :, None]
            stretch = attention_scaling(config.rotary)
            rotation = angles_BS1F.cos() * stretch, angles_BS1F.sin() * stretch

        for block in self.blocks:
            x_BSE = block(x_BSE, attend, rotation)
        x_BSE = self.norm(x_BSE)

        if targets_BS is not None:
            return linear_cross_entropy(
                x_BSE.flatten(0, 1),
                self.head.weight,
                targets_BS.flatten(),
                softcap=config.logit_softcap,
                chunk_size=config.loss_chunk_size,
            )
        logits_BSV = self.head(x_BSE)
        if config.logit_softcap > 0:
            logits_BSV = config.logit_softcap * torch.tanh(logits_BSV / config.logit_softcap)
        return logits_BSV
