"""Tile sizes of the portable kernels: measured on an H100, compiled for the others. No torch, no Triton here.

`python -m scripts.tune_attention` times every candidate; the reasons below are from its runs (bf16, 16k tokens,
heads · head_dim = 2048, TFLOP/s of the products that the kernel really does). tests/kernels/test_compile_portable.py
compiles each entry for each architecture: it must fit into shared memory and keep its values in registers.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tiles:
    """How one kernel cuts its work."""

    m: int
    """Queries in a tile."""
    n: int
    """Keys in a tile."""
    num_warps: int
    num_stages: int
    """Tiles in flight: the loop loads that many ahead, less one."""


# Hopper and data-centre Blackwell: TMA, and products by a warp group of 4 warps, 64 rows at a time. Two or three small
# programs on a multiprocessor hide each other's softmax, so 64 rows and 4 warps win nearly everywhere.
HOPPER = {
    ("forward", 64): Tiles(64, 128, 4, 2),  # causal 464; one stage: 434; 64 keys: 412
    ("forward", 128): Tiles(128, 128, 8, 3),  # causal 568; 64 × 128: 530; 128 × 64: 505
    ("forward", 256): Tiles(128, 64, 8, 2),  # causal 565; 64 × 128, one stage: 511
    ("dq", 64): Tiles(128, 64, 4, 4),  # causal 664, full 698; 64 × 64: 610, 668
    ("dq", 128): Tiles(128, 64, 8, 3),  # causal 704, full 684; 64 × 32: 627, 630
    ("dq", 256): Tiles(64, 32, 4, 3),  # causal 570; 128 × 32: 506; 64 × 64: 340
    ("dkdv", 64): Tiles(32, 64, 4, 3),  # causal 434, full 500; 64 × 64: 402, 467; 128 × 64: 465, 458, but it spills
    ("dkdv", 128): Tiles(64, 64, 4, 2),  # causal 563, full 584; 32 × 64: 523, 539; 64 × 128: 516, 575
    ("dkdv", 256): Tiles(64, 64, 8, 2),  # causal 293; one stage: 276; 32 × 64: 227; 4 warps spill: 194
}

# Without a diagonal all tiles are inner ones, and several small programs with one tile in flight each do best.
HOPPER_FULL = {
    ("forward", 64): Tiles(64, 128, 4, 1),  # 497; two stages: 477
    ("forward", 128): Tiles(64, 128, 4, 1),  # 593; 128 × 128: 571
    ("forward", 256): Tiles(64, 128, 4, 1),  # 630; 128 × 64: 537
}

# A window or documents leave each query few keys: small tiles waste less at both ends. Milliseconds, for documents of
# 1k tokens and for a window of 1k in 16k.
HOPPER_LOCAL = {
    ("forward", 64): Tiles(64, 64, 4, 2),  # 0.50 and 0.37; 64 × 128: 0.58 and 0.47
    ("forward", 128): Tiles(64, 64, 4, 3),  # 0.40 and 0.32; 128 × 128: 0.47 and 0.36
    ("forward", 256): Tiles(64, 64, 4, 3),  # documents: 0.41; 128 × 64: 0.47
    ("dq", 64): Tiles(64, 64, 4, 3),  # 0.49 and 0.38; 128 × 64: 0.55 and 0.43
    ("dq", 128): Tiles(64, 32, 4, 4),  # 0.50 and 0.40; 128 × 64: 0.53 and 0.41
    ("dkdv", 256): Tiles(32, 64, 8, 2),  # untimed: 64 × 64 would spill 192 bytes here
}

# A soft cap needs registers for the derivative: where the tiles above would spill 100 bytes and more.
HOPPER_SOFTCAP = {
    ("dq", 64): Tiles(64, 64, 4, 3),
    ("dkdv", 128): Tiles(32, 64, 4, 3),
    ("dkdv", 256): Tiles(32, 64, 8, 2),
}

# Where padding tokens are read as 0, and so by pointers (`ends`): untimed. The tiles above spill 84 and 288 bytes
# here, and those of dK and dV at 256, without better ones, 188.
HOPPER_POINTERS = {
    ("forward", 256): Tiles(128, 32, 8, 2),
    ("dkdv", 128): Tiles(32, 64, 4, 3),
}

# Data-centre Blackwell stages operands differently: the tiles above would need 262,752 bytes.
BLACKWELL = {("dkdv", 256): Tiles(32, 64, 4, 2)}

# mma.sync (sm_80, 86, 89, 120): never timed here. The largest tiles that compile without spilling, and that fit into
# the 101,376 bytes of an RTX 3090 or 4090, whose shared memory is the smallest.
AMPERE = {
    ("forward", 64): Tiles(128, 64, 4, 2),
    ("forward", 128): Tiles(128, 64, 8, 2),
    ("forward", 256): Tiles(64, 32, 4, 2),
    ("dq", 64): Tiles(64, 32, 4, 3),
    ("dq", 128): Tiles(64, 32, 4, 3),
    ("dq", 256): Tiles(32, 32, 4, 2),
    ("dkdv", 64): Tiles(32, 64, 4, 2),
    ("dkdv", 128): Tiles(64, 64, 8, 2),
    ("dkdv", 256): Tiles(16, 64, 8, 1),
}

# float32 on every GPU (IEEE products have no matrix unit), and 16 bits on AMD's, which are compiled for and never run.
SMALL = {
    ("forward", 64): Tiles(64, 32, 8, 2),
    ("forward", 128): Tiles(32, 32, 8, 2),
    ("forward", 256): Tiles(16, 32, 8, 1),
    ("dq", 64): Tiles(64, 32, 8, 2),
    ("dq", 128): Tiles(32, 32, 8, 2),
    ("dq", 256): Tiles(16, 32, 8, 1),
    ("dkdv", 64): Tiles(32, 32, 4, 2),
    ("dkdv", 128): Tiles(32, 32, 8, 2),
    ("dkdv", 256): Tiles(16, 32, 8, 1),
}

# TF32 products, where PyTorch allows them, hold operands twice: with the tiles above 114,688 bytes, more than sm_86, 89
# and 120 have.
SMALL_RTX = {("dkdv", 256): Tiles(16, 16, 8, 1)}

# A head_dim above 256 (latent attention's 576 and 512), in 16 bits: untimed, and slow, for tiles are padded to 512 or
# 1,024 columns, of which dQ, and dK and dV, need 114,688 bytes, and the latter spill 200.
VERY_WIDE = {
    "forward": Tiles(16, 16, 4, 1),
    "dq": Tiles(16, 16, 8, 1),
    "dkdv": Tiles(16, 16, 8, 1),
}

INTERPRETER = Tiles(64, 32, 4, 1)  # unequal on purpose, so that a mix-up of queries and keys shows


def choose_tiles(
    kernel: str,
    head_dim: int,
    capability: tuple[int, int] | None,
    *,
    float32: bool = False,
    causal: bool = True,
    local: bool = False,
    softcap: bool = False,
    pointers: bool = False,
) -> Tiles:
    """The tiles for one kernel.

    Args:
        kernel: forward, dq or dkdv. head_dim: the larger of Q's and V's.
        capability: of the GPU, (9, 0) for sm_90; (0, 0) for one that is not NVIDIA's; None in Triton's interpreter.
        float32: the inputs are. local: a window or documents bound what each query sees. softcap: scores are capped, or
            biased. pointers: tiles come by pointers where others come by TMA.
    """
    if capability is None:
        return INTERPRETER
    if head_dim > 256:
        return VERY_WIDE[kernel]
    key = (kernel, 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256)
    if float32 or capability == (0, 0):
        rtx = capability[0] == 12 or capability in ((8, 6), (8, 9))
        return SMALL_RTX.get(key, SMALL[key]) if rtx else SMALL[key]
    if capability[0] not in (9, 10):
        return AMPERE[key]
    overrides = (
        (pointers, HOPPER_POINTERS),
        (capability[0] == 10, BLACKWELL),
        (softcap, HOPPER_SOFTCAP),
        (local, HOPPER_LOCAL),
        (not causal, HOPPER_FULL),
    )
    for applies, tiles in overrides:
        if applies and key in tiles:
            return tiles[key]
    return HOPPER[key]


def why_not_so_wide(head_dim: int, capability: tuple[int, int] | None, *, float32: bool) -> str | None:
    """The reason a GPU does not have VERY_WIDE tiles in its shared memory; None where it does, or none are needed."""
    if head_dim <= 256 or capability is None:
        return None
    if float32:
        return f"head_dim {head_dim} is for float16 and bfloat16, not float32: above 256 its tiles fit no shared memory"
    if capability == (0, 0) or (head_dim > 512 and capability[0] not in (9, 10) and capability != (8, 0)):
        return f"head_dim {head_dim} needs more shared memory than this GPU has; it takes 512 or less (256 on AMD's)"
    return None


@dataclass(frozen=True)
class DecodeTiles:
    """How the decoding kernel cuts its work: see `decode_kernels`."""

    m: int
    """Rows in a tile: queries times query heads of a key/value head."""
    n: int
    """Keys in a tile."""
    least: int
    """Tiles of keys that a split has at least: below that, a merge costs more than it gains."""
    num_warps: int
    num_stages: int


def choose_decode_tiles(
    head_dim: int, rows: int, element_size: int, capability: tuple[int, int] | None = None
) -> DecodeTiles:
    """The tiles for so many rows: 16 KiB of K and of V at a time. Compiled for every GPU, untimed.

    Args:
        head_dim: up to 256. rows: queries times query heads of a key/value head. element_size: bytes, 2 or 4.
        capability: as for `choose_tiles`.
    """
    padded = max(64, 1 << (head_dim - 1).bit_length())
    # IEEE products have no matrix unit: with more rows their operands spill. At 256 more rows do not fit into 99 KiB.
    most = 16 if element_size == 4 else 32 if padded == 256 else 64
    m = min(most, max(16, 1 << (rows - 1).bit_length()))
    n = min(16384 // (padded * element_size), 128 if m == 16 else 64)  # 64 × 128 scores would spill on sm_120
    warps = 8 if element_size == 4 else 4
    stages = 2 if capability == (0, 0) else 3  # 64 KiB of shared memory on AMD's
    return DecodeTiles(m=m, n=n, least=2, num_warps=warps, num_stages=stages)
