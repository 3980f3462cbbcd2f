"""Runs the scripts compile_*.py in processes of their own: in this one, kernels may belong to Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any


@cache
def compiled(script: str, *arguments: str, triton: str = "") -> list[dict[str, Any]]:
    """What a script says of every configuration: minutes, and seconds where it has been compiled before.

    Args:
        triton: the folder of another Triton than the installed one.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": triton} if triton else {}
    command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
