"""What a run is, beyond its configuration: for the start-up lines, facts.json and W&B."""

from __future__ import annotations

import shlex
import socket
import sys
from pathlib import Path
from typing import Any

import torch

from data.corpus import Corpus
from model.activations_config import SelectiveConfig
from model.arithmetic import float8_flops_per_token, parameter_count, train_flops_per_token
from model.attention.base import AttentionBackend
from model.layer_memory import kept_bytes
from model.memory import GIB, predict, state_bytes
from model.precision_config import Float8Config, described

from . import hardware
from .capacity import workload
from .config import Plan, TrainConfig
from .graphs import uses_graphs
from .parallel.launch import Launch
from .parallel.world import World
from .runtime import Runtime
from .throughput import Peak

ROOT = Path(__file__).resolve().parent.parent


def run_facts(
    config: TrainConfig, runtime: Runtime, attention: AttentionBackend, corpus: Corpus, world: World
) -> dict[str, Any]:
    """JSON-able facts: model size, what computes it, versions, commit, corpus manifest, command. All ranks ask."""
    here = {"host": socket.gethostname(), "device": hardware.describe_device(runtime.device)["name"]}
    count, peak = parameter_count(config.model), matmul_peak(config, runtime, world.size)
    return {
        "parameters": count.total,
        "matmul_parameters": count.matmul,
        "train_flops_per_token": train_flops_per_token(config.model, config.seq_len / 2),
        "attention": f"{attention.name}: {attention.describe()}",
        "device": hardware.describe_device(runtime.device),
        "ranks": world.gather(here),
        "precision": runtime.precision.name,
        "compile": runtime.compile,
        "cuda_graphs": uses_graphs(config, runtime),
        "peak_flops": peak(config.seq_len / 2) if peak else None,
        "versions": hardware.versions(),
        "git_commit": hardware.git_commit(ROOT),
        "data": corpus.manifest,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def matmul_peak(config: TrainConfig, runtime: Runtime, num_gpus: int = 1) -> Peak | None:
    """Dense peak of the units this run's matrix products use, on all its GPUs; None where it is not known.

    With fp8 each product is held against the peak of its own factors: the linear layers' against that of 8 bits,
    attention's and the head's against that of bf16.

    Returns:
        FLOP/s, by the keys that a token sees on average, on which the share of the linear layers depends.
    """
    if runtime.device.type != "cuda":
        return None
    name, capability = torch.cuda.get_device_name(runtime.device), torch.cuda.get_device_capability(runtime.device)
    peak = hardware.peak_flops(name, runtime.factors, capability)
    if peak is None or not isinstance(runtime.precision, Float8Config):
        return None if peak is None else lambda keys: num_gpus * peak
    peak_in_fp8 = hardware.peak_flops(name, "float8_e4m3fn", capability)
    if peak_in_fp8 is None:
        return None
    in_fp8 = float8_flops_per_token(config.model, runtime.precision)
    return lambda keys: num_gpus * mixed_peak(train_flops_per_token(config.model, keys), in_fp8, peak, peak_in_fp8)


def mixed_peak(flops: float, in_fp8: float, peak: float, peak_in_fp8: float) -> float:
    """The rate at which so many FLOPs are done, of which some at another peak."""
    return flops / ((flops - in_fp8) / peak + in_fp8 / peak_in_fp8)


def start_up_lines(config: TrainConfig, runtime: Runtime, facts: dict[str, Any]) -> list[str]:
    """What a person should know before the first step."""
    execution = ("torch.compile" if facts["compile"] else "eager") + (", CUDA graphs" if facts["cuda_graphs"] else "")
    plan, state = config.plan, sum(state_bytes(workload(config, runtime)))
    data_size = config.parallel.data_size(len(facts["ranks"]))
    a_gpu = " on each GPU" if config.parallel.shard_size(Launch.here()) > 1 else ""
    on = f" on each of {data_size}" if data_size > 1 else ""
    return [
        f"device     {facts['device']['name']}, {facts['precision']}, {execution}, torch {facts['versions']['torch']}",
        f"precision  {described(config.precision, runtime.precision, config.model, emulated=runtime.gpu is None)}",
        f"model      {config.model.name}: {facts['parameters'] / 1e6:,.1f}M parameters, "
        f"{state / GIB:.2f} GiB with gradients and {config.optimizer.name}'s moments{a_gpu}",
        f"attention  {facts['attention']}",
        *memory_lines(config, runtime),
        *parallel_lines(config, facts["ranks"]),
        f"plan       {plan.max_steps:,} steps × {plan.tokens_per_step:,} tokens "
        f"({plan.accumulation} × {config.batch_size} rows of {config.seq_len:,}{on}){epochs(plan, facts['data'])}",
    ]


def memory_lines(config: TrainConfig, runtime: Runtime) -> list[str]:
    """What layers keep for the backward pass, where a policy says it, and on a GPU the peak that is predicted."""
    work, policy, n_layers = workload(config, runtime), config.memory, config.model.n_layers
    said = []
    if isinstance(policy, SelectiveConfig):
        layers = policy.of(n_layers)
        kept = f"{sum(kept_bytes(work, layer) for layer in range(layers)) / GIB:.2f} GiB"
        said.append(f"{layers} of {n_layers} layers keep {kept} for the backward pass and compute the rest again")
    if runtime.gpu is not None:
        plan = predict(work)
        of = f" of {runtime.gpu.memory / GIB:.1f}" if runtime.gpu.memory else ""
        host = f" and {plan.host / GIB:.1f} GiB of the host" if plan.host else ""
        said.append(f"{plan.total / GIB:.1f}{of} GiB{host} by prediction")
    return [f"memory     {policy.name}: {'; '.join(said)}"] if said else []


def parallel_lines(config: TrainConfig, ranks: list[dict[str, str]]) -> list[str]:
    """How the run is spread over its processes; nothing of one process with all of the model."""
    parallel, hosts = config.parallel, len({rank["host"] for rank in ranks})
    shards = parallel.shard_size(Launch.here())
    if len(ranks) == 1 and parallel.name == "data":
        return []
    said = [f"{len(ranks)} process{'es' * (len(ranks) > 1)} on {hosts} host{'s' * (hosts > 1)}"]
    if parallel.context > 1:
        said.append(f"{parallel.context} share each row")
    if parallel.name != "data":
        copies = f"{len(ranks) // shards} × " if len(ranks) > shards else ""
        said.append(f"{copies}{shards} shard{'s' * (shards > 1)}")
    return [f"parallel   {parallel.name}: {', '.join(said)}"]


def epochs(plan: Plan, manifest: dict[str, Any]) -> str:
    """ ", 0.7 epochs of the text"; nothing where the text is a stream or a mixture, which has no one length."""
    tokens = manifest.get("train", {}).get("tokens", 0)
    if not tokens:
        return ""
    number = plan.max_steps * plan.tokens_per_step / tokens
    return f", {number:,.2f} epochs of the text" if number < 10 else f", {number:,.0f} epochs of the text"
