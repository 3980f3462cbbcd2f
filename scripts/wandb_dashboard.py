"""Make the workspace of a project on W&B: a panel for every metric, in sections, and the main ones by attention.

python -m scripts.wandb_dashboard                    makes it and prints its address
python -m scripts.wandb_dashboard --update URL       updates that one
python -m scripts.wandb_dashboard --dry-run          prints it as JSON; needs no login, no network and no package
"""

from __future__ import annotations

import argparse
import json
import os
import sys

from scripts.parser import parser_of
from training.dashboard import translated, workspace
from training.loggers.base import one_line
from training.loggers.wandb import login_problem
from training.terminal import plain, secure

INSTALL = "the workspace is made by wandb-workspaces, which is not installed: pip install 'wandb-workspaces<0.5'"


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0; 2 where the command cannot work."""
    parser = parser_of("wandb_dashboard", __doc__)
    parser.add_argument(
        "--project", default=os.environ.get("WANDB_PROJECT") or "flash-gpt", help="default $WANDB_PROJECT, or flash-gpt"
    )
    parser.add_argument("--entity", default=os.environ.get("WANDB_ENTITY"), help="user or team; the account's default")
    parser.add_argument("--name", default="flash-gpt", help="of the workspace")
    parser.add_argument("--update", metavar="URL", help="the address of a workspace that was saved")
    parser.add_argument("--dry-run", action="store_true", help="print it, and send nothing")
    options = parser.parse_args(arguments)
    if options.dry_run:
        print(json.dumps(workspace(options.entity or "", options.project, options.name), indent=2, ensure_ascii=False))
        return 0
    try:
        print(save(options))
    except ImportError:
        return refuse(INSTALL)
    except ValueError as error:
        return refuse(str(error))
    except Exception as error:  # of the network, the server, or an address: theirs to explain
        return refuse(f"W&B did not take the workspace: {one_line(error)}")
    return 0


def save(options: argparse.Namespace) -> str:
    """Save the workspace; returns its address.

    Raises:
        ImportError: a package is missing. ValueError: nobody is logged in. What W&B raises.
    """
    import wandb
    import wandb_workspaces.workspaces as ws

    if problem := login_problem(wandb, wandb.setup().settings):
        raise ValueError(problem)
    entity = options.entity or wandb.Api().default_entity
    existing = ws.Workspace.from_url(options.update) if options.update else None
    plain = workspace(entity or "", options.project, options.name)
    return str(translated(plain, existing).save().url)


def refuse(why: str) -> int:
    print(f"error: {plain(' '.join(why.split()))}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    secure()
    raise SystemExit(main())
