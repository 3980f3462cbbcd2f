"""Attention's backward pass without its forward pass: what its operator returned is kept and put back.

An operator such as `flash_gpt::flash_attention` returns its output and the log-sum-exp of its scores, and its gradient
reads q, k, v and these. `catch` records them, `replay` answers the operator's call with them, so that PyTorch builds
the graph of the backward pass as usual and no kernel runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from kernels import FLASH_ATTENTION_OPS

from .gpt import Attend

# By name: PyTorch defines some of them only when their module is imported. attention=math is not among them: it has no
# operator whose result spares its backward pass the S × S scores.
ATTENTION = {
    *(op.name() for op in FLASH_ATTENTION_OPS),
    "flash_gpt::context_attention",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "torch_attn::_varlen_attn",
    "flex_attention",
}


class _View(NamedTuple):
    """A strided view of one of the kept tensors."""

    base: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, x: Tensor, tensors: Sequence[Tensor]) -> _View | None:
        """None where it is a view of none."""
        for base, tensor in enumerate(tensors):
            if tensor.untyped_storage()._cdata == x.untyped_storage()._cdata and not _has_gaps(tensor):
                return cls(base, tuple(x.shape), x.stride(), int(x.storage_offset()) - int(tensor.storage_offset()))
        return None

    def on(self, tensors: Sequence[Tensor]) -> Tensor:
        base = tensors[self.base]
        return base.as_strided(self.size, self.stride, int(base.storage_offset()) + self.offset)


def _has_gaps(x: Tensor) -> bool:
    """Whether memory that is not the tensor's lies within it, which a copy to the host and back would not carry."""
    return 1 + sum((length - 1) * step for length, step in zip(x.shape, x.stride(), strict=True)) > x.numel()


class Recipe(NamedTuple):
    """How attention's output and its operator's results are made of the tensors that are kept of them."""

    size: int
    """Number of those tensors."""
    out: _View
    leaves: list[Any]
    """The operators' results: an `_Index` stands for a kept tensor."""
    spec: TreeSpec


class _Index(int):
    """Of a kept tensor."""


Kept = tuple[list[Tensor], Recipe]
"""What is kept of attention over a group of heads."""


def catch(attend: Attend, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Kept:
    """What to keep of `attend(q, k, v, mask)`: its output, and what else its operator returned in floating point.

    Where no operator is recognised (attention=math, FlexAttention's own compiled function on a GPU) that is the output
    alone, and `replay` computes attention again.
    """
    # With a graph, for PyTorch's operators leave out the log-sum-exp where no gradient is asked for.
    with torch.enable_grad(), _Catch() as caught:
        out = attend(q.detach().requires_grad_(), k.detach().requires_grad_(), v.detach().requires_grad_(), mask)
    return _kept(out.detach(), caught.results)


def plain(attend: Attend, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Kept:
    """The output alone."""
    return _kept(attend(q, k, v, mask), [])


def output(tensors: Sequence[Tensor], recipe: Recipe) -> Tensor:
    """Attention's output, a view of what was kept."""
    return recipe.out.on(tensors)


def replay(tensors: Sequence[Tensor], recipe: Recipe, attend: Attend, *inputs: Any) -> Tensor:
    """`attend(*inputs)` with a graph, its operators' results being those that were caught."""
    with torch.enable_grad():
        if not recipe.leaves:
            return attend(*inputs)
        leaves = [tensors[leaf] if isinstance(leaf, _Index) else leaf for leaf in recipe.leaves]
        with _Replay(tree_unflatten(leaves, recipe.spec)):
            return attend(*inputs)


def _kept(out: Tensor, results: list[Any]) -> Kept:
    leaves, spec = tree_flatten(results)
    tensors: list[Tensor] = []
    for place, leaf in enumerate(leaves):
        # Seeds and lengths are small integers, which stay where they are.
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel():
            leaves[place] = _Index(len(tensors))
            tensors.append(leaf.detach())
    view = _View.of(out, tensors)
    if view is None:
        out = out.clone() if _has_gaps(out) else out
        view = _View(len(tensors), tuple(out.shape), out.stride(), 0)
        tensors.append(out)
    return tensors, Recipe(len(tensors), view, leaves, spec)


class _Mode(TorchDispatchMode):
    supports_higher_order_operators = True  # FlexAttention is one

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """True: what an attention backend has compiled runs compiled, unseen."""
        return True


class _Catch(_Mode):
    def __init__(self) -> None:
        super().__init__()
        self.results: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # While FlexAttention is compiled, its operator is called with tensors that have no data, of a class of theirs.
        if func.name() in ATTENTION and all(type(x) is Tensor for x in tree_leaves(result) if isinstance(x, Tensor)):
            self.results.append(result)
        return result


class _Replay(_Mode):
    def __init__(self, results: list[Any]) -> None:
        super().__init__()
        self.results = results

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() in ATTENTION:
            return self.results.pop(0)
        return func(*args, **(kwargs or {}))
