"""What the commands that use a trained model share: how they are typed and ended. Needs no torch."""

from __future__ import annotations

import argparse
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
    """Of a command: 0; 2 where something cannot be, which one line says; 130 after Ctrl-C."""
    try:
        command()
    except ValueError as error:
        say_error(str(error))
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def note(line: str) -> None:
    """Standard output is for the results alone."""
    print(plain(line), file=sys.stderr, flush=True)
