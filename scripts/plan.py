"""What a run will take, before anything is allocated: memory by part, time, and the longest row of each policy.

python -m scripts.plan model=llama-1b seq_len=128k memory=auto                         on this machine's card
python -m scripts.plan gpu=h200 model=llama-1b seq_len=128k memory=auto                on a card that is not here
python -m scripts.plan gpu=h200 gpus=64 parallel=hsdp model=llama-8b                   on 64 of them
python -m scripts.plan gpu=h200 gpus=64,256,1024 parallel=hsdp model=llama-8b          a line for each

With gpus=: node=N GPUs in a node (8), link=GB/s each way between two of them (the card's data sheet), network=GB/s from
a GPU to other nodes (50). Memory is PyTorch's max_memory_allocated; times are for rows of one document each.
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentTypeError
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NoReturn

import hydra
from omegaconf import DictConfig

from model.activations_config import AutoConfig
from model.arithmetic import parameter_count, train_flops_per_token
from model.layer_memory import Workload
from model.memory import GIB, predict
from scripts.parser import positive, refuse_ranks
from training import cli, machine
from training.capacity import (
    AUTO_FILLS,
    as_typed,
    candidates,
    choose_policy,
    host_bytes,
    host_memory,
    longest_row,
    remedy,
    resolve_memory,
    rows,
    workload,
)
from training.cards import CARDS, LINKS
from training.config import TrainConfig, load_config
from training.metrics import short
from training.runtime import Runtime, resolve_runtime
from training.step_time import MEASURED_ON, PRODUCTS, StepTime, step_time
from training.traffic import (
    NETWORK_BYTES_PER_SECOND,
    NODE,
    exposed_seconds,
    sent_in_step,
)

PARTS = {
    "weights": "weights",
    "copies": "their copies for matrix products",
    "gradients": "gradients",
    "optimizer": "moments of the optimizer",
    "kept": "kept by layers for the backward pass",
    "layer": "one layer's own, while it computes",
    "loss": "logits, and gradients at the head",
    "batch": "tokens, positions and S × S masks",
}


@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
def main(composed: DictConfig) -> None:
    cli.job(plan, composed)


@dataclass
class Cluster:
    """The GPUs to plan for, as typed."""

    gpus: int = 1
    several: list[int] = field(default_factory=list)
    """Numbers of GPUs to compare; `gpus` is the one that is planned now."""
    node: int = NODE
    link: float = 0.0
    """Bytes a second."""
    network: float = NETWORK_BYTES_PER_SECOND

    def plan_for(self, gpus: int) -> None:
        """From here on this is the first of so many processes."""
        self.gpus, local = gpus, min(self.node, gpus)
        if gpus % local:
            raise ValueError(f"gpus={gpus} are no nodes of {self.node}; use a multiple, or node=")
        world = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": gpus, "LOCAL_WORLD_SIZE": local}
        os.environ |= {name: str(value) for name, value in world.items()}


cluster = Cluster()


def plan(composed: DictConfig) -> None:
    if len(cluster.several) > 1:
        for line in compared(composed):
            cli.say(line)
        return
    if cluster.several:
        cluster.plan_for(cluster.several[0])
    config = load_config(composed)
    runtime = resolve_runtime(config)
    if machine.supposed is not None and config.device == "cpu":
        raise ValueError("device=cpu has no GPU to plan for; leave it out")
    if runtime.gpu is None or runtime.gpu.memory is None:
        raise ValueError(f"there is no GPU here to plan for; name one: gpu={', '.join(CARDS)}")
    resolved = resolve_memory(config, runtime)
    for line in (
        *described(resolved, runtime, is_auto=isinstance(config.memory, AutoConfig)),
        *table(resolved, runtime),
    ):
        cli.say(line)


def described(config: TrainConfig, runtime: Runtime, is_auto: bool) -> Iterator[str]:
    """The run, its peak by part, and its step."""
    assert runtime.gpu is not None
    assert runtime.gpu.memory is not None
    work, steps, model = workload(config, runtime), config.plan, config.model
    there, peak = runtime.gpu.memory / GIB, predict(work)
    flops = train_flops_per_token(model, config.seq_len / 2) * steps.tokens_per_step
    yield f"card    {runtime.gpu.name}, {there:.1f} GiB; {runtime.precision.name}"
    yield f"model   {model.name}: {parameter_count(model).total / 1e6:,.1f}M parameters"
    micro_batches = f"{steps.accumulation} × {rows(config)}"
    taken = time_of(config, runtime, work)
    if work.ranks > 1:
        yield f"gpus    {work.ranks} in nodes of {cluster.node}: {arrangement(config, work)}"
        data_size = config.parallel.data_size(work.ranks)
        micro_batches += f" on each of {data_size}" if data_size > 1 else ""
    yield f"step    {steps.tokens_per_step:,} tokens ({micro_batches}), {flops / 1e12:,.0f} TFLOP"
    yield f"policy  {as_typed(config.memory)}{', which memory=auto means here' if is_auto else ''}"
    verdict = (
        "fits"
        if peak.total <= AUTO_FILLS * runtime.gpu.memory
        else "is tight"
        if peak.total / GIB <= there
        else "does not fit"
    )
    yield f"peak    {peak.total / GIB:,.1f} GiB, in {peak.moment}: {verdict}"
    yield from (f"        {size / GIB:9,.2f}  {PARTS[part]}" for part, size in peak.parts.items())
    if peak.host:
        needed, host, short = sum(host_bytes(work)), host_memory(), ""
        if host is not None and needed > host:
            short = f", which has {host / GIB:,.1f} GiB and with checkpoints needs {needed / GIB:,.1f}: does not fit"
        yield f"        {peak.host / GIB:9,.2f}  beside, in pinned memory of the host{short}"
    if work.ranks > 1:
        link, network = cluster.link / 1e9, cluster.network / 1e9
        yield f"sends   of a GPU and step, {link:g} GB/s in a node and {network:g} GB/s between nodes:"
        for sent in sent_in_step(work, steps.accumulation, cluster.node):
            way = ("in a node" if sent.is_in_node else "between nodes") + (", hidden" if sent.is_hidden else "")
            yield f"        {sent.bytes / 1e9:9,.2f}  GB, {sent.collective} of {sent.what} {way}"
    yield f"time    {time_line(taken, flops / work.ranks, runtime)}{' a GPU' if work.ranks > 1 and taken else ''}"
    if work.ranks > 1 and taken:
        yield f"        {steps.tokens_per_step / taken.total:,.0f} tokens/s"


def compared(composed: DictConfig) -> Iterator[str]:
    """A line for each number of GPUs."""
    yield " GPUs  rows at once  sent in node  between nodes  peak GiB  s a step  waiting  TFLOP/s  tokens/s"
    for gpus in cluster.several:
        cluster.plan_for(gpus)
        config = load_config(composed)
        runtime = resolve_runtime(config)
        config = resolve_memory(config, runtime)
        work, tokens = workload(config, runtime), config.plan.tokens_per_step
        taken = time_of(config, runtime, work)
        if taken is None:
            raise ValueError(f"the time is {unpredicted(runtime)}; plan for one number of GPUs")
        traffic = sent_in_step(work, config.plan.accumulation, cluster.node)
        inside, between = (sum(sent.bytes for sent in traffic if sent.is_in_node is place) for place in (True, False))
        flops = train_flops_per_token(config.model, config.seq_len / 2) * tokens / gpus
        rows_at_once = config.parallel.data_size(gpus) * config.batch_size
        yield (
            f"{gpus:5,}  {rows_at_once:12,}  {inside / 1e9:9,.1f} GB  {between / 1e9:10,.1f} GB"
            f"  {predict(work).total / GIB:8,.1f}  {taken.total:8,.2f}  {taken.sending / taken.total:7.1%}"
            f"  {flops / taken.total / 1e12:7,.0f}  {short(tokens / taken.total):>8}"
        )


def arrangement(config: TrainConfig, work: Workload) -> str:
    shards = f", {work.ranks // work.shards} × {work.shards} shards" if work.shards > 1 else ""
    rows_of = f", {work.context} share a row ({work.context_method})" if work.context > 1 else ""
    return f"parallel={config.parallel.name}{shards}{rows_of}"


def time_of(config: TrainConfig, runtime: Runtime, work: Workload) -> StepTime | None:
    """The time of a step, with what GPUs send each other."""
    micro_batches = config.plan.accumulation
    taken = step_time(work, micro_batches, runtime.gpu, runtime.factors)
    if taken is None or cluster.gpus == 1:
        return taken
    traffic = sent_in_step(work, micro_batches, cluster.node)
    return replace(taken, sending=exposed_seconds(traffic, taken.total, cluster.link, cluster.network))


def unpredicted(runtime: Runtime) -> str:
    return f"not predicted: this card's peak is not known for {runtime.factors} products"


def time_line(taken: StepTime | None, flops: float, runtime: Runtime) -> str:
    if taken is None:
        return unpredicted(runtime)
    parts = {"attention": taken.attention, "computed again": taken.again, "waiting for the host": taken.waiting}
    parts["for other GPUs"] = taken.sending
    said = ", ".join(f"{name} {seconds:,.2f}" for name, seconds in parts.items() if seconds >= 0.005)
    return f"{taken.total:,.2f} s a step{f' ({said})' if said else ''}: {flops / taken.total / 1e12:,.0f} TFLOP/s"


def table(config: TrainConfig, runtime: Runtime) -> Iterator[str]:
    """What each policy would take, and the longest row that it would train."""
    assert runtime.gpu is not None
    assert runtime.gpu.memory is not None
    assert config.model.n_kv_heads is not None
    work, limit = workload(config, runtime), AUTO_FILLS * runtime.gpu.memory
    chosen = choose_policy(work, runtime, limit)
    yield ""
    yield f"  {'policy':38} {'peak GiB':>9} {'host GiB':>8} {'s a step':>8} {'longest row':>11}"
    for policy in candidates(config.model.n_kv_heads):
        mine = replace(work, memory=policy)
        peak, taken = predict(mine), time_of(config, runtime, mine)
        seconds = f"{taken.total:,.2f}" if taken else "–"
        name = as_typed(policy).replace("memory=", "").replace("memory.", "")
        mark = "→" if policy == chosen else " "
        host = f"{peak.host / GIB:,.1f}" if peak.host else ""
        longest = work.context * longest_row(mine, limit)
        yield f"{mark} {name:38} {peak.total / GIB:9,.1f} {host:>8} {seconds:>8} {longest:11,}"
    yield ""
    timed = time_of(config, runtime, work) is not None
    if chosen:
        which = "fastest" if timed else "first"
        yield f"→ the {which} that fills at most {AUTO_FILLS:.0%} of the card, as the longest rows do"
    else:
        yield f"None fits; use {remedy(config, runtime, limit)}."
    if not timed:
        yield f"Times: {unpredicted(runtime)}."
    elif any(name in runtime.gpu.name for name in MEASURED_ON):
        yield f"Times: products at {PRODUCTS:.0%} of this card's peak, {work.attention} as measured; whole rows."
    else:
        yield "Times: not measured on this card; for as much of its peak as an H200 reaches."


def take_cluster(words: list[str]) -> None:
    """Take gpu=NAME, gpus=N … out of the command's words: from here on, that is the GPU of this machine."""
    typed = dict[str, str]()
    for word in list(words):
        name, is_setting, value = word.partition("=")
        if name == "card":
            _refuse(f"{word} is no setting; use gpu={value}")
        if is_setting and name in ("gpu", "gpus", "node", "link", "network"):
            words.remove(word)
            typed[name] = value
    card = typed.pop("gpu", "").lower() or None
    if card is not None and card not in CARDS:
        _refuse(f"gpu={card} is unknown; use {', '.join(CARDS)}")
    counts = typed.pop("gpus", "")
    cluster.several = [_count("gpus", count) for count in counts.split(",") if counts]
    cluster.node = _count("node", typed.pop("node", str(NODE)))
    for name, rate in typed.items():
        if not rate.replace(".", "", 1).isdecimal() or float(rate) == 0:
            _refuse(f"{name}={rate} is not possible; use GB/s")
    cluster.network = 1e9 * float(typed["network"]) if "network" in typed else NETWORK_BYTES_PER_SECOND
    if card is not None:
        machine.supposed = CARDS[card]
        cluster.link = 1e9 * float(typed["link"]) if "link" in typed else LINKS[card]
    elif counts:
        _refuse(f"gpus={counts} needs a card to plan for; name one: gpu={', '.join(CARDS)}")


def _count(name: str, value: str) -> int:
    try:
        return positive(value)
    except ArgumentTypeError as error:
        _refuse(f"{name}={error}")


def _refuse(message: str) -> NoReturn:
    cli.say_error(message)
    raise SystemExit(2)


if __name__ == "__main__":
    refuse_ranks("plan")
    take_cluster(sys.argv)
    cli.run(main)
