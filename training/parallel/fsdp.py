"""Parameters in shards: PyTorch's FSDP2 (`fully_shard`), a block at a time.

Matrices are split by their rows (dimension 0) over the ranks of `World.mesh`; norms and biases are small and stay whole
on every rank. With precision=bf16 matrices are gathered in bf16, which is also what linear layers multiply with, so
that sharded models have no working copies (`model.linear`). Gradients are summed in precision.reduction.

Only runs with sharded parameters import this: it costs the start of a process half a second.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from model.gpt import GPT

from .config import FsdpConfig
from .sharding import is_sharded, local, local_part


def shard(
    model: GPT, mesh: DeviceMesh, config: FsdpConfig, dtype: torch.dtype | None, reduction: torch.dtype = torch.float32
) -> None:
    """Shard a model on the meta device: each block by itself, and embedding and head with the model.

    Args:
        dtype: in which parameters are gathered; None: their own. reduction: in which gradients are added up over ranks.
    """
    whole = {parameter for parameter in model.parameters() if parameter.dim() < 2}
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if config.offload else OffloadPolicy()
    # Inputs stay what they are: autocast and the residual stream decide their dtypes.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduction, cast_forward_inputs=False)
    for module, reshards in [*((block, config.reshard) for block in model.blocks), (model, False)]:
        fully_shard(
            module,
            mesh=mesh,
            reshard_after_forward=reshards,
            mp_policy=policy,
            offload_policy=offload,
            ignored_params=whole,
        )
    for part in sharded_modules(model):
        # The loss is divided by the targets of the whole step: gradients are added up, not averaged.
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)


def sharded_modules(model: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))


@torch.no_grad()
def materialize(model: GPT, device: torch.device, offload: bool) -> None:
    """`GPT.materialize` for a sharded model: the weights that one process would begin with, each in its shards.

    Every rank draws all numbers, one parameter at a time.

    Args:
        offload: keep shards in the host's memory.
    """

    def empty(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device="cpu" if offload and is_sharded(tensor) else device)

    model._apply(empty)
    with device:
        for module in model.modules():
            with _whole_parameters(module, device):
                getattr(module, "reset_parameters", lambda: None)()
        model.begin()
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            drawn = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            model.draw(name, drawn)
            local(parameter).copy_(local_part(drawn, parameter))
        else:
            model.draw(name, parameter)


@contextmanager
def _whole_parameters(module: nn.Module, device: torch.device) -> Iterator[None]:
    """The module's own parameters, whole and uninitialised in place of their shards."""
    shards = {name: p for name, p in module.named_parameters(recurse=False) if is_sharded(p)}
    for name, parameter in shards.items():
        module._parameters[name] = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device=device))
    yield
    module._parameters.update(shards)
