"""The decoding kernels compile for every GPU they are meant for: they fit, keep their values in registers, and load
ahead. Compiled by processes of their own, as in test_compile_only.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from test_compile_only import PRODUCTS, SHARED_MEMORY

pytestmark = pytest.mark.slow
architectures = pytest.mark.parametrize("architecture", SHARED_MEMORY)
LARGEST = 116_000  # bytes: two programs on a multiprocessor of sm_90
ALLOWED_STACK = 8  # bytes per thread: two registers


@cache
def compiled(architecture: str) -> list[dict[str, Any]]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("compile_decode.py")), architecture]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@architectures
def test_every_configuration_compiles_fits_and_does_not_spill(architecture):
    rows = compiled(architecture)
    assert len(rows) == 27
    for row in rows:
        assert row["shared"] <= min(SHARED_MEMORY[architecture], LARGEST), row
        assert row["stack"] <= ALLOWED_STACK or architecture.startswith("gfx"), row


@architectures
def test_one_query_takes_a_tile_of_16_rows_and_the_keys_are_loaded_ahead(architecture):
    for row in compiled(architecture):
        if row["kernel"] == "merge" or row["dtype"] == "fp32":
            continue
        # 16 rows are too few for wgmma; where a tile has more, the compiler may choose.
        expected = PRODUCTS["gfx942"] if architecture == "gfx942" else "mma.sync"
        if row["rows"] == 4:
            assert expected in row["instructions"], row
        if architecture.startswith("sm_"):
            assert "cp.async.cg" in row["instructions"], row
