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
from contextlib import suppress
from pathlib import Path
from time import strftime
from typing import Any, NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.live import LINE

from . import jobs, terminal
from .config import TrainConfig
from .config.paths import expand_path
from .config.saved import saved_settings
from .config.schema import CHOICES
from .config.secrets import refuse_secrets
from .errors import Interrupted, NonFiniteError, OutOfMemory, SaveFailed
from .interrupt import keep_exit_code, leave, listen
from .machine import find_gpu
from .mistakes import CONFIGS, explain, refuse_lists, settings_in, typed_words
from .numbers import whole_number
from .parallel.launch import speaks
from .terminal import say, say_error, tell
from .usage import usage

__all__ = ["CONFIGS", "job", "register_resolvers", "run", "say"]

# A person who sets this wants tracebacks. It is set below in any case: otherwise Hydra prints errors itself.
WANTS_TRACEBACK = os.environ.get("HYDRA_FULL_ERROR") == "1"
FLAGS_WITH_VALUES: tuple[str, ...] = ("-c", "--cfg", "-p", "--package", "-cp", "--config-path", "-cn", "--config-name")
FLAGS_WITH_VALUES += ("-cd", "--config-dir", "-i", "--info", "--experimental-rerun")


def run(main: Callable[[], None], check: Callable[[TrainConfig], object] = jobs.check) -> None:
    """Run a Hydra application and end the process with the right exit code.

    Args:
        check: refuses (ValueError) a configuration that this machine cannot run; in a sweep it is asked of every job
            before the first one begins.
    """
    jobs.check = check
    terminal.use_utf8()
    terminal.secure()
    if {"-h", "--help"} & set(sys.argv[1:]):
        say(usage(sys.modules["__main__"].__doc__ or ""))
        sys.exit(0)
    LINE.doing("composing the settings")
    set_home()
    listen(leave)  # until the process ends; a trainer listens itself while there is something to save
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # Before torch loads. On two cores of which another process wanted one, OpenMP's threads waiting in a spin cost
    # 1.0k against 3.6k tokens/s; on idle cores there is little between them.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Where a rank is lost, a line of ours says so; PyTorch's warnings would be a page for each of the others.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    sys.argv[1:] = with_saved_options(settings_first(map(_for_hydra, sys.argv[1:])))
    register_resolvers()
    argparse.ArgumentParser.error = _refuse_flags  # type: ignore[method-assign]  # Hydra's prints a page of usage
    try:
        try:
            refuse_lists(typed_words())
            for key, value in settings_in(typed_words()):  # facts.json holds the command
                refuse_secrets({key: value})
            main()
        finally:
            LINE.end()
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # Hydra raises ValueError for group=null
        if WANTS_TRACEBACK:
            raise
        tell(explain(error, typed_words()))
        jobs.failures.append(2)
    except Interrupted as stopped:
        keep_exit_code()  # signals come again, to all processes of a group: the line is said once
        if speaks():
            say_error(str(stopped))
        jobs.failures.insert(0, stopped.code)
    finally:
        keep_exit_code()
    if jobs.sweep is not None:
        jobs.failures.extend(jobs.sweep.compare())
    sys.exit(jobs.failures[0] if jobs.failures else 0)


def job(task: Callable[[DictConfig], dict[str, float] | None], composed: DictConfig) -> float:
    """Run one job of a Hydra application, turning what a person can cause into one line.

    A task's last metrics, where it has any, are a row of the table at the end of a sweep.

    Returns:
        The metric that `optimized_metric` names, for a sweeper that looks for the smallest; infinity without one.
    """
    number = jobs.job_number()
    if jobs.sweep and number in jobs.sweep.refused:
        return math.inf
    gc.collect()  # what the sweep's job before left in cycles: 0.5 GiB of weights, once, in this one's peak
    summary: dict[str, float] | None = None
    code = 0
    try:
        if jobs.sweep:
            say(jobs.sweep.header(number or 0, jobs.typed()))
        composed = jobs.settings_of_job(composed, say)
        summary = task(composed)
    except (ValueError, OutOfMemory, NonFiniteError, SaveFailed) as error:
        if WANTS_TRACEBACK:
            raise
        tell(str(error))
        codes: dict[type[Exception], int] = {OutOfMemory: 3, NonFiniteError: 4, SaveFailed: 5}
        code = codes.get(type(error), 2)
        jobs.failures.append(code)
    if jobs.sweep and number is not None:
        jobs.sweep.record(number, jobs.typed(), code, summary)
    return (summary or {}).get(composed.get("optimized_metric") or "", math.inf)


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
    number = jobs.job_number()  # none yet in `--cfg job`
    return f"{HydraConfig.get().sweep.dir}/{'N' if number is None else number}"


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


def with_saved_options(words: list[str]) -> list[str]:
    """The words with a ++ before each setting of an option that the run which goes on has: `run_dir=runs/x data.path=…`
    names no data, and Hydra would ask the default for the setting."""
    typed = dict(word.partition("=")[::2] for word in words)
    saved: dict[str, Any] | None = None
    for key in ("run_dir", "resume"):
        if saved is None and (folder := typed.get(key, "").strip("'\"")):
            with suppress(ValueError, OSError):  # it is refused where it is used
                saved = saved_settings(Path(expand_path(folder, key)))

    def is_saved(word: str) -> bool:
        group, dot, name = word.partition("=")[0].partition(".")
        options = (saved or {}).get(group)
        return bool(dot) and group in CHOICES and group not in typed and isinstance(options, dict) and name in options

    return [f"++{word}" if is_saved(word) else word for word in words]


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
