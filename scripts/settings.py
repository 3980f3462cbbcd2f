"""What train.py makes of the settings that are typed, for scripts that build runs and models of them."""

from __future__ import annotations

from collections.abc import Sequence

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from scripts.record import ROOT
from training import cli
from training.config import TrainConfig, load_config
from training.mistakes import explain


def train_config(words: Sequence[str]) -> TrainConfig:
    """The configuration of `python train.py` with these words.

    Raises:
        ValueError: one line: a setting is impossible, or there is none of that name.
    """
    cli.register_resolvers()
    try:
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            return load_config(compose("train", list(words)))
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(explain(error, words)) from error
