"""Whether the steps of a run are recorded as CUDA graphs and replayed. No torch here: `training.graphed_step` does it.

A step of a short row is over before its host has launched it: 14 ms and 44 ms for one row of 4,096 of gpt2-124m on an
H200. A graph is launched as one.
"""

from __future__ import annotations

from model.activations_config import OffloadConfig

from .capacity import workload
from .config import MuonConfig, TrainConfig
from .parallel.config import FsdpConfig
from .parallel.launch import Launch
from .runtime import Runtime
from .step_time import step_time

HOST_SECONDS = 44e-3 / 12
"""What the host takes for a layer of a micro-batch and its share of the update, compiled: the figure above."""
FEWEST_STEPS = 100
"""Of a run, from which on recording, which takes a second, pays."""


def check_graphs(config: TrainConfig, runtime: Runtime) -> None:
    """Raises ValueError where cuda_graphs=true asks for what cannot be recorded."""
    if config.cuda_graphs is True and (why := why_no_graphs(config, runtime)):
        raise ValueError(f"cuda_graphs=true: {why}; use cuda_graphs=auto or false")


def uses_graphs(config: TrainConfig, runtime: Runtime) -> bool:
    """Whether this run's steps are recorded; `auto` says so where by prediction the GPU would wait for its host."""
    if config.cuda_graphs is False or why_no_graphs(config, runtime):
        return False
    if config.cuda_graphs is True:
        return True
    taken = step_time(workload(config, runtime), 1, runtime.gpu, runtime.factors)
    is_short = taken is not None and taken.total < HOST_SECONDS * config.model.n_layers
    return is_short and config.plan.max_steps >= FEWEST_STEPS and config.attention.name in ("auto", "flash", "sdpa")


def why_no_graphs(config: TrainConfig, runtime: Runtime) -> str | None:
    """The reason why a step cannot be recorded; None where it can."""
    if runtime.gpu is None:
        return "a CPU has none"
    if isinstance(config.memory, OffloadConfig):
        return "memory=offload copies to the host and back on a stream of its own"
    if isinstance(config.optimizer, MuonConfig):
        return "the step of optimizer=muon reads its learning rate on the host"
    if Launch.here().size > 1:
        return "steps of several processes are not recorded"
    if isinstance(config.parallel, FsdpConfig):
        return f"the weights of parallel={config.parallel.name} are gathered by hooks"
    return None
