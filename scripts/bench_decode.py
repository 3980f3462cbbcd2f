"""Attention of one new token over a cache: how fast the keys and values are read. On a GPU, in a minute.

    python -m scripts.bench_decode
    python -m scripts.bench_decode --out docs/benchmarks/decode-h200     # the record: .md and .json
    python -m scripts.bench_decode --tune                                # tiles and splits, tried one by one

Times are of the GPU alone, caches of the chip emptied before each call. GB/s are the bytes of the keys and values that
a row has, over that time. Our kernel reads a cache whose capacity is the longest length measured; the others are given
views of exactly the length. Each result is compared with float64 before it is timed: at most twice the error of
standard attention in the same dtype. Exit code 1 where one is further off.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import attention, flash_attention, flash_decode
from kernels.flash_attention.config import choose_decode_tiles
from scripts.bench_attention.check import error
from scripts.bench_attention.timing import gpu_time
from scripts.parser import parser_of, positive, row_length
from scripts.record import collect_facts, heading, need_cuda, write, write_json

SHAPES = {"llama-1b": (32, 8, 64), "llama-8b": (32, 8, 128)}  # query heads, key/value heads, head_dim
BATCHES = (1, 16)
LENGTHS = (1024, 8192, 32768, 131072)
PACKAGES = ("flash-attn-3", "fa3-fwd", "flash-attn")
BUDGET_MS = 20.0

Row = dict[str, Any]
Attend = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    model: str
    batch: int
    length: int

    @property
    def bytes_read(self) -> int:
        _, G, D = SHAPES[self.model]
        return 2 * 2 * self.batch * self.length * G * D

    @property
    def label(self) -> str:
        return f"{self.model}, {self.batch} × {self.length // 1024}k"


@dataclass(frozen=True)
class Inputs:
    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, model: str, batch: int, capacity: int, device: torch.device) -> Inputs:
        torch.manual_seed(0)
        H, G, D = SHAPES[model]
        options: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
        k_cache, v_cache = (torch.randn(batch, capacity, G, D, **options) for _ in range(2))
        lengths = torch.full((batch,), capacity, dtype=torch.int32, device=device)
        return cls(torch.randn(batch, 1, H, D, **options), k_cache, v_cache, lengths)

    def views(self, length: int) -> tuple[Tensor, Tensor]:
        return self.k_cache[:, :length], self.v_cache[:, :length]


def ours(inputs: Inputs, length: int) -> Attend:
    return lambda: flash_decode(inputs.q, inputs.k_cache, inputs.v_cache, inputs.lengths)  # type: ignore[return-value]


def by_flash_attention(inputs: Inputs, length: int) -> Attend:
    k, v = inputs.views(length)
    return lambda: flash_attention(inputs.q, k, v)  # type: ignore[return-value]


def sdpa(inputs: Inputs, length: int) -> Attend:
    q, k, v = (x.transpose(1, 2) for x in (inputs.q, *inputs.views(length)))
    return lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)


def flash_attn(*modules: str) -> Callable[[Inputs, int], Attend]:
    """The first of these modules that is installed and has the function."""

    def build(inputs: Inputs, length: int) -> Attend:
        function = first_of(modules)

        def attend() -> Tensor:
            out = function(inputs.q, inputs.k_cache, inputs.v_cache, cache_seqlens=inputs.lengths, causal=True)
            return out[0] if isinstance(out, tuple) else out

        return attend

    return build


def first_of(modules: Sequence[str]) -> Callable[..., Any]:
    for module in modules:
        try:
            function: Callable[..., Any] = import_module(module).flash_attn_with_kvcache
            return function
        except (ImportError, AttributeError):
            continue
    raise ModuleNotFoundError(f"none of {', '.join(modules)} is installed with flash_attn_with_kvcache")


PEERS: dict[str, Callable[[Inputs, int], Attend]] = {
    "flash_decode": ours,
    "flash_attention": by_flash_attention,
    "sdpa": sdpa,
    "fa3": flash_attn("flash_attn_interface", "fa3_fwd_interface"),
    "fa2": flash_attn("flash_attn"),
}


def limits(inputs: Inputs, length: int) -> tuple[Tensor, float]:
    """The truth for the last row's last key/value head, and how far a result may be off, as a share of its norm."""
    k, v = (x[-1:, :, -1:] for x in inputs.views(length))
    q = inputs.q[-1:, :, -(inputs.q.shape[2] // inputs.k_cache.shape[2]) :]
    truth, standard = attention(q.double(), k.double(), v.double()), attention(q, k, v)
    assert isinstance(truth, Tensor)
    assert isinstance(standard, Tensor)
    return truth, 2 * error(standard, truth)


def measure(case: Case, inputs: Inputs, peers: Sequence[str]) -> list[Row]:
    """A row for each: milliseconds and GB/s, or what is `wrong`, or why it was `left_out`."""
    inputs.lengths.fill_(case.length)
    truth, limit = limits(inputs, case.length)
    rows: list[Row] = []
    for peer in peers:
        row: Row = {"peer": peer, **asdict(case)}
        rows.append(row)
        try:
            attend = PEERS[peer](inputs, case.length)
            out = attend()
        except Exception as failure:  # whatever a peer raises is its answer
            row["left_out"] = f"{type(failure).__name__}: {' '.join(str(failure).split())}"[:160]
            continue
        off = error(out[-1:, :, -truth.shape[2] :], truth)
        if not off <= limit:  # NaN is wrong too
            row["wrong"] = f"off by {off / limit:.2g} times what is allowed"
            continue
        ms, waits = gpu_time(attend, BUDGET_MS)
        row |= {"ms": ms, "gb_per_s": case.bytes_read / ms / 1e6, "waits": waits}
    return rows


def tune(model: str, batch: int, length: int, device: torch.device) -> None:
    """Every tile and number of splits that might do, the fastest last."""
    from kernels.flash_attention.decode_kernels import decode

    (H, G, D), inputs = SHAPES[model], Inputs.of(model, batch, length, device)
    first = choose_decode_tiles(D, H // G, 2)
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    found = []
    for n, warps, stages in product((32, 64, 128, 256), (2, 4, 8), (2, 3, 4, 5)):
        tiles = replace(first, n=n, num_warps=warps, num_stages=stages)
        for per_multiprocessor in (1, 2, 3, 4, 6):
            splits = max(1, round(per_multiprocessor * multiprocessors / (batch * G)))
            options: dict[str, Any] = {"window": None, "softcap": 0.0, "scale": D**-0.5, "splits": splits}

            def call(tiles: Any = tiles, options: dict[str, Any] = options) -> Any:
                return decode(inputs.q, inputs.k_cache, inputs.v_cache, inputs.lengths, None, tiles=tiles, **options)

            try:
                found.append((gpu_time(call, BUDGET_MS / 4).ms, tiles, splits))
            except Exception as failure:  # too large for the chip
                print(f"{tiles}: {type(failure).__name__}", flush=True)
                break
    for ms, tiles, splits in sorted(found, key=lambda entry: -entry[0])[-12:]:
        gb_per_s = Case(model, batch, length).bytes_read / ms / 1e6
        print(f"{model} {batch} × {length:,}: {ms:.4f} ms, {gb_per_s:,.0f} GB/s, {splits} splits, {tiles}")


def table(rows: Sequence[Row], peers: Sequence[str]) -> list[str]:
    """Markdown: GB/s of each, and the time of ours."""
    shown = [peer for peer in peers if any(row["peer"] == peer and "left_out" not in row for row in rows)]
    lines = [f"| GB/s | {' | '.join(shown)} | {shown[0]}, µs |", f"|---|{'---:|' * (len(shown) + 1)}"]
    for case in dict.fromkeys(Case(row["model"], row["batch"], row["length"]) for row in rows):
        of_case = {row["peer"]: row for row in rows if Case(row["model"], row["batch"], row["length"]) == case}
        cells = [_cell(of_case[peer]) for peer in shown]
        ms = of_case[shown[0]].get("ms")
        lines.append(f"| {case.label} | {' | '.join(cells)} | {'–' if ms is None else f'{1000 * ms:.1f}'} |")
    return lines


def _cell(row: Row) -> str:
    if "wrong" in row:
        return "wrong"
    return f"{row['gb_per_s']:,.0f}{'*' if row['waits'] else ''}" if "ms" in row else "–"


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("bench_decode", __doc__)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), help="implementations; default all")
    parser.add_argument("--batch", nargs="+", type=positive, default=list(BATCHES), help="rows; default 1 16")
    parser.add_argument(
        "--length", nargs="+", type=row_length, default=list(LENGTHS), help="tokens; default 1k 8k 32k 128k"
    )
    parser.add_argument("--out", type=Path, help="write OUT.md and OUT.json")
    parser.add_argument("--tune", action="store_true", help="time tiles and splits of our kernel instead")
    options = parser.parse_args(argv)
    device = need_cuda("bench_decode")
    if options.tune:
        for model, batch, length in product(SHAPES, options.batch, options.length):
            tune(model, batch, length, device)
        return 0
    facts = collect_facts("bench_decode", sys.argv[1:] if argv is None else argv, device, PACKAGES)
    rows: list[Row] = []
    for model, batch in product(SHAPES, options.batch):
        inputs = Inputs.of(model, batch, max(options.length), device)
        for length in options.length:
            rows += (found := measure(Case(model, batch, length), inputs, options.peers))
            print(f"{found[0]['model']} {batch} × {length:,}: {', '.join(map(_cell, found))}", flush=True)
        del inputs
        torch.cuda.empty_cache()
    for reason in dict.fromkeys(f"{row['peer']}: {row['left_out']}" for row in rows if "left_out" in row):
        print(f"left out: {reason}")
    lines = table(rows, options.peers)
    if options.out:
        write_json(options.out, facts, rows)
        title = "Attention of one token over a cache"
        notes = ["bf16; 32 query heads, 8 key/value heads. A star: the time includes gaps between launches.", ""]
        page = [*heading(title, facts), *notes, *lines]
        write(options.out.with_name(options.out.name + ".md"), "\n".join(page) + "\n")
    print("\n".join(lines))
    wrong = [row for row in rows if "wrong" in row]
    for row in wrong:
        print(f"FAILED {row['peer']}, {Case(row['model'], row['batch'], row['length']).label}: {row['wrong']}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
