"""A block that keeps its input and attention's result, and computes the rest again in the backward pass.

Only attention needs whole rows. All else in a block belongs to a token and exists for one tile of tokens at a time;
attention runs for one group of heads at a time. The two passes, m being the residual stream between attention and MLP:

    forward     by groups   qkv = product(norm(x)), out = attention(q, k, v)
                by tiles    m = x + product(out), y = m + mlp(norm(m))
    backward    by tiles    m and the MLP up to its activation again; the MLP's gradients, dy → dm
                by groups   qkv again; attention's gradients, which are written over q, k and v
                by tiles    the gradients of qkv's product and of the norm, dm → dx

So the MLP's last product is computed once, the other products twice, and attention once where its result is kept;
where it is not, attention is computed twice and qkv three times. Gradients of weights add up in their `.grad`. The
gradient of y is written over until it is that of x: what a block returns has one reader, the next block or the loss.

What exists for all tokens, in numbers a token: E is the width, H, G and D are query heads, key/value heads and head
dimension, g is the number of groups. x, y and their gradients have the residual stream's dtype, LSE is float32, the
others have the dtype of the products:

    forward     x E, out HD, LSE H         and one group's qkv, q, k (2H + 3G)D/g, or y E
    backward    x E, dy E, dqkv (H + 2G)D  and the last group's out, q, k, dout, dq, dk, dv (4H + 3G)D/g, LSE H/g
                beside what attention's kernel needs for that group (flash: dq once more in float32, HD/g)

For the tokens of one tile, uncompiled, there are at most 4U + 4E besides, U being the width of the MLP's first product.

Shape suffixes: B batch, S sequence, N = B · S tokens, T tokens of a tile, E width, H and G query and key/value heads of
a group, W query, key and value heads of all groups, D head dimension, I and O inputs and outputs of a product.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .float8 import quantize
from .gpt import Attend, Attention, Block, Compiled, Rotation
from .kept import Store
from .product import product_of
from .replay import Kept, catch, output, plain, replay


def _normalize(norm: nn.Module, x_TE: Tensor, dtype: torch.dtype) -> Tensor:
    normalized_TE: Tensor = norm(x_TE)
    return normalized_TE.to(dtype)


def _activate(mlp: Any, u_TO: Tensor) -> Tensor:
    activated: Tensor = mlp.activate(u_TO)
    return activated


class Pieces(NamedTuple):
    """What a block computes between its products, each a function that can be compiled."""

    normalize: Callable[[nn.Module, Tensor, torch.dtype], Tensor] = _normalize
    position: Callable[..., tuple[Tensor, Tensor]] = Attention.position
    activate: Callable[[nn.Module, Tensor], Tensor] = _activate
    quantize: Callable[..., list[Tensor]] = quantize


class Recomputed(Block):
    """A block of which little is kept; `activations.apply` makes it of a plain one and sets these attributes."""

    own: Attend
    """The model's attention. With another one (generation) this is a plain block."""
    store: Store
    keeps_attention: bool
    tile: int
    head_groups: int
    pieces: Pieces

    def forward(
        self, x_BSE: Tensor, attend: Attend, mask: Any, rotation: Rotation, compiled: Compiled | None = None
    ) -> Tensor:
        if attend is not self.own:
            return super().forward(x_BSE, attend, mask, rotation)
        if not torch.is_grad_enabled():
            y_BSE, _ = _Pass(self, x_BSE, attend, mask, rotation).forward(x_BSE, plain)
            return y_BSE
        assert x_BSE.requires_grad, "the gradients of a block's weights are computed with the gradient of its input"
        y_BSE = _Recompute.apply(x_BSE, self, attend, mask, rotation)
        return y_BSE

    def compile_forward(self, **options: Any) -> None:
        # Only pieces. A second length, of the last tile or of shorter rows of validation, is compiled as any length.
        options["dynamic"] = None
        pieces: list[Any] = [torch.compile(piece, **options) for piece in Pieces()]
        self.pieces = Pieces(*pieces)


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BSE: Tensor, block: Recomputed, attend: Attend, mask: Any, rotation: Rotation) -> Tensor:
        x_BSE = x_BSE.detach()
        run = _Pass(block, x_BSE, attend, mask, rotation)
        y_BSE, attended = run.forward(x_BSE, catch if block.keeps_attention else plain)
        if not block.keeps_attention:
            attended = []
        ctx.ticket = block.store.keep([x_BSE, *(tensor for tensors, _ in attended for tensor in tensors)])
        ctx.recipes = [recipe for _, recipe in attended]
        ctx.arguments = block, attend, mask, rotation
        device = x_BSE.device.type
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        return y_BSE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BSE: Tensor) -> tuple[Tensor | None, ...]:
        x_BSE, *tensors = ctx.ticket.take()
        attended = []
        for recipe in ctx.recipes:
            attended.append((tensors[: recipe.size], recipe))
            del tensors[: recipe.size]
        block, attend, mask, rotation = ctx.arguments
        dx_BSE = dy_BSE.contiguous()  # the gradient of a plain sum is one number, expanded: that is copied
        with torch.autocast(*ctx.autocast):
            _Pass(block, x_BSE, attend, mask, rotation).backward(x_BSE, dx_BSE, attended)
        return dx_BSE, None, None, None, None


class _Pass:
    """One forward or backward pass over a block, for an input like `x_BSE`. No tensor of tokens is kept in it."""

    def __init__(self, block: Recomputed, x_BSE: Tensor, attend: Attend, mask: Any, rotation: Rotation) -> None:
        self.block, self.pieces, self.attend, self.mask = block, block.pieces, attend, mask
        device, (B, S, _) = x_BSE.device.type, x_BSE.shape
        self.rows = B, S
        self.tiles = _tiles(B * S, block.tile)
        self.angles_N1F = [angle_BS1F.expand(B, -1, -1, -1).flatten(0, 1) for angle_BS1F in rotation or ()]
        dtype = self.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_BSE.dtype
        attention, mlp = block.attention, block.mlp
        layers = attention.qkv, attention.out, mlp.first, mlp.down
        self.qkv, self.out, self.up, self.down = (product_of(layer, dtype, self.pieces.quantize) for layer in layers)
        self.heads = [count // block.head_groups for count in attention.heads]  # of a group
        self.groups = self.qkv.by_heads(attention.heads, block.head_groups)

    def forward(self, x_BSE: Tensor, keep: Callable[..., Kept]) -> tuple[Tensor, list[Kept]]:
        """The block's output, and of attention what `catch` or `plain` keep."""
        x_NE = x_BSE.flatten(0, 1)
        attended = self.attended(x_NE, keep)
        y_BSE, outs = x_BSE.new_empty(x_BSE.shape), self.outs(attended)  # itself, no view: FSDP2 hooks into it
        y_NE = y_BSE.flatten(0, 1)
        for tile in self.tiles:
            m_TE, _ = self.middle(x_NE, outs, tile)
            u_TO = self.up(self.pieces.normalize(self.block.mlp_norm, m_TE, self.dtype))
            torch.add(m_TE, self.down(self.pieces.activate(self.block.mlp, u_TO)), out=y_NE[tile])
            del m_TE, u_TO
        return y_BSE, attended

    def backward(self, x_BSE: Tensor, dx_BSE: Tensor, attended: list[Kept]) -> None:
        """Write the gradient of the input over that of the output, which comes in `dx_BSE`. Empties `attended`."""
        x_NE, dx_NE = x_BSE.flatten(0, 1), dx_BSE.flatten(0, 1)
        attended = attended or self.attended(x_NE, catch)
        outs = self.outs(attended)
        for tile in self.tiles:
            self.mlp_backward(x_NE, outs, dx_NE, tile)
        del outs
        dqkvs = [self.attention_backward(x_NE, group, dx_NE, attended) for group in range(len(self.groups))]
        for tile in self.tiles:
            self.qkv_backward(x_NE, dqkvs, dx_NE, tile)
        for product in (self.qkv, self.out, self.up, self.down):
            product.close()

    # Queries, keys and values

    def projected(self, x_NE: Tensor, group: int) -> Tensor:
        """Queries, keys and values (N, W, D) of a group of heads, before their positions are in them."""
        product = self.groups[group]
        qkv_NO = x_NE.new_empty(len(x_NE), product.num_outputs, dtype=self.dtype)
        for tile in self.tiles:
            product(self.pieces.normalize(self.block.attention_norm, x_NE[tile], self.dtype), out=qkv_NO[tile])
        return qkv_NO.unflatten(1, (sum(self.heads), -1))

    def qkv_backward(self, x_NE: Tensor, dqkvs: list[Tensor], dx_NE: Tensor, tile: slice) -> None:
        of_each = zip(*(dqkv_NWD[tile].split(self.heads, dim=1) for dqkv_NWD in dqkvs), strict=True)
        parts = [part for of_groups in of_each for part in of_groups] if len(dqkvs) > 1 else [dqkvs[0][tile]]
        dqkv_TO = _joined(parts).flatten(1)
        x_TE = _leaf(x_NE[tile])
        with torch.enable_grad():
            n_TE = self.pieces.normalize(self.block.attention_norm, x_TE, self.dtype)
        dn_TE = self.qkv.backward(dqkv_TO, n_TE.detach())
        torch.autograd.backward((x_TE, n_TE), (dx_NE[tile], dn_TE))
        dx_NE[tile] = _grad(x_TE)

    def positioned(self, q_THD: Tensor, k_TGD: Tensor, tile: slice) -> tuple[Tensor, Tensor]:
        rotation = tuple(angle_N1F[tile] for angle_N1F in self.angles_N1F) or None
        return self.pieces.position(self.block.attention, q_THD, k_TGD, rotation)

    # Attention

    def attended(self, x_NE: Tensor, keep: Callable[..., Kept]) -> list[Kept]:
        """Attention's results, group by group."""
        groups = range(len(self.groups))
        return [keep(self.attend, *self.inputs(self.projected(x_NE, group)), self.mask) for group in groups]

    def outs(self, attended: list[Kept]) -> list[Tensor]:
        """Attention's output (N, H, D) of each group."""
        return [output(*results).flatten(0, 1) for results in attended]

    def inputs(self, qkv_NWD: Tensor) -> list[Tensor]:
        """A group's queries (B, S, H, D), keys and values (B, S, G, D), with positions; the values are a view."""
        q_NHD, k_NGD, v_NGD = qkv_NWD.split(self.heads, dim=1)
        placed_NHD, placed_NGD = (x.new_empty(x.shape) for x in (q_NHD, k_NGD))
        for tile in self.tiles:
            placed_NHD[tile], placed_NGD[tile] = self.positioned(q_NHD[tile], k_NGD[tile], tile)
        return [x.unflatten(0, self.rows) for x in (placed_NHD, placed_NGD, v_NGD)]

    def attention_backward(self, x_NE: Tensor, group: int, dm_NE: Tensor, attended: list[Kept]) -> Tensor:
        """The gradient (N, W, D) of what `projected` gives. The first of `attended` is this group's, and leaves it."""
        qkv_NWD = self.projected(x_NE, group)
        dq_NHD, dk_NGD, dv_NGD = self.input_gradients(qkv_NWD, group, dm_NE, attended)
        q_NHD, k_NGD, v_NGD = qkv_NWD.split(self.heads, dim=1)
        for tile in self.tiles:
            q_THD, k_TGD = _leaf(q_NHD[tile]), _leaf(k_NGD[tile])
            with torch.enable_grad():
                positioned = self.positioned(q_THD, k_TGD, tile)
            torch.autograd.backward(positioned, (dq_NHD[tile], dk_NGD[tile]))
            q_NHD[tile], k_NGD[tile] = _grad(q_THD), _grad(k_TGD)
        v_NGD.copy_(dv_NGD)
        return qkv_NWD

    def input_gradients(self, qkv_NWD: Tensor, group: int, dm_NE: Tensor, attended: list[Kept]) -> tuple[Tensor, ...]:
        """Gradients of a group's `inputs`, (N, H, D) and (N, G, D)."""
        leaves = [_leaf(x) for x in self.inputs(qkv_NWD)]
        out_BSHD = replay(*attended.pop(0), self.attend, *leaves, self.mask)
        dout_NI = out_BSHD.new_empty(len(dm_NE), out_BSHD[0, 0].numel())
        columns = slice(group * dout_NI.shape[1], (group + 1) * dout_NI.shape[1])
        for tile in self.tiles:
            self.out.input_gradient(dm_NE[tile].to(self.dtype), columns, out=dout_NI[tile])
        gradients = torch.autograd.grad(out_BSHD, leaves, dout_NI.view(out_BSHD.shape))
        return tuple(gradient.flatten(0, 1) for gradient in gradients)

    # After attention

    def middle(self, x_NE: Tensor, outs: list[Tensor], tile: slice) -> tuple[Tensor, Tensor]:
        """The residual stream after attention, and the output of all heads that was added to it."""
        out_TI = _joined([out_NHD[tile] for out_NHD in outs]).flatten(1)
        return x_NE[tile] + self.out(out_TI), out_TI

    def mlp_backward(self, x_NE: Tensor, outs: list[Tensor], dy_NE: Tensor, tile: slice) -> None:
        """Write the gradient of the residual stream after attention over that of the block's output."""
        m_TE, out_TI = self.middle(x_NE, outs, tile)
        with torch.enable_grad():
            n_TE = self.pieces.normalize(self.block.mlp_norm, m_TE.requires_grad_(), self.dtype)
        u_TO = _leaf(self.up(n_TE.detach()))
        with torch.enable_grad():
            a_TI = self.pieces.activate(self.block.mlp, u_TO)
        dy_TO = dy_NE[tile].to(self.dtype)
        a_TI.backward(self.down.backward(dy_TO, a_TI.detach()))
        dn_TE = self.up.backward(_grad(u_TO), n_TE.detach())
        torch.autograd.backward((m_TE, n_TE), (dy_NE[tile], dn_TE))
        dy_NE[tile] = _grad(m_TE)
        self.out.add_gradients(dy_NE[tile].to(self.dtype), out_TI)


def _tiles(tokens: int, at_most: int) -> list[slice]:
    """Tiles of one length, the last of which may be shorter."""
    length = math.ceil(tokens / math.ceil(tokens / (at_most or tokens)))
    return [slice(start, min(start + length, tokens)) for start in range(0, tokens, length)]


def _joined(parts: list[Tensor]) -> Tensor:
    """Heads of several groups; those of one are not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _grad(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()
