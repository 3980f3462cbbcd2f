"""Gradients of all ranks: added up, and their norm."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.gpt import GPT

from .sharding import is_sharded, local
from .world import World

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

SMALL = 2**20
"""Numbers below which gradients are added up together, in a copy; a larger one is added up where it lies, if in its own
dtype."""


class Gradients:
    """Those of a model's parameters, over the micro-batches of a step and the ranks of a world.

    FSDP adds up the gradients of sharded parameters itself, after each block of each micro-batch; copies of them, and
    parameters that every rank has whole, are added up once a step, in the backward pass of its last micro-batch: those
    of a block while the blocks before it compute, where blocks are called one by one. In one compiled graph of the
    whole model all gradients come at its end.

    Args:
        reduction: the dtype in which those of whole parameters are added up over ranks.
    """

    def __init__(self, model: GPT, world: World, reduction: torch.dtype = torch.float32) -> None:
        self.world, self.reduction, parameters = world, reduction, list(model.parameters())
        self.sharded = [p for p in parameters if is_sharded(p)]
        self.whole = [p for p in parameters if not is_sharded(p)]
        self.is_last = False
        self._sums: list[_Sum] = []
        """What is being added up."""
        self.modules: list[FSDPModule] = []
        if self.sharded:
            from .fsdp import sharded_modules

            self.modules = list(sharded_modules(model))
        elif world.size > 1 and not model.is_one_graph:
            for block in model.blocks:
                block.register_forward_pre_hook(self._before_block)

    def begin(self, is_last: bool) -> None:
        """A backward pass comes: whether it is the last one of the step."""
        self.is_last = is_last
        for module in self.modules:
            module.set_requires_all_reduce(is_last, recurse=False)
            module.set_is_last_backward(is_last)

    def add_up(self) -> None:
        """After the last backward pass: every rank gets the sums."""
        if self.world.size == 1:
            return
        begun = {parameter for each in self._sums for parameter in each.parameters}
        self._begin_sums([parameter for parameter in self.whole if parameter not in begun])
        for each in self._sums:
            each.finish()
        self._sums.clear()

    def norm(self) -> Tensor:
        """Their global norm: float32 scalar on the device."""
        whole = torch.nn.utils.get_total_norm([gradient_of(p) for p in self.whole])
        if not self.sharded:
            return whole
        shards = torch.nn.utils.get_total_norm([local(gradient_of(p)) for p in self.sharded])
        square = shards.to(self.world.device).square()
        assert self.world.mesh is not None
        dist.all_reduce(square, group=self.world.mesh.get_group("shard"))
        return (square + whole.square()).sqrt()

    def _before_block(self, block: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        """Add up the block's gradients as soon as that of its input is there: by then they are, too."""
        x_BSE = arguments[0]
        if self.is_last and torch.is_grad_enabled() and x_BSE.requires_grad:
            x_BSE.register_hook(partial(self._after_block, list(block.parameters())))

    def _after_block(self, parameters: list[Tensor], grad: Tensor) -> None:
        self._begin_sums(parameters)

    def _begin_sums(self, parameters: Iterable[Tensor]) -> None:
        small = list[Tensor]()
        for parameter in parameters:
            if parameter.numel() < SMALL or not gradient_of(parameter).is_contiguous():
                small.append(parameter)
            else:
                self._sums.append(_Sum([parameter], self.reduction))
        if small:
            self._sums.append(_Sum(small, self.reduction))


class _Sum:
    """Gradients that are being added up over all ranks, in one collective."""

    def __init__(self, parameters: list[Tensor], dtype: torch.dtype) -> None:
        self.parameters = parameters
        gradients = [gradient_of(parameter) for parameter in parameters]
        is_one = len(gradients) == 1 and gradients[0].is_contiguous() and gradients[0].dtype == dtype
        self.flat = None if is_one else torch.cat([gradient.flatten().to(dtype) for gradient in gradients])
        self.work = dist.all_reduce(gradients[0] if self.flat is None else self.flat, async_op=True)

    def finish(self) -> None:
        assert self.work is not None
        self.work.wait()  # on a GPU its stream waits, not the host
        if self.flat is not None:
            gradients = [gradient_of(parameter) for parameter in self.parameters]
            parts = self.flat.split([gradient.numel() for gradient in gradients])
            torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])


def gradient_of(parameter: Tensor) -> Tensor:
    """One that is there."""
    assert parameter.grad is not None
    return parameter.grad
