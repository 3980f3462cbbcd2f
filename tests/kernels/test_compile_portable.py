"""Every configuration compiles for every GPU it is meant for: it fits, keeps its values in registers, and uses the
fast instructions."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from compile_process import compiled

SHARED_MEMORY = {  # bytes that one program can have
    "sm_80": 166_912, "sm_86": 101_376, "sm_89": 101_376, "sm_90": 232_448, "sm_100": 232_448, "sm_120": 101_376,
    "gfx942": 65_536,
}  # fmt: skip
PRODUCTS = {"sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}  # mma.sync elsewhere

# Bytes of stack per thread: ten registers. dK/dV at head_dim 128 keeps 6 of them there on sm_90, and its tiles were
# the fastest all the same (kernels/flash_attention/config.py). AMD's compiler is only asked to compile.
ALLOWED_STACK = 40
HEAD_DIM_256 = 128  # two accumulators of N × 256 and every mask at once, or one and pointers: no tiles without
SLOW = 256  # accumulators of 16 × 1,024 and 16 × 512, and pointers beside two of 64 × 256: they run, that is all


pytestmark = pytest.mark.slow
# One process has all tests of an architecture (--dist loadgroup), and compiles its kernels once.
architectures = pytest.mark.parametrize(
    "architecture", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in SHARED_MEMORY]
)


@architectures
def test_every_configuration_compiles_fits_and_does_not_spill(architecture):
    rows = compiled("portable", architecture)
    assert len(rows) >= 12
    for row in rows:
        # 16 bits on sm_80 take the tiles that sm_86 and 89 do, which are compiled there with one mask only.
        smallest = architecture == "sm_80" and row["dtype"] in ("bf16", "fp16") and row["head_dim"] <= 256
        assert row["shared"] <= SHARED_MEMORY["sm_86" if smallest else architecture], row
        is_tight = row["head_dim"] == 256 and (row["kernel"] == "dkdv" or row["mask"] == "packed")
        allowed = HEAD_DIM_256 if is_tight else ALLOWED_STACK
        if row["head_dim"] > 256 or (row["kernel"], row["head_dim"], row["mask"]) == ("dkdv", 256, "packed"):
            allowed = SLOW
        assert row["stack"] <= allowed or architecture.startswith("gfx"), row


@architectures
def test_the_fast_instructions_are_used(architecture):
    for row in compiled("portable", architecture):
        if row["dtype"] == "fp32":
            assert "mma" not in " ".join(row["instructions"]), "IEEE float32 has no matrix unit"
            continue
        if row["dtype"] == "tf32":
            assert "mma" in " ".join(row["instructions"]), row
            continue
        if row["head_dim"] > 256:
            continue  # 16 rows: mma.sync everywhere, and nothing in flight
        assert PRODUCTS.get(architecture, "mma.sync") in row["instructions"], row
        if row["mask"] == "packed" and architecture.startswith("sm_"):
            assert "cp.async.cg" in row["instructions"] or row["tiles"]["num_stages"] == 1, "pointers, in flight"
        elif architecture in ("sm_90", "sm_100", "sm_120"):
            assert "cp.async.bulk.tensor" in row["instructions"], row
        elif architecture.startswith("sm_"):
            assert "cp.async.cg" in row["instructions"] or row["tiles"]["num_stages"] == 1, row
