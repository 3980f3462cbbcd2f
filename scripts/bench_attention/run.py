"""Attention kernels side by side, forward and backward.

    python -m scripts.bench_attention --out docs/benchmarks/attention
    python -m scripts.bench_attention --quick
    python -m scripts.bench_attention --only causal --head-dim 64 128 --seq-len 16384 --peers flash flex

Ours beside every kernel of PyTorch's SDPA, FlexAttention and, where installed, FlashAttention-3 and -4. No speed is
printed for a wrong result: at every point each implementation's output and gradients are first compared with float64.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from itertools import accumulate, pairwise, product
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

from kernels import attention as reference
from kernels import starts_from_cu_seqlens
from kernels.flash_attention.op import choose_implementation
from model.arithmetic import causal_keys
from model.attention import AttentionConfig, AttentionSpec, build_attention
from model.attention.config import FlashConfig, FlexConfig, SdpaConfig
from scripts.record import Panel, collect_facts, heading, line_chart, need_cuda, write, write_json

GRID_TOKENS, GRID_WIDTH = 16384, 2048  # the field's usual grid: batch · sequence, heads · head_dim


# ---- what is measured


@dataclass(frozen=True)
class Case:
    """One call of attention on random q (B, S, H, D), k and v (B, S, G, D)."""

    head_dim: int
    seq_len: int
    batch: int
    heads: int
    kv_heads: int
    causal: bool = True
    window: int | None = None
    documents: tuple[int, ...] = ()
    """Lengths of the documents that share each row; none for one document."""
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        assert self.causal or not (self.window or self.documents), "windows and documents are causal here"
        assert not self.documents or sum(self.documents) == self.seq_len

    @property
    def pairs(self) -> float:
        """Query-key pairs per head and row: S², by convention half of that when causal, exact with a mask."""
        if self.documents or self.window:
            return sum(n * causal_keys(n, self.window) for n in self.documents or (self.seq_len,))
        return self.seq_len**2 / (2 if self.causal else 1)

    @property
    def flops(self) -> float:
        """Forward FLOPs, 4 · B · H · D · pairs; backward counts 2.5 times that, whatever a kernel recomputes."""
        return 4 * self.batch * self.heads * self.head_dim * self.pairs

    @property
    def is_grid(self) -> bool:
        """Whether it belongs to the usual grid, not to the special shapes."""
        return self == on_grid(self.head_dim, self.seq_len, causal=self.causal)

    @property
    def label(self) -> str:
        shape = f"S {self.seq_len:,}"
        if self.is_grid:
            return f"{'causal' if self.causal else 'full'}, {shape}"
        if self.documents:
            return f"{len(self.documents)} documents, {shape}"
        if self.window:
            return f"window {self.window:,}, {shape}"
        if self.kv_heads != self.heads:
            return f"{self.heads} : {self.kv_heads} heads, {shape}"
        return f"{'causal' if self.causal else 'full'}, B {self.batch}, H {self.heads}, {shape}, {self.dtype}"


def grid(head_dims: Sequence[int], seq_lens: Sequence[int], causal: bool) -> list[Case]:
    return [on_grid(D, S, causal=causal) for D, S in product(head_dims, seq_lens)]


def on_grid(D: int, S: int, **mask: Any) -> Case:
    heads = max(1, GRID_WIDTH // D)
    return Case(D, S, max(1, GRID_TOKENS // S), heads, heads, **mask)


def random_lengths(seq_len: int, documents: int) -> tuple[int, ...]:
    """A row cut at random places, the same ones every time."""
    cuts = torch.randperm(seq_len - 1, generator=torch.Generator().manual_seed(0))[: documents - 1] + 1
    edges = [0, *sorted(cuts.tolist()), seq_len]
    return tuple(end - begin for begin, end in pairwise(edges))


GROUPS = ("causal", "full", "documents", "window", "grouped", "notes", "million")
MILLION = [Case(64, S, 1, 8, 8) for S in (2**16, 2**18, 2**20)]


def choose_cases(groups: Sequence[str], head_dims: Sequence[int], seq_lens: Sequence[int]) -> list[Case]:
    """The cases of these groups, each once. `seq_lens` are the grid's; the other groups have their own."""
    common = [D for D in head_dims if D in (64, 128)]
    small = [64] if 64 in head_dims else []
    S = 16384
    cases = {
        "causal": grid(head_dims, seq_lens, causal=True),
        "full": grid(head_dims, seq_lens, causal=False),
        # with the row that they are compared with
        "documents": [on_grid(D, S, documents=docs) for D in common for docs in ((), random_lengths(S, S // 1024))],
        "window": [on_grid(D, S, window=1024) for D in common],
        "grouped": [Case(D, S, 1, 32, 8) for D in common],
        # the shape in the notes that this project began with
        "notes": [Case(D, 51200, 32, 8, 8, causal=c, dtype="float16") for D in small for c in (True, False)],
        "million": MILLION if small else [],
    }
    return list(dict.fromkeys(case for group in groups for case in cases[group]))


# ---- the implementations

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Build = Callable[[Case, Tensor | None, torch.device], Attend]


def backend(config: AttentionConfig) -> Build:
    """One of the trainer's own attention backends; raises ValueError with the reason where it cannot."""

    def build(case: Case, starts: Tensor | None, device: torch.device) -> Attend:
        spec = AttentionSpec(
            n_heads=case.heads,
            n_kv_heads=case.kv_heads,
            head_dim=case.head_dim,
            seq_len=case.seq_len,
            dtype=case.dtype,
            capability=torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
            causal=case.causal,
            window=case.window,
            max_documents=len(case.documents) or None,
        )
        attention = build_attention(config, spec)
        return partial(attention, mask=attention.prepare(starts, case.seq_len))

    return build


def package(module: str) -> Build:
    """The flash-attn packages' functions; raises ImportError where it is not installed."""

    def build(case: Case, starts: Tensor | None, device: torch.device) -> Attend:
        functions = import_module(module)
        options: dict[str, Any] = {"causal": case.causal}
        if case.window:
            options["window_size"] = (case.window - 1, 0)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return first(functions.flash_attn_func(q, k, v, **options))

        def attend_documents(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.flatten(0, 1) for x in (q, k, v))
            return first(functions.flash_attn_varlen_func(q, k, v, **options)).unflatten(0, (case.batch, case.seq_len))

        if not case.documents:
            return attend
        offsets = torch.tensor([0, *accumulate(case.documents * case.batch)], dtype=torch.int32, device=device)
        longest = max(case.documents)
        options |= {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "max_seqlen_q": longest, "max_seqlen_k": longest}
        return attend_documents

    def first(result: Any) -> Tensor:
        return result[0] if isinstance(result, tuple) else result

    return build


OURS, PORTABLE = "flash", "flash-triton"
PEERS: dict[str, Build] = {
    OURS: backend(FlashConfig()),
    PORTABLE: backend(FlashConfig(implementation="triton")),
    "sdpa-flash": backend(SdpaConfig(kernel="flash")),
    "sdpa-cudnn": backend(SdpaConfig(kernel="cudnn")),
    "sdpa-efficient": backend(SdpaConfig(kernel="efficient")),
    "sdpa-math": backend(SdpaConfig(kernel="math")),
    "flex": backend(FlexConfig()),
    "fa3": package("fa3_fwd_interface"),  # PyPI's fa3-fwd
    "fa4": package("flash_attn.cute"),  # PyPI's flash-attn-4
}
FORWARD_ONLY = ("fa3",)
PACKAGES = ("flash-attn-4", "fa3-fwd")


def why_left_out(peer: str, case: Case) -> str | None:
    """Measurements that would take seconds or more memory than there is, and tell nothing new."""
    if peer == PORTABLE and choose_implementation("auto", torch.device("cuda"), getattr(torch, case.dtype)) == "triton":
        return f"is {OURS} on this GPU"
    if peer != OURS and case in MILLION:
        return "the rows that show memory are ours alone"
    if peer == "sdpa-math" and case.batch * case.heads * case.seq_len**2 > 2**31:
        return "S × S float32 scores of more than 8 GiB, several times over"
    if peer in ("sdpa-math", "sdpa-efficient") and (case.window or case.documents):
        return "reads an S × S mask and skips nothing"
    if peer == "sdpa-efficient" and case.seq_len > 16384:
        return "takes seconds, at the speed of S 16,384"
    return None


# ---- is it right?


@dataclass
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    starts: Tensor | None

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v


def make_inputs(case: Case, device: torch.device) -> Inputs:
    torch.manual_seed(0)
    B, S, D = case.batch, case.seq_len, case.head_dim
    options: dict[str, Any] = {"dtype": getattr(torch, case.dtype), "device": device}
    q, k, v = (torch.randn(B, S, h, D, **options, requires_grad=True) for h in (case.heads, *[case.kv_heads] * 2))
    starts = None
    if case.documents:
        offsets = torch.tensor([0, *accumulate(case.documents)], dtype=torch.int32, device=device)
        starts = starts_from_cu_seqlens(offsets, S).expand(B, S).contiguous()
    return Inputs(q, k, v, torch.randn(B, S, case.heads, D, **options), starts)


MOST_SCORES = 2**28  # that are checked in full: 2 GiB in float64
SAMPLE = 128


def checked_rows(case: Case) -> list[tuple[int, int]]:
    """The queries [begin, end) that are compared: all of them, or two stretches where that would be slow."""
    S = case.seq_len
    if case.heads // case.kv_heads * S**2 <= MOST_SCORES:
        return [(0, S)]
    middle = S // 2 + 77  # on no tile's edge
    return [(middle - SAMPLE, middle), (S - SAMPLE, S)]


def only_rows(dout: Tensor, rows: list[tuple[int, int]]) -> Tensor:
    """dout, and zero outside these rows: then the rows alone decide all three gradients, at any length."""
    if rows == [(0, dout.shape[1])]:
        return dout
    kept = torch.zeros_like(dout)
    for begin, end in rows:
        kept[:, begin:end] = dout[:, begin:end]
    return kept


def one_group(case: Case, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The last row's last key/value head and its query heads: where a wrong offset is wrong by most."""
    return q[-1:, :, -(case.heads // case.kv_heads) :], k[-1:, :, -1:], v[-1:, :, -1:]


Results = dict[str, Tensor]


def standard(case: Case, inputs: Inputs, dout: Tensor, dtype: torch.dtype) -> Results:
    """Standard attention of one group in this dtype, by the definition: out of the checked rows, and gradients."""
    rows = checked_rows(case)
    leaves = [x.detach().to(dtype).requires_grad_() for x in one_group(case, *inputs.qkv)]
    q, k, v = leaves
    outs = []
    for begin, end in rows:
        keys = end if case.causal else case.seq_len
        starts = None if inputs.starts is None else inputs.starts[-1:, begin:end]
        out = reference(
            q[:, begin:end], k[:, :keys], v[:, :keys], causal=case.causal, window=case.window, starts=starts
        )
        assert isinstance(out, Tensor)
        outs.append(out)
    douts = at_rows(one_group(case, dout, dout, dout)[0], rows).to(dtype)
    grads = torch.autograd.grad(torch.cat(outs, 1), leaves, douts)
    return {"out": torch.cat(outs, 1).detach(), **dict(zip(("dq", "dk", "dv"), grads, strict=True))}


def at_rows(x: Tensor, rows: list[tuple[int, int]]) -> Tensor:
    return torch.cat([x[:, begin:end] for begin, end in rows], 1)


@dataclass
class Check:
    """What any implementation must give for these inputs, and how far it may be off."""

    dout: Tensor
    truth: Results
    limits: dict[str, float]

    @classmethod
    def of(cls, case: Case, inputs: Inputs) -> Check:
        """The field's rule: at most twice the error of standard attention in the same dtype, both against float64."""
        dout = only_rows(inputs.dout, checked_rows(case))
        truth = standard(case, inputs, dout, torch.float64)
        usual = standard(case, inputs, dout, inputs.q.dtype)
        noise = 16 * torch.finfo(torch.float32).eps * max(x.norm().item() for x in truth.values())
        return cls(dout, truth, {name: 2 * distance(usual[name], truth[name]) + noise for name in truth})

    def errors(self, case: Case, out: Tensor, grads: Sequence[Tensor]) -> dict[str, float]:
        """Error over what is allowed, by tensor: above 1, or NaN, is wrong."""
        results = {"out": at_rows(one_group(case, out, out, out)[0], checked_rows(case))}
        if grads:
            results |= dict(zip(("dq", "dk", "dv"), one_group(case, *grads), strict=True))
        return {name: distance(x, self.truth[name]) / self.limits[name] for name, x in results.items()}


def distance(x: Tensor, truth: Tensor) -> float:
    return (x.detach().double() - truth).norm().item()


def poison_free_memory(inputs: Inputs) -> None:
    """NaN where the next outputs will be allocated: what a kernel leaves unwritten shows, and not a peer's results."""
    blocks = [torch.full_like(x, torch.nan) for x in (inputs.q, inputs.q, inputs.k, inputs.v)]
    del blocks


# ---- how fast is it?


AHEAD = 2_000_000  # cycles: about a millisecond, more than the host takes to launch any call here


def median_ms(run: Callable[[], Any], budget_ms: float) -> float:
    """Median GPU time of a call in milliseconds, over repetitions that fill the budget.

    The L2 cache is emptied before each, and the GPU sleeps until the call's launches are queued, as they are in a
    training step: what launching costs the host is `launch_us`.
    """
    cache = torch.empty(2**28, dtype=torch.int8, device="cuda")

    def times(repetitions: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repetitions)]
        for began, ended in events:
            cache.zero_()
            torch.cuda._sleep(AHEAD)
            began.record()
            run()
            ended.record()
        torch.cuda.synchronize()
        return [began.elapsed_time(ended) for began, ended in events]

    (estimate,) = times(1)
    if estimate > 1000:
        return estimate  # long enough to be steady
    repetitions = min(100, max(3, round(budget_ms / estimate)))
    times(repetitions // 4)  # warm up
    return statistics.median(times(repetitions))


def launch_us(run: Callable[[], Any]) -> float:
    """Microseconds of the host for a call that waits for nothing."""
    repetitions = 10
    torch.cuda.synchronize()
    torch.cuda._sleep(20 * AHEAD)
    began = time.perf_counter()
    for _ in range(repetitions):
        run()
    elapsed = time.perf_counter() - began
    torch.cuda.synchronize()
    return elapsed / repetitions * 1e6


class Memory:
    """Peak bytes beyond what was allocated at the beginning; 0 where there is no GPU."""

    def __init__(self, device: torch.device) -> None:
        self.is_cuda = device.type == "cuda"
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() - self.before if self.is_cuda else 0


Row = dict[str, Any]


def run_case(case: Case, peers: Sequence[str], device: torch.device, budget_ms: float) -> list[Row]:
    """One row per implementation: errors, memory and speed; or `wrong`, `refused` or `left_out` with a reason.

    All are checked first and then timed one right after the other, so that they meet the same card.
    """
    torch.compiler.reset()  # FlexAttention compiles for each case, and PyTorch gives up on a function after 8 times
    inputs = make_inputs(case, device)
    check = Check.of(case, inputs)
    rows: list[Row] = []
    right: list[tuple[Row, Attend, Tensor]] = []
    for peer in peers:
        row: Row = {"peer": peer, **asdict(case)}
        rows.append(row)
        reason = why_left_out(peer, case)
        if reason:
            row["left_out"] = reason
            continue
        try:
            errors, found, attend, out = examine(case, peer, inputs, check, device)
        except ImportError as error:
            row["left_out"] = f"not installed ({error})"
            continue
        except Exception as error:  # whatever a peer raises is its answer
            row["refused"] = one_line(error)
            continue
        wrong = {name: error for name, error in errors.items() if not error <= 1}  # NaN is wrong too
        if wrong:
            name = next(iter(wrong))
            row["wrong"] = f"{name} is off by {wrong[name]:.2g} times what is allowed"
        else:
            row |= {**found, "errors": errors}
            right.append((row, attend, out))
    del check
    for row, attend, out in right:
        try:
            row |= speeds(case, row["peer"], inputs, attend, out, budget_ms)
        except torch.OutOfMemoryError as error:
            row["refused"] = one_line(error)
    return rows


def examine(
    case: Case, peer: str, inputs: Inputs, check: Check, device: torch.device
) -> tuple[dict[str, float], Row, Attend, Tensor]:
    """Run it once, forward and backward: its errors, its memory, itself and its output with the graph."""
    attend = PEERS[peer](case, inputs.starts, device)
    poison_free_memory(inputs)
    memory = Memory(device)
    out = attend(*inputs.qkv)
    row: Row = {"forward_bytes": memory.peak()}
    grads: Sequence[Tensor] = ()
    if peer not in FORWARD_ONLY:
        grads = torch.autograd.grad(out, inputs.qkv, check.dout, retain_graph=True)
        row["backward_bytes"] = memory.peak()
    return check.errors(case, out, grads), row, attend, out


def speeds(case: Case, peer: str, inputs: Inputs, attend: Attend, out: Tensor, budget_ms: float) -> Row:
    calls: dict[str, tuple[Callable[[], Any], float]] = {"forward": (partial(attend, *inputs.qkv), 1.0)}
    if peer not in FORWARD_ONLY:
        backward = partial(torch.autograd.grad, out, inputs.qkv, inputs.dout, retain_graph=True)
        calls["backward"] = backward, 2.5
    row: Row = {}
    for direction, (run, factor) in calls.items():
        ms = median_ms(run, budget_ms)
        row |= {f"{direction}_ms": ms, f"{direction}_tflops": factor * case.flops / ms / 1e9}
        if case.seq_len <= 1024:
            row[f"{direction}_launch_us"] = launch_us(run)
    return row


def one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]


# ---- what the record says


def cell(row: Row | None) -> str:
    """Forward / backward TFLOP/s of one implementation."""
    if row is None:
        return ""
    if "wrong" in row:
        return "WRONG"
    return pair((row.get("forward_tflops"), row.get("backward_tflops")), "{:.0f}")


def pair(forward_backward: Sequence[float | None], form: str) -> str:
    if forward_backward == (None, None):
        return "–"
    return " / ".join("–" if x is None else form.format(x) for x in forward_backward)


def ratio(by_peer: dict[str, Row], peers: Sequence[str]) -> str:
    """Ours over the fastest of these, forward / backward."""
    return pair(ratios(by_peer, peers), "{:.2f}")


def ratios(by_peer: dict[str, Row], peers: Sequence[str]) -> tuple[float | None, float | None]:
    def of(key: str) -> float | None:
        ours = by_peer.get(OURS, {}).get(key)
        others = (by_peer[peer] for peer in peers if peer in by_peer and peer not in (OURS, PORTABLE))
        theirs = [row[key] for row in others if key in row]
        return ours / max(theirs) if ours and theirs else None

    return of("forward_tflops"), of("backward_tflops")


def summary(table: dict[Case, dict[str, Row]]) -> list[str]:
    """Ours against the field on the whole grid: the geometric mean, and the points where another is faster."""
    lines = []
    for against, peers in (("the best other", list(PEERS)), ("FlexAttention", ["flex"])):
        found = [x for case, by_peer in table.items() if case.is_grid for x in ratios(by_peer, peers) if x]
        if found:
            faster = sum(x >= 1 for x in found)
            lines.append(
                f"Against {against}, over {len(found)} figures of the grid: geometric mean "
                f"{statistics.geometric_mean(found):.3f}, from {min(found):.2f} to {max(found):.2f}; "
                f"at least as fast in {faster}."
            )
    return [*lines, ""] if lines else []


def launch_table(table: dict[Case, dict[str, Row]]) -> list[str]:
    """What a call costs the host, where it might be more than the GPU's time."""
    lines = []
    for case, by_peer in table.items():
        cells = [
            f"{peer} {row['forward_launch_us']:.0f} / {row.get('backward_launch_us', float('nan')):.0f}"
            for peer, row in by_peer.items()
            if "forward_launch_us" in row
        ]
        if cells:
            lines.append(f"- D {case.head_dim}, {case.label}: {', '.join(cells)}".replace("/ nan", ""))
    return ["## Host time of a call, forward / backward, µs", "", *lines, ""] if lines else []


def by_case(rows: Sequence[Row]) -> dict[Case, dict[str, Row]]:
    fields = Case.__dataclass_fields__
    table: dict[Case, dict[str, Row]] = {}
    for row in rows:
        table.setdefault(Case(**{name: row[name] for name in fields}), {})[row["peer"]] = row
    return table


def speed_table(title: str, table: dict[Case, dict[str, Row]], with_head_dim: bool = False) -> list[str]:
    found = {peer for by_peer in table.values() for peer, row in by_peer.items() if cell(row) != "–"}
    peers = [peer for peer in PEERS if peer in found]
    lines = [f"## {title}", ""]
    lines.append(f"| | {' | '.join(peers)} | {OURS} ÷ flex | {OURS} ÷ best other |")
    lines.append("|---|" + "---:|" * (len(peers) + 2))
    for case, by_peer in table.items():
        label = f"D {case.head_dim}, {case.label}" if with_head_dim else case.label
        cells = [cell(by_peer.get(peer)) for peer in peers]
        lines.append(f"| {label} | {' | '.join([*cells, ratio(by_peer, ['flex']), ratio(by_peer, peers)])} |")
    return [*lines, ""]


def memory_table(table: dict[Case, dict[str, Row]]) -> list[str]:
    """Ours beyond the inputs: what is allocated at the peak, what must be there, and whether it grows linearly."""
    chosen = [(case, row) for case, row in our_long_rows(table) if "forward_ms" in row]
    if not chosen:
        return []
    lines = ["## Peak memory beyond the inputs, ours, B 1, H 8, D 64", "",
             "| S | forward MiB | out, LSE | with backward MiB | … + row statistic, dq, dk, dv | fwd s | bwd s |",
             "|---:|---:|---:|---:|---:|---:|---:|"]  # fmt: skip
    for case, row in chosen:
        at_least = outputs_bytes(case)
        lines.append(
            f"| {case.seq_len:,} | {row['forward_bytes'] / 2**20:,.1f} | {at_least[0] / 2**20:,.1f} "
            f"| {row['backward_bytes'] / 2**20:,.1f} | {at_least[1] / 2**20:,.1f} "
            f"| {row['forward_ms'] / 1000:.3f} | {row['backward_ms'] / 1000:.3f} |"
        )
    verdict = "Linear in S" if is_linear(chosen) else "NOT LINEAR IN S"
    return [*lines, "", f"{verdict}: bytes per token differ by {100 * (spread(chosen) - 1):.2f} % at most.", ""]


def our_long_rows(table: dict[Case, dict[str, Row]]) -> list[tuple[Case, Row]]:
    return [(case, by_peer[OURS]) for case, by_peer in table.items() if case in MILLION and OURS in by_peer]


def outputs_bytes(case: Case) -> tuple[int, int]:
    """Bytes that must exist beyond the inputs: out and LSE; for backward also delta and the three gradients."""
    rows, width = case.batch * case.seq_len, torch.finfo(getattr(torch, case.dtype)).bits // 8 * case.head_dim
    forward = rows * case.heads * (width + 4)
    return forward, forward + rows * (case.heads * (width + 4) + 2 * case.kv_heads * width)


def spread(rows: Sequence[tuple[Case, Row]]) -> float:
    """Largest over smallest number of bytes per token, forward or with backward."""
    ratios = []
    for key in ("forward_bytes", "backward_bytes"):
        per_token = [row[key] / (case.batch * case.seq_len) for case, row in rows]
        ratios.append(max(per_token) / min(per_token))
    return max(ratios)


def is_linear(rows: Sequence[tuple[Case, Row]]) -> bool:
    return spread(rows) < 1.01


def documents_lines(table: dict[Case, dict[str, Row]]) -> list[str]:
    """How much faster ours is on rows of documents than on the same rows without."""
    lines = []
    for case, by_peer in table.items():
        row, plain = by_peer.get(OURS, {}), table.get(on_grid(case.head_dim, case.seq_len), {}).get(OURS, {})
        if case.documents and "backward_ms" in row and "backward_ms" in plain:
            gains = pair([plain[key] / row[key] for key in ("forward_ms", "backward_ms")], "{:.1f}×")
            lines.append(
                f"{len(case.documents)} documents of {case.seq_len // len(case.documents):,} tokens on average, "
                f"D {case.head_dim}: {gains} the speed of the same row without documents."
            )
    return [*lines, ""] if lines else []


def reasons(rows: Sequence[Row]) -> list[str]:
    """Why cells are empty or wrong: one line per reason, with the implementations and in how many rows."""
    found: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        for kind in ("wrong", "refused", "left_out"):
            if kind in row:
                reason = f"{kind.replace('_', ' ')}, {row[kind]}"
                found.setdefault(reason, {}).setdefault(row["peer"], []).append(row)
    lines = []
    for reason, by_peer in found.items():
        places = []
        for peer, those in by_peer.items():
            (case, *_) = by_case(those)
            places.append(f"{peer} ({f'{len(those)} rows' if len(those) > 1 else f'D {case.head_dim}, {case.label}'})")
        lines.append(f"- {', '.join(places)}: {reason}")
    return lines


def tables(rows: Sequence[Row]) -> list[str]:
    table = by_case(rows)
    lines: list[str] = []
    for D in sorted({case.head_dim for case in table if case.is_grid}):
        part = {case: by_peer for case, by_peer in table.items() if case.is_grid and case.head_dim == D}
        lines += speed_table(f"head_dim {D}", dict(sorted(part.items(), key=lambda x: (not x[0].causal, x[0].seq_len))))
    special = {case: by_peer for case, by_peer in table.items() if not case.is_grid}
    if special:
        lines += speed_table("Documents, windows, grouped heads, long rows", special, with_head_dim=True)
    lines += summary(table) + documents_lines(table) + memory_table(table) + launch_table(table)
    empty = reasons(rows)
    return lines + (["## Without a speed", "", *empty] if empty else [])


EXPLANATION = """\
Forward / backward TFLOP/s. Forward counts 4 · B · H · D FLOPs per query-key pair: S² pairs, by convention half of that
when causal, the exact number with documents or a window; backward 2.5 times that. bf16 unless said otherwise; B · S =
16,384 tokens (B = 1 beyond) and H · D = 2,048 in the tables by head_dim. q, k and v are (B, S, H, D), as a projection
writes them; forward is the training forward, which keeps what backward needs. Each time is the median over repeated
calls between events on the stream, L2 emptied before each, with the call's launches queued before it begins, as they
are in a training step; what they cost the host stands at the end. `flash` is what attention=flash runs on this GPU,
`flash-triton` the portable kernels.

Before it was timed each output and gradient was compared with float64, over the last row's last key/value head (all
queries up to S 16,384, 256 of them beyond): an error above twice that of standard attention in the same dtype would
show as WRONG, without a speed."""


def markdown(rows: Sequence[Row], facts: dict[str, Any], plot: str | None = None) -> str:
    lines = [*heading("Attention kernels", facts), EXPLANATION, ""]
    if plot and chart(rows):
        lines += [f"![Speed against sequence length]({plot})", ""]
    return "\n".join([*lines, *tables(rows)]).rstrip() + "\n"


def chart(rows: Sequence[Row]) -> str | None:
    """Speed against S on the grid, one panel per head_dim, direction and mask; None where nothing was measured."""
    table = {case: by_peer for case, by_peer in by_case(rows).items() if case.is_grid}
    panels: list[list[Panel]] = []
    for causal, direction in product((True, False), ("forward", "backward")):
        line = []
        for D in sorted({case.head_dim for case in table}):
            series: dict[str, list[tuple[float, float]]] = {}
            for case, by_peer in table.items():
                for peer, row in by_peer.items():
                    if case.head_dim == D and case.causal == causal and f"{direction}_tflops" in row:
                        series.setdefault(peer, []).append((case.seq_len, row[f"{direction}_tflops"]))
            if series:
                line.append(Panel(f"{direction}, D {D}, {'causal' if causal else 'full'}", series))
        if line:
            panels.append(line)
    shown = {peer for line in panels for panel in line for peer in panel.series}
    if not panels:
        return None
    return line_chart("Attention, speed against sequence length", "TFLOP/s", panels, [p for p in PEERS if p in shown])


def failures(rows: Sequence[Row]) -> list[str]:
    """What makes the run fail: wrong results, ours not running, ours growing faster than S."""
    failed = [f"{row['peer']} {row['wrong']}" for row in rows if "wrong" in row]
    failed += [f"{OURS} failed: {row['refused']}" for row in rows if row["peer"] == OURS and "refused" in row]
    long_rows = [(case, row) for case, row in our_long_rows(by_case(rows)) if "backward_bytes" in row]
    if long_rows and not is_linear(long_rows):
        failed.append("peak memory does not grow linearly in S")
    return failed


# ---- the command


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=GROUPS, help="groups of cases (default: all)")
    parser.add_argument("--head-dim", nargs="+", type=int, help="default 64 128 256")
    parser.add_argument("--seq-len", nargs="+", type=int, help="of the causal and full grids; default 1024 … 65536")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), help="implementations; default all")
    parser.add_argument("--quick", action="store_true", help="causal, documents, D 64 128, S 4096 16384; short timings")
    parser.add_argument("--out", type=Path, help="write OUT.md, OUT.json (after every case) and OUT.svg")
    args = parser.parse_args(argv)
    quick = args.quick
    args.only = args.only or (["causal", "documents"] if quick else list(GROUPS))
    args.head_dim = args.head_dim or ([64, 128] if quick else [64, 128, 256])
    args.seq_len = args.seq_len or ([4096, 16384] if quick else [1024, 4096, 16384, 65536])
    args.budget_ms = 40.0 if quick else 100.0
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    device = need_cuda("bench_attention")
    # Backward is timed on one graph again and again, which a compiled backward that gives its buffers away refuses.
    torch._functorch.config.donated_buffer = False
    facts = collect_facts("bench_attention", sys.argv[1:] if argv is None else argv, device, PACKAGES)
    cases = choose_cases(args.only, args.head_dim, args.seq_len)
    rows: list[Row] = []
    began = time.perf_counter()
    for number, case in enumerate(cases, 1):
        rows += (found := run_case(case, args.peers, device, args.budget_ms))
        torch.cuda.empty_cache()
        speeds = "  ".join(f"{row['peer']} {cell(row).replace(' ', '')}" for row in found if cell(row) != "–")
        clock = f"{time.perf_counter() - began:4.0f} s {number}/{len(cases)}"
        print(f"{clock}  D {case.head_dim} {case.label}: {speeds}", flush=True)
        if args.out:
            write_json(args.out, facts, rows)
    if args.out:
        plot = chart(rows)
        if plot:
            write(args.out.with_name(args.out.name + ".svg"), plot)
        write(args.out.with_name(args.out.name + ".md"), markdown(rows, facts, f"{args.out.name}.svg"))
    print("\n".join(line for line in tables(rows) if line))
    failed = failures(rows)
    for line in dict.fromkeys(failed):
        print(f"FAILED {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
