"""Find the fastest tiles of the portable attention kernels on this GPU, for kernels/flash_attention/config.py.

    python -m scripts.tune_attention --head-dim 64 128 --mask causal documents --out tuning

The kernels of forward, dQ and dK/dV are independent choices. Every candidate is compiled (in parallel), its result is
compared with that of the first one that works, and only then it is timed, alone. The first is what config.py has now;
its line ends in "now".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.flash_attention import portable
from kernels.flash_attention.config import Tiles, choose_tiles
from kernels.flash_attention.testing import random_starts
from scripts.parser import parser_of, positive, row_length
from scripts.record import need_cuda

KERNELS = {"forward": portable.forward_kernel, "dq": portable.dq_kernel, "dkdv": portable.dkdv_kernel}
MASKS = ("causal", "full", "documents", "window")
WIDTH = 2048  # heads · head_dim

Run = Callable[[Tiles], tuple[Any, ...]]


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("tune_attention", __doc__)
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=list(KERNELS), help="default: all")
    parser.add_argument("--head-dim", nargs="+", type=positive, default=[64, 128, 256], help="default 64 128 256")
    parser.add_argument("--mask", nargs="+", choices=MASKS, default=["causal", "full"], help="default causal full")
    parser.add_argument("--seq-len", type=row_length, default=16384, help="default 16384")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16", help="default bfloat16"
    )
    parser.add_argument("--out", type=Path, help="folder for tuning.json with every figure")
    parser.add_argument("--workers", type=positive, default=12, help="processes that compile (default 12)")
    args = parser.parse_args(argv)
    need_cuda("tune_attention")
    dtype = getattr(torch, args.dtype)
    capability = (0, 0) if torch.version.hip else torch.cuda.get_device_capability()
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        for kernel, head_dim, mask in product(args.kernel, args.head_dim, args.mask):
            now = choose_tiles(
                kernel, head_dim, capability, float32=dtype == torch.float32, causal=mask != "full",
                local=mask in ("documents", "window"),
            )  # fmt: skip
            jobs = [(kernel, head_dim, mask, dtype, tiles) for tiles in candidates(kernel, head_dim, now)]
            compiled = [(job[-1], made) for job, made in zip(jobs, pool.map(compile_one, jobs), strict=True) if made]
            timed = time_all(kernel, head_dim, mask, dtype, args.seq_len, compiled)
            print(f"{kernel}, head_dim {head_dim}, {mask}", flush=True)
            for i, row in enumerate(timed):
                is_now = vars(now).items() <= row.items()
                if i < 6 or is_now:
                    print("  {ms:8.3f} ms  m {m:3} n {n:3} warps {num_warps} stages {num_stages}  shared {shared:6} "
                          "spilled {spilled}{mark}".format(**row, mark="  now" * is_now), flush=True)  # fmt: skip
            rows += timed
            if args.out:
                args.out.mkdir(parents=True, exist_ok=True)
                (args.out / "tuning.json").write_text(json.dumps(rows, indent=1))


def candidates(kernel: str, head_dim: int, now: Tiles) -> list[Tiles]:
    """Those chosen now, and others worth a look: a warp group (4 warps) multiplies 64 rows at a time."""
    found = [now]
    for resident, streamed, warps, stages in product((64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3, 4)):
        few_rows_each = warps == 8 and resident == 64 and head_dim <= 128
        tiny = streamed == 16 and head_dim <= 128
        starved = stages == 1 and streamed < 64
        if not (few_rows_each or tiny or starved):
            m, n = (streamed, resident) if kernel == "dkdv" else (resident, streamed)
            found.append(Tiles(m, n, warps, stages))
    return list(dict.fromkeys(found))


def compile_one(job: tuple[str, int, str, torch.dtype, Tiles]) -> tuple[int, int] | None:
    """(bytes of shared memory, bytes spilled per thread); None where it does not compile or fit. Fills the disk cache,
    from which the measuring process takes it."""
    kernel, head_dim, mask, dtype, tiles = job
    try:
        runner(kernel, (1, 1024, 2, head_dim), mask, dtype)(tiles)
        torch.cuda.synchronize()
    except Exception:  # the compiler has many ways to refuse a candidate, and each is just a candidate less
        return None
    compiled = list(KERNELS[kernel].device_caches[0][0].values())[-1]
    return compiled.metadata.shared, compiled.n_spills


def time_all(
    kernel: str, head_dim: int, mask: str, dtype: torch.dtype, seq_len: int,
    compiled: list[tuple[Tiles, tuple[int, int]]],
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for each candidate, the fastest first."""
    run = runner(kernel, (1, seq_len, max(1, WIDTH // head_dim), head_dim), mask, dtype)
    truth = run(compiled[0][0])
    rows = []
    for tiles, (shared, spilled) in compiled:
        off = max(relative(x, y) for x, y in zip(run(tiles), truth, strict=True))
        if not off < 0.01:
            print(f"WRONG: {kernel} {tiles} differs from {compiled[0][0]} by {off:.2g}")
            continue
        ms = triton.testing.do_bench(lambda tiles=tiles: run(tiles), warmup=10, rep=40, return_mode="median")
        about = {"kernel": kernel, "head_dim": head_dim, "mask": mask}
        rows.append({**about, "ms": ms, **vars(tiles), "shared": shared, "spilled": spilled})
    return sorted(rows, key=lambda row: row["ms"])


def runner(kernel: str, shape: tuple[int, int, int, int], mask: str, dtype: torch.dtype) -> Run:
    """A function of tiles that launches this kernel alone and returns what it wrote."""
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(shape, dtype=dtype, device="cuda") for _ in range(4))
    starts = None
    if mask == "documents":  # of 1,024 tokens on average
        starts = random_starts(*shape[:2], 1 / 1024).cuda()
    window = 1024 if mask == "window" else None
    options: dict[str, Any] = {"causal": mask != "full", "window": window, "softcap": 0.0, "scale": shape[3] ** -0.5}
    if kernel == "forward":
        return lambda tiles: portable.forward(q, k, v, starts, None, None, None, **options, tiles=tiles)
    out, lse = portable.forward(q, k, v, starts, None, None, None, **options)
    delta = (out.float() * dout.float()).sum(-1).transpose(1, 2).contiguous()
    if kernel == "dq":
        return lambda tiles: portable.dq(dout, q, k, v, lse, delta, starts, **options, tiles=tiles)[:1]
    return lambda tiles: portable.dkdv(dout, q, k, v, lse, delta, starts, **options, tiles=tiles)


def relative(x: Tensor, truth: Tensor) -> float:
    return float((x.float() - truth.float()).norm() / truth.float().norm())


if __name__ == "__main__":
    main()
