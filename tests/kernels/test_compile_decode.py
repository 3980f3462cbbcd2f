"""The decoding kernels compile for every GPU they are meant for: they fit, keep their values in registers, and load
ahead."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from compile_process import compiled
from test_compile_portable import PRODUCTS, SHARED_MEMORY

pytestmark = pytest.mark.slow
# One process has all tests of an architecture (--dist loadgroup), and compiles its kernels once.
architectures = pytest.mark.parametrize(
    "architecture", [pytest.param(name, marks=pytest.mark.xdist_group(f"decode {name}")) for name in SHARED_MEMORY]
)
LARGEST = 116_000  # bytes: two programs on a multiprocessor of sm_90
ALLOWED_STACK = 8  # bytes per thread: two registers


@architectures
def test_every_configuration_compiles_fits_and_does_not_spill(architecture):
    rows = compiled("decode", architecture)
    assert len(rows) == 27
    for row in rows:
        assert row["shared"] <= min(SHARED_MEMORY[architecture], LARGEST), row
        assert row["stack"] <= ALLOWED_STACK or architecture.startswith("gfx"), row


@architectures
def test_one_query_takes_a_tile_of_16_rows_and_the_keys_are_loaded_ahead(architecture):
    for row in compiled("decode", architecture):
        if row["kernel"] == "merge" or row["dtype"] == "fp32":
            continue
        # 16 rows are too few for wgmma; where a tile has more, the compiler may choose.
        expected = PRODUCTS["gfx942"] if architecture == "gfx942" else "mma.sync"
        if row["rows"] == 4:
            assert expected in row["instructions"], row
        if architecture.startswith("sm_"):
            assert "cp.async.cg" in row["instructions"], row
