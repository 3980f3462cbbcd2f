"""Attention alone, over rows that several GPUs share: how fast each way of context parallelism is.

    torchrun --nproc-per-node=4 -m scripts.bench_context --out docs/benchmarks/context-h200

Forward and backward of one layer's attention, with all exchanges, in TFLOP/s of each GPU: 2 and 5 products over the
(query, key) pairs that the mask lets through, divided by the GPUs. Every rank has `--tokens` tokens of the row. Causal
rows are one document; packed rows hold documents of exponential lengths with a mean of `--documents` tokens. "one GPU"
is the same attention without context parallelism, on a row of `--tokens` tokens.

Before anything is timed, output and gradients on a short row are held against float64: a method whose error is more
than twice that of standard attention in the same dtype gets no time. Times are the slowest rank's, the median of
`--repeat` calls, or of as many as take BUDGET_S.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data.loader import Batch
from kernels.reference import attention as reference
from model.attention import ATTENTIONS, AttentionSpec, build_attention
from model.attention.base import AttentionBackend
from model.attention.config import CONTEXT_METHODS, context_method, context_spec
from model.attention.context import ContextAttention
from scripts.parser import parser_of, positive, row_length
from scripts.record import collect_facts, heading, stop, write, write_json
from training.parallel.config import ParallelConfig
from training.parallel.context import SharedRows
from training.parallel.launch import Launch
from training.parallel.world import World

CHECKED = 512
"""Tokens of a rank on the row whose results are held against float64."""
WARM_UP = 2
BUDGET_S = 5.0


class Shape(NamedTuple):
    """Of what is timed: rows (1, S, …)."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    def spec(self, seq_len: int, is_packed: bool) -> AttentionSpec:
        return AttentionSpec(
            self.n_heads,
            self.n_kv_heads,
            self.head_dim,
            seq_len,
            str(self.dtype).removeprefix("torch."),
            torch.cuda.get_device_capability() if self.device.type == "cuda" else None,
            max_documents=seq_len if is_packed else None,
        )

    def inputs(self, tokens: int, seed: int) -> list[Tensor]:
        """q, k, v and the gradient of out."""
        generator = torch.Generator(self.device).manual_seed(seed)
        heads = (self.n_heads, self.n_kv_heads, self.n_kv_heads, self.n_heads)
        options: dict[str, Any] = {"generator": generator, "device": self.device, "dtype": torch.float32}
        return [torch.randn(1, tokens, n, self.head_dim, **options).to(self.dtype) for n in heads]


class Attention(NamedTuple):
    """How one rank attends to its part of a row."""

    call: Callable[[Tensor, Tensor, Tensor], Tensor]
    pairs: float
    """(query, key) pairs of the row for each rank: the mean."""
    imbalance: float
    """The pairs of the rank that has most, divided by the mean."""
    own: Tensor
    """Places of its tokens in the row."""


def packed_starts(seq_len: int, mean: int, seed: int = 0) -> Tensor:
    """Documents of exponential lengths: starts (1, S)."""
    lengths = 1 + np.random.default_rng(seed).exponential(mean, size=2 * seq_len // mean + 64).astype(np.int64)
    begins = np.concatenate([[0], np.cumsum(lengths)])
    return torch.from_numpy(begins[np.searchsorted(begins, np.arange(seq_len), side="right") - 1]).int()[None]


def batch_of(seq_len: int, starts: Tensor | None) -> Batch:
    """A row whose tokens are their places."""
    places = torch.arange(seq_len)[None]
    positions = places if starts is None else places - starts
    return Batch(places, places, starts, positions, int((positions + 1).sum()), seq_len, seq_len)


def whole(shape: Shape, name: str, seq_len: int, starts: Tensor | None) -> Attention:
    """On this rank alone."""
    backend = build_attention(ATTENTIONS[name](name=name), shape.spec(seq_len, starts is not None))
    mask = backend.prepare(None if starts is None else starts.to(shape.device), seq_len)
    batch = batch_of(seq_len, starts)
    return Attention(lambda q, k, v: backend(q, k, v, mask), batch.visible_pairs, 1.0, batch.tokens_BS[0])


def shared(shape: Shape, name: str, method: str, world: World, seq_len: int, starts: Tensor | None) -> Attention:
    """Over all ranks."""
    assert world.context_group is not None
    spec = shape.spec(seq_len, starts is not None)
    inner: AttentionBackend = build_attention(ATTENTIONS[name](name=name), context_spec(spec, method, world.size))
    attention = ContextAttention(inner, spec, method, world.context_group)
    shard = SharedRows(attention).shard(batch_of(seq_len, starts))
    assert shard.split is not None
    mask = attention.prepare_shard(None if shard.starts_BS is None else shard.starts_BS.to(shape.device), shard.split)
    # Ulysses computes some heads of all pairs, the same number on each rank.
    own = shard.visible_pairs
    mean = world.count([own])[0] / world.size
    most = world.max(torch.tensor([float(own)])).item() if method == "all-gather" else mean
    return Attention(lambda q, k, v: attention(q, k, v, mask), mean, most / mean, shard.tokens_BS[0])


def errors(shape: Shape, attention: Attention, seq_len: int, starts: Tensor | None, world: World) -> list[float]:
    """Of out, dq, dk and dv this rank's error, divided by that of standard attention in the same dtype: the largest of
    all ranks. Below 2 is right."""
    tensors = shape.inputs(seq_len, seed=1)
    starts = None if starts is None else starts.to(shape.device)
    own = attention.own.to(shape.device)

    def of_whole_rows(dtype: torch.dtype) -> list[Tensor]:
        q, k, v, dout = (x.to(dtype) for x in tensors)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = reference(*leaves, starts=starts)
        assert isinstance(out, Tensor)
        return [x[:, own].double() for x in (out, *torch.autograd.grad(out, leaves, dout))]

    leaves = [x[:, own].contiguous().requires_grad_() for x in tensors[:3]]
    out = attention.call(*leaves)
    got = [out, *torch.autograd.grad(out, leaves, tensors[3][:, own])]
    exact, standard = of_whole_rows(torch.float64), of_whole_rows(shape.dtype)
    floor = 16 * torch.finfo(torch.float32).eps
    ratios = [
        (ours.double() - truth).norm() / ((theirs - truth).norm() + floor * truth.norm())
        for ours, theirs, truth in zip(got, standard, exact, strict=True)
    ]
    return world.max(torch.stack(ratios).cpu()).tolist()


def seconds(shape: Shape, attention: Attention, world: World, repeat: int) -> tuple[float, float]:
    """Of the slowest rank, forward and backward."""
    q, k, v, dout = shape.inputs(len(attention.own), seed=world.rank)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    times: list[tuple[float, float]] = []
    for turn in range(WARM_UP + repeat):
        world.wait()
        begin, forward, backward = _clock(shape.device), _clock(shape.device), _clock(shape.device)
        begin.record()
        out = attention.call(*leaves)
        forward.record()
        torch.autograd.grad(out, leaves, dout)
        backward.record()
        if shape.device.type == "cuda":
            torch.cuda.synchronize()
        mine = torch.tensor([begin.elapsed_time(forward), forward.elapsed_time(backward)], dtype=torch.float64) / 1e3
        slowest = world.max(mine).tolist()
        if turn >= WARM_UP:
            times.append((slowest[0], slowest[1]))
        if len(times) >= 3 and sum(map(sum, times)) > BUDGET_S:
            break
    return median(t[0] for t in times), median(t[1] for t in times)


class _HostClock:
    """As a CUDA event."""

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, later: _HostClock) -> float:
        return 1e3 * (later.at - self.at)


def _clock(device: torch.device) -> Any:
    return torch.cuda.Event(enable_timing=True) if device.type == "cuda" else _HostClock()


def measure(
    shape: Shape, name: str, method: str | None, world: World, tokens: int, documents: int | None, repeat: int
) -> dict[str, Any]:
    """A row of the table: of a method, or of one GPU (None)."""

    def build(of_each: int, documents: int | None) -> tuple[Attention, int, Tensor | None]:
        seq_len = of_each * (1 if method is None else world.size)
        starts = None if documents is None else packed_starts(seq_len, documents)
        if method is None:
            return whole(shape, name, seq_len, starts), seq_len, starts
        return shared(shape, name, method, world, seq_len, starts), seq_len, starts

    row: dict[str, Any] = {
        "rows": "causal" if documents is None else "packed",
        "tokens": tokens,
        "method": method or "one GPU",
        "gpus": 1 if method is None else world.size,
    }
    short = min(tokens, CHECKED)
    checked, seq_len, starts = build(short, documents and min(documents, max(2, short // 4)))
    row["errors"] = dict(zip(("out", "dq", "dk", "dv"), errors(shape, checked, seq_len, starts, world), strict=True))
    beyond = [f"{part} is off by {error:.1f} ×" for part, error in row["errors"].items() if not error <= 2]
    if beyond:
        return row | {"wrong": ", ".join(beyond)}
    attention, seq_len, _ = build(tokens, documents)
    row |= {"imbalance": attention.imbalance, "keys": attention.pairs * row["gpus"] / seq_len}
    forward, backward = seconds(shape, attention, world, repeat)
    flops = 2 * shape.n_heads * shape.head_dim * attention.pairs / 1e12
    row |= {"forward_ms": 1e3 * forward, "backward_ms": 1e3 * backward}
    return row | {"forward_tflops": 2 * flops / forward, "backward_tflops": 5 * flops / backward}


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "| rows | tokens of a GPU | GPUs | | keys of a query | forward TFLOP/s | backward TFLOP/s | forward ms "
        "| backward ms | most pairs ÷ mean | largest error |",
        "|---|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        head = [row["rows"], f"{row['tokens']:,}", str(row["gpus"]), row["method"]]
        error = f"{max(row['errors'].values()):.2f}"
        if "wrong" in row:
            lines.append(f"| {' | '.join([*head, '–', row['wrong'], '–', '–', '–', '–', error])} |")
            continue
        speed = [f"{row[name]:.1f}" for name in ("forward_tflops", "backward_tflops")]
        times = [f"{row[name]:.2f}" for name in ("forward_ms", "backward_ms")]
        head.append(f"{row['keys']:,.0f}")
        lines.append(f"| {' | '.join([*head, *speed, *times, format(row['imbalance'], '.3f'), error])} |")
    return lines


def markdown(rows: Sequence[dict[str, Any]], facts: dict[str, Any], args: argparse.Namespace) -> str:
    text = (
        f"One layer's attention={args.attention} over one row, with all exchanges, {args.heads} query:key/value heads, "
        f"head_dim {args.head_dim}, {args.dtype}.\nTFLOP/s of each GPU count the visible pairs. Packed rows: documents "
        f'of {args.documents:,} tokens on average, exponential,\none draw for each length of a row; "keys of a query" '
        "are the mean.\nErrors: against float64, divided by standard attention's in the same dtype, on a row of "
        f"{CHECKED} tokens for each GPU;\nbelow 2 is right."
    )
    return "\n".join([*heading("Attention under context parallelism", facts), text, "", *table(rows)]) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = parser_of("bench_context", __doc__, of_ranks=True)
    parser.add_argument("--methods", nargs="+", choices=CONTEXT_METHODS, default=CONTEXT_METHODS, help="default both")
    parser.add_argument("--tokens", nargs="+", type=row_length, default=[8192, 32768, 131072], help="of each GPU")
    parser.add_argument("--heads", default="64:8", help="query:key/value heads")
    parser.add_argument("--head-dim", type=positive, default=128, help="default 128")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"], help="default bfloat16"
    )
    names = [name for name in ATTENTIONS if name != "auto"]
    parser.add_argument("--attention", default="flash", choices=names, help="default flash")
    parser.add_argument("--documents", type=row_length, default=8192, help="mean length in packed rows")
    parser.add_argument("--repeat", type=positive, default=10, help="calls of which the median is taken (default 10)")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="default cuda")
    parser.add_argument("--out", type=Path, help="write OUT.md and OUT.json, over what is there")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        stop("scripts.bench_context needs CUDA GPUs, and this machine has none; --device=cpu tries it out")
    launch = Launch.here()
    if launch.size == 1:
        stop("scripts.bench_context needs several processes; use torchrun --nproc-per-node=N -m scripts.bench_context")
    heads, kv_heads = map(int, args.heads.split(":"))
    try:
        methods = [context_method(method, heads, launch.size) for method in args.methods]
    except ValueError as error:
        stop(str(error))
    if args.device == "cuda":
        device = torch.device("cuda", launch.local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    shape = Shape(heads, kv_heads, args.head_dim, getattr(torch, args.dtype), device)
    facts = collect_facts("bench_context", argv, device)
    facts["command"] = facts["command"].replace("python", f"torchrun --nproc-per-node={launch.local_size}", 1)
    world = World.start(device, ParallelConfig(context=launch.size))
    rows: list[dict[str, Any]] = []
    for documents, tokens, method in product((None, args.documents), args.tokens, (None, *methods)):
        rows.append(measure(shape, args.attention, method, world, tokens, documents, args.repeat))
        if not world.is_first:
            continue
        print(table(rows)[-1], flush=True)
        if args.out:  # after every row, so that what was measured survives the next
            write(args.out.with_name(args.out.name + ".md"), markdown(rows, facts, args))
            write_json(args.out, facts, rows)
    world.wait()
    dist.destroy_process_group()
    return 1 if any("wrong" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
