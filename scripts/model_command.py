"""What the commands that use a trained model share: how they are typed and ended. Needs no torch."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable

from training.terminal import plain, say_error


def add_machine(parser: argparse.ArgumentParser) -> None:
    """The options that say with what and where the model runs: those of `training.trained.load_model`."""
    parser.add_argument(
        "--attention", default="auto", metavar="NAME", help="auto, math, sdpa, flex or flash (default auto)"
    )
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cuda or cpu (default auto)")
    parser.add_argument("--precision", default="auto", metavar="NAME", help="auto, bf16, tf32 or fp32 (default auto)")


def exit_code(command: Callable[[], None]) -> int:
    """Of a command: 0; 2 where something cannot be, and 3 where memory ends, which one line says; 130 after Ctrl-C."""
    try:
        command()
    except ValueError as error:
        say_error(as_options(str(error)))
        return 2
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or re.search("out of memory|DefaultCPUAllocator", str(error))):
            raise
        say_error("out of memory; ask for shorter rows or fewer at a time, or a fused --attention (sdpa, flash)")
        return 3
    except KeyboardInterrupt:
        return 130
    return 0


def as_options(line: str) -> str:
    """What train.py says of its settings, where they are options: "use device=cpu" → "use --device cpu"."""
    name = r"(?<![\w.])(attention|device|precision|temperature|top_k|top_p|min_p)=(?=[^\s=])"
    return re.sub(name, lambda found: f"--{found[1].replace('_', '-')} ", line)


def note(line: str) -> None:
    """Standard output is for the results alone."""
    print(plain(line), file=sys.stderr, flush=True)
