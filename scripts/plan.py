"""What a run will take, before anything is allocated: python -m scripts.plan model=llama-1b seq_len=1048576 memory=auto

Takes the settings of train.py. gpu=NAME plans for a card that is not here. Memory is predicted for PyTorch's allocator
(`memory/peak_allocated_gib`), time for rows that are one document each.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace

import hydra
from omegaconf import DictConfig

from model.activations_config import AutoConfig
from model.arithmetic import parameter_count, train_flops_per_token
from model.memory import GIB, predict
from training import cli, machine
from training.capacity import (
    AUTO_FILLS,
    as_typed,
    candidates,
    choose_policy,
    longest_row,
    resolve_memory,
    rows,
    workload,
)
from training.cards import CARDS
from training.config import TrainConfig, load_config
from training.runtime import Runtime, resolve_runtime
from training.step_time import MEASURED_ON, PRODUCTS, StepTime, step_time

PARTS = {
    "weights": "weights",
    "copies": "their copies for matrix products",
    "gradients": "gradients",
    "optimizer": "moments of the optimizer",
    "kept": "kept by layers for the backward pass",
    "layer": "one layer's own, while it computes",
    "loss": "logits, and gradients at the head",
    "batch": "tokens and positions",
}


@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
def main(composed: DictConfig) -> None:
    cli.job(plan, composed)


def plan(composed: DictConfig) -> None:
    config = load_config(composed)
    runtime = resolve_runtime(config)
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
        yield f"        {peak.host / GIB:9,.2f}  beside, in pinned memory of the host"
    yield f"time    {time_line(step_time(work, steps.accumulation, runtime.gpu, runtime.dtype_name), flops)}"


def time_line(taken: StepTime | None, flops: float) -> str:
    if taken is None:
        return "not predicted: this card's peak is not known"
    parts = {"attention": taken.attention, "computed again": taken.again, "waiting for the host": taken.waiting}
    said = ", ".join(f"{name} {seconds:,.2f}" for name, seconds in parts.items() if seconds >= 0.005)
    return f"{taken.total:,.2f} s a step ({said}): {flops / taken.total / 1e12:,.0f} TFLOP/s"


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
        peak, taken = predict(mine), step_time(mine, config.plan.accumulation, runtime.gpu, runtime.dtype_name)
        seconds = f"{taken.total:,.2f}" if taken else "–"
        name = as_typed(policy).replace("memory=", "").replace("memory.", "")
        mark = "→" if policy == chosen else " "
        host = f"{peak.host / GIB:,.1f}" if peak.host else ""
        yield f"{mark} {name:38} {peak.total / GIB:9,.1f} {host:>8} {seconds:>8} {longest_row(mine, limit):11,}"
    yield ""
    yield (
        f"→ the fastest of those below {AUTO_FILLS:.0%} of the card, as the longest rows are"
        if chosen
        else "None fits."
    )
    if any(name in runtime.gpu.name for name in MEASURED_ON):
        yield f"Times: products at {PRODUCTS:.0%} of this card's peak, attention as measured; whole rows."
    else:
        yield "Times: not measured on this card; for as much of its peak as an H200 reaches."


def take_card(words: list[str]) -> None:
    """Take gpu=NAME out of the command's words: from here on, that is the GPU of this machine."""
    for word in [word for word in words if word.startswith("gpu=")]:
        words.remove(word)
        name = word.removeprefix("gpu=")
        if name not in CARDS:
            cli.say_error(f"gpu={name} is unknown; use {', '.join(CARDS)}")
            raise SystemExit(2)
        machine.supposed = CARDS[name]


if __name__ == "__main__":
    take_card(sys.argv)
    cli.run(main)
