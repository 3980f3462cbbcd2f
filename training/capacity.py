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
from model.attention.config import SdpaConfig, has_hopper_kernels
from model.layer_memory import Workload
from model.memory import GIB, MemoryPlan, moments, predict, state_bytes
from model.precision_config import Float8Config

from . import machine
from .config import TrainConfig
from .optimizer_config import SLOWEST_IN_BF16
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
CPU_FILLS = 0.6
"""Fraction of a CPU's memory that what is offered instead fills by prediction, which is a GPU's: steps on a CPU took up
to 1.6 times as much."""
ROW_STEP = 1024
"""Tokens in steps of which the longest row is looked for."""


# ---- what a run takes


def workload(config: TrainConfig, runtime: Runtime) -> Workload:
    """What of a run decides its memory."""
    spec = inner_spec(config, attention_spec(config, runtime))
    chosen, parallel = choose_attention(config.attention, spec), config.parallel
    method = method_of(config) if parallel.context > 1 else "ulysses"
    if method == "all-gather" and isinstance(chosen, SdpaConfig) and chosen.kernel != "math":
        chosen = replace(chosen, kernel="efficient")  # the one that takes fewer queries than keys, by a mask
    reads_mask = chosen.reads_mask(spec) or (method == "all-gather" and chosen.name == "sdpa")
    return Workload(
        model=config.model,
        memory=config.memory,
        batch_size=config.batch_size,
        seq_len=math.ceil(config.seq_len / config.parallel.context),
        accumulates=config.plan.accumulation > 1,
        optimizer=config.optimizer.name,
        moment_bytes=config.precision.moment_bytes,
        product_bytes=runtime.precision.product_bytes,
        in_fp8=isinstance(runtime.precision, Float8Config),
        input_bytes=1 if getattr(runtime.precision, "weight_gradients", None) == "fp8" else None,
        residual_bytes=runtime.precision.residual_bytes,
        compiled=runtime.compile,
        attention="math" if getattr(chosen, "kernel", None) == "math" else chosen.name,
        mask_rows=reads_mask * (config.batch_size if spec.masks_documents else 1),
        saves=config.checkpoint.save,
        ranks=Launch.here().size,
        shards=parallel.shard_size(Launch.here()),
        reshards=getattr(parallel, "reshard", True),
        state_on_host=getattr(parallel, "offload", False),
        context=parallel.context,
        context_method=method,
        reduction_bytes=2 if config.precision.reduction == "bfloat16" else 4,
        sums_queries=chosen.name == "flash" and has_hopper_kernels(spec),
        repeats_keys=chosen.repeats_keys(spec),
    )


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
    for groups in [groups for groups in (2, 4, 8) if n_kv_heads % groups == 0][-2:]:
        for kept in (1.0, 0.0):
            yield FullConfig(keep_attention=kept, head_groups=groups)
            yield OffloadConfig(keep_attention=kept, head_groups=groups)


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
        taken = step_time(replace(work, memory=policy), 1, runtime.gpu, runtime.factors)
        return None if taken is None else taken.total

    policies = on_device(work) if runtime.gpu is None else candidates(work.model.n_kv_heads)
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

    On a GPU the predicted peak of a step counts, on a CPU, whose kernels are not predicted, what is held while they
    compute. Of the host's memory, what is kept there counts, and what checkpoints are copied to.

    Raises:
        ValueError: names what is needed, what there is, and what would fit.
    """
    if not config.check_memory:
        return
    gpu = runtime.gpu
    there = host_memory() if gpu is None else gpu.memory
    place = f"{'this machine' if gpu is None else gpu.name} has {(there or 0) / GIB:,.1f} GiB of memory"
    work = workload(config, runtime)
    weights, gradients, optimizer = state_bytes(work)
    state = weights + gradients + optimizer
    is_here = gpu is None or not work.state_on_host
    # What could be halved is left to `remedy`, on a GPU.
    least = cpu_bytes(config, work, state) if gpu is None else state - optimizer + optimizer // 2
    if is_here and there is not None and least > there and not (gpu and fits_in_shards(work, there)):
        copied = "" if gpu else f", with the memory that checkpoints are copied to {least / GIB:,.0f} GiB"
        shape = ", ".join(f"model.{name}={getattr(config.model, name)}" for name in SHAPE)
        raise ValueError(
            f"model.name={config.model.name} ({shape}) has {parameter_count(config.model).total:.3g} parameters, whose "
            f"weights, gradients and optimizer alone take {state / GIB:,.0f} GiB{copied}; {place}; "
            f"use a smaller one, such as model=tiny"
        )
    config = resolve_memory(config, runtime)
    work = workload(config, runtime)
    check_host(work, runtime)
    if there is None:
        return
    if gpu is None:
        needed = max(moments(work), key=held)
        size, limit = cpu_bytes(config, work, held(needed)), CPU_FILLS * (there - snapshot_bytes(work))
        if size <= there:
            return
        how, limit = "held, with the memory that checkpoints are copied to", limit / Launch.here().local_size
    else:
        needed = predict(work)
        size, how, limit = needed.total, "predicted", AUTO_FILLS * there
        if size <= REFUSED_ABOVE * there:
            return
    raise ValueError(
        f"{config.model.name} with {rows(config)} and {as_typed(config.memory)} needs {size / GIB:,.0f} GiB "
        f"({how}, in {needed.moment}); {place}; use "
        f"{'parallel=fsdp, ' if gpu and fits_in_shards(work, there) else ''}{remedy(config, runtime, limit)}, "
        f"or check_memory=false to try it all the same"
    )


def held(plan: MemoryPlan) -> int:
    """Bytes that are there at a moment of a step whatever computes it: all but what exists while a kernel runs."""
    return plan.total - plan.layer - plan.loss


def cpu_bytes(config: TrainConfig, work: Workload, of_step: int) -> int:
    """Bytes that a CPU's processes come to hold, each of them so many in a step.

    The memory that a checkpoint was copied to stays; when the last one is, the gradients are gone.
    """
    weights, _, optimizer = state_bytes(work)
    local, saved = Launch.here().local_size, snapshot_bytes(work)
    saves_before_the_end = 0 < config.checkpoint.every < config.plan.max_steps
    return max(local * of_step + saved * saves_before_the_end, local * (weights + optimizer) + saved)


def fits_in_shards(work: Workload, limit: float) -> bool:
    """Whether the run, whose ranks all hold everything, would fit as parallel=fsdp."""
    shards = Launch.here().size
    return work.shards < shards and not work.in_fp8 and predict(replace(work, shards=shards)).total <= limit


def snapshot_bytes(work: Workload) -> int:
    """Bytes of this node's host memory that a checkpoint is copied to: each rank writes its share of it."""
    weights, _, optimizer = state_bytes(work)
    return work.saves * Launch.here().local_size * work.shards * (weights + optimizer) // work.ranks


def host_bytes(work: Workload) -> tuple[int, int]:
    """Bytes of this node's host memory that layers keep their tensors in, and that a checkpoint is copied to."""
    return Launch.here().local_size * predict(work).host, snapshot_bytes(work)


def check_host(work: Workload, runtime: Runtime) -> None:
    """Refuse memory=offload where there is no GPU, and what the memory of a GPU's host is too small for.

    Raises:
        ValueError: names what is needed, what there is, and what to do instead.
    """
    offloads = isinstance(work.memory, OffloadConfig)
    if runtime.gpu is None:
        if offloads:
            raise ValueError(
                "memory=offload moves tensors from a GPU to the host, and this run has no GPU; use memory=full"
            )
        return
    there, (pinned, saved) = host_memory(), host_bytes(work)
    if there is None or pinned + saved <= there:
        return
    copied = f"checkpoints are copied to {saved / GIB:,.1f} GiB of"
    if isinstance(work.memory, OffloadConfig):
        L = work.model.n_layers
        fewer = (math.floor(100 * n / work.memory.of(L)) / 100 for n in range(work.memory.on_host(L) - 1, 0, -1))
        policies = [replace(work.memory, host=fraction) for fraction in fewer if fraction > 0]
        fits = [policy for policy in policies if sum(host_bytes(replace(work, memory=policy))) <= there]
        who = f"memory=offload with memory.host={work.memory.host:g}"
        instead = f"memory.host={fits[0].host:g}" if fits else "memory=full"
    else:
        who, instead = "parallel.offload=true", "parallel.offload=false"
    if pinned:
        needs = f"{who} keeps {pinned / GIB:,.1f} GiB in the host's memory, and {copied} it"
    else:
        needs, instead = f"{copied} the host's memory", "a smaller model="
    raise ValueError(
        f"{needs}; there are {there / GIB:,.1f} GiB; use {instead}, or check_memory=false to try it anyway"
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
    if work.moment_bytes == 4 and config.optimizer.slowest_decay <= SLOWEST_IN_BF16:
        yield [*typed, "precision.moments=bfloat16"], replace(work, moment_bytes=2)


def smaller_batches(config: TrainConfig) -> list[int]:
    """Rows of smaller micro-batches that make up the same step, the largest first."""
    total = config.plan.accumulation * config.batch_size  # of this rank
    return [size for size in range(config.batch_size // 2, 0, -1) if total % size == 0]


def rows(config: TrainConfig) -> str:
    """ "2 rows of 16,384 tokens"."""
    return f"{config.batch_size} row{'s' * (config.batch_size > 1)} of {config.seq_len:,} tokens"
