"""What the blocks keep for the backward pass; whatever they do not keep, they compute again there, to the same bits."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from kernels import FLASH_ATTENTION_OPS

from .activations_config import FullConfig, MemoryConfig, SelectiveConfig
from .config import ModelConfig
from .gpt import GPT, Attend, Block, Rotation

# By name: PyTorch defines some of them only when their module is imported. attention=math is not among them: it has no
# operator whose result spares its backward pass the S × S scores.
ATTENTION = {
    *(op.name() for op in FLASH_ATTENTION_OPS),
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "torch_attn::_varlen_attn",
    "flex_attention",
}
PRODUCTS = {"aten::mm", "aten::addmm"}
"""Of linear layers; attention=math multiplies with bmm."""

Keeps = Callable[..., CheckpointPolicy]
"""Whether an operator's result is kept: (context, operator, *its arguments)."""


def apply(model: GPT, policy: MemoryConfig) -> None:
    """Let the blocks that the policy is about keep what it says. Parameters and their names stay as they are."""
    if not isinstance(policy, SelectiveConfig):
        return
    # PyTorch warns of in-place operations inside such a block when it compiles the first one; ours have none.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    # One object for all blocks, so that one compiled block serves them all.
    contexts = partial(create_selective_checkpoint_contexts, _keeps(policy, model.config))
    for block in list(model.blocks)[: policy.of(len(model.blocks))]:
        block.__class__ = _Recomputed
        assert isinstance(block, _Recomputed)
        block.contexts = contexts


class _Recomputed(Block):
    """A block that keeps its input and what its policy names."""

    contexts: Callable[[], Any]

    def forward(self, x_BSE: Tensor, attend: Attend, mask: Any, rotation: Rotation) -> Tensor:
        # Nothing in a block is random, so there is no state of a generator to go back to.
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": self.contexts}
        out_BSE: Tensor = checkpoint(super().forward, x_BSE, attend, mask, rotation, **options)
        return out_BSE


def _keeps(policy: SelectiveConfig, config: ModelConfig) -> Keeps:
    kept = set(ATTENTION) if getattr(policy, "keep_attention", True) else set()
    if not isinstance(policy, FullConfig):
        kept |= PRODUCTS
    down = (config.ffn_dim, config.dim)

    def keeps(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        # What the MLP's last product gives is added to the residual stream, and no gradient reads it.
        is_kept = op.name() in kept and not (op.name() in PRODUCTS and tuple(args[-1].shape) == down)
        return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE

    return keeps
