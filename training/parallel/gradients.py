"""Gradients of all ranks: added up, and scaled down to a norm."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .sharding import is_sharded, local
from .world import World

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

BUCKET = 2**24
"""Numbers that are added up in one collective: 64 MiB. A gradient of more is a bucket of its own, and not copied."""


class Gradients:
    """Those of a model's parameters, over the micro-batches of a step and the ranks of a world.

    FSDP adds up the gradients of sharded parameters itself, after each block of each micro-batch; copies of them, and
    parameters that every rank has whole, are added up once a step, after the last micro-batch.
    """

    def __init__(self, model: nn.Module, world: World) -> None:
        self.world, parameters = world, list(model.parameters())
        self.sharded = [p for p in parameters if is_sharded(p)]
        self.whole = [p for p in parameters if not is_sharded(p)]
        self.modules: list[FSDPModule] = []
        if self.sharded:
            from .fsdp import sharded_modules

            self.modules = list(sharded_modules(model))

    def begin(self, is_last: bool) -> None:
        """A backward pass comes: whether it is the last one of the step."""
        for module in self.modules:
            module.set_requires_all_reduce(is_last, recurse=False)
            module.set_is_last_backward(is_last)

    def add_up(self) -> None:
        """After the last backward pass: every rank gets the sums."""
        if self.world.size > 1:
            for bucket in _buckets([_grad(p) for p in self.whole]):
                _add_up(bucket)

    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradients down to a global norm of at most `max_norm`; returns what it was, on the device."""
        if not self.sharded:
            norm: Tensor = torch.nn.utils.clip_grad_norm_(self.whole, max_norm)
            return norm
        whole, shards = [_grad(p) for p in self.whole], [local(_grad(p)) for p in self.sharded]
        square = torch.nn.utils.get_total_norm(shards).to(self.world.device).square()
        assert self.world.mesh is not None
        dist.all_reduce(square, group=self.world.mesh.get_group("shard"))
        norm = (square + torch.nn.utils.get_total_norm(whole).square()).sqrt()
        if max_norm < math.inf:
            for gradients in (whole, shards):
                scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)  # as torch.nn.utils.clip_grad_norm_
                torch._foreach_mul_(gradients, scale.to(gradients[0].device))
        return norm


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for gradient in gradients:
        if bucket and sum(map(torch.numel, bucket)) + gradient.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


def _add_up(bucket: list[Tensor]) -> None:
    if len(bucket) == 1 and bucket[0].is_contiguous():
        dist.all_reduce(bucket[0])
        return
    flat = torch.cat([gradient.flatten() for gradient in bucket])
    dist.all_reduce(flat)
    parts = flat.split([gradient.numel() for gradient in bucket])
    torch._foreach_copy_(bucket, [part.view_as(gradient) for part, gradient in zip(parts, bucket, strict=True)])
