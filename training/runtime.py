"""What a configuration means on this machine: device, precision and attention, decided or refused.

Deciding needs no torch, so that a refusal need not wait for it: train.py decides before torch loads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from model.attention import AttentionSpec, build_attention, choose_attention
from model.attention.config import context_method, context_spec
from model.precision_config import Float8Config, PrecisionConfig, precision_named

from .config import TrainConfig
from .machine import Gpu, find_gpu
from .parallel.config import FsdpConfig
from .parallel.launch import Launch

if TYPE_CHECKING:
    import torch

    from model.attention.base import AttentionBackend

    from .parallel.world import World


@dataclass(frozen=True)
class Runtime:
    """Where and how a run computes: `device`, `precision` and `compile` with every auto decided."""

    gpu: Gpu | None
    """None: on the CPU."""
    precision: PrecisionConfig
    """Never auto."""
    compile: bool

    @cached_property
    def device(self) -> torch.device:
        """Raises ValueError where the driver has a GPU that this torch cannot use."""
        import torch

        if self.gpu is not None and not torch.cuda.is_available():
            raise ValueError(
                f"the driver offers {self.gpu.name}, but torch {torch.__version__} cannot use it; "
                f"update the driver, install a build of torch for it, or use device=cpu"
            )
        if self.gpu is None:
            return torch.device("cpu")
        launch = Launch.here()
        return torch.device("cuda", launch.local_rank) if launch.is_launched else torch.device("cuda")

    @property
    def dtype_name(self) -> str:
        return "bfloat16" if self.precision.product_bytes == 2 else "float32"

    @property
    def factors(self) -> str:
        """What matrix products multiply, in fp8 but for the linear layers, as `cards.peak_tflops` names it."""
        return "tf32" if self.precision.name == "tf32" else self.dtype_name

    @property
    def dtype(self) -> torch.dtype:
        """Of matrix products and attention."""
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype_name)
        return dtype

    @property
    def residual_dtype(self) -> torch.dtype:
        """Of the residual stream: the embedding's output and every layer's sum."""
        import torch

        return torch.bfloat16 if self.precision.residual_bytes == 2 else torch.float32

    def working_dtype(self, config: TrainConfig) -> torch.dtype | None:
        """Of the copies of the weights that linear layers multiply with, cast once a step; None: no copies.

        A step of one micro-batch has none: autocast casts each weight once for it, or twice where layers are computed
        again, and holds no cast of theirs from step to step. Sharded weights are gathered in this dtype at any rate.
        """
        is_cast = config.plan.accumulation > 1 or isinstance(config.parallel, FsdpConfig)
        return self.dtype if self.precision.product_bytes == 2 and is_cast else None

    def autocast(self) -> torch.autocast:
        import torch

        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision.product_bytes == 2)


def resolve_runtime(config: TrainConfig) -> Runtime:
    """Decide every `auto` from the machine at hand. Needs no torch.

    Raises:
        ValueError: what was asked for is not there, or the attention that was named cannot do what this run needs.
    """
    launch = Launch.here()
    config.parallel.check(launch)
    gpu, name = resolve_device(config.device, config.precision.name)
    if gpu is not None and gpu.count is not None and launch.local_rank >= gpu.count:
        raise ValueError(
            f"{launch.local_size} processes want a GPU each of this machine, which offers {gpu.count}; "
            f"use torchrun --nproc-per-node={gpu.count}"
        )
    precision = config.precision.decided(name)
    if isinstance(precision, Float8Config) and isinstance(config.parallel, FsdpConfig):
        raise ValueError(
            f"precision=fp8 needs whole weights on every process, which parallel={config.parallel.name} shards; "
            f"use parallel=data, or precision=bf16"
        )
    runtime = Runtime(gpu, precision, gpu is not None if config.compile == "auto" else bool(config.compile))
    choose_attention(config.attention, inner_spec(config, attention_spec(config, runtime)))
    return runtime


def resolve_device(device: str, precision: str) -> tuple[Gpu | None, str]:
    """The GPU to run on, None for the CPU, and the precision there.

    Args:
        device: auto, cuda or cpu. precision: auto, or another option of `configs/precision`.
    Raises:
        ValueError: this machine does not have what was asked for.
    """
    gpu = None if device == "cpu" else find_gpu()
    if device == "cuda" and gpu is None:
        raise ValueError(
            "device=cuda, but PyTorch sees no CUDA GPU here; use device=cpu or install a CUDA build of torch"
        )
    has_bf16 = gpu is not None and gpu.capability >= (8, 0)
    if precision == "auto":
        precision = "bf16" if has_bf16 else "fp32"
    if precision == "tf32" and not has_bf16:
        raise ValueError("precision=tf32 needs an NVIDIA GPU from the A100 on; use precision=fp32")
    if precision_named(precision).product_bytes == 2 and gpu is not None and not has_bf16:
        raise ValueError(f"precision={precision} needs an A100 or newer, not {gpu.name}; use precision=fp32")
    if precision == "fp8" and gpu is not None and not (gpu.capability >= (9, 0) and gpu.name.startswith("NVIDIA")):
        raise ValueError(f"precision=fp8 needs an NVIDIA GPU from the H100 on, not {gpu.name}; use precision=bf16")
    return gpu, precision


def attention_spec(config: TrainConfig, runtime: Runtime, max_documents: int | None = None) -> AttentionSpec:
    """What this run asks of its attention; see `attention_for`."""
    return AttentionSpec.of(
        config.model,
        seq_len=config.seq_len,
        dtype=runtime.dtype_name,
        capability=runtime.gpu.capability if runtime.gpu else None,
        max_documents=(max_documents or config.seq_len) if config.data.document_mask else None,
    )


def method_of(config: TrainConfig) -> str:
    """How ranks that share rows attend.

    Raises:
        ValueError: they cannot as was asked for, or there are more of them than tokens.
    """
    parallel, head_groups = config.parallel, getattr(config.memory, "head_groups", 1)
    if parallel.context > config.seq_len:
        raise ValueError(
            f"parallel.context={parallel.context} ranks cannot share rows of {config.seq_len} tokens; "
            f"use parallel.context={config.seq_len} or less"
        )
    return context_method(parallel.context_method, config.model.n_heads, parallel.context, head_groups)


def inner_spec(config: TrainConfig, spec: AttentionSpec) -> AttentionSpec:
    """What one rank's kernels compute of attention as `spec` says."""
    return spec if config.parallel.context == 1 else context_spec(spec, method_of(config), config.parallel.context)


def attention_for(
    config: TrainConfig, runtime: Runtime, max_documents: int | None = None, world: World | None = None
) -> AttentionBackend:
    """The attention backend of this run.

    Args:
        max_documents: most documents in a row, where that is known; any bound does to learn whether a backend can.
        world: whose ranks may share rows; None: rows are whole.
    Raises:
        ValueError: the backend that was named cannot do what this run needs of it.
    """
    spec = attention_spec(config, runtime, max_documents)
    with runtime.device:
        if world is None or world.context_group is None:
            return build_attention(config.attention, spec)
        from model.attention.context import ContextAttention

        inner = build_attention(config.attention, inner_spec(config, spec))
        return ContextAttention(inner, spec, method_of(config), world.context_group)
