"""Runs of four ranks, one of which gets into trouble: what became of each rank, and what all of them said.

    python tests/training/trouble.py CASES.json OUT.json

CASES.json: name → {"act", "phase", "at", "rank", "words"}, "at" being which call of the phase's function it is. This
process imports everything once and forks the ranks of each case, which are those of `train.py`, case after case;
OUT.json: name → {"codes", "seconds", "said"}.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import runpy
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SIZE = 4
LIMIT_S = 300.0  # nothing here takes so long


def act(what: str, phase: str) -> None:
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    if what == "stop":
        os.kill(os.getpid(), signal.SIGTERM)
    if what == "time":
        from training import interrupt

        # By this rank's clock max_time is over.
        interrupt.time = SimpleNamespace(monotonic=lambda: time.monotonic() + 3600.0)  # type: ignore[assignment]
    if what == "starve":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if phase == "save" else MemoryError("no page is left")


def make_trouble(what: str, phase: str, at: int) -> None:
    """Of this rank, once, in a phase of the run."""
    from training import run as runs
    from training import step as steps
    from training.batches import Batches
    from training.checkpoint import folder as checkpoints

    owner, name = {
        "prepare": (runs, "load_corpus"),
        "data": (Batches, "next"),
        "step": (steps.TrainStep, "loss"),
        "evaluation": (steps.TrainStep, "losses"),
        "save": (checkpoints, "_write_files"),
    }[phase]
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def troubled(*arguments: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            act(what, phase)
        return original(*arguments, **more)

    setattr(owner, name, troubled)


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    from training.parallel.launch import local_launch

    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as said:
        ranks = []
        for rank, world in enumerate(local_launch(SIZE)):
            if (process := os.fork()) == 0:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
                os.environ |= world
                code = 1
                try:
                    if rank == case["rank"]:
                        make_trouble(case["act"], case["phase"], case["at"])
                    sys.argv = ["train.py", *case["words"]]
                    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
                except SystemExit as ended:
                    code = int(ended.code or 0)
                except BaseException:
                    traceback.print_exc()  # as Python would say, and then end with 1
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
            ranks.append(process)
        codes: dict[int, int | None] = dict.fromkeys(range(SIZE))
        while None in codes.values() and time.monotonic() < began + LIMIT_S:
            for rank, code in codes.items():
                if code is None and (ended := os.waitpid(ranks[rank], os.WNOHANG))[0]:
                    codes[rank] = os.waitstatus_to_exitcode(ended[1])
            frozen = [rank for rank, code in codes.items() if code is None]
            if case["act"] == "freeze" and frozen == [case["rank"]]:
                os.kill(ranks[case["rank"]], signal.SIGKILL)
            time.sleep(0.02)
        for rank, code in codes.items():
            if code is None:
                os.kill(ranks[rank], signal.SIGKILL)
                os.waitpid(ranks[rank], 0)
        said.seek(0)
        return {"codes": list(codes.values()), "seconds": time.monotonic() - began, "said": said.read()}


def main(cases: Path, out: Path) -> None:
    import torch

    for module in ("train", "training.trainer", "training.parallel.fsdp", "torch._dynamo"):
        importlib.import_module(module)

    torch.set_num_threads(1)
    out.write_text(json.dumps({name: run_case(case) for name, case in json.loads(cases.read_text()).items()}))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main(Path(sys.argv[1]), Path(sys.argv[2]))
