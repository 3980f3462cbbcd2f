"""A backend for tokens that lie on several ranks: around any other backend, by one of two exchanges.

The rows of a batch are split over the ranks of a process group, each of which holds as many tokens of every row. All
but attention belongs to a token, so a block computes what it did; its attention is one operator,
`flash_gpt::context_attention`, which exchanges what attention needs, computes with the inner backend, and exchanges
again.

    ulysses      queries, keys and values of all heads of a rank's tokens → of all tokens, a rank's heads; out goes back
    all-gather   a rank receives the keys and values that its queries see; out is where it belongs

The operator returns the output of this rank's tokens, and the log-sum-exp where the inner backend has one. Its gradient
exchanges again instead of keeping what it received. So it is to torch.compile, to selective checkpointing and to
`model.replay` what `flash_gpt::flash_attention` is: one node, whose results are all that is worth keeping; which rank
holds which tokens is data, and no shape depends on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any, NamedTuple, NoReturn
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.operators import define

from ..base import AttentionBackend
from ..spec import AttentionSpec
from .all_gather import AllGather
from .exchange import Exchange
from .ulysses import Ulysses

EXCHANGES: dict[str, type[Exchange]] = {"ulysses": Ulysses, "all-gather": AllGather}


class Shard(NamedTuple):
    """The mask of a shard."""

    starts_BS: Tensor | None
    """Of the whole rows, int32: S is the number of ranks times the tokens of a shard."""
    split: Tensor
    """Who holds which tokens, int64 on the host: see `all_gather.runs_of`."""


class ContextAttention(AttentionBackend):
    """Attention of this rank's tokens to all tokens of their rows; every rank of the group calls it at once."""

    def __init__(self, inner: AttentionBackend, spec: AttentionSpec, method: str, group: dist.ProcessGroup) -> None:
        """
        Args:
            inner: what computes; its spec is `config.context_spec` of `spec`. spec: of whole rows and all heads.
            method: "ulysses" or "all-gather".
        Raises:
            ValueError: attention is not causal.
        """
        super().__init__(spec, inner.config)
        self.name = inner.name
        if not spec.causal:
            raise ValueError("context parallelism is for causal attention; use parallel.context=1")
        self.inner, self.method = inner, method
        self.exchange = EXCHANGES[method](group)
        self.key = f"{method} over {self.exchange.size}, {inner.name}, {next(_NUMBERS)}"
        _BY_KEY[self.key] = self

    def describe(self) -> str:
        return f"{self.inner.describe()}; over {self.exchange.size} ranks by {self.method}: {self.exchange.says}"

    def prepare(self, starts_BS: Tensor | None, seq_len: int, num_keys: int | None = None) -> NoReturn:
        raise ValueError("context parallelism trains and evaluates shards of rows; generate in a run without it")

    def prepare_decode(self, lengths_B: Tensor, seq_len: int, capacity: int) -> NoReturn:
        self.prepare(None, seq_len)

    def prepare_shard(self, starts_BS: Tensor | None, split: Tensor) -> Shard:
        """The mask of a batch's shards: see `Shard`."""
        return Shard(starts_BS, split)

    def __call__(self, q_BSHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, mask: Shard) -> Tensor:
        if torch.is_autocast_enabled(q_BSHD.device.type):  # operators are not on its list
            dtype = torch.get_autocast_dtype(q_BSHD.device.type)
            q_BSHD, k_BSGD, v_BSGD = q_BSHD.to(dtype), k_BSGD.to(dtype), v_BSGD.to(dtype)
        operator = torch.ops.flash_gpt.context_attention.default
        out, _ = operator(q_BSHD, k_BSGD, v_BSGD, mask.starts_BS, mask.split, self.key)
        assert isinstance(out, Tensor)
        return out

    def compile_ahead(self) -> None:
        self.inner.compile_ahead()

    def bound_documents(self, max_documents: int | None) -> None:
        super().bound_documents(max_documents)
        self.inner.bound_documents(max_documents)


# An operator takes tensors and words: it finds its backend by its key. The words in that are for torch.compile's cache
# of graphs, which outlives a process and knows the shapes of results.
_NUMBERS = count()
_BY_KEY: WeakValueDictionary[str, ContextAttention] = WeakValueDictionary()


def forward(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, split: Tensor, key: str
) -> tuple[Tensor, Tensor]:  # fmt: skip
    attention = _BY_KEY[key]
    with torch.autocast(q.device.type, enabled=False):
        out, lse = attention.exchange.forward(attention.inner, q, k, v, starts, split)
        return out.contiguous(), lse.contiguous()


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: Tensor | None, split: Tensor,
    key: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    attention = _BY_KEY[key]
    with torch.autocast(q.device.type, enabled=False), _with_autograd():
        grads = attention.exchange.backward(attention.inner, dout, q, k, v, out, lse, starts, split)
        dq, dk, dv = (grad.contiguous() for grad in grads)
        return dq, dk, dv


@contextmanager
def _with_autograd() -> Iterator[None]:
    """PyTorch records no graph inside of an operator; a backend that has no `backward` of its own needs one."""
    keys, guard = torch._C.DispatchKey, torch._C._SetExcludeDispatchKeyGuard
    with guard(keys.AutogradFunctionality, False), guard(keys.ADInplaceOrView, False), torch.no_grad():
        yield


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, starts: Any, split: Any, key: str) -> tuple[Tensor, Tensor]:
    attention = _BY_KEY[key]
    lse = attention.exchange.lse_shape(q.shape) if attention.inner.keeps_lse else (0,)
    return q.new_empty(q.shape), q.new_empty(lse, dtype=torch.float32)


def _backward_fake(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


class _ContextAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, starts: Any, split: Tensor, key: str) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = torch.ops.flash_gpt.context_attention.default(q, k, v, starts, split, key)
        ctx.save_for_backward(q, k, v, out, lse, starts, split)
        ctx.key = key
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, starts, split = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        operator = torch.ops.flash_gpt.context_attention_backward.default
        return *operator(dout, q, k, v, out, lse, starts, split, ctx.key), None, None, None


# As for flash attention: every query with every key, 2 products forward and 5 backward, divided by the ranks.
def _forward_flops(q_shape: Any, k_shape: Any, v_shape: Any, starts: Any, split: Any, key: str, **_: Any) -> int:
    B, S, H, D = q_shape
    return 2 * 2 * B * H * S * S * _BY_KEY[key].exchange.size * D


def _backward_flops(
    dout_shape: Any, q_shape: Any, k_shape: Any, v_shape: Any, out: Any, lse: Any, starts: Any, split: Any, key: str,
    **_: Any,
) -> int:  # fmt: skip
    B, S, H, D = q_shape
    return 5 * 2 * B * H * S * S * _BY_KEY[key].exchange.size * D


_MASK = "Tensor? starts, Tensor split, str key"
define(
    "context_attention",
    f"(Tensor q, Tensor k, Tensor v, {_MASK}) -> (Tensor, Tensor)",
    forward,
    _forward_fake,
    derivative=_ContextAttention.apply,
    flops=_forward_flops,
)
define(
    "context_attention_backward",
    f"(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_MASK}) -> (Tensor, Tensor, Tensor)",
    backward,
    _backward_fake,
    flops=_backward_flops,
)
