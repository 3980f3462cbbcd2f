"""What fits into this machine: the memory that a run will take, the policy that memory=auto means, and refusals."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path, PurePosixPath

from model.activations_config import AutoConfig, FullConfig, MemoryConfig, OffloadConfig, SelectiveConfig
from model.arithmetic import parameter_count
from model.attention import choose_attention
from model.attention.config import has_hopper_kernels
from model.layer_memory import Workload
from model.memory import GIB, predict, state_bytes
from model.precision_config import Float8Config

from . import machine
from .config import TrainConfig
from .optimizer_config import ROUNDED_AT_ONCE, SLOWEST_IN_BF16
from .parallel.launch import Launch
from .runtime import Runtime, attention_spec, inner_spec, method_of
from .step_time import step_time

SHAPE = ("n_layers", "n_heads", "head_dim", "dim", "ffn_dim", "vocab_size", "n_positions")
UNLIMITED = 2**60
"""Bytes from which on the limit of a container is none: the kernel's largest number stands there."""

AUTO_FILLS = 0.94
"""Fraction of a card that memory=auto fills by prediction. CUDA itself takes some of the rest, and so do the gaps
between what PyTorch's allocator holds."""
REFUSED_ABOVE = 1.02
"""Fraction of a card from which on a run is refused: the prediction may be so much too high."""
HOST_FILLS = 0.8
"""Fraction of the host's memory that may be pinned."""
ROW_STEP = 1024
"""Tokens in steps of which the longest row is looked for."""


# ---- what a run takes


def workload(config: TrainConfig, runtime: Runtime) -> Workload:
    """What of a run decides its memory."""
    spec = inner_spec(config, attention_spec(config, runtime))
    chosen, parallel = choose_attention(config.attention, spec), config.parallel
    return Workload(
        model=config.model,
        memory=config.memory,
        batch_size=config.batch_size,
        seq_len=math.ceil(config.seq_len / config.parallel.context),
        accumulates=config.plan.accumulation > 1,
        optimizer=config.optimizer.name,
        moment_bytes=config.precision.moment_bytes,
        rounded_at_once=ROUNDED_AT_ONCE,
        product_bytes=runtime.precision.product_bytes,
        in_fp8=isinstance(runtime.precision, Float8Config),
        input_bytes=1 if getattr(runtime.precision, "weight_gradients", None) == "fp8" else None,
        residual_bytes=runtime.precision.residual_bytes,
        compiled=runtime.compile,
        writes_scores=writes_scores(config),
        ranks=Launch.here().size,
        shards=parallel.shard_size(Launch.here()),
        reshards=getattr(parallel, "reshard", True),
        state_on_host=getattr(parallel, "offload", False),
        context=parallel.context,
        context_method=method_of(config) if parallel.context > 1 else "ulysses",
        keeps_lse=chosen.name == "flash",
        reduction_bytes=2 if config.precision.reduction == "bfloat16" else 4,
        sums_queries=chosen.name == "flash" and has_hopper_kernels(spec),
    )


def writes_scores(config: TrainConfig) -> bool:
    """Whether attention writes S × S scores to memory."""
    return "math" in (config.attention.name, getattr(config.attention, "kernel", None))


def host_memory() -> int | None:
    """Bytes of memory that this process may come to use: the machine's, or its container's.

    None where nobody knows: the memory of some virtual machines starts small and grows while it is used.
    """
    if machine.supposed is not None:
        return None  # nor is the host here
    known = []
    if not any(Path("/sys/bus/virtio/drivers/virtio_mem").glob("virtio*")):
        with suppress(ValueError, OSError):
            known.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for file in container_limits():
        with suppress(ValueError, OSError):  # "max" is no number
            known.append(int(file.read_text()))
    return min((limit for limit in known if limit < UNLIMITED), default=None)


def container_limits(groups: Path = Path("/proc/self/cgroup")) -> Iterator[Path]:
    """The files with the memory limits of the control group that this process is in, and of those around it."""
    with suppress(OSError):
        for line in groups.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            for group in (PurePosixPath(path), *PurePosixPath(path).parents):
                if not controllers:
                    yield Path(f"/sys/fs/cgroup{group}/memory.max")
                elif "memory" in controllers.split(","):
                    yield Path(f"/sys/fs/cgroup/memory{group}/memory.limit_in_bytes")


# ---- memory=auto


def candidates(n_kv_heads: int) -> Iterator[MemoryConfig]:
    """The policies that memory=auto chooses from, roughly from the fastest to the leanest."""
    yield MemoryConfig()
    yield SelectiveConfig()
    for fraction in (1.0, 0.75, 0.5, 0.25):
        yield FullConfig(keep_attention=fraction)
    yield OffloadConfig()
    yield OffloadConfig(keep_attention=0.5)
    yield FullConfig(keep_attention=0.0)
    yield OffloadConfig(keep_attention=0.0)
    for groups in (2, 4, 8):
        if n_kv_heads % groups == 0:
            yield FullConfig(keep_attention=0.0, head_groups=groups)
            yield OffloadConfig(keep_attention=0.0, head_groups=groups)


def cheapest(
    policies: Iterable[MemoryConfig],
    fits: Callable[[MemoryConfig], bool],
    seconds: Callable[[MemoryConfig], float | None],
) -> MemoryConfig | None:
    """The policy that fits with the shortest step, and of equals, or where no time is known, the first."""
    return min((policy for policy in policies if fits(policy)), key=lambda policy: seconds(policy) or 0.0, default=None)


def choose_policy(work: Workload, runtime: Runtime, limit: float) -> MemoryConfig | None:
    """The fastest policy that fits into `limit` bytes of the device; None where there is none."""
    assert work.model.n_kv_heads is not None

    def seconds(policy: MemoryConfig) -> float | None:
        taken = step_time(replace(work, memory=policy), 1, runtime.gpu, runtime.dtype_name)
        return None if taken is None else taken.total

    policies = candidates(work.model.n_kv_heads)
    return cheapest(policies, lambda policy: fits(replace(work, memory=policy), limit), seconds)


def fits(work: Workload, limit: float) -> bool:
    """Whether the predicted peak is at most `limit` bytes, and what goes to the host has room there."""
    plan = predict(work)
    if plan.host == 0 or (host := host_memory()) is None:
        return plan.total <= limit
    return plan.total <= limit and sum(host_bytes(work)) <= HOST_FILLS * host


def leanest(work: Workload) -> MemoryConfig:
    """The policy with the lowest peak that is predicted, without the host's memory."""
    return min(on_device(work), key=lambda policy: predict(replace(work, memory=policy)).total)


def on_device(work: Workload) -> list[MemoryConfig]:
    assert work.model.n_kv_heads is not None
    return [policy for policy in candidates(work.model.n_kv_heads) if not isinstance(policy, OffloadConfig)]


def resolve_memory(config: TrainConfig, runtime: Runtime) -> TrainConfig:
    """The configuration with the policy that memory=auto means on this machine; any other is left as it is.

    On a CPU it means none. Where nothing fits it means the leanest, which `check_capacity` then refuses.
    """
    if not isinstance(config.memory, AutoConfig):
        return config
    if runtime.gpu is None or runtime.gpu.memory is None:
        return replace(config, memory=MemoryConfig())
    work = workload(config, runtime)
    chosen = choose_policy(work, runtime, AUTO_FILLS * runtime.gpu.memory)
    return replace(config, memory=chosen or leanest(work))


def as_typed(policy: MemoryConfig) -> str:
    """A policy as it is typed: "memory=full memory.keep_attention=0"."""
    default = type(policy)()
    changed = [field.name for field in fields(policy) if getattr(policy, field.name) != getattr(default, field.name)]
    return " ".join([f"memory={policy.name}", *(f"memory.{name}={getattr(policy, name):g}" for name in changed)])


def longest_row(work: Workload, limit: float) -> int:
    """Tokens of the longest row, alone in its micro-batch, that fits into `limit` bytes: a multiple of 1,024, or 0."""
    low, high = 0, 2**31 // ROW_STEP
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(one_row(work, middle * ROW_STEP), limit) else (low, middle)
    return low * ROW_STEP


def one_row(work: Workload, seq_len: int) -> Workload:
    """A micro-batch of one row; learned positions grow with it."""
    model = replace(work.model, n_positions=seq_len) if work.model.position == "learned" else work.model
    return replace(work, model=model, batch_size=1, seq_len=seq_len)


# ---- refusals


def check_capacity(config: TrainConfig, runtime: Runtime) -> None:
    """Refuse a run that will not fit; `check_memory=false` does not ask.

    On a GPU the predicted peak of a step counts, on a CPU, whose kernels are not predicted, what is held from step to
    step.

    Raises:
        ValueError: names what is needed, what there is, and what would fit.
    """
    if not config.check_memory:
        return
    gpu = runtime.gpu
    there = host_memory() if gpu is None else gpu.memory
    place = f"{'this machine' if gpu is None else gpu.name} has {(there or 0) / GIB:,.1f} GiB of memory"
    work = workload(config, runtime)
    weights, gradients, moments = state_bytes(work)
    is_here = gpu is None or not work.state_on_host
    # What could be halved is left to `remedy`, on a GPU.
    least = weights + gradients + (moments if gpu is None else moments // 2)
    least *= Launch.here().local_size if gpu is None else 1
    if is_here and there is not None and least > there and not (gpu and fits_in_shards(work, there)):
        shape = ", ".join(f"model.{name}={getattr(config.model, name)}" for name in SHAPE)
        raise ValueError(
            f"model.name={config.model.name} ({shape}) has {parameter_count(config.model).total:.3g} parameters, whose "
            f"weights, gradients and optimizer alone take {(weights + gradients + moments) / GIB:,.0f} GiB; {place}; "
            f"use a smaller one, such as model=tiny"
        )
    config = resolve_memory(config, runtime)
    work = workload(config, runtime)
    check_host(work, runtime)
    if gpu is None or there is None or (needed := predict(work)).total <= REFUSED_ABOVE * there:
        return
    raise ValueError(
        f"{config.model.name} with {rows(config)} and {as_typed(config.memory)} needs {needed.total / GIB:,.0f} GiB "
        f"(predicted, in {needed.moment}); {place}; use "
        f"{'parallel=fsdp, ' if fits_in_shards(work, there) else ''}{remedy(config, runtime, AUTO_FILLS * there)}, "
        f"or check_memory=false to try it all the same"
    )


def fits_in_shards(work: Workload, limit: float) -> bool:
    """Whether the run, whose ranks all hold everything, would fit as parallel=fsdp."""
    shards = Launch.here().size
    return work.shards < shards and not work.in_fp8 and predict(replace(work, shards=shards)).total <= limit


def host_bytes(work: Workload) -> tuple[int, int]:
    """Bytes of the host's memory that layers keep their tensors in, and that a checkpoint is copied to."""
    weights, _, moments = state_bytes(work)
    return predict(work).host, weights + moments


def check_host(work: Workload, runtime: Runtime) -> None:
    """Refuse memory=offload where there is no GPU, and where the host's memory is too small for it.

    Raises:
        ValueError: names what is needed, what there is, and what to do instead.
    """
    if not isinstance(work.memory, OffloadConfig):
        return
    if runtime.gpu is None:
        raise ValueError(
            "memory=offload moves tensors from a GPU to the host, and this run has no GPU; use memory=full"
        )
    there, (pinned, saved) = host_memory(), host_bytes(work)
    if there is None or pinned + saved <= there:
        return
    L = work.model.n_layers
    fewer = (math.floor(100 * n / work.memory.of(L)) / 100 for n in range(work.memory.on_host(L) - 1, 0, -1))
    policies = [replace(work.memory, host=fraction) for fraction in fewer if fraction > 0]
    fits = [policy for policy in policies if sum(host_bytes(replace(work, memory=policy))) <= there]
    raise ValueError(
        f"memory=offload with memory.host={work.memory.host:g} keeps {pinned / GIB:,.1f} GiB in the host's memory, and "
        f"checkpoints are copied to {saved / GIB:,.1f} GiB of it; there are {there / GIB:,.1f} GiB; use "
        f"{f'memory.host={fits[0].host:g}' if fits else 'memory=full'}, or check_memory=false to try it anyway"
    )


def remedy(config: TrainConfig, runtime: Runtime, limit: float) -> str:
    """The least change that fits into `limit` bytes: a policy, fewer rows at a time, smaller numbers, a shorter row,
    another model."""
    work = workload(config, runtime)
    for change, changed in changes(config, work):
        if (policy := choose_policy(changed, runtime, limit)) is not None:
            peak = predict(replace(changed, memory=policy)).total
            return " ".join([*change, as_typed(policy), f"({peak / GIB:,.0f} GiB)"])
    longest = [(longest_row(replace(work, memory=policy), limit), policy) for policy in on_device(work)]
    row, policy = max(longest, key=lambda item: item[0])
    row *= config.parallel.context
    return f"{as_typed(policy)} batch_size=1 seq_len={row} or shorter" if row else "a smaller model="


def changes(config: TrainConfig, work: Workload) -> Iterator[tuple[list[str], Workload]]:
    """What a person may type to take less with rows as long, and the work that it makes; at first nothing."""
    typed = list[str]()
    yield typed, work
    for batch_size in smaller_batches(config):
        work = replace(work, batch_size=batch_size, accumulates=True)
        typed = [f"batch_size={batch_size}", f"tokens_per_step={config.plan.tokens_per_step}"]
        yield typed, work
    if work.product_bytes < work.residual_bytes:
        work, typed = (
            replace(work, residual_bytes=work.product_bytes),
            [*typed, "precision.residual=bfloat16" if work.in_fp8 else "precision=bf16-residual"],
        )
        yield typed, work
    if work.moment_bytes == 4 and max(config.optimizer.betas) <= SLOWEST_IN_BF16:
        yield [*typed, "precision.moments=bfloat16"], replace(work, moment_bytes=2)


def smaller_batches(config: TrainConfig) -> list[int]:
    """Rows of smaller micro-batches that make up the same step, the largest first."""
    total = config.plan.tokens_per_step // config.seq_len
    return [size for size in range(config.batch_size // 2, 0, -1) if total % size == 0]


def rows(config: TrainConfig) -> str:
    """ "2 rows of 16,384 tokens"."""
    return f"{config.batch_size} row{'s' * (config.batch_size > 1)} of {config.seq_len:,} tokens"
