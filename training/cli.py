"""The command line's manners: one line for each mistake, an exit code for each ending, a table after a sweep.

Exit codes: 0 finished; 1 a bug, with its traceback; 2 the command or configuration cannot work; 3 out of memory;
4 the loss or a gradient was not finite, or spiked; 5 what was trained could not be saved; 75 stopped on request, with
all saved that there was: the same command goes on; 130 stopped by Ctrl-C, likewise. A sweep goes on after a failed job
and ends with its code; an interruption ends it.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from time import strftime
from typing import Any, NoReturn

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from . import terminal
from .config import TrainConfig, load_config
from .config.load import resolved
from .config.numbers import whole_number
from .config.paths import expand_path
from .config.saved import saved_settings, with_saved
from .config.secrets import refuse_secrets
from .errors import Interrupted, NonFiniteError, OutOfMemory, SaveFailed
from .interrupt import keep_exit_code, leave, listen
from .machine import find_gpu
from .mistakes import CONFIGS, explain, refuse_lists, set_by_experiment, typed_settings
from .run_folder import make_new
from .sweep import Sweep
from .terminal import say, say_error

__all__ = ["CONFIGS", "BeforeTheFirstJob", "job", "register_resolvers", "run", "say"]

# A person who sets this wants tracebacks. It is set below in any case: otherwise Hydra prints errors itself.
WANTS_TRACEBACK = os.environ.get("HYDRA_FULL_ERROR") == "1"
FLAGS_WITH_VALUES: tuple[str, ...] = ("-c", "--cfg", "-p", "--package", "-cp", "--config-path", "-cn", "--config-name")
FLAGS_WITH_VALUES += ("-cd", "--config-dir", "-i", "--info", "--experimental-rerun")

_failures: list[int] = []  # exit codes
_sweep: Sweep | None = None
_check: Callable[[TrainConfig], None] | None = None


def run(main: Callable[[], None], check: Callable[[TrainConfig], None] | None = None) -> None:
    """Run a Hydra application and end the process with the right exit code.

    Args:
        check: refuses (ValueError) a configuration that this machine cannot run; in a sweep it is asked of every job
            before the first one begins.
    """
    global _check
    _check = check
    terminal.use_utf8()
    terminal.secure()
    set_home()
    listen(leave)  # until the process ends; a trainer listens itself while there is something to save
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # Before torch loads. On two cores of which another process wanted one, OpenMP's threads waiting in a spin cost
    # 1.0k against 3.6k tokens/s; on idle cores there is little between them.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.argv[1:] = settings_first(map(_for_hydra, sys.argv[1:]))
    register_resolvers()
    argparse.ArgumentParser.error = _refuse_flags  # type: ignore[method-assign]  # Hydra's prints a page of usage
    try:
        try:
            refuse_lists()
            for key, value in typed_settings():  # facts.json holds the command
                refuse_secrets({key: value})
            main()
        finally:
            keep_exit_code()
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # Hydra raises ValueError for group=null
        if WANTS_TRACEBACK:
            raise
        say_error(explain(error))
        _failures.append(2)
    except Interrupted as stopped:
        say_error(str(stopped))
        _failures.insert(0, stopped.code)
    if _sweep is not None:
        _failures.extend(_sweep.compare())
    sys.exit(_failures[0] if _failures else 0)


def job(task: Callable[[DictConfig], dict[str, float] | None], composed: DictConfig) -> float:
    """Run one job of a Hydra application, turning what a person can cause into one line.

    A task's last metrics, where it has any, are a row of the table at the end of a sweep.

    Returns:
        The metric that `optimized_metric` names, for a sweeper that looks for the smallest; NaN where there is none.
    """
    number = _job_number()
    if _sweep and number in _sweep.refused:
        return math.nan
    gc.collect()  # what the sweep's job before left in cycles: 0.5 GiB of weights, once, in this one's peak
    summary: dict[str, float] | None = None
    code = 0
    try:
        if _sweep:
            say(_sweep.header(number or 0, _typed()))
        composed = settings_of_job(composed)
        summary = task(composed)
    except (ValueError, OutOfMemory, NonFiniteError, SaveFailed) as error:
        if WANTS_TRACEBACK:
            raise
        say_error(str(error))
        codes: dict[type[Exception], int] = {OutOfMemory: 3, NonFiniteError: 4, SaveFailed: 5}
        code = codes.get(type(error), 2)
        _failures.append(code)
    if _sweep and number is not None:
        _sweep.record(number, _typed(), code, summary)
    return (summary or {}).get(composed.get("optimized_metric") or "", math.nan)


def settings_of_job(composed: DictConfig) -> DictConfig:
    """The settings of the job that Hydra composed: in its own folder of a sweep, and over those that its folder saved.

    `python train.py run_dir=runs/x` goes on with what runs/x/config.yaml holds; what is typed beside it is a change.
    """
    keys = typed_keys()
    if "run_dir" not in keys:
        return composed
    composed = composed.copy()
    run_dir = expand_path(str(resolved(composed)["run_dir"] or ""), "run_dir")
    number = _job_number()
    if _sweep and number is not None and "run_dir" not in _sweep.swept:
        composed.run_dir = run_dir
        run_dir = _sweep.folder_for(number, run_dir, load_config(composed))
        composed.run_dir = run_dir
    saved = saved_settings(Path(run_dir))
    return composed if saved is None else with_saved(composed, saved, keys)


class BeforeTheFirstJob(Callback):
    """Hydra calls this before it writes anything and before a sweep's first job; configs/train.yaml names it."""

    def __init__(self) -> None:
        self.sweep: Sweep | None = None

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        _or_exit(lambda: _refuse_secrets_of_hydra(config))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        _or_exit(lambda: self._prepare(config))

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        global _sweep
        _sweep = self.sweep  # in the process of the job, which may be another one than the sweep's

    def _prepare(self, config: DictConfig) -> None:
        global _sweep
        _refuse_secrets_of_hydra(config)
        typed: Any = OmegaConf.to_container(config.hydra.overrides.task)
        params = config.hydra.sweeper.get("params") or {}
        loader = GlobalHydra.instance().config_loader()
        parsed = OverridesParser.create(loader).parse_overrides([*(f"{k}={v}" for k, v in params.items()), *typed])
        swept = [override.key_or_group for override in parsed if override.is_sweep_override()]
        is_named = "run_dir" not in swept and any(override.key_or_group == "run_dir" for override in parsed)
        if not _is_typed_for_hydra("hydra.sweep.dir", config):
            if is_named:
                folder = expand_path(str(config.run_dir), "run_dir")
            else:
                folder = str(make_new(Path(str(config.hydra.sweep.dir))))
            config.hydra.sweep.dir = folder  # of multirun.yaml and the table
            quoted = folder.replace("'", r"\'")
            config.hydra.overrides.hydra.append(f"hydra.sweep.dir='{quoted}'")  # for what the jobs compose
        self.sweep = _sweep = Sweep(f"{_started()} {os.getpid()}", str(config.hydra.sweep.dir), swept)
        if not str(config.hydra.sweeper._target_).endswith("BasicSweeper"):
            return  # another sweeper chooses as it goes
        jobs = [words for batch in BasicSweeper.split_arguments(parsed, None) for words in batch]
        self.sweep.total = len(jobs)
        for number, words in enumerate(jobs):
            self._check_job(config, number, words)

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
            if _check is not None:
                _check(loaded)
        except ValueError as error:
            say_error(str(error))
            self.sweep.refused.append(number)
            _failures.append(2)
        finally:
            hydra_config.cfg = before


def _or_exit(check: Callable[[], None]) -> None:
    """Hydra turns the exceptions of a callback into warnings."""
    try:
        check()
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        say_error(explain(error))
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


def _typed() -> list[str]:
    """The settings of this job as they were typed, or as its sweep has chosen them."""
    if not HydraConfig.initialized():
        return []
    words: Any = HydraConfig.get().overrides.task
    # Unresolved: in run_dir=${…} there is nothing of Hydra's own.
    return list(words if isinstance(words, list) else OmegaConf.to_container(words))  # type: ignore[arg-type]


def typed_keys() -> set[str]:
    """The settings and groups that this job's command decides, an experiment's among them."""
    return {key for word in _typed() for key in _keys_of_override(word)}


def is_typed(key: str) -> bool:
    return key in typed_keys()


def _keys_of_override(word: str) -> set[str]:
    key, _, value = word.partition("=")
    key = key.lstrip("+~").partition("@")[0]
    return set_by_experiment(value) if key == "experiment" else {key}


def register_resolvers() -> None:
    """What configs/train.yaml may compute.

    ${cpu_or_gpu:a,b}; ${rows_in:tokens,seq_len}; ${started:}, the time; ${new_run:}, the beginning of a new run's
    folder; ${ours:path}, a path inside this repository.
    """
    started = strftime("%Y-%m-%d_%H-%M-%S")  # once: Hydra's ${now:} differs between the jobs of a sweep
    on_cpu = "device=cpu" in sys.argv  # now: a launcher may compose in a process with a command of its own
    OmegaConf.register_new_resolver("started", lambda: started, replace=True)
    OmegaConf.register_new_resolver(
        "cpu_or_gpu", lambda cpu, gpu: gpu if not on_cpu and _runs_on_gpu() else cpu, replace=True
    )
    OmegaConf.register_new_resolver("rows_in", _rows_in, replace=True)
    OmegaConf.register_new_resolver("new_run", lambda: _new_run(started), replace=True)
    OmegaConf.register_new_resolver("ours", lambda path: str(CONFIGS.parent / path), replace=True)


def _started() -> str:
    return str(OmegaConf.create({"started": "${started:}"}).started)


def _runs_on_gpu() -> bool:
    return find_gpu() is not None


def _rows_in(tokens: int, seq_len: Any) -> int:
    """Rows that hold so many tokens, at least one. Short rows alone keep the host of an H100 busier than the H100."""
    seq_len = whole_number(seq_len, "seq_len")
    return max(1, tokens // seq_len) if isinstance(seq_len, int) and seq_len > 0 else 1


def _new_run(started: str) -> str:
    """runs/TIME, or a folder inside the sweep's: each job has one."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return f"runs/{started}"
    number = _job_number()  # none yet in `--cfg job`
    return f"{HydraConfig.get().sweep.dir}/{'N' if number is None else number}"


def _job_number() -> int | None:
    """Of a job of a sweep."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    job = HydraConfig.get().job
    return None if OmegaConf.is_missing(job, "num") else int(job.num)


def set_home() -> None:
    """Without HOME the user database knows it; not all libraries ask there."""
    home = os.path.expanduser("~")
    if home != "~":
        os.environ.setdefault("HOME", home)


def _refuse_flags(self: argparse.ArgumentParser, message: str) -> NoReturn:
    raise ValueError(f"{message}; write settings as key=value, without dashes (--hydra-help lists the flags)")


def settings_first(words: Any) -> list[str]:
    """The command's words with its flags at the end: argparse takes settings on one side of a flag only."""
    settings, flags, awaits_value = list[str](), list[str](), False
    for word in words:
        is_flag = word.startswith("-") or awaits_value
        (flags if is_flag else settings).append(word)
        awaits_value = word in FLAGS_WITH_VALUES
    return [*settings, *flags]


def _for_hydra(word: str) -> str:
    """A word as Hydra's grammar takes it.

    It has no ~ (data.path=~/notes, which the shell leaves to us) and no letters beyond ASCII but in quotes.
    """
    if "'" in word or '"' in word:
        return word
    word = re.sub(r"(?<=[=:,\[ ])~(?=/|$)", lambda _: os.path.expanduser("~"), word)
    key, equals, value = word.partition("=")
    simple = equals and not value.isascii() and not set(value) & set("[]{}(),")
    return f"{key}='{value}'" if simple else word
