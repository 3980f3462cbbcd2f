"""The command line's manners: one line for each mistake, an exit code for each ending, a table after a sweep.

Exit codes: 0 finished; 1 a bug, with its traceback; 2 the command or configuration cannot work; 3 out of memory;
4 the loss or a gradient was not finite, or spiked; 5 what was trained could not be saved; 75 stopped on request, with
all saved that there was: the same command goes on; 130 stopped by Ctrl-C, likewise. A sweep goes on after a failed job
and ends with its code; an interruption ends it.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from time import strftime
from typing import Any, NoReturn

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table

from .config import dotted_keys, one_line, unknown_key
from .errors import Interrupted, NonFiniteError, OutOfMemory, SaveFailed
from .interrupt import keep_exit_code, leave, listen
from .machine import find_gpu
from .metrics import in_table

CONFIGS = Path(__file__).resolve().parent.parent / "configs"

# A person who sets this wants tracebacks. It is set below in any case: otherwise Hydra prints errors itself.
WANTS_TRACEBACK = os.environ.get("HYDRA_FULL_ERROR") == "1"

_results: list[tuple[list[str], dict[str, float]]] = []  # of a sweep's jobs: overrides, summary
_failures: list[int] = []  # exit codes


def run(main: Callable[[], None]) -> None:
    """Run a Hydra application and end the process with the right exit code."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed (`>&-`): otherwise the next file that is opened would take its place
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    listen(leave)  # until the process ends; a trainer listens itself while there is something to save
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # Before torch loads. On two cores of which another process wanted one, OpenMP's threads waiting in a spin cost
    # 1.0k against 3.6k tokens/s; on idle cores there is little between them.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.argv[1:] = map(_expand_home, sys.argv[1:])
    register_resolvers()
    argparse.ArgumentParser.error = _refuse_flags  # type: ignore[method-assign]  # Hydra's prints a page of usage
    try:
        try:
            _refuse_lists()
            main()
        finally:
            keep_exit_code()
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # Hydra raises ValueError for group=null
        if WANTS_TRACEBACK:
            raise
        _error(explain(error))
        _failures.append(2)
    except Interrupted as stopped:
        _error(str(stopped))
        _failures.insert(0, stopped.code)
    if len(_results) > 1:
        _print_comparison()
    sys.exit(_failures[0] if _failures else 0)


def job(task: Callable[[DictConfig], dict[str, float] | None], composed: DictConfig) -> None:
    """Run one job of a Hydra application, turning what a person can cause into one line.

    A task's last metrics, where it has any, are a row of the table at the end of a sweep.
    """
    if _job_folder() and any(override.startswith("run_dir=") for override in HydraConfig.get().overrides.task):
        composed.run_dir += _job_folder()  # jobs share the folder that was named for the sweep
    gc.collect()  # what the sweep's job before left in cycles: 0.5 GiB of weights, once, in this one's peak
    try:
        summary = task(composed)
        if summary:
            _results.append((list(HydraConfig.get().overrides.task), summary))
    except (ValueError, OutOfMemory, NonFiniteError, SaveFailed) as error:
        if WANTS_TRACEBACK:
            raise
        _error(str(error))
        codes: dict[type[Exception], int] = {OutOfMemory: 3, NonFiniteError: 4, SaveFailed: 5}
        _failures.append(codes.get(type(error), 2))


def register_resolvers() -> None:
    """What configs/train.yaml may compute: ${cpu_or_gpu:a,b}, ${rows_in:tokens,seq_len}, ${started:} and ${job:}."""
    started = strftime("%Y-%m-%d_%H-%M-%S")  # once: Hydra's ${now:} differs between the jobs of a sweep
    OmegaConf.register_new_resolver("started", lambda: started, replace=True)
    OmegaConf.register_new_resolver("cpu_or_gpu", lambda cpu, gpu: gpu if _runs_on_gpu() else cpu, replace=True)
    OmegaConf.register_new_resolver("rows_in", _rows_in, replace=True)
    OmegaConf.register_new_resolver("job", _job_folder, replace=True)


def _runs_on_gpu() -> bool:
    return "device=cpu" not in sys.argv and find_gpu() is not None


def _rows_in(tokens: int, seq_len: Any) -> int:
    """Rows that hold so many tokens, at least one. Short rows alone keep the host of an H100 busier than the H100."""
    return max(1, tokens // seq_len) if isinstance(seq_len, int) and seq_len > 0 else 1


def _job_folder() -> str:
    """/0, /1, … in a sweep: each job has a folder inside the sweep's; nothing in a single run."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return ""
    job = HydraConfig.get().job
    return "/N" if OmegaConf.is_missing(job, "num") else f"/{job.num}"  # no number yet in `--cfg job`


def _refuse_flags(self: argparse.ArgumentParser, message: str) -> NoReturn:
    raise ValueError(f"{message}; write settings as key=value, without dashes (--hydra-help lists the flags)")


def _expand_home(argument: str) -> str:
    """data.path=~/notes: the shell leaves this ~ to us, and Hydra's grammar has none but in quotes."""
    if "'" in argument or '"' in argument:
        return argument
    return re.sub(r"(?<=[=:,\[ ])~(?=/|$)", lambda _: os.path.expanduser("~"), argument)


def _refuse_lists() -> None:
    """attention=[math,sdpa] would be one laid over the other, without a word."""
    for group, _, value in (override.partition("=") for override in sys.argv[1:]):
        if value.startswith("[") and _options(group):
            raise ValueError(f"{group}={value} is not possible; name one, or -m {group}=a,b to run each in turn")


def say(line: str) -> None:
    """Print a line. A reader that went away (`python train.py | head`) or a full disk is no reason to end a run."""
    try:
        print(line, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _error(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)


def explain(error: Exception) -> str:
    """One line for what Hydra says in several: what, which value, what to do instead."""
    text = str(error)
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return one_line(error)
    if "Config group override must be" in text:  # attention=null, attention=3: Hydra does not say which
        for group, _, value in (override.partition("=") for override in sys.argv[1:]):
            if _options(group) and value not in _options(group):
                return f"{group}={value} is not possible; use {', '.join(_options(group))}"
    several = re.search(r"Ambiguous value for argument '([^']+)'", text)
    if several:
        return f"{several[1]} is several values; add -m to run each in turn (a list: [a,b]; one text: \"'a,b'\")"
    present = re.search(r"Could not append to config. An item is already at '([^']+)'", text)
    if present:
        return f"{present[1]} is a setting already; write {present[1]}=…, without +"
    key = re.search(r"Could not override '([^']+)'", text)
    if key:
        group, _, field = key[1].partition(".")
        if not field and _options(group):
            return f"{group} is a choice, not a setting; use {', '.join(_options(group))}"
        owners = [name for name in _options(group) if field in _keys_of(CONFIGS / group / f"{name}.yaml")]
        if field and owners:
            return f"{key[1]} belongs to {group}={' or '.join(owners)}; choose that too"
        return unknown_key(key[1], _settings())
    option = re.search(r"Could not find '([^'/]+)/([^']*)'", text)
    if option:
        group, name = option.groups()
        near = get_close_matches(name, _options(group), n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        return f"{group}={name} is unknown; use {', '.join(_options(group))}{hint}"
    first = text.strip().splitlines()[0]
    if isinstance(error, OverrideParseException):
        first = first.removeprefix("LexerNoViableAltException: ")
        return f"cannot read the command: {first}; write key=value, and special characters in two quotes: \"key='a b'\""
    return first


def _options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def _keys_of(option: Path) -> set[str]:
    """The settings in an option's file: its own, and those of the files that it builds on."""
    content: Any = OmegaConf.load(option)
    bases = [f"{base.partition('@')[0]}.yaml" for base in content.pop("defaults", []) if base != "_self_"]
    return {*dotted_keys(content), *(key for base in bases for key in _keys_of(option.parent / base))}


def _settings() -> list[str]:
    """Every setting of the configuration with the options that were chosen, and the names of the groups."""
    chosen = [
        f"{group}={name}"
        for group, _, name in (word.partition("=") for word in sys.argv[1:])
        if name in _options(group)
    ]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return [*dotted_keys(compose("train", chosen)), "experiment"]


def _print_comparison() -> None:
    columns = in_table()
    table = Table("job", *(metric.title for metric in columns), box=None)
    shared = set.intersection(*(set(overrides) for overrides, _ in _results))
    for overrides, summary in _results:
        cells = [metric.text(summary[metric.name]) if metric.name in summary else "–" for metric in columns]
        table.add_row(" ".join(o for o in overrides if o not in shared), *cells)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
