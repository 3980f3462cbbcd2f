"""Runs scripts.compile_kernels in processes of their own: in this one, kernels may belong to Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@cache
def compiled(*words: str, triton: str = "") -> list[dict[str, Any]]:
    """What the script says of every configuration with these words: minutes, and seconds where it has been compiled
    before.

    Args:
        triton: the folder of another Triton than the installed one.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": triton} if triton else {}
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder, "record.json")
        command = [sys.executable, "-m", "scripts.compile_kernels", "--only", *words, "--out", str(record)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        found = json.loads(record.read_text())
        return [row | {"triton": found["triton"]} for row in found["configurations"].values()]
