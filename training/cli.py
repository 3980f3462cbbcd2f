"""The command line's manners: one line for each mistake, an exit code for each ending, a table after a sweep.

Exit codes: 0 finished; 1 a bug, with its traceback; 2 the command or configuration cannot work; 3 out of memory;
4 the loss or a gradient was not finite; 130 interrupted. A sweep goes on after a failed job and ends with its code.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table

CONFIGS = Path(__file__).resolve().parent.parent / "configs"

# A person who sets this wants tracebacks. It is set below in any case: otherwise Hydra prints errors itself.
WANTS_TRACEBACK = os.environ.get("HYDRA_FULL_ERROR") == "1"

_results: list[tuple[str, dict[str, float]]] = []  # of a sweep's jobs: overrides, summary
_failures: list[int] = []  # exit codes


def run(main: Callable[[], None]) -> None:
    """Run a Hydra application and end the process with the right exit code."""
    os.environ["HYDRA_FULL_ERROR"] = "1"
    register_resolvers()
    try:
        main()
    except (HydraException, OmegaConfBaseException) as error:
        if WANTS_TRACEBACK:
            raise
        _say(explain(error))
        _failures.append(2)
    except KeyboardInterrupt:
        _say("interrupted")
        _failures.append(130)
    if len(_results) > 1:
        _print_comparison()
    sys.exit(_failures[0] if _failures else 0)


def job(task: Callable[[DictConfig], dict[str, float]], composed: DictConfig) -> None:
    """Run one job of a Hydra application, turning what a person can cause into one line."""
    from .memory import OutOfMemory  # these import torch
    from .trainer import NonFiniteError

    try:
        summary = task(composed)
        _results.append((" ".join(HydraConfig.get().overrides.task), summary))
    except (ValueError, OutOfMemory, NonFiniteError) as error:
        if WANTS_TRACEBACK:
            raise
        _say(str(error))
        _failures.append(3 if isinstance(error, OutOfMemory) else 4 if isinstance(error, NonFiniteError) else 2)


def register_resolvers() -> None:
    """What configs/train.yaml may compute: ${cpu_or_gpu:a,b} and ${job:}."""
    OmegaConf.register_new_resolver("cpu_or_gpu", lambda cpu, gpu: gpu if _runs_on_gpu() else cpu, replace=True)
    OmegaConf.register_new_resolver("job", lambda: f"/{HydraConfig.get().job.num}" if _in_sweep() else "", replace=True)


def _runs_on_gpu() -> bool:
    if "device=cpu" in sys.argv:
        return False
    import torch  # 1.5 s: not before it is needed

    return torch.cuda.is_available()


def _in_sweep() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def _say(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)


def explain(error: Exception) -> str:
    """One line for what Hydra says in several: what, which value, what to do instead."""
    text = str(error)
    unknown = re.search(r"Could not override '([^']+)'", text)
    if unknown:
        from .config import unknown_key

        return unknown_key(unknown[1], _settings())
    option = re.search(r"Could not find '([^'/]+)/([^']+)'", text)
    if option:
        group, name = option.groups()
        options = sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))
        near = get_close_matches(name, options, n=1)
        return f"{group}={name} is unknown; use {', '.join(options)}" + (f" (did you mean {near[0]}?)" if near else "")
    bad = re.search(r"(?:Error parsing override|LexerNoViableAltException:|override) '([^']*)'", text)
    first = text.strip().splitlines()[0]
    return f"cannot read {bad[1]!r}: {first}; quote values with special characters" if bad else first


def _settings() -> list[str]:
    """Every setting of the default configuration, and the names of the groups."""
    from .config import dotted_keys

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return [*dotted_keys(compose("train")), "experiment"]


def _print_comparison() -> None:
    columns = {
        "loss": ("train/loss", "{:.4f}"),
        "val bits/byte": ("val/bits_per_byte", "{:.4f}"),
        "tokens/s": ("throughput/tokens_per_second", "{:,.0f}"),
        "step ms": ("time/step_ms", "{:,.1f}"),
        "MFU": ("throughput/mfu", "{:.1%}"),
        "peak GiB": ("memory/peak_allocated_gib", "{:.2f}"),
    }
    table = Table("job", *(name for name in columns), box=None)
    for overrides, summary in _results:
        cells = [form.format(summary[key]) if key in summary else "–" for key, form in columns.values()]
        table.add_row(overrides, *cells)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
