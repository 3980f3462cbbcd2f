"""Train a GPT: python train.py attention=sdpa seq_len=16384

configs/train.yaml lists everything that can be set; README.md explains the numbers.
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from training import cli, run_folder
from training.config import load_config
from training.runtime import resolve_runtime


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(composed: DictConfig) -> None:
    cli.job(train, composed)


def train(composed: DictConfig) -> dict[str, float]:
    """One run; returns the last value of every metric."""
    config = load_config(composed)
    # What this machine cannot do or does not have is refused here, the rest is the trainer's.
    runtime = resolve_runtime(config)
    run_folder.check(config)
    config.data.check()
    config.tokenizer.check()

    from training.memory import out_of_memory_explained  # torch: 1 to 3 s that a mistake need not wait for
    from training.trainer import Trainer

    with out_of_memory_explained(config):
        trainer = Trainer(config, cli.say, runtime)
        summary = trainer.fit()
    cli.say(str(trainer.run.folder))
    return summary


if __name__ == "__main__":
    cli.run(main)
