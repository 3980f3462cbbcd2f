"""The jobs of a command: one, or a sweep's. What each is set to, and what is refused before the first one begins."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from time import time_ns
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from .config import TrainConfig, load_config
from .config.load import resolved
from .config.paths import expand_path, in_quotes
from .config.saved import saved_settings, with_saved
from .config.secrets import refuse_secrets
from .mistakes import explain, set_by_experiment, typed_words
from .run_folder import LOCK, make_new, run_nearby
from .sweep import Sweep
from .terminal import say_error

check: Callable[[TrainConfig], object] = lambda config: None  # noqa: E731
"""Refuses (ValueError) what this machine cannot run. The program's own, set by `cli.run`."""
sweep: Sweep | None = None
"""The one that runs now."""
failures: list[int] = []
"""Exit codes of what failed in this process."""


def settings_of_job(composed: DictConfig, notify: Callable[[str], None] = lambda line: None) -> DictConfig:
    """What Hydra composed for this job: in the job's own folder, and over the settings of the run that it goes on with.

    `python train.py run_dir=runs/x` goes on with what runs/x/config.yaml holds, `resume=runs/x` branches off with it;
    what is typed beside it is a change.

    Raises:
        ValueError: two lengths of the run were typed.
    """
    keys = typed_keys()
    # An experiment's max_tokens is a default beside a max_steps that is typed.
    if composed.get("max_steps") is not None and any(word.lstrip("+").startswith("max_tokens=") for word in typed()):
        raise ValueError(
            f"max_steps={composed.max_steps} and max_tokens={composed.max_tokens} are two lengths of one run; "
            f"use max_steps=null, or leave out max_tokens"
        )
    if not keys & {"run_dir", "resume"}:
        return composed
    composed = composed.copy()
    values = resolved(composed)
    saved, source = None, ""
    if "run_dir" in keys:
        run_dir = expand_path(str(values["run_dir"] or ""), "run_dir")
        number = job_number()
        if sweep and number is not None and "run_dir" not in sweep.swept:
            composed.run_dir = run_dir
            run_dir = sweep.folder_for(number, run_dir, load_config(composed))
        composed.run_dir = run_dir
        saved, source = saved_settings(Path(run_dir)), run_dir
    if saved is None and values["resume"] not in ("auto", "none"):
        source = expand_path(str(values["resume"] or ""), "resume")
        saved = saved_settings(Path(source))
    if saved is None:
        if keys == {"run_dir"} and not Path(source).exists() and (near := run_nearby(Path(source))):
            notify(f"run_dir    {source} begins a new run; {near} is one that is there")
        return composed
    notify(f"settings   those of {source}, changed by what is typed")
    return with_saved(composed, saved, keys)


class BeforeTheFirstJob(Callback):
    """Hydra calls this before it writes anything and before a sweep's first job; configs/train.yaml names it."""

    def __init__(self) -> None:
        self.sweep: Sweep | None = None

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        _or_exit(lambda: _refuse_secrets_of_hydra(config))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        _or_exit(lambda: self._prepare(config))

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        global sweep
        sweep = self.sweep  # in the process of the job, which may be another one than the sweep's

    def _prepare(self, config: DictConfig) -> None:
        global sweep
        _refuse_secrets_of_hydra(config)
        words: Any = OmegaConf.to_container(config.hydra.overrides.task)
        params = config.hydra.sweeper.get("params") or {}
        loader = GlobalHydra.instance().config_loader()
        parsed = OverridesParser.create(loader).parse_overrides([*(f"{k}={v}" for k, v in params.items()), *words])
        swept = [override.key_or_group for override in parsed if override.is_sweep_override()]
        named = {key for word in words for key in _keys_of_override(word)} - set(swept)
        if _is_typed_for_hydra("hydra.sweep.dir", config):
            folder = expand_path(str(config.hydra.sweep.dir), "hydra.sweep.dir")
            _refuse_run(folder, "hydra.sweep.dir")
        elif "run_dir" in named:
            folder = expand_path(str(config.run_dir), "run_dir")
            _refuse_run(folder, "run_dir")
            if named == {"run_dir"} and not swept and (there := Path(folder) / "multirun.yaml").exists():
                raise ValueError(f"run_dir={folder} holds a sweep; to go on, type what it sweeps, too: {there} has it")
        else:
            folder = str(make_new(Path(str(config.hydra.sweep.dir))))
        config.hydra.sweep.dir = folder  # of multirun.yaml and the table
        config.hydra.overrides.hydra.append(f"hydra.sweep.dir={in_quotes(folder)}")  # for what the jobs compose
        self.sweep = sweep = Sweep(f"{time_ns()} {os.getpid()}", folder, swept)
        if not str(config.hydra.sweeper._target_).endswith("BasicSweeper"):
            _make(folder)  # another sweeper chooses as it goes, and may keep there what it knows
            return
        jobs = [job for batch in BasicSweeper.split_arguments(parsed, None) for job in batch]
        self.sweep.total = len(jobs)
        try:
            for number, job in enumerate(jobs):
                self._check_job(config, number, job)
        except (HydraException, OmegaConfBaseException, ValueError):
            with suppress(OSError):
                os.rmdir(self.sweep.folder)  # made above: a command that cannot work leaves nothing behind
            raise

    def _check_job(self, config: DictConfig, number: int, words: list[str]) -> None:
        """Refuse a job that cannot work now, not after the jobs before it have trained."""
        assert self.sweep is not None
        hydra_config, before = HydraConfig.instance(), HydraConfig.instance().cfg
        composed = GlobalHydra.instance().config_loader().load_sweep_config(config, list(words))
        with open_dict(composed):
            composed.hydra.job.num = number
        hydra_config.set_config(composed)
        _refuse_secrets_of_hydra(composed)
        try:
            with open_dict(composed):
                del composed["hydra"]
            loaded = load_config(settings_of_job(composed))
            check(loaded)
        except ValueError as error:
            say_error(str(error))
            self.sweep.refused.append(number)
            failures.append(2)
        finally:
            hydra_config.cfg = before


def _refuse_run(folder: str, key: str) -> None:
    if (Path(folder) / LOCK).exists():
        raise ValueError(f"{key}={folder} holds a run, and -m makes a folder of runs; choose another")


def _make(folder: str) -> None:
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise ValueError(f"the sweep's folder {folder} cannot be made: {error.strerror}; choose another") from error


def _or_exit(refuse: Callable[[], None]) -> None:
    """Hydra turns the exceptions of a callback into warnings."""
    try:
        refuse()
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        say_error(explain(error, typed_words()))
        sys.exit(2)


def _refuse_secrets_of_hydra(config: DictConfig) -> None:
    """Also what is Hydra's: hydra.job.env_set, and the parameters of a sweep, which multirun.yaml holds."""
    own = {name: node for name in config if name != "hydra" and (node := config._get_node(name)) is not None}
    for items in (own, {"hydra.job": config.hydra.job, "hydra.sweeper": config.hydra.sweeper}):
        plain = {
            name: OmegaConf.to_container(node) if OmegaConf.is_config(node) else node._value()
            for name, node in items.items()
        }
        refuse_secrets(plain)


def _is_typed_for_hydra(key: str, config: DictConfig) -> bool:
    return any(word.lstrip("+").startswith(f"{key}=") for word in config.hydra.overrides.hydra)


def typed() -> list[str]:
    """The settings of this job as they were typed, or as its sweep has chosen them."""
    if not HydraConfig.initialized():
        return []
    words: Any = HydraConfig.get().overrides.task
    # Unresolved: in run_dir=${…} there is nothing of Hydra's own.
    return list(words if isinstance(words, list) else OmegaConf.to_container(words))  # type: ignore[arg-type]


def typed_keys() -> set[str]:
    """The settings and groups that this job's command decides, an experiment's among them."""
    return {key for word in typed() for key in _keys_of_override(word)}


def is_typed(key: str) -> bool:
    return key in typed_keys()


def _keys_of_override(word: str) -> set[str]:
    key, _, value = word.partition("=")
    key = key.lstrip("+~").partition("@")[0]
    return set_by_experiment(value) if key == "experiment" else {key}


def job_number() -> int | None:
    """Of a job of a sweep."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    job = HydraConfig.get().job
    return None if OmegaConf.is_missing(job, "num") else int(job.num)
