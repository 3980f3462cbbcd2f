"""What the blocks keep for the backward pass; whatever they do not keep, they compute again there.

`memory=selective` is selective checkpointing inside the compiled model, `memory=full` executes its blocks itself:
`model.recompute`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from .activations_config import FullConfig, MemoryConfig, OffloadConfig, SelectiveConfig
from .config import ModelConfig
from .gpt import GPT, Attend, Block, Compiled, Rotation
from .kept import Store
from .offload import HostStore
from .recompute import Pieces, Recomputed
from .replay import ATTENTION

PRODUCTS = {"aten::mm": 1, "aten::addmm": 2, "aten::_scaled_mm": 1}
"""Of linear layers, and which argument is the weight; attention=math multiplies with bmm."""

Keeps = Callable[..., CheckpointPolicy]
"""Whether an operator's result is kept: (context, operator, *its arguments)."""


def apply(model: GPT, policy: MemoryConfig) -> None:
    """Let the blocks that the policy is about keep what it says. Parameters and their names stay as they are."""
    if isinstance(policy, FullConfig):
        _recompute(model, policy)
    elif isinstance(policy, SelectiveConfig):
        _select(model, policy)


def _recompute(model: GPT, policy: FullConfig) -> None:
    policy.check_model(model.config)
    n_layers, store, host = len(model.blocks), Store(), HostStore()
    # The host's store never copies what the last of its layers keeps: on_host layers leave the device.
    on_host = policy.on_host(n_layers) if isinstance(policy, OffloadConfig) else -1
    for layer, block in enumerate(list(model.blocks)[: policy.of(n_layers)]):
        block.__class__ = Recomputed
        assert isinstance(block, Recomputed)
        block.own, block.store, block.pieces = model.attention, host if layer <= on_host else store, Pieces()
        block.tile, block.head_groups = policy.tile, policy.head_groups
        block.keeps_attention = policy.keeps_attention(layer, n_layers)


def _select(model: GPT, policy: SelectiveConfig) -> None:
    # PyTorch warns of in-place operations inside such a block when it compiles the first one; ours have none.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    # One object for all blocks, so that one compiled block serves them all.
    contexts = partial(create_selective_checkpoint_contexts, _keeps(model.config))
    for block in list(model.blocks)[: policy.of(len(model.blocks))]:
        block.__class__ = _Selective
        assert isinstance(block, _Selective)
        block.contexts = contexts


class _Selective(Block):
    """A block that keeps its input, attention's results and those of its products."""

    contexts: Callable[[], Any]

    def forward(
        self, x_BSE: Tensor, attend: Attend, mask: Any, rotation: Rotation, compiled: Compiled | None = None
    ) -> Tensor:
        if compiled is not None:
            return compiled(x_BSE, attend, mask, rotation)
        # Nothing in a block is random, so there is no state of a generator to go back to.
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": self.contexts}
        out_BSE: Tensor = checkpoint(super().forward, x_BSE, attend, mask, rotation, **options)
        return out_BSE


def _keeps(config: ModelConfig) -> Keeps:
    down = (config.ffn_dim, config.dim)

    def keeps(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        # What the MLP's last product gives is added to the residual stream, and no gradient reads it.
        weight = PRODUCTS.get(op.name())
        is_product = weight is not None and tuple(args[weight].shape) != down
        is_kept = is_product or op.name() in ATTENTION
        return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE

    return keeps
