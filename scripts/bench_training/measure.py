"""One run, measured in a process of its own: what train.py does, without evaluation, samples and checkpoints.

    python -m scripts.bench_training.measure model=tiny seq_len=64 max_steps=9 log_every=2

`log_every` is the length of a window. The last line printed is the result, in JSON. Under torchrun it is the whole
run's, printed by rank 0.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from model.arithmetic import train_flops_per_token
from model.memory import GIB, predict
from scripts.settings import train_config
from train import check
from training.capacity import workload
from training.config import TrainConfig
from training.errors import NonFiniteError, OutOfMemory
from training.loggers.jsonl import read_metrics
from training.memory import out_of_memory_explained
from training.parallel.launch import speaks
from training.parallel.watch import watched
from training.parallel.world import World
from training.run import Run
from training.services import Service
from training.services.first_step import FirstStep
from training.services.garbage import Garbage
from training.services.logging import Logging
from training.services.profiling import Profiling
from training.trainer import Trainer

ALWAYS = ["logger=none", "sample_tokens=0", "check_memory=false"]  # what will not fit is tried
Figures = dict[str, Any]


class Clock(Service):
    """When the run began and when each of its windows ended; comes after what waits for the device there."""

    def __init__(self) -> None:
        self.seconds: dict[int, float] = {}
        """By the number of the window's last step."""

    def begin(self, run: Run) -> None:
        self.seconds[0] = time.perf_counter()

    def after_step(self, run: Run) -> None:
        if run.due(run.config.log_every, first=True):
            self.seconds[run.progress.step] = time.perf_counter()

    def step_seconds(self) -> tuple[float, int]:
        """Median over windows of the seconds of a step, and how many steps those are. Where there are others, the first
        step, in which all is compiled, is in no window."""
        windows = list(pairwise(self.seconds.items()))
        windows = windows[1:] or windows
        found = [(end - begin) / (last - before) for (before, begin), (last, end) in windows]
        return statistics.median(found), windows[-1][1][0] - windows[0][0][0]


def measured(words: list[str], profile: bool = False) -> Figures:
    """Train as these settings say; with `profile` one step more, of which a profiler then says where its time goes.

    Returns:
        the figures; or `out_of_memory`, `refused` or `failed` with a reason.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            config = settings([*words, f"run_dir={folder}/run"])
            steps = config.plan.max_steps
            if profile:
                more = [f"max_steps={steps + 1}", "profile=true", f"profile_steps=[{steps + 1},{steps + 1}]"]
                config = settings([*words, f"run_dir={folder}/run", *more])
            runtime = check(config)
            world = World.start(runtime.device, config.parallel)
            config = replace(config, run_dir=world.gather(config.run_dir)[0])
            clock, profiling = Clock(), Profiling()
            with watched(world), out_of_memory_explained(config, runtime):
                trainer = Trainer(config, _say, runtime, world)
                trainer.services = [profiling, FirstStep(), Logging(), Garbage(), clock]
                trainer.fit()
        except (OutOfMemory, ValueError, NonFiniteError) as error:
            kinds: dict[type[Exception], str] = {OutOfMemory: "out_of_memory", NonFiniteError: "failed"}
            return {kinds.get(type(error), "refused"): str(error)}
        config, facts = trainer.run.config, trainer.run.facts()  # which all ranks ask for
        if not world.is_first:
            return {}
        rows = [row for row in read_metrics(trainer.run.folder / "metrics.jsonl") if row["step"] <= steps]
    if profile:
        if not profiling.found:
            return {"failed": "the profiler, whose line says why"}
        del profiling.found["memory"]  # hundreds of points, which no record needs
        del clock.seconds[steps + 1]
    seen = [row["throughput/attended_fraction"] for row in rows if "throughput/attended_fraction" in row]
    keys = (statistics.mean(seen) if seen else 1.0) * (config.seq_len + 1) / 2
    found = figures(config, *clock.step_seconds(), peak_flops=facts["peak_flops"])
    return {
        **found,
        "gpus": world.size,
        "attended_tflops": found["tokens_per_second"] * train_flops_per_token(config.model, keys) / 1e12,
        "first_step_s": clock.seconds[1] - clock.seconds[0],
        "peak_allocated_gib": max(row.get("memory/peak_allocated_gib", 0.0) for row in rows),
        "predicted_gib": predict(workload(config, runtime)).total / GIB,
        "peak_reserved_gib": max(row.get("memory/peak_reserved_gib", 0.0) for row in rows),
        "pinned_gib": pinned_bytes(trainer.run.model) / GIB,
        "losses": [row["train/loss"] for row in rows],
        "grad_norms": [row["train/grad_norm"] for row in rows],
        "attention": facts["attention"],
        "parameters": facts["parameters"],
        **({"profile": profiling.found} if profile else {}),
    }


def figures(config: TrainConfig, step_s: float, steps: int, *, peak_flops: float | None) -> Figures:
    """What follows from the seconds of a step."""
    tokens_per_second = config.plan.tokens_per_step / step_s
    flops = tokens_per_second * train_flops_per_token(config.model, config.seq_len / 2)
    return {
        "model": config.model.name,
        "policy": config.memory.name,
        "seq_len": config.seq_len,
        "step_s": step_s,
        "steps": steps,
        "tokens_per_second": tokens_per_second,
        "tflops": flops / 1e12,
        "mfu": flops / peak_flops if peak_flops else None,
    }


def pinned_bytes(model: torch.nn.Module) -> int:
    """Host memory that the blocks' stores hold."""
    stores = {id(store): store for module in model.modules() if (store := getattr(module, "store", None)) is not None}
    return sum(store.buffers.bytes for store in stores.values() if getattr(store, "buffers", None) is not None)


def settings(words: list[str]) -> TrainConfig:
    """What train.py would make of them, without what a benchmark leaves out."""
    return train_config([*ALWAYS, *words])


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="settings of train.py")
    parser.add_argument("--profile", action="store_true", help="train one step more, under PyTorch's profiler")
    args = parser.parse_args()
    found = measured(args.words, args.profile)
    if speaks():
        print(json.dumps(found))


if __name__ == "__main__":
    main()
