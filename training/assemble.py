"""The only place where a run's model is made, in an order that can be read aloud."""

from __future__ import annotations

import torch

from model import activations, float8
from model.activations_config import MemoryConfig
from model.attention.base import AttentionBackend
from model.compile_unit import compile_unit
from model.config import ModelConfig
from model.gpt import GPT
from model.linear import keep_working_copies, refresh
from model.precision_config import Float8Config, PrecisionConfig

from .parallel.config import FsdpConfig, ParallelConfig
from .parallel.world import World


def assemble(
    config: ModelConfig,
    attention: AttentionBackend,
    world: World,
    *,
    seed: int,
    compile: bool,
    unit: str | None = None,
    memory: MemoryConfig | None = None,
    parallel: ParallelConfig | None = None,
    residual_dtype: torch.dtype | None = None,
    working_dtype: torch.dtype | None = None,
    precision: PrecisionConfig | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> GPT:
    """A model on the world's device, with the weights of a seed; a checkpoint's weights are loaded over them.

    Args:
        unit: of compilation, see `GPT.compile`; None: `compile_unit`.
        memory: what blocks keep for the backward pass, see `model.activations`; None: everything.
        parallel: how its parameters are spread over the world; None: every rank has all.
        residual_dtype: of the residual stream; None: float32.
        working_dtype: of what linear layers multiply with: copies of the weights (`model.linear`), or, where those are
            sharded, what they are gathered in; None: the weights themselves.
        precision: whose fp8, if it is that, the linear layers of blocks multiply in, see `model.float8`, and in whose
            reduction gradients of shards are added up; None: float32.
        z_loss, label_smoothing: of the training loss, see `kernels.linear_cross_entropy`.
    """
    # 1. On the meta device: no memory yet, so that what follows decides where a weight lives.
    with torch.device("meta"):
        model = GPT(config, attention)
    model.head.z_loss, model.head.label_smoothing = z_loss, label_smoothing
    # 2. Precision.
    model.residual_dtype = residual_dtype
    sharded = parallel if isinstance(parallel, FsdpConfig) else None
    if working_dtype is not None and not sharded:
        keep_working_copies(model, working_dtype)
    if isinstance(precision, Float8Config):
        float8.convert(model, precision, compile)
    # 3. What blocks keep for the backward pass.
    memory = memory or MemoryConfig()
    activations.apply(model, memory)
    # 4. Compilation.
    if compile:
        # What earlier jobs of a sweep compiled would count against the limit on versions of one function, and the fifth
        # job would run uncompiled.
        torch.compiler.reset()
        model.compile(unit or compile_unit(memory, is_sharded=sharded is not None))
    # 5. Sharding, whose hooks surround what is compiled.
    if sharded:
        from .parallel import fsdp

        assert world.mesh is not None
        reduction: torch.dtype = getattr(torch, precision.reduction if precision else "float32")
        fsdp.shard(model, world.mesh, sharded, working_dtype, reduction)
    # 6. Memory and first weights.
    torch.manual_seed(seed)
    if sharded:
        fsdp.materialize(model, world.device, sharded.offload)
    else:
        model.materialize(world.device)
    refresh(model)
    return model
