"""List, verify, prune and export the checkpoints of a run, of one process or of many ranks.

python -m scripts.checkpoint list RUN      what there is: step, tokens, size, validation loss
python -m scripts.checkpoint verify RUN    read every byte; exit code 1 if any checkpoint is damaged
python -m scripts.checkpoint prune RUN --keep-last 1 [--keep-every K] [--no-best]
python -m scripts.checkpoint export RUN FILE    the weights of a checkpoint, or of a run's newest (needs torch)
"""

from __future__ import annotations

import argparse
from pathlib import Path

from scripts.parser import Parser, parser_of, whole
from training.checkpoint import folder as checkpoints
from training.checkpoint.folder import DamagedCheckpoint
from training.run_folder import LOCK, take
from training.terminal import secure


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0; 1 where something is damaged; 2 where the command cannot work."""
    parser = parser_of("checkpoint", __doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    for name, what in (("list", "what there is"), ("verify", "read every byte"), ("prune", "remove the surplus")):
        action = actions.add_parser(name, help=what)
        action.add_argument("run", type=Path, metavar="RUN", help="a run folder")
        if name == "prune":
            action.add_argument("--keep-last", type=whole, default=1, help="the newest so many stay (default 1)")
            action.add_argument("--keep-every", type=whole, default=0, help="and those at multiples of this step")
            action.add_argument("--no-best", action="store_true", help="the lowest validation loss need not stay")
    action = actions.add_parser("export", help="write the whole weights as one safetensors file")
    action.add_argument("run", type=Path, metavar="RUN", help="a run folder, or a checkpoint in one")
    action.add_argument("file", type=Path, metavar="FILE", help="which is not there yet")
    options = parser.parse_args(arguments)
    if options.action == "export":
        return export(parser, options.run, options.file)
    try:
        found = checkpoints.candidates(options.run)
    except ValueError as error:
        parser.refuse(str(error))
    if not found:
        parser.refuse(f"{options.run} holds no checkpoints; name a run folder")
    if options.action == "prune":
        if options.keep_last < 1:
            parser.refuse(f"--keep-last {options.keep_last} would leave nothing; use 1 or more")
        return prune(parser, options)
    return show(found, read_all=options.action == "verify")


def show(found: list[Path], read_all: bool) -> int:
    damaged = 0
    for path in reversed(found):
        try:
            manifest = checkpoints.verify_shown(path) if read_all else checkpoints.read_manifest(path)
            loss = f"   val/loss {manifest.val_loss:.4f}" if manifest.val_loss is not None else ""
            size = f"{manifest.num_bytes / 1e6:,.1f} MB"
            size += f" of {manifest.world_size} ranks" if manifest.world_size > 1 else ""
            good = "   good" if read_all else ""
            print(f"{path}   step {manifest.step:,}   {manifest.tokens:,} tokens   {size}{loss}{good}")
        except DamagedCheckpoint as damage:
            damaged += 1
            print(f"{path}   DAMAGED: {damage}")
    return 1 if damaged else 0


def export(parser: Parser, run: Path, file: Path) -> int:
    from training.checkpoint.weights import export_weights  # torch, which no other action needs
    from training.run_folder import find

    if file.exists():
        parser.refuse(f"{file} exists; name a new file")
    if not file.parent.is_dir():
        parser.refuse(f"{file} cannot be written: there is no folder {file.parent}; make it, or name another file")
    try:
        path, manifest = find(str(run), "RUN", print)
        num_bytes = export_weights(path, manifest, file)
    except (ValueError, OSError) as error:
        parser.refuse(str(error))
    print(f"{file}   step {manifest.step:,}   {num_bytes / 1e6:,.1f} MB")
    return 0


def prune(parser: Parser, options: argparse.Namespace) -> int:
    try:
        with open(options.run / LOCK, "ab+") as lock:
            take(lock, str(options.run))
            gone = checkpoints.prune(options.run, options.keep_last, options.keep_every, not options.no_best)
    except DamagedCheckpoint as damage:
        print(f"nothing removed: the newest checkpoint is damaged: {damage}")
        return 1
    except ValueError as error:  # it is being trained, and its own checkpoint.keep_last removes what is surplus
        parser.refuse(str(error))
    except OSError as error:
        parser.refuse(f"{options.run} cannot be written: {error.strerror}")
    for path in gone:
        print(f"removed {path}")
    return 0


if __name__ == "__main__":
    secure()
    raise SystemExit(main())
