"""Train a GPT.

python train.py                                  a small model on a CPU, GPT-2 124M on a GPU; nothing to download
python train.py attention=flash seq_len=16k      change any choice and any setting
python train.py data=text data.path=~/notes      your own text
python train.py run_dir=runs/NAME                go on with a run, after any interruption
python train.py -m attention=math,sdpa,flex      each value in turn, and a table
torchrun --nproc-per-node=8 train.py             on 8 GPUs
python train.py --cfg job --resolve              every setting with its value on this machine; runs nothing
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import training.installed  # noqa: F401  (first: it says in one line what is not installed)

# isort: split
import hydra
from omegaconf import DictConfig

from data.progress import doing
from training import cli, jobs, run_folder
from training.capacity import check_capacity
from training.closing import closing_lines
from training.config import TrainConfig, load_config
from training.graphs import check_graphs
from training.runtime import Runtime, resolve_runtime
from training.terminal import columns


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(composed: DictConfig) -> float:
    return cli.job(train, composed)


def check(config: TrainConfig) -> Runtime:
    """What this machine runs the configuration on; what it cannot do or does not have is refused.

    Raises:
        ValueError: one line.
    """
    runtime = resolve_runtime(config)
    check_capacity(config, runtime)
    check_graphs(config, runtime)
    run_folder.check(config)
    config.data.check()
    config.tokenizer.check()
    config.logger.check()
    return runtime


def train(composed: DictConfig) -> dict[str, float]:
    """One run; returns the last value of every metric."""
    doing("checking the settings")
    config = load_config(composed)
    runtime = check(config)

    doing("loading PyTorch")
    from training.memory import out_of_memory_explained  # torch: 1 to 3 s that a mistake need not wait for
    from training.parallel.watch import watched
    from training.parallel.world import World
    from training.trainer import Trainer

    world = World.start(runtime.device, config.parallel)
    with (
        watched(world),
        run_folder.claimed(config, is_named=jobs.is_typed("run_dir") or not world.is_first) as config,
        out_of_memory_explained(config, runtime),
    ):
        config = replace(config, run_dir=world.gather(config.run_dir)[0])
        summary = Trainer(config, cli.say, runtime, world).fit()
    if jobs.job_number() is None:  # a sweep has its table
        for line in closing_lines(Path(config.run_dir), columns()):
            cli.say(line)
    cli.say(config.run_dir)
    return summary


if __name__ == "__main__":
    cli.run(main, check)
