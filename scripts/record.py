"""What every benchmark record is made of: the facts it stands on, its files, and a line chart."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from xml.sax.saxutils import escape

import torch

from data import disk
from training.hardware import describe_device, git_commit, versions
from training.terminal import tell

ROOT = Path(__file__).resolve().parent.parent
FONTS = ("Helvetica", "Arial", "Liberation Sans", "Noto Sans", "DejaVu Sans", "Segoe UI")
"""For pictures in PNG, the best first: at least one is on nearly every macOS, Linux and Windows with a screen."""


def stop(reason: str) -> NoReturn:
    """End with one line and exit code 2: this machine cannot run what was asked for."""
    tell(reason)
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


Row = dict[str, Any]


class Record:
    """Rows that are measured in several calls, on one kind of device; on disk after each.

    Args:
        out: for OUT.md, OUT.json and OUT.svg, whose rows are kept; None: nothing is read or written.
        key: the entries of a row that name it; the first is one of `names`, in whose order rows are written.
        page: rows, facts and the chart's file name, or None without one → OUT.md.
        chart: rows → OUT.svg, or None where there is nothing to draw.
    """

    def __init__(
        self,
        out: Path | None,
        facts: dict[str, Any],
        key: tuple[str, ...],
        names: Sequence[str],
        page: Callable[[Sequence[Row], dict[str, Any], str | None], str],
        chart: Callable[[Sequence[Row]], str | None],
    ) -> None:
        self.out, self.facts, self.key, self.names, self.page, self.chart = out, facts, key, list(names), page, chart
        self._rows: dict[tuple[Any, ...], Row] = {}
        if out is not None and (file := out.with_name(out.name + ".json")).exists():
            before = json.loads(file.read_text("utf-8"))
            if before["facts"]["device"]["name"] != facts["device"]["name"]:
                stop(f"{file} is of another device, {before['facts']['device']['name']}; choose another --out")
            self._rows = {self._key(row): row for row in before["rows"]}

    def _key(self, row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in self.key)

    @property
    def rows(self) -> list[Row]:
        """In the order of their names; those that have none any more come first."""

        def place(key: tuple[Any, ...]) -> tuple[Any, ...]:
            return (self.names.index(key[0]) if key[0] in self.names else -1, *key[1:])

        return [self._rows[key] for key in sorted(self._rows, key=place)]

    def row(self, *key: Any) -> Row:
        """The row of this key; an empty one where there is none."""
        return self._rows.get(key, {})

    def put(self, row: Row) -> None:
        """In the place of the row with its key."""
        self._rows[self._key(row)] = row
        if self.out is None:
            return
        rows, plot = self.rows, f"{self.out.name}.svg"
        write_json(self.out, self.facts, rows)
        if drawn := self.chart(rows):
            write(self.out.with_name(plot), drawn)
        write(self.out.with_name(f"{self.out.name}.md"), self.page(rows, self.facts, plot if drawn else None))


class Panel(NamedTuple):
    title: str
    series: dict[str, list[tuple[float, float]]]
    """Points (x, y) by name; x above 0, drawn on a logarithmic axis."""
    unit: str = ""
    """Where it is another than the chart's."""
    log_y: bool = False
    """Whether y is on a logarithmic axis, too, and above 0."""


COLOURS = (
    "#d55e00", "#0072b2", "#009e73", "#e69f00", "#56b4e9", "#cc79a7", "#8b5a2b", "#999999", "#882255", "#bbaa00"
)  # fmt: skip
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 300, 200, 46, 34, 34
MOST_STEPS = 8  # on the y axis
STYLE = """
svg.chart { --ground: #fff; --grid: #ddd; --ink: #1c1e23; }
@media (prefers-color-scheme: dark) { svg.chart { --ground: #181b21; --grid: #343944; --ink: #e6e8ec; } }
:root[data-theme="light"] svg.chart { --ground: #fff; --grid: #ddd; --ink: #1c1e23; }
:root[data-theme="dark"] svg.chart { --ground: #181b21; --grid: #343944; --ink: #e6e8ec; }
svg.chart .ground { fill: var(--ground); } svg.chart .grid { stroke: var(--grid); } svg.chart text { fill: var(--ink); }
@media (prefers-color-scheme: dark) { :root:not([data-theme="light"]) svg.chart .data { filter: brightness(1.4); } }
:root[data-theme="dark"] svg.chart .data { filter: brightness(1.4); }
"""


def line_chart(title: str, unit: str, panels: Sequence[Sequence[Panel]], names: Sequence[str]) -> str:
    """An SVG of rows of panels. `names` fixes each series' colour; the first is drawn thickest."""
    entries = [max(105, 34 + 7 * len(name)) for name in names]  # widths in the legend
    width = LEFT + max(max(map(len, panels)) * (WIDTH + LEFT), sum(entries))
    height = 50 + len(panels) * (HEIGHT + TOP + BOTTOM)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="11"><style>{STYLE}</style>'
        f'<rect class="ground" width="100%" height="100%" fill="white"/>',
        f'<text x="{LEFT}" y="18" font-size="14">{escape(title)}</text>',
    ]
    for i, name in enumerate(names):
        x = LEFT + sum(entries[:i])
        parts.append(f'<path d="M{x} 34h18" {_stroke(i)}/><text x="{x + 22}" y="38">{escape(name)}</text>')
    for row, line in enumerate(panels):
        for column, panel in enumerate(line):
            left, top = LEFT + column * (WIDTH + LEFT), 50 + TOP + row * (HEIGHT + TOP + BOTTOM)
            parts += [f'<g transform="translate({left} {top})">', *_panel(panel, panel.unit or unit, names), "</g>"]
    return "\n".join([*parts, "</svg>"]) + "\n"


def png(svg: str) -> bytes:
    """An SVG as a PNG, at twice its size, on white.

    Raises:
        ValueError: this machine has none of FONTS, so the picture would have no words.
    """
    import resvg_py

    if (family := font()) is None:
        raise ValueError(f"this machine has none of the fonts {', '.join(FONTS)}")
    svg = svg.replace(f"<style>{STYLE}</style>", "")  # its variables would be black on black: resvg knows none
    return bytes(resvg_py.svg_to_bytes(svg_string=svg, zoom=2.0, background="white", sans_serif_family=family))


@cache
def font() -> str | None:
    """The first of FONTS that this machine has. For resvg, sans-serif is Arial, on every system."""
    import resvg_py

    word = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 20 20"><text y="15" font-family="{}">{}</text></svg>'
    for family in FONTS:
        drawn, empty = (resvg_py.svg_to_bytes(svg_string=word.format(family, text)) for text in ("M", ""))
        if drawn != empty:
            return family
    return None


def _stroke(i: int) -> str:
    return f'class="data" fill="none" stroke="{COLOURS[i % len(COLOURS)]}" stroke-width="{3 if i == 0 else 1.5}"'


def _round_step(least: float) -> float:
    """The smallest of … 1, 2, 5, 10, 20 … that is not less."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least)


def _levels(values: Sequence[float]) -> list[float]:
    """Round numbers from 0 to the first that no value exceeds."""
    step = _round_step(max(values) / MOST_STEPS)
    return [i * step for i in range(math.ceil(max(values) / step) + 1)]


def _log_levels(values: Sequence[float]) -> list[float]:
    """Round numbers around all values, above 0: 1, 2, 5, 10, …, or powers of ten where these are too many."""
    powers = range(math.floor(math.log10(min(values))), math.ceil(math.log10(max(values))) + 1)
    levels = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    first = max((i for i, level in enumerate(levels) if level <= min(values)), default=0)
    last = min(i for i, level in enumerate(levels) if level >= max(values) and i > first)
    inside = levels[first : last + 1]
    if len(inside) <= MOST_STEPS:
        return inside
    tens = [level for level in inside if math.log10(level) == round(math.log10(level))]
    return sorted({inside[0], *tens, inside[-1]})


def _panel(panel: Panel, unit: str, names: Sequence[str]) -> list[str]:
    points = [point for series in panel.series.values() for point in series]
    ticks = sorted({x for x, _ in points})
    low, span = math.log2(ticks[0]), max(math.log2(ticks[-1] / ticks[0]), 1.0)
    levels = (_log_levels if panel.log_y else _levels)([y for _, y in points])

    def height(y: float) -> float:
        bottom, top, here = (math.log(level) if panel.log_y else level for level in (levels[0], levels[-1], y))
        return HEIGHT * (1 - (here - bottom) / (top - bottom))

    def at(x: float, y: float) -> str:
        return f"{8 + (WIDTH - 24) * (math.log2(x) - low) / span:.1f} {height(y):.1f}"

    parts = [f'<text x="0" y="-12">{escape(panel.title)}, {escape(unit)}</text>']
    for level in levels:
        y = height(level)
        parts.append(f'<path class="grid" d="M0 {y:.1f}h{WIDTH - 8}" stroke="#ddd"/>')
        label = f"{level / 1000:g}k" if panel.log_y and level >= 1000 else f"{level:g}"
        parts.append(f'<text x="-5" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for x in ticks:
        label = f"{x / 1024:g}k" if x >= 1024 else f"{x:g}"
        parts.append(f'<text x="{at(x, levels[0]).split()[0]}" y="{HEIGHT + 16}" text-anchor="middle">{label}</text>')
    for name, series in panel.series.items():
        line = " L".join(at(x, y) for x, y in sorted(series))
        parts.append(f'<path d="M{line}" {_stroke(list(names).index(name))}/>')
        dot = COLOURS[list(names).index(name) % len(COLOURS)]
        for x, y in series:
            cx, cy = at(x, y).split()
            about = f"<title>{escape(name)}, {x:,g}: {y:,.4g}</title>"
            parts.append(f'<circle class="data" cx="{cx}" cy="{cy}" r="2.5" fill="{dot}">{about}</circle>')
    return parts
