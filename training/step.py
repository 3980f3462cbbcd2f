"""One optimizer step: micro-batches in, an update of the parameters out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

from data.loader import IGNORE_INDEX, Batch
from model.gpt import GPT
from model.linear import refresh

from .guard import Guard
from .optimizer import Optimizer
from .parallel.context import SharedRows
from .parallel.gradients import Gradients
from .parallel.world import World

COUNTS = ("num_tokens", "num_targets", "visible_pairs")
"""What is summed over micro-batches and ranks."""


class StepResult(NamedTuple):
    """What a step did. The tensors are scalars on the device: reading one waits for it."""

    loss: Tensor
    """Mean over the step's targets on all ranks, in nats."""
    grad_norm: Tensor
    """Global, before clipping."""
    good: Tensor
    """bool: whether the parameters took the step."""
    learning_rate: float
    num_tokens: int
    """On all ranks, as `visible_pairs`: (query, key) pairs that the masks let through."""
    visible_pairs: int


class Forward:
    """The forward pass of a model over a batch: losses and predictions.

    Args:
        autocast: returns the context that the forward pass runs in.
        shared: how rows are split over the ranks that share them; None where rows are whole.
    """

    def __init__(
        self,
        model: GPT,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[object]],
        shared: SharedRows | None = None,
    ) -> None:
        self.model, self.device, self.autocast, self.shared = model, device, autocast, shared

    @torch.no_grad()
    def losses(self, batch: Batch) -> Tensor:
        """The loss of each token of a batch in nats: float32 (B, S), 0 where the target is no token; no gradient.

        Ranks that share rows are all asked for the same batch of whole rows, and all get the whole answer.
        """
        if self.shared is None:
            return self._loss(batch, per_token=True)
        shard = self.shared.shard(batch)
        return self.shared.whole(self._loss(shard, per_token=True), shard, batch.tokens_BS.shape[1])

    @torch.no_grad()
    def predictions(self, batch: Batch) -> Tensor:
        """The most likely token wherever a batch has a target: int64, in the order of rows and places. Logits exist for
        these places only; nothing is compiled. Ranks that share rows are asked as for `losses`."""
        if self.shared is None:
            return self._predictions(batch.to(self.device))
        shard = self.shared.shard(batch).to(self.device)
        predicted_BS = torch.zeros_like(shard.tokens_BS)
        predicted_BS[shard.targets_BS != IGNORE_INDEX] = self._predictions(shard)
        whole_BS = self.shared.whole(predicted_BS, shard, batch.tokens_BS.shape[1])
        return whole_BS[(batch.targets_BS != IGNORE_INDEX).to(self.device)]

    def _predictions(self, batch: Batch) -> Tensor:
        inputs = batch.tokens_BS, None, batch.starts_BS, batch.positions_BS
        with self.autocast():
            places_BS = batch.targets_BS != IGNORE_INDEX
            logits: Tensor = self.model(*inputs, places_BS=places_BS, split=batch.split)
            return logits.argmax(-1)

    def _loss(self, batch: Batch, per_token: bool) -> Tensor:
        batch = batch.to(self.device)
        inputs = batch.tokens_BS, batch.targets_BS, batch.starts_BS, batch.positions_BS
        with self.autocast():
            loss: Tensor = self.model(*inputs, per_token=per_token, split=batch.split)
            return loss


class TrainStep(Forward):
    """Gradients over micro-batches, clipped, guarded, and applied. The host waits for nothing.

    Args:
        grad_clip: global norm that gradients are scaled down to; 0 for none.
        autocast: returns the context that the forward pass runs in.
        reduction: the dtype in which gradients are added up over ranks.
    """

    def __init__(
        self,
        model: GPT,
        optimizer: Optimizer,
        guard: Guard,
        world: World,
        *,
        grad_clip: float,
        autocast: Callable[[], AbstractContextManager[object]],
        reduction: torch.dtype = torch.float32,
        shared: SharedRows | None = None,
    ) -> None:
        super().__init__(model, world.device, autocast, shared)
        self.optimizer, self.guard, self.world = optimizer, guard, world
        self.gradients = Gradients(model, world, reduction)
        self.max_norm = grad_clip

    @property
    def replayed_peak(self) -> int:
        """Bytes allocated at most in what is replayed, which PyTorch's allocator does not see."""
        return 0

    def loss(self, batch: Batch) -> Tensor:
        """Summed loss of a batch in nats."""
        return self._loss(batch, per_token=False)

    def __call__(self, micro_batches: Sequence[Batch], step: int, learning_rate: float) -> StepResult:
        num_tokens, num_targets, pairs = self.counts(micro_batches)
        loss = torch.zeros((), device=self.world.device)
        for number, batch in enumerate(micro_batches, 1):
            self.gradients.begin(is_last=number == len(micro_batches))
            loss += self.backward(batch, num_targets)
        loss = self.world.sum(loss)
        grad_norm, good = self.update(loss, step, learning_rate)
        return StepResult(loss, grad_norm, good, learning_rate, num_tokens, pairs)

    # ---- the parts of a step; numbers may be scalars on the device, for `training.graphed_step`

    def counts(self, micro_batches: Sequence[Batch]) -> list[int]:
        """COUNTS of a step on all ranks."""
        return self.world.count([sum(getattr(batch, name) for batch in micro_batches) for name in COUNTS])

    def backward(self, batch: Batch, num_targets: int | Tensor) -> Tensor:
        """Add a micro-batch's part of the step's gradients; returns its part of the loss."""
        # Divided by the whole step's targets, not averaged per micro-batch: every target weighs the same.
        micro_loss = self.loss(batch) / num_targets
        micro_loss.backward()
        return micro_loss.detach()

    def update(self, loss: Tensor, step: int | Tensor, learning_rate: float | Tensor) -> tuple[Tensor, Tensor]:
        """Add up, clip, guard, step; returns the gradient's norm, and whether the parameters took the step."""
        self.gradients.add_up()
        grad_norm = self.gradients.norm()
        scale = clip_scale(grad_norm, self.max_norm) if self.max_norm else None
        good = self.guard.check(step, loss, grad_norm)
        self.optimizer.step(learning_rate, good, scale)
        refresh(self.model)
        return grad_norm, good


def clip_scale(norm: Tensor, max_norm: float) -> Tensor:
    """What gradients of this norm are multiplied by, so that it is `max_norm` at most; as
    torch.nn.utils.clip_grad_norm_."""
    return torch.clamp(max_norm / (norm + 1e-6), max=1.0)
