"""What the figures say: charts, tables, and whether the losses agree."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from scripts.record import Panel, line_chart

from .jobs import TOO_LARGE, Row, Settings, length

SAME_LOSS = ("attention", "memory", "compile", "precision", "deterministic", "device")
"""Settings (and what is below them) that change how a step is computed, not what: losses agree whatever they are."""
FIGURES = {
    "tokens/s": ("tokens_per_second", "{:,.0f}"),
    "step": ("step_ms", "{:,.1f}"),
    "peak memory": ("peak_gib", "{:.2f}"),
    "MFU": ("mfu", "{:.1%}"),
}
LOSSES = {"train loss": ("train_loss", "{:.4f}"), "validation loss": ("val_loss", "{:.4f}")}
UNITS = {"train loss": "nats per token, mean of the last steps", "validation loss": "nats per token, at the end"}
UNITS |= {"tokens/s": "higher is better", "step": "ms", "peak memory": "GiB", "MFU": "fraction of the peak"}


def name_of(settings: Settings, swept: Sequence[str]) -> str:
    """A line of the charts: the values that make it another than the others, beside the length."""
    keys = [key for key in swept if key != "seq_len"]
    values = [settings[key] if key == "attention" else f"{key}={settings[key]}" for key in keys]
    return " · ".join(values) or settings["attention"]


def by_length(rows: Sequence[Row], swept: Sequence[str]) -> dict[int, dict[str, Row]]:
    table: dict[int, dict[str, Row]] = {}
    for row in rows:
        seq_len = row.get("seq_len") or length(row["settings"]["seq_len"])
        if math.isfinite(seq_len):
            table.setdefault(int(seq_len), {})[name_of(row["settings"], swept)] = row
    return dict(sorted(table.items()))


def names_of(rows: Sequence[Row], swept: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(name_of(row["settings"], swept) for row in rows))


# ---- losses


def loss_lines(rows: Sequence[Row], tolerance: float) -> tuple[list[str], bool]:
    """A line for each group of runs that do the same sums: how far apart their losses are; and whether all agree."""
    lines, agree = [], True
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row["outcome"] == "done":
            groups.setdefault(_same(row), []).append(row)
    for settings, members in groups.items():
        if len(members) == 1:
            continue
        parts = []
        for name, (key, form) in LOSSES.items():
            low, high = (choose(members, key=lambda row: row[key]) for choose in (min, max))
            apart = (high[key] - low[key]) / abs(low[key])
            part = f"{name} {form.format(low[key])} to {form.format(high[key])}, {apart:.3%} apart"
            if not apart <= tolerance:  # of NaN nothing is true
                agree = False
                part += f" and not the {tolerance:.1%} that is allowed: {_words(low)} and {_words(high)}"
            parts.append(part)
        lines.append(f"{settings}, {len(members)} runs: {'; '.join(parts)}.")
    return lines, agree


def _same(row: Row) -> str:
    shared = {key: value for key, value in row["settings"].items() if key.partition(".")[0] not in SAME_LOSS}
    return " ".join(f"{key}={value}" for key, value in shared.items())


def _words(row: Row) -> str:
    return " ".join(f"{key}={value}" for key, value in row["settings"].items())


# ---- words


def headlines(rows: Sequence[Row], swept: Sequence[str]) -> list[str]:
    """At each length: which is fastest, by how much, with how much memory; and what did not fit."""
    lines = []
    for seq_len, by_name in by_length(rows, swept).items():
        done = {name: row for name, row in by_name.items() if row["outcome"] == "done" and row["tokens_per_second"]}
        parts = []
        order = sorted(done, key=lambda name: -done[name]["tokens_per_second"])
        if order:
            best = order[0]
            parts.append(f"{best} is fastest, {done[best]['tokens_per_second']:,.0f} tokens/s")
        for other in order[1:]:
            speed = done[order[0]]["tokens_per_second"] / done[other]["tokens_per_second"]
            memory = f"{done[order[0]]['peak_gib'] / done[other]['peak_gib']:.2f}"
            held = "the same memory" if memory == "1.00" else f"{memory} × its memory"
            parts.append(f"{speed:.2f} × as fast as {other} with {held}")
        parts += [f"{name}: {row['outcome']}" for name, row in by_name.items() if row["outcome"] != "done"]
        lines.append(f"{seq_len:,} tokens: {'; '.join(parts)}")
    return lines


def cell(row: Row | None, figure: str) -> str:
    if row is None:
        return ""
    if row["outcome"] != "done":
        return str(row["outcome"])
    key, form = (FIGURES | LOSSES)[figure]
    return "–" if row[key] is None else form.format(row[key])


# ---- pictures


def chart(rows: Sequence[Row], swept: Sequence[str]) -> str:
    """The SVG; "" where nothing was measured. The fastest at the longest rows is named first and drawn thickest."""
    table = by_length(rows, swept)
    speeds: dict[str, tuple[int, float]] = {}
    too_large: dict[str, str] = {}
    for seq_len, by_name in table.items():
        for name, row in by_name.items():
            if row["outcome"] == "done":
                speeds[name] = (seq_len, row["tokens_per_second"] or 0.0)
            elif row["outcome"] in TOO_LARGE:
                too_large.setdefault(name, f"{name} ({row['outcome']} at {seq_len:,})")
    order = sorted(speeds, key=lambda name: speeds[name], reverse=True)
    labels = {name: too_large.get(name, name) for name in order}
    panels = []
    for figure, (key, _) in FIGURES.items():
        series: dict[str, list[tuple[float, float]]] = {}
        for seq_len, by_name in table.items():
            for name, row in by_name.items():
                if row["outcome"] == "done" and row[key]:
                    series.setdefault(labels[name], []).append((seq_len, row[key]))
        if series:
            panels.append(Panel(figure, series, UNITS[figure], log_y=figure != "MFU"))
    title = "Against context length (tokens per row)"
    return line_chart(title, "", arranged(panels), list(labels.values())) if panels else ""


def arranged(panels: list[Panel]) -> list[list[Panel]]:
    return [panels] if len(panels) < 4 else [panels[:2], panels[2:]]


def html(rows: Sequence[Row], swept: Sequence[str], facts: dict[str, Any], checks: list[str]) -> str:
    names = names_of(rows, swept)
    table = by_length(rows, swept)
    head = "".join(f"<th>{escape(name)}" for name in names)
    tables = []
    for figure, (key, _) in (FIGURES | LOSSES).items():
        cells = [
            f"<tr><th>{seq_len:,}" + "".join(f"<td>{escape(cell(by_name.get(name), figure))}" for name in names)
            for seq_len, by_name in table.items()
        ]
        if any(row["outcome"] == "done" and row[key] is not None for row in rows):
            title = f"{figure} <small>{UNITS[figure]}</small>"
            tables.append(f"<div><h2>{title}</h2><table><tr><th>tokens per row{head}{''.join(cells)}</table></div>")
    parts = {
        "title": f"{escape(facts['title'])}",
        "machine": escape(facts["machine"]),
        "command": escape(facts["command"]),
        "headlines": "".join(f"<li>{escape(line)}" for line in headlines(rows, swept)),
        "checks": listed("Losses", checks),
        "chart": f'<div id="chart">{picture}</div>' if (picture := chart(rows, swept)) else "",
        "tables": "".join(tables),
        "reasons": listed("What did not run", reasons(rows, swept)),
        "kernels": listed("Kernels", kernels(rows, swept)),
    }
    text = (Path(__file__).parent / "report.html").read_text("utf-8")
    for name, value in parts.items():
        text = text.replace("{{" + name + "}}", value)
    return text


def markdown(rows: Sequence[Row], swept: Sequence[str], facts: dict[str, str], checks: list[str]) -> str:
    """The page as text, for a record or an issue; the picture is beside it."""
    names = names_of(rows, swept)
    lines = [f"# {facts['title']}", "", facts["machine"], "", f"    {facts['command']}", ""]
    lines += [*(f"- {line}" for line in [*headlines(rows, swept), *checks]), ""]
    if chart(rows, swept):
        lines += ["![report.svg](report.svg)", ""]
    for figure, (key, _) in (FIGURES | LOSSES).items():
        if any(row["outcome"] == "done" and row[key] is not None for row in rows):
            lines += [f"## {figure[0].upper()}{figure[1:]} ({UNITS[figure]})", ""]
            lines += [f"| tokens per row | {' | '.join(names)} |", "|---:" * (len(names) + 1) + "|"]
            for seq_len, by_name in by_length(rows, swept).items():
                lines.append(f"| {seq_len:,} | {' | '.join(cell(by_name.get(name), figure) for name in names)} |")
            lines.append("")
    for title, said in {"What did not run": reasons(rows, swept), "Kernels": kernels(rows, swept)}.items():
        lines += [f"## {title}", "", *(f"- {line}" for line in said), ""] if said else []
    return "\n".join(lines[:-1]) + "\n"


def listed(title: str, lines: Sequence[str]) -> str:
    """A heading and a list; nothing where there is nothing to say."""
    return f"<h2>{title}</h2><ul>{''.join(f'<li>{escape(line)}' for line in lines)}</ul>" if lines else ""


def reasons(rows: Sequence[Row], swept: Sequence[str]) -> list[str]:
    """Each reason once, with the combinations that it holds for."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if "why" in row:
            which = " ".join(f"{key}={row['settings'][key]}" for key in dict.fromkeys([*swept, "seq_len"]))
            found.setdefault(f"{row['outcome']}. {row['why']}", []).append(which)
    return [f"{', '.join(which)}: {why}" for why, which in found.items()]


def kernels(rows: Sequence[Row], swept: Sequence[str]) -> list[str]:
    found = dict.fromkeys((name_of(row["settings"], swept), row["kernel"]) for row in rows if "kernel" in row)
    return [kernel if kernel.startswith(f"{name}: ") else f"{name}: {kernel}" for name, kernel in found]


def shown(command: Sequence[str]) -> str:
    return shlex.join(["python", "-m", "scripts.compare", *command])
