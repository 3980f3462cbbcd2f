"""The command: see the package."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import NoReturn

from data import disk
from training.checkpoint.folder import is_checkpoint
from training.terminal import plain, say, say_error, secure

from . import __doc__ as usage


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        say_error(f"{message}; python -m scripts.evaluate --help shows what there is")
        raise SystemExit(2)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    heading, _, rest = (usage or "").partition("\n\n")
    parser = Parser(
        prog="python -m scripts.evaluate",
        description=heading,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="a run folder, a checkpoint, or a folder of transformers")
    add("--tasks", metavar="NAMES", help="of lm-evaluation-harness, with commas; recall is one of our own")
    add("--include-path", metavar="DIR", help="a folder with tasks of your own, as YAML")
    add("--limit", type=int, metavar="N", help="the first N questions of each task")
    add("--num-fewshot", type=int, metavar="N", help="examples before each question (default: the task's)")
    add("--seq-len", type=int, metavar="N", help="tokens of a row, or of the longest document (default: as trained)")
    add("--eval-tokens", type=int, metavar="N", help="held-out tokens (default: as in training)")
    add("--documents", type=int, default=64, metavar="N", help="of each length of the recall task (default 64)")
    add("--batch-size", type=int, default=8, metavar="B", help="rows at once (default 8)")
    add("--out", type=Path, metavar="DIR", help="where results.json and recall.svg go (default RUN/evaluation)")
    add("--attention", default="auto", metavar="NAME", help="auto, math, sdpa, flex or flash (default auto)")
    add("--device", default="auto", metavar="NAME", help="auto, cuda or cpu (default auto)")
    add("--precision", default="auto", metavar="NAME", help="auto, bf16, tf32 or fp32 (default auto)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0; 2 where something cannot be; 130 after Ctrl-C."""
    options = parse(arguments)
    try:
        for name in ("limit", "seq_len", "eval_tokens", "documents", "batch_size"):
            if (value := getattr(options, name)) is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value}: use 1 or more")
        if options.tasks:
            from .harness import evaluate_tasks

            results = evaluate_tasks(options, note)
        else:
            from .held_out import evaluate_held_out

            results = evaluate_held_out(options, note)
        write(options, results)
    except ValueError as error:
        say_error(str(error))
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def write(options: argparse.Namespace, results: dict[str, object]) -> None:
    """Raises ValueError where the folder cannot be written."""
    place = Path(options.run).resolve()
    home = place.parent.parent if is_checkpoint(place) else place
    out = options.out or home / "evaluation"
    picture = results.pop("picture", None)
    try:
        out.mkdir(parents=True, exist_ok=True)
        disk.write_whole(out / "results.json", json.dumps(results, indent=2) + "\n")
        if isinstance(picture, str):
            disk.write_whole(out / "recall.svg", picture)
    except OSError as error:
        raise ValueError(f"{out} cannot be written ({error.strerror}); name another place with --out") from error
    say(str(out))


def note(line: str) -> None:
    """Standard output is for the results alone."""
    print(plain(line), file=sys.stderr, flush=True)


if __name__ == "__main__":
    secure()
    raise SystemExit(main())
