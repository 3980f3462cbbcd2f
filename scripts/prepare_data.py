"""Make the token files before training; a preparation that was killed goes on.

python -m scripts.prepare_data data=text data.path=~/corpus tokenizer=bpe
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from scripts.parser import refuse_ranks
from training import cli
from training.config import load_config


@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
def main(composed: DictConfig) -> None:
    cli.job(prepare, composed)


def prepare(composed: DictConfig) -> None:
    config = load_config(composed)

    from data.config import HubData
    from data.corpus import load_corpus

    if isinstance(config.data, HubData) and not config.data.prepare:
        raise ValueError("data.prepare=false leaves nothing to prepare: leave it out, or train")

    corpus = load_corpus(config.data, config.tokenizer, cli.say)
    for part in corpus.parts:
        cli.say(str(part.folder))


if __name__ == "__main__":
    refuse_ranks("prepare_data")
    cli.run(main)
