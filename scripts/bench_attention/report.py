"""What the record says: tables, ratios and plots from measured rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from statistics import geometric_mean
from typing import Any

import torch

from scripts.record import Panel, heading, line_chart

from .cases import MILLION, Case, on_grid
from .peers import OURS, PEERS, PORTABLE

Row = dict[str, Any]
Table = dict[Case, dict[str, Row]]
"""Rows by case and implementation."""
DIRECTIONS = ("forward", "backward")


def by_case(rows: Sequence[Row]) -> Table:
    fields = Case.__dataclass_fields__
    table: Table = {}
    for row in rows:
        # An older record lacks what came later, and was measured without it.
        values = {name: row[name] for name in fields if name in row} | {"documents": tuple(row["documents"])}
        table.setdefault(Case(**values), {})[row["peer"]] = row
    return table


# ---- cells


def cell(row: Row | None) -> str:
    """Forward / backward TFLOP/s of one implementation."""
    if row is None:
        return ""
    if "wrong" in row:
        return "WRONG"
    return pair([row.get(f"{direction}_tflops") for direction in DIRECTIONS], "{:.0f}")


def pair(forward_backward: Sequence[float | None], form: str) -> str:
    if all(x is None for x in forward_backward):
        return "–"
    return " / ".join("–" if x is None else form.format(x) for x in forward_backward)


def ratio(by_peer: dict[str, Row], peers: Sequence[str], direction: str) -> float | None:
    """Our speed over that of the fastest of these; None where nothing can be compared."""
    key = f"{direction}_tflops"
    mine = by_peer.get(OURS, {}).get(key)
    theirs = [by_peer[peer][key] for peer in peers if peer not in (OURS, PORTABLE) and key in by_peer.get(peer, {})]
    return mine / max(theirs) if mine and theirs else None


def ratios(by_peer: dict[str, Row], peers: Sequence[str]) -> str:
    return pair([ratio(by_peer, peers, direction) for direction in DIRECTIONS], "{:.2f}")


# ---- tables


def speed_table(title: str, table: Table, with_head_dim: bool = False) -> list[str]:
    found = {peer for by_peer in table.values() for peer, row in by_peer.items() if cell(row) != "–"}
    peers = [peer for peer in PEERS if peer in found]
    lines = [f"## {title}", ""]
    lines.append(f"| | {' | '.join(peers)} | {OURS} ÷ flex | {OURS} ÷ best other |")
    lines.append("|---|" + "---:|" * (len(peers) + 2))
    for case, by_peer in table.items():
        label = f"D {case.head_dim}, {case.label}" if with_head_dim else case.label
        cells = [cell(by_peer.get(peer)) for peer in peers]
        lines.append(f"| {label} | {' | '.join([*cells, ratios(by_peer, ['flex']), ratios(by_peer, peers)])} |")
    return [*lines, ""]


def headline(table: Table) -> list[str]:
    """Ours over the others at head_dim 64 and 128 up to 16k tokens: the geometric mean, and the worst point."""
    lines = []
    for others, peers in (("the fastest other", list(PEERS)), ("flex", ["flex"])):
        found = {
            f"D {case.head_dim}, {case.label}, {direction}": figure
            for (case, by_peer), direction in product(table.items(), DIRECTIONS)
            if case.is_grid and case.head_dim in (64, 128) and case.seq_len <= 16384
            if (figure := ratio(by_peer, peers, direction)) is not None
        }
        if found:
            least = min(found, key=lambda where: found[where])
            lines.append(
                f"- {OURS} ÷ {others}, {len(found)} figures (D 64 and 128, S up to 16,384): geometric mean "
                f"{geometric_mean(found.values()):.3f}; 1 or more at {sum(x >= 1 for x in found.values())}; "
                f"smallest {found[least]:.2f} ({least})."
            )
    return [*lines, ""] if lines else []


def call_table(table: Table) -> list[str]:
    """Microseconds on the GPU, and called from Python one after the other."""
    called = {case: by_peer for case, by_peer in table.items() if any("forward_call_ms" in r for r in by_peer.values())}
    if not called:
        return []
    peers = [peer for peer in PEERS if any("forward_call_ms" in by_peer.get(peer, {}) for by_peer in called.values())]
    lines = ["## Short rows: µs on the GPU → called from Python, one call after the other", "",
             f"| | | {' | '.join(peers)} |", "|---|---|" + "---:|" * len(peers)]  # fmt: skip

    def both(row: Row, direction: str) -> str:
        if f"{direction}_call_ms" not in row:
            return "–"
        return f"{1000 * row[f'{direction}_ms']:.0f} → {1000 * row[f'{direction}_call_ms']:.0f}"

    for (case, by_peer), direction in product(called.items(), DIRECTIONS):
        cells = [both(by_peer.get(peer, {}), direction) for peer in peers]
        lines.append(f"| D {case.head_dim}, {case.label} | {direction} | {' | '.join(cells)} |")
    return [*lines, ""]


def error_table(table: Table) -> list[str]:
    """Errors against float64 at the longest row of each head_dim and mask that is compared in full."""
    longest: dict[tuple[int, bool], Case] = {}
    for case in sorted((case for case in table if case.is_grid and case.seq_len <= 16384), key=lambda c: c.seq_len):
        longest[case.head_dim, case.causal] = case
    cases = [case for _, case in sorted(longest.items(), key=lambda item: (item[0][0], not item[0][1]))]
    peers = [peer for peer in PEERS if any("errors" in table[case].get(peer, {}) for case in cases)]
    if not peers:
        return []
    lines = ["## Errors: out, dq, dk, dv against float64, in thousandths of the tensor's norm", "",
             f"| | {' | '.join(peers)} |", "|---|" + "---:|" * len(peers)]  # fmt: skip
    for case in cases:
        found = [table[case].get(peer, {}).get("errors", {}) for peer in peers]
        cells = [", ".join(f"{1000 * x:.2f}" for x in errors.values()) or "–" for errors in found]
        lines.append(f"| D {case.head_dim}, {case.label} | {' | '.join(cells)} |")
    return [*lines, ""]


def gain_lines(table: Table) -> list[str]:
    """What documents win, and determinism and a soft cap cost us, against the same rows without."""
    lines = []
    for case, by_peer in table.items():
        plain = table.get(on_grid(case.head_dim, case.seq_len), {})
        for name in (OURS, PORTABLE):
            row, without = by_peer.get(name, {}), plain.get(name, {})
            if "backward_ms" not in row or "backward_ms" not in without:
                continue
            where = f"{name}, D {case.head_dim}, S {case.seq_len:,}"
            if case.documents:
                gains = pair(
                    [without[f"{direction}_ms"] / row[f"{direction}_ms"] for direction in DIRECTIONS], "{:.1f}×"
                )
                mean = case.seq_len // len(case.documents)
                lines.append(f"- {where}: documents of {mean:,} tokens on average, {gains} the speed without them.")
            elif case.deterministic:
                cost = 100 * (row["backward_ms"] / without["backward_ms"] - 1)
                lines.append(f"- {where}: deterministic gradients take {cost:.0f} % more time.")
            elif case.softcap:
                speeds = pair(
                    [without[f"{direction}_ms"] / row[f"{direction}_ms"] for direction in DIRECTIONS], "{:.2f}×"
                )
                lines.append(f"- {where}: {speeds} the speed with a soft cap of {case.softcap:g}.")
    return [*lines, ""] if lines else []


# ---- memory


def memory_table(table: Table) -> list[str]:
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
    lines += [
        "",
        f"{verdict}: bytes per token differ by {100 * (spread(chosen) - 1):.2f} % at most. The Hopper kernels",
    ]
    return [*lines, "add up dq in float32, 4 bytes per element of q, and keep a second number per query.", ""]


def our_long_rows(table: Table) -> list[tuple[Case, Row]]:
    return [(case, by_peer[OURS]) for case, by_peer in table.items() if case in MILLION and OURS in by_peer]


def outputs_bytes(case: Case) -> tuple[int, int]:
    """Bytes that must exist beyond the inputs: out and LSE; for backward also delta and the three gradients."""
    rows, width = case.batch * case.seq_len, torch.finfo(getattr(torch, case.dtype)).bits // 8 * case.head_dim
    forward = rows * case.heads * (width + 4)
    return forward, forward + rows * (case.heads * (width + 4) + 2 * case.kv_heads * width)


def spread(rows: Sequence[tuple[Case, Row]]) -> float:
    """Largest over smallest number of bytes per token, forward or with backward."""
    found = []
    for key in ("forward_bytes", "backward_bytes"):
        per_token = [row[key] / (case.batch * case.seq_len) for case, row in rows]
        found.append(max(per_token) / min(per_token))
    return max(found)


def is_linear(rows: Sequence[tuple[Case, Row]]) -> bool:
    return spread(rows) < 1.01


# ---- the whole


def reasons(rows: Sequence[Row]) -> list[str]:
    """Why cells are empty, wrong or not of the GPU alone: one line per reason, with the implementations and rows."""
    found: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        for kind in ("wrong", "refused", "left_out", "waits"):
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
    lines = headline(table)
    for D in sorted({case.head_dim for case in table if case.is_grid}):
        part = {case: by_peer for case, by_peer in table.items() if case.is_grid and case.head_dim == D}
        lines += speed_table(f"head_dim {D}", dict(sorted(part.items(), key=lambda x: (not x[0].causal, x[0].seq_len))))
    special = {case: by_peer for case, by_peer in table.items() if not case.is_grid}
    if special:
        lines += speed_table("Documents, windows, grouped heads, long rows", special, with_head_dim=True)
    lines += gain_lines(table) + call_table(table) + error_table(table) + memory_table(table)
    notes = reasons(rows)
    return lines + (["## Notes", "", *notes] if notes else [])


EXPLANATION = """\
Forward / backward TFLOP/s. `flash` is ours: the Hopper kernels where they run, elsewhere the portable ones, which are
`flash-triton`. Forward counts 4 · B · H · D FLOPs per query-key pair: S² pairs, by convention half of that when causal,
the exact number with documents or a window; backward 2.5 times that. bf16 unless said otherwise; B · S = 16,384 tokens
(B = 1 beyond) and H · D = 2,048 in the tables by head_dim. q, k and v are (B, S, H, D), as a projection writes them;
forward is the training forward, which keeps what backward needs.

Each time is the median over repeated calls between events on the stream, L2 emptied before each. The GPU is kept busy
until all of a call's kernels are launched, so a time is how long the GPU computes, whatever the host; what a call costs
a program that makes it from Python is in the table of short rows.

Before it was timed each output and gradient was compared with float64, over the last row's last key/value head (all
queries up to S 16,384, 256 of them beyond): an error above twice that of standard attention in the same dtype would
show as WRONG, without a speed. Gradients that were asked to be deterministic were computed twice and compared."""


def markdown(rows: Sequence[Row], facts: dict[str, Any], plots: Sequence[str] = ()) -> str:
    lines = [*heading("Attention kernels", facts), EXPLANATION, ""]
    for plot in plots:
        lines += [f"![{plot}]({plot})", ""]
    return "\n".join([*lines, *tables(rows)]).rstrip() + "\n"


def charts(rows: Sequence[Row]) -> dict[str, str]:
    """Plots by the ending of their file's name, against S on the grid: speed, also in two panels for a small page, and
    the ratio to the fastest other."""
    table = {case: by_peer for case, by_peer in by_case(rows).items() if case.is_grid}
    speed = [[panel for panel in line if panel.series] for line in speed_panels(table)]
    ahead = [panel for panel in ratio_panels(table) if panel.series]
    found = {}
    if any(speed):
        shown = {peer for line in speed for panel in line for peer in panel.series}
        names = [peer for peer in PEERS if peer in shown]
        title = "Attention, speed against sequence length"
        found[".svg"] = line_chart(title, "TFLOP/s", [line for line in speed if line], names)
        if causal := [line[-1] for line in speed[: len(DIRECTIONS)] if line]:  # of the largest head_dim
            found["-causal.svg"] = line_chart(title, "TFLOP/s", [causal], names)
    if ahead:
        title = f"Speed of {OURS} over that of the fastest other, against sequence length"
        found["-ratio.svg"] = line_chart(title, f"{OURS} ÷ best other", [ahead], list(RATIO_SERIES))
    return found


def speed_panels(table: Table) -> Iterator[list[Panel]]:
    """One panel per head_dim, direction and mask."""
    for causal, direction in product((True, False), DIRECTIONS):
        line = []
        for D in sorted({case.head_dim for case in table}):
            series: dict[str, list[tuple[float, float]]] = {}
            for case, by_peer in table.items():
                for peer, row in by_peer.items():
                    if case.head_dim == D and case.causal == causal and f"{direction}_tflops" in row:
                        series.setdefault(peer, []).append((case.seq_len, row[f"{direction}_tflops"]))
            line.append(Panel(f"{direction}, D {D}, {'causal' if causal else 'full'}", series))
        yield line


RATIO_SERIES = {
    f"{direction} {'causal' if causal else 'full'}": (causal, direction)
    for causal, direction in product((True, False), DIRECTIONS)
}


def ratio_panels(table: Table) -> Iterator[Panel]:
    for D in sorted({case.head_dim for case in table}):
        series: dict[str, list[tuple[float, float]]] = {}
        for (name, (causal, direction)), (case, by_peer) in product(RATIO_SERIES.items(), table.items()):
            found = ratio(by_peer, list(PEERS), direction)
            if case.head_dim == D and case.causal == causal and found is not None:
                series.setdefault(name, []).append((case.seq_len, found))
        yield Panel(f"D {D}", series)


def failures(rows: Sequence[Row]) -> list[str]:
    """What makes the run fail: wrong results, ours not running, ours growing faster than S."""
    failed = [f"{row['peer']} {row['wrong']}" for row in rows if "wrong" in row]
    failed += [f"{row['peer']} failed: {row['refused']}" for row in rows if row["peer"] == OURS and "refused" in row]
    chosen = [(case, row) for case, row in our_long_rows(by_case(rows)) if "backward_bytes" in row]
    if chosen and not is_linear(chosen):
        failed.append("peak memory does not grow linearly in S")
    return failed
