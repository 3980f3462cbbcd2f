"""Tensors of which every rank holds a shard (PyTorch's `DTensor`), and those that are whole, alike."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs


def is_sharded(tensor: Tensor) -> TypeIs[DTensor]:
    module = sys.modules.get("torch.distributed.tensor")  # where nobody imported it, nothing is sharded
    return module is not None and isinstance(tensor, module.DTensor)


def named_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters by name, as they are sharded: FSDP leaves some gathered after a forward pass without a backward
    pass, and then it is those that a module has."""
    if "torch.distributed.fsdp" in sys.modules:
        from .fsdp import sharded_modules

        for module in sharded_modules(model):
            module.reshard()
    return dict(model.named_parameters())


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Embedding and head of a sharded model are whole meanwhile, for code that calls parts of the model: FSDP gathers
    them only where the model itself is called. All ranks enter."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not isinstance(model, fsdp.FSDPModule):
        yield
        return
    model.unshard()
    yield
    model.reshard()


def local(tensor: Tensor) -> Tensor:
    """This rank's shard, in the same memory, without its gradient; of a tensor that is whole, the tensor."""
    if not is_sharded(tensor):
        return tensor
    shard: Tensor = tensor.to_local()
    return shard.detach()


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which every rank has a shard, gathered on every rank: all call it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local_part(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's shard of a tensor, split as `like` is; no communication.

    Args:
        tensor: whole, and the same on every rank; or split so already.
    """
    if is_sharded(tensor):
        assert is_sharded(like)
        assert tensor.placements == like.placements
        return local(tensor)
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return local(distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None))


def sharded_as(shard: Tensor, like: Tensor) -> Tensor:
    """A shard of this rank as a part of what `like` is a part of, on the device that it is on; where `like` is whole,
    the tensor."""
    if not is_sharded(like):
        return shard
    # As FSDP makes its shards: `from_local` would move one that lies in the host's memory to the mesh's device.
    meta = like._spec.tensor_meta
    assert meta is not None
    spec = replace(like._spec, tensor_meta=meta._replace(dtype=shard.dtype))
    return type(like)(shard, spec, requires_grad=False)
