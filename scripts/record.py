"""What every benchmark record is made of: the facts it stands on, its files, and a line chart."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from xml.sax.saxutils import escape

import torch

from data import disk
from training.hardware import describe_device, git_commit, versions

ROOT = Path(__file__).resolve().parent.parent


def stop(reason: str) -> NoReturn:
    """End with one line and exit code 2: this machine cannot run what was asked for."""
    print(f"error: {reason}", file=sys.stderr)
    raise SystemExit(2)


def need_cuda(script: str) -> torch.device:
    if not torch.cuda.is_available():
        stop(f"scripts.{script} needs a CUDA GPU, and this machine has none")
    return torch.device("cuda")


def collect_facts(
    script: str, argv: Sequence[str], device: torch.device, packages: Sequence[str] = ()
) -> dict[str, Any]:
    """Hardware, versions (of `packages` too, where installed), commit and the exact command."""
    found = versions()
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    command = shlex.join(["python", "-m", f"scripts.{script}", *argv])
    return {"device": describe_device(device), "versions": found, "commit": git_commit(ROOT), "command": command}


def heading(title: str, facts: dict[str, Any]) -> list[str]:
    """A record's first lines: what ran, on what, and how to run it again."""
    shown = {name: number for name, number in facts["versions"].items() if name not in ("tokenizers", "hydra-core")}
    stack = ", ".join(f"{name} {number}" for name, number in shown.items())
    return [f"# {title}", "", f"{facts['device']['name']}, {stack}, commit {facts['commit']}", "",
            f"    {facts['command']}", ""]  # fmt: skip


def write(out: Path, text: str) -> None:
    """Write a file whole or not at all, so that what a killed run leaves can be read."""
    out.parent.mkdir(parents=True, exist_ok=True)
    disk.write_whole(out, text)


def write_json(out: Path, facts: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    write(out.with_name(out.name + ".json"), json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n")


class Panel(NamedTuple):
    title: str
    series: dict[str, list[tuple[float, float]]]
    """Points (x, y) by name; x above 0, drawn on a logarithmic axis."""


COLOURS = (
    "#d55e00", "#0072b2", "#009e73", "#e69f00", "#56b4e9", "#cc79a7", "#000000", "#999999", "#882255", "#bbaa00"
)  # fmt: skip
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 300, 200, 46, 34, 34
MOST_STEPS = 8  # on the y axis


def line_chart(title: str, unit: str, panels: Sequence[Sequence[Panel]], names: Sequence[str]) -> str:
    """An SVG of rows of panels. `names` fixes each series' colour; the first is drawn thickest."""
    width = LEFT + max(max(map(len, panels)) * (WIDTH + LEFT), len(names) * 105)
    height = 50 + len(panels) * (HEIGHT + TOP + BOTTOM)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="11"><rect width="100%" height="100%" fill="white"/>',
        f'<text x="{LEFT}" y="18" font-size="14">{escape(title)}</text>',
    ]
    for i, name in enumerate(names):
        x = LEFT + 105 * i
        parts.append(f'<path d="M{x} 34h18" {_stroke(i)}/><text x="{x + 22}" y="38">{escape(name)}</text>')
    for row, line in enumerate(panels):
        for column, panel in enumerate(line):
            left, top = LEFT + column * (WIDTH + LEFT), 50 + TOP + row * (HEIGHT + TOP + BOTTOM)
            parts += [f'<g transform="translate({left} {top})">', *_panel(panel, unit, names), "</g>"]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _stroke(i: int) -> str:
    return f'fill="none" stroke="{COLOURS[i % len(COLOURS)]}" stroke-width="{3 if i == 0 else 1.5}"'


def _round_step(least: float) -> float:
    """The smallest of … 1, 2, 5, 10, 20 … that is not less."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least)


def _panel(panel: Panel, unit: str, names: Sequence[str]) -> list[str]:
    points = [point for series in panel.series.values() for point in series]
    ticks = sorted({x for x, _ in points})
    low, span = math.log2(ticks[0]), max(math.log2(ticks[-1] / ticks[0]), 1.0)
    highest = max(y for _, y in points)
    step = _round_step(highest / MOST_STEPS)
    steps = math.ceil(highest / step)

    def at(x: float, y: float) -> str:
        return f"{8 + (WIDTH - 24) * (math.log2(x) - low) / span:.1f} {HEIGHT * (1 - y / (steps * step)):.1f}"

    parts = [f'<text x="0" y="-12">{escape(panel.title)}, {escape(unit)}</text>']
    for i in range(steps + 1):
        y = HEIGHT * (1 - i / steps)
        parts.append(f'<path d="M0 {y:.1f}h{WIDTH - 8}" stroke="#ddd"/>')
        parts.append(f'<text x="-5" y="{y + 4:.1f}" text-anchor="end">{i * step:g}</text>')
    for x in ticks:
        label = f"{x / 1024:g}k" if x >= 1024 else f"{x:g}"
        parts.append(f'<text x="{at(x, 0).split()[0]}" y="{HEIGHT + 16}" text-anchor="middle">{label}</text>')
    for name, series in panel.series.items():
        line = " L".join(at(x, y) for x, y in sorted(series))
        parts.append(f'<path d="M{line}" {_stroke(list(names).index(name))}/>')
        dot = COLOURS[list(names).index(name) % len(COLOURS)]
        for x, y in series:
            cx, cy = at(x, y).split()
            parts.append(f'<circle cx="{cx}" cy="{cy}" r="2.5" fill="{dot}"/>')
    return parts
