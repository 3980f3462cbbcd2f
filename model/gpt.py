"""The transformer. GPT-2 and Llama are the same page with different choices.

Shape suffixes: B batch, S sequence, E model width, H query heads, G key/value heads, D head dimension, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import linear_cross_entropy

from .attention.base import AttentionBackend
from .config import ModelConfig
from .linear import Linear, is_one_row
from .rotary import attention_scaling, inverse_frequencies, rotate

Attend = Callable[[Tensor, Tensor, Tensor, Any], Tensor]
"""(q, k, v, mask) → out: an `AttentionBackend`, or what its `for_layer` returned."""
Rotation = tuple[Tensor, Tensor] | None
Compiled = Callable[..., Tensor]


class RMSNorm(nn.RMSNorm):
    """In the weight's dtype, float32, whatever comes in: autocast of PyTorch 2.11 does not know of it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class Attention(nn.Module):
    """Self-attention of one layer: x (B, S, E) → (B, S, E). `attend` computes it, between the projections."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.head_dim is not None
        assert config.n_kv_heads is not None
        self.heads = (config.n_heads, config.n_kv_heads, config.n_kv_heads)
        self.head_dim = config.head_dim
        self.qkv = Linear(config.dim, sum(self.heads) * self.head_dim, bias=config.bias or config.qkv_bias)
        self.out = Linear(config.n_heads * self.head_dim, config.dim, bias=config.bias)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x_BSE: Tensor, attend: Attend, mask: Any, rotation: Rotation) -> Tensor:
        return self.out(self.by_heads(self.qkv(x_BSE), attend, mask, rotation))

    def by_heads(self, qkv_BSQ: Tensor, attend: Attend, mask: Any, rotation: Rotation) -> Tensor:
        """What lies between the projections: (B, S, H · D) of queries, keys and values side by side."""
        q_BSHD, k_BSGD, v_BSGD = qkv_BSQ.unflatten(-1, (-1, self.head_dim)).split(self.heads, dim=2)
        q_BSHD, k_BSGD = self.position(q_BSHD, k_BSGD, rotation)
        return attend(q_BSHD, k_BSGD, v_BSGD, mask).flatten(2)

    def position(self, q_BSHD: Tensor, k_BSGD: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """Queries and keys of some or all heads, normalised and rotated."""
        q_BSHD, k_BSGD = self.q_norm(q_BSHD).to(q_BSHD.dtype), self.k_norm(k_BSGD).to(k_BSGD.dtype)
        if rotation is not None:
            q_BSHD, k_BSGD = rotate(q_BSHD, *rotation), rotate(k_BSGD, *rotation)
        return q_BSHD, k_BSGD


class GELU(nn.Module):
    """GPT-2's MLP, with the tanh approximation of GELU: x (B, S, E) → (B, S, E)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = Linear(config.dim, config.ffn_dim, bias=config.bias)
        self.down = Linear(config.ffn_dim, config.dim, bias=config.bias)

    def forward(self, x_BSE: Tensor) -> Tensor:
        return self.down(self.activate(self.up(x_BSE)))

    def activate(self, up_BSF: Tensor) -> Tensor:
        return F.gelu(up_BSF, approximate="tanh")

    @property
    def first(self) -> Linear:
        return self.up


class SwiGLU(nn.Module):
    """Llama's MLP (Shazeer 2020, arXiv:2002.05202): x (B, S, E) → (B, S, E)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = Linear(config.dim, 2 * config.ffn_dim, bias=config.bias)
        self.down = Linear(config.ffn_dim, config.dim, bias=config.bias)

    def forward(self, x_BSE: Tensor) -> Tensor:
        return self.down(self.activate(self.gate_up(x_BSE)))

    def activate(self, gate_up_BSU: Tensor) -> Tensor:
        gate_BSF, up_BSF = gate_up_BSU.chunk(2, dim=-1)
        return F.silu(gate_BSF) * up_BSF

    @property
    def first(self) -> Linear:
        return self.gate_up


def _norm(config: ModelConfig) -> nn.Module:
    if config.norm == "rmsnorm":
        return RMSNorm(config.dim, config.norm_eps)
    return nn.LayerNorm(config.dim, config.norm_eps, bias=config.bias)


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)). Blocks are what is compiled, recomputed and sharded."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = _norm(config)
        self.attention = Attention(config)
        self.mlp_norm = _norm(config)
        self.mlp: SwiGLU | GELU = SwiGLU(config) if config.mlp == "swiglu" else GELU(config)

    def forward(
        self, x_BSE: Tensor, attend: Attend, mask: Any, rotation: Rotation, compiled: Compiled | None = None
    ) -> Tensor:
        """`compiled`: what `compile` gave, to compute it; what shards a block hooks into the call around that."""
        if compiled is not None:
            return compiled(x_BSE, attend, mask, rotation)
        if is_one_row(x_BSE) and self.is_plain_llama:
            return self.of_one_row(x_BSE, attend, mask, rotation)
        x_BSE = x_BSE + self.attention(self.attention_norm(x_BSE), attend, mask, rotation)
        return x_BSE + self.mlp(self.mlp_norm(x_BSE))

    @property
    def is_plain_llama(self) -> bool:
        """Neither in 8 bits nor sharded: FSDP makes a subclass of a sharded block, and writes its weights just before
        they are read, which `matvec` forbids."""
        parts = (self, self.mlp_norm, self.mlp, self.mlp.down)
        return tuple(map(type, parts)) == (Block, RMSNorm, SwiGLU, Linear)

    def of_one_row(self, x_BSE: Tensor, attend: Attend, mask: Any, rotation: Rotation) -> Tensor:
        """`forward` of a Llama's single token without gradients: norms, SwiGLU and sums are parts of the products."""
        attention, mlp, first, second = self.attention, self.mlp, self.attention_norm, self.mlp_norm
        assert isinstance(first, RMSNorm)
        assert isinstance(second, RMSNorm)
        qkv_BSQ = attention.qkv.of_one_row(x_BSE, norm=first)
        attended_BSQ = attention.by_heads(qkv_BSQ, attend, mask, rotation)
        x_BSE = attention.out.of_one_row(attended_BSQ, residual=x_BSE)
        return mlp.down.of_one_row(mlp.first.of_one_row(x_BSE, norm=second, swiglu=True), residual=x_BSE)

    def compile_forward(self, **options: Any) -> Compiled | None:
        """This block's forward pass as torch.compile makes it, with its options."""
        compiled: Compiled = torch.compile(self.forward, **options)
        return compiled


class Head(Linear):
    """The output head: logits, or the summed loss. Always called as a module: what shards it hooks into that call."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.dim, config.vocab_size, bias=False)
        self.softcap, self.chunk_size = config.logit_softcap, config.loss_chunk_size
        self.z_loss = self.label_smoothing = 0.0

    def forward(self, x_BSE: Tensor, targets_BS: Tensor | None = None, per_token: bool = False) -> Tensor:
        """Logits (B, S, V); with targets the loss in nats, for which not all logits exist at once: what is trained on,
        −log p(target) with `z_loss` and `label_smoothing`, summed; or per_token −log p(target) alone, (B, S)."""
        if targets_BS is not None:
            loss = linear_cross_entropy(
                x_BSE.flatten(0, 1),
                self.weight,
                targets_BS.flatten(),
                operand_VE=None if self.working is None else self.operand(),
                softcap=self.softcap,
                z_loss=0.0 if per_token else self.z_loss,
                label_smoothing=0.0 if per_token else self.label_smoothing,
                chunk_size=self.chunk_size,
                reduction="none" if per_token else "sum",
            )
            return loss.unflatten(0, targets_BS.shape) if per_token else loss
        logits_BSV = super().forward(x_BSE)
        return self.softcap * torch.tanh(logits_BSV / self.softcap) if self.softcap > 0 else logits_BSV


class GPT(nn.Module):
    """A decoder-only language model whose attention is any `AttentionBackend`.

    `training.assemble` is where a run's model is made; built directly, a model is eager, on the default device.
    """

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
        self.head = Head(config)
        if config.position == "rotary":
            self.register_buffer("frequencies", None, persistent=False)
        self.residual_dtype: torch.dtype | None = None
        """Of the residual stream; None: the weights', under autocast, too."""
        self._compiled: Compiled | None = None
        self._compiled_blocks: Sequence[Compiled | None] | None = None
        self._compiled_loss: Compiled | None = None
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """First weights; draws from torch's default generator, one parameter after the other."""
        with self.embedding.weight.device:
            self.begin()
        for name, parameter in self.named_parameters():
            self.draw(name, parameter)

    def begin(self) -> None:
        """What is computed rather than drawn, on the default device, and which weights are one."""
        if self.config.tie_head:
            self.head.weight = self.embedding.weight
        if self.config.position == "rotary":
            assert self.config.head_dim is not None
            self.frequencies = inverse_frequencies(self.config.rotary, self.config.head_dim)

    def draw(self, name: str, parameter: Tensor) -> None:
        """GPT-2's initialisation: N(0, 0.02²), and 0.02 / √(2 · layers) where a layer adds to the residual stream."""
        if parameter.dim() == 2:
            is_residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.n_layers) if is_residual else 0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)

    def materialize(self, device: torch.device) -> None:
        """Give a model built on the meta device memory on `device`, and the weights it would have been built with."""
        self.to_empty(device=device)
        with device:
            for module in self.modules():
                # As PyTorch's constructors do: norms become 1, and as many random numbers are drawn.
                getattr(module, "reset_parameters", lambda: None)()
            self.initialize()

    def compile(self, unit: str = "model", **options: Any) -> None:
        """Compile for each shape by itself; the mask is still prepared eagerly, once per batch.

        Args:
            unit: what training sees at a time: "model", one graph; or "block", one graph that all blocks share, and
                one for the loss. Without gradients it is always "block", which compiles sooner.
            options: of torch.compile.
        """
        # Not for any length: rows of validation, which come first, may be shorter than those of training.
        options = {"dynamic": False, **options}
        blocks: Iterable[Any] = self.blocks
        self._compiled = torch.compile(self.steps, **options) if unit == "model" else None
        self._compiled_blocks = [block.compile_forward(**options) for block in blocks]
        self._compiled_loss = torch.compile(self.loss, **options)

    @property
    def is_one_graph(self) -> bool:
        """Whether training sees the whole model as one compiled graph, so that blocks are not called one by one."""
        return self._compiled is not None

    def forward(
        self,
        tokens_BS: Tensor,
        targets_BS: Tensor | None = None,
        starts_BS: Tensor | None = None,
        positions_BS: Tensor | None = None,
        attention: AttentionBackend | None = None,
        per_token: bool = False,
        places_BS: Tensor | None = None,
        split: Tensor | None = None,
    ) -> Tensor:
        """Logits, or with targets the summed loss.

        Args:
            tokens_BS: int64. targets_BS: int64, −100 where no loss is wanted.
            starts_BS: int32, index in its row of the first token of each token's document; attention does not cross
                documents. None: a row is one document.
            positions_BS: int64 (B, S), or (1, S) for all rows: each token's place in its document. None: rows are
                whole, and places are counted from `starts_BS`.
            attention: another backend for this call only, uncompiled (such as a cache around one).
            per_token: the loss of each token instead of their sum; made for evaluation, without gradients.
            places_BS: bool; without targets, where logits are wanted: there are no others.
            split: of shards of rows, which rank holds which tokens; see `model.attention.context`.
        Returns:
            logits (B, S, V) without targets, or those of the places (places, V) in the order of rows; with targets
            Σ −log p(target) in nats, a float32 scalar (and what the head adds to it in training), or with per_token
            each −log p(target), float32 (B, S), 0 where no loss is wanted.
        """
        S = tokens_BS.shape[1]
        if positions_BS is None:
            positions_BS = torch.arange(S, device=tokens_BS.device)[None]
            positions_BS = positions_BS if starts_BS is None else positions_BS - starts_BS
        is_whole = attention is None and torch.is_grad_enabled()
        steps = self._compiled if is_whole and self._compiled else self.steps
        attention = attention or self.attention
        mask = attention.mask(starts_BS, S, split)
        if places_BS is not None:
            return self.logits(self.hidden(tokens_BS, positions_BS, attention, mask)[places_BS])
        return steps(tokens_BS, targets_BS, positions_BS, attention, mask, per_token)

    def steps(
        self,
        tokens_BS: Tensor,
        targets_BS: Tensor | None,
        positions_BS: Tensor,
        attention: AttentionBackend,
        mask: Any,
        per_token: bool = False,
    ) -> Tensor:
        """`forward` after its arguments are complete: hidden states, then the loss or the logits."""
        x_BSE = self.hidden(tokens_BS, positions_BS, attention, mask)
        if targets_BS is None:
            return self.logits(x_BSE)
        compiled = self._compiled_loss if self._is_by_block(attention) else None
        return (compiled or self.loss)(x_BSE, targets_BS, per_token)

    def hidden(self, tokens_BS: Tensor, positions_BS: Tensor, attention: AttentionBackend, mask: Any) -> Tensor:
        """The residual stream after the last block (B, S, E), before the final norm; in `residual_dtype`."""
        x_BSE, rotation = self.embedding(tokens_BS), None
        if self.config.position == "learned":
            x_BSE = x_BSE + self.positions(positions_BS)
        else:
            angles_BS1F = (positions_BS[..., None].float() * self.frequencies)[:, :, None]
            stretch = attention_scaling(self.config.rotary)
            rotation = angles_BS1F.cos() * stretch, angles_BS1F.sin() * stretch
        if self.residual_dtype is not None:
            x_BSE = x_BSE.to(self.residual_dtype)
        compiled = self._compiled_blocks if self._is_by_block(attention) else None
        for layer, block in enumerate(self.blocks):
            x_BSE = block(x_BSE, attention.for_layer(layer), mask, rotation, compiled and compiled[layer])
        return x_BSE

    def _is_by_block(self, attention: AttentionBackend) -> bool:
        """Whether the compiled blocks may serve: not inside the graph of the whole model, nor for another backend."""
        return attention is self.attention and not torch.compiler.is_compiling()

    def loss(self, x_BSE: Tensor, targets_BS: Tensor, per_token: bool = False) -> Tensor:
        """Σ −log p(target) in nats, a float32 scalar, from `hidden`'s states; per_token: each, (B, S)."""
        loss: Tensor = self.head(self.norm(x_BSE), targets_BS, per_token)
        return loss

    def logits(self, x_BSE: Tensor) -> Tensor:
        """(B, S, V) from `hidden`'s states."""
        logits_BSV: Tensor = self.head(self.norm(x_BSE))
        return logits_BSV
