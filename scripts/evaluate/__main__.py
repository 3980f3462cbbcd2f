"""The command: see the package."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from data import disk
from scripts.model_command import add_machine, exit_code, note
from scripts.parser import parser_of, positive, row_length, whole
from training.checkpoint.folder import is_checkpoint
from training.terminal import say, secure

from . import __doc__ as usage


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = parser_of("evaluate", usage)
    add = parser.add_argument
    add("run", metavar="RUN", help="a run folder, a checkpoint, or a folder of transformers")
    add("--tasks", metavar="NAMES", help="of lm-evaluation-harness, with commas; recall is one of our own")
    add("--include-path", metavar="DIR", help="a folder with tasks of your own, as YAML")
    add("--limit", type=positive, metavar="N", help="the first N questions of each task")
    add("--num-fewshot", type=whole, metavar="N", help="examples before each question (default: the task's)")
    add("--seq-len", type=row_length, metavar="N", help="of a row, or of the longest document (default: as trained)")
    add("--eval-tokens", type=positive, metavar="N", help="held-out tokens (default: as in training)")
    add("--documents", type=positive, default=64, metavar="N", help="of each length of the recall task (default 64)")
    add("--batch-size", type=positive, default=8, metavar="B", help="rows at once (default 8)")
    add("--out", type=Path, metavar="DIR", help="where results.json and recall.svg go (default RUN/evaluation)")
    add_machine(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0; 2 where something cannot be; 130 after Ctrl-C."""
    options = parse(arguments)
    return exit_code(lambda: evaluate(options))


def evaluate(options: argparse.Namespace) -> None:
    """Raises ValueError where something cannot be."""
    if options.tasks is None and (options.limit or options.num_fewshot or options.include_path):
        raise ValueError("--limit, --num-fewshot and --include-path are about tasks; name some with --tasks")
    if options.tasks is not None and not options.tasks.strip(", "):
        raise ValueError(f'--tasks "{options.tasks}" names none; leave it out for held-out text')
    out = folder_of(options)
    try:
        disk.need_writable(out)
    except OSError as error:
        raise unwritable(out, error) from error
    if options.tasks:
        from .harness import evaluate_tasks

        results = evaluate_tasks(options, note)
    else:
        from .held_out import evaluate_held_out

        results = evaluate_held_out(options, note)
    write(out, results)


def folder_of(options: argparse.Namespace) -> Path:
    place = Path(options.run).resolve()
    home = place.parent.parent if is_checkpoint(place) else place
    return options.out or home / "evaluation"


def write(out: Path, results: dict[str, object]) -> None:
    """Raises ValueError where the folder cannot be written."""
    picture = results.pop("picture", None)
    try:
        out.mkdir(parents=True, exist_ok=True)
        disk.write_whole(out / "results.json", json.dumps(results, indent=2) + "\n")
        if isinstance(picture, str):
            disk.write_whole(out / "recall.svg", picture)
    except OSError as error:
        raise unwritable(out, error) from error
    say(str(out))


def unwritable(out: Path, error: OSError) -> ValueError:
    return ValueError(f"{out} cannot be written ({error.strerror}); name another place with --out")


if __name__ == "__main__":
    secure()
    raise SystemExit(main())
