"""The ranks of a program: forks of one process, which imports once what takes each seconds of the processor.

    PYTHONPATH=. MASTER_ADDR=… MASTER_PORT=… WORLD_SIZE=4 python tests/forked.py PROGRAM ARGUMENT…

It ends with 1 if a rank has failed; what all of them say comes through one stream.
"""

from __future__ import annotations

import importlib
import os
import runpy
import sys


def main(program: str, *arguments: str) -> int:
    for module in ("train", "training.trainer", "training.parallel.fsdp", "torch._dynamo"):
        importlib.import_module(module)
    ranks = []
    for rank in range(int(os.environ["WORLD_SIZE"])):
        if (process := os.fork()) == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            sys.argv = [program, *arguments]
            runpy.run_path(program, run_name="__main__")
            return 0
        ranks.append(process)
    ended = [os.waitpid(process, 0)[1] for process in ranks]
    return int(any(ended))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
