"""The page about a run: what is read, what is thinned, what is escaped, and that a browser draws it."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from processes import ROOT, run_unread

from scripts import report as command
from training.config import TrainConfig
from training.metrics import METRICS, Metric
from training.report import RunReader, page, runs_at
from training.report.series import MOST_POINTS, Point, Series
from training.trainer import Trainer

MakeConfig = Callable[..., TrainConfig]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
BEGAN = 1_700_000_000.0


def write_run(folder: Path, losses: list[float], **more: Any) -> Path:
    """A run folder with a validation at the end; `more` replaces its files by name (dots written as _)."""
    folder.mkdir(parents=True)
    events: list[dict[str, Any]] = [
        {"step": step, "tokens": 100 * step, "time": BEGAN + step, "train/loss": loss}
        for step, loss in enumerate(losses, 1)
    ]
    positions = {"val/loss_at_256": 3.0, "val/loss_at_512": 2.5, "val/right_at_1k": 0.5, "val/right_at_1m": 0.25}
    events.append({**events[-1], "val/loss": 2.75, **positions})
    files = {
        "metrics_jsonl": "".join(json.dumps(event) + "\n" for event in events),
        "config_yaml": f"seq_len: 512\nmax_steps: {len(losses)}\nattention:\n  name: {folder.name}\n",
        "facts_json": json.dumps({"device": {"name": "a CPU"}, "started": BEGAN, "status": "finished", "restarts": 0}),
    }
    for name, text in (files | more).items():
        (folder / name.replace("_", ".")).write_text(text)
    return folder


class Parts(HTMLParser):
    """Start tags with their attributes, and the text inside of each kind of tag."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {}
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        tag = self.tags[-1][0] if self.tags else ""
        self.text[tag] = self.text.get(tag, "") + data


def data_of(html: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found
    return json.loads(found[1])


# ---- series


def test_a_long_series_keeps_its_first_last_smallest_largest_and_what_is_not_finite() -> None:
    series = Series()
    for step in range(100_000):
        value = {40_001: -50.0, 71_234: 99.0, 20_000: math.nan}.get(step, math.sin(step / 1000))
        series.add(Point(step, step, None, value))
        assert len(series.points) < 4 * MOST_POINTS
    columns = series.columns(None)
    assert len(columns["step"]) <= MOST_POINTS
    assert columns["step"] == sorted(columns["step"])
    by_step = dict(zip(columns["step"], columns["value"], strict=True))
    assert by_step.keys() >= {0, 99_999}
    assert (by_step[40_001], by_step[71_234], by_step[20_000]) == (-50.0, 99.0, None)
    gaps = [later - sooner for sooner, later in zip(columns["step"], columns["step"][1:], strict=False)]
    assert max(gaps) < 100_000 / MOST_POINTS * 6, "all of the run is shown, not its end more closely than its beginning"


def test_a_short_series_is_left_as_it_is() -> None:
    series = Series()
    for step in range(MOST_POINTS):
        series.add(Point(step, 2 * step, BEGAN + step, step / 3))
    assert not series.is_thinned
    assert series.columns(BEGAN)["step"] == list(range(MOST_POINTS))
    assert series.columns(BEGAN)["time"][-1] == MOST_POINTS - 1


# ---- reading


def test_a_reader_takes_what_is_new_and_leaves_half_a_line_for_later(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [3.0, 2.0])
    reader = RunReader(run)
    assert reader.read()["metrics"]["train/loss"]["value"] == [3.0, 2.0, 2.0]
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "tokens": 300, "train/loss": 1.5}\n{"step": 4, "tok')
    assert reader.read()["metrics"]["train/loss"]["value"] == [3.0, 2.0, 2.0, 1.5]
    with open(run / "metrics.jsonl", "a") as file:
        file.write('ens": 400, "train/loss": "nan"}\nno JSON\n')
    after = reader.read()
    assert after["metrics"]["train/loss"]["value"] == [3.0, 2.0, 2.0, 1.5, None]
    assert (after["events"], after["unreadable"]) == (5, 1)


def test_samples_bad_steps_and_restarts_are_read(tmp_path: Path) -> None:
    samples = "## step 2 (1,200 tokens)\n\n````text\na\n```\n## step 9 (9 tokens)\n````\n\n"
    bad = json.dumps({"step": 2, "loss": "nan", "grad_norm": "inf", "rows": [1000, 1001, 1002]}) + "\n"
    run = write_run(tmp_path / "run", [3.0, 2.0], samples_md=samples)
    (run / "bad-steps.jsonl").write_text(bad)
    (run / "checkpoints" / "step-00000002").mkdir(parents=True)
    (run / "checkpoints" / "step-00000002" / "manifest.json").write_text("{}")
    found = RunReader(run).read()
    assert found["samples"] == [{"step": 2, "tokens": 1200, "text": "a\n```\n## step 9 (9 tokens)"}]
    assert found["bad_steps"] == [{"step": 2, "loss": "nan", "grad_norm": "inf", "rows": "1,000 to 1,002"}]
    assert found["checkpoints"] == [2]


# ---- the page


def test_every_metric_comes_with_what_the_registry_says_in_its_order_and_a_new_one_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METRICS, "train/new", Metric("train/new", "apples", "what is new", "higher", form=".1f"))
    run = write_run(tmp_path / "run", [3.0])
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "tokens": 300, "train/new": 1.5, "old/gone": 1}\n')
    html = page([RunReader(run).read()])
    found = data_of(html)["metrics"]
    names = ["train/loss", "val/loss", "val/loss_at_256", "val/loss_at_512", "train/new"]
    names += ["old/gone", "val/right_at_1k", "val/right_at_1m"]
    assert [metric["name"] for metric in found] == names
    assert found[4] == {
        "name": "train/new", "section": "train", "unit": "apples", "meaning": "what is new", "better": "higher",
        "form": ".1f", "headline": "",
    }  # fmt: skip
    assert found[0]["unit"] == "nats per token"
    ranges = {name: part["end"] for name, part in data_of(html)["ranges"].items()}
    assert ranges == {"val/loss_at_256": 256, "val/loss_at_512": 512, "val/right_at_1k": 1024, "val/right_at_1m": 2**20}


def test_text_of_a_run_is_data_and_never_markup_and_the_page_loads_nothing(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    run = write_run(
        tmp_path / "<img src=x>",
        [3.0],
        samples_md=f"## step 1 (100 tokens)\n\n```text\n{evil}\n```\n\n",
        config_yaml=json.dumps({"sample_prompt": evil, "learning_rate": math.inf}),
    )
    html = page([RunReader(run).read()])
    plain = Parts(page([RunReader(write_run(tmp_path / "plain", [3.0])).read()]))
    parts = Parts(html)
    assert [tag for tag, _ in parts.tags] == [tag for tag, _ in plain.tags]
    names = {name for _, attributes in parts.tags for name in attributes}
    assert not [name for name in names if name in ("src", "href") or name.startswith("on")]
    assert "default-src 'none'" in html
    assert data_of(html)["runs"][0]["samples"][0]["text"] == evil
    assert "Permission is hereby granted, free of charge" in html, "the licence of uPlot goes with it"


def test_a_hundred_thousand_events_are_a_page_of_a_bounded_size(tmp_path: Path) -> None:
    names = [name for name in METRICS if not name.startswith("val/")][:5]
    run = write_run(tmp_path / "run", [3.0])
    with open(run / "metrics.jsonl", "w") as file:
        values = [", ".join(f'"{name}": {place / 7:.6f}' for name in names) for place in range(1009)]
        for step in range(100_000):
            head = f'"step": {step}, "tokens": {step * 131072}, "time": {BEGAN + step}'
            file.write(f"{{{head}, {values[step * 7919 % 1009]}}}\n")
    html = page([RunReader(run).read()])
    assert len(html) < 1_000_000
    assert data_of(html)["runs"][0]["events"] == 100_000


# ---- the command


def test_the_command_writes_a_page_into_the_run_and_compares_several(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [write_run(tmp_path / "sweep" / name, [3.0, 2.0]) for name in ("2_math", "10_flash")]
    assert command.main([str(runs[0])]) == 0
    assert [run["name"] for run in data_of((runs[0] / "report.html").read_text())["runs"]] == ["2_math"]
    assert command.main([*map(str, runs)]) == 0
    assert command.main([str(tmp_path / "sweep"), "--out", "both.html"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(runs[0] / "report.html"), "report.html", "both.html"]
    assert [run["name"] for run in data_of(Path("report.html").read_text())["runs"]] == ["2_math", "10_flash"]
    assert runs_at(tmp_path / "sweep") == runs, "in the order of their numbers"


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda path: None, "does not exist; name a run folder, such as runs/"),
        (lambda path: path.write_text(""), "is no folder; name a run folder"),
        (lambda path: path.mkdir(), "holds no run; name a run folder that holds metrics.jsonl"),
        (lambda path: (path.mkdir(), (path / "run.lock").touch()), "has no metrics.jsonl yet; name a run folder"),
        (lambda path: write_run(path, [1.0], config_yaml="{"), "config.yaml cannot be read"),
        (lambda path: write_run(path, [1.0], facts_json="{"), "facts.json cannot be read as JSON ("),
        (lambda path: write_run(path, [1.0], facts_json="[1]"), "facts.json holds no JSON object"),
    ],
    ids=[
        "nothing",
        "a file",
        "another folder",
        "a run before its first event",
        "a damaged configuration",
        "damaged facts",
        "facts of another kind",
    ],
)
def test_what_is_no_run_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], Any], line: str
) -> None:
    make(tmp_path / "run")
    assert command.main([str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'run'}")
    assert line in error
    assert error.count("\n") == 1


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", [1.0])
    out = tmp_path / "none" / "a.html"
    assert command.main([str(run), "--out", str(out)]) == 2
    line = f"error: {out} cannot be written: No such file or directory; name another place with --out\n"
    assert capsys.readouterr().err == line


def test_a_reader_that_went_away_and_ctrl_c_give_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", [1.0])
    done = run_unread(["-m", "scripts.report", str(run)], cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert (run / "report.html").exists()

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "write_page", interrupted)
    assert command.main([str(run)]) == 130
    assert capsys.readouterr() == ("", "")


# ---- a run's own page


def test_a_run_writes_its_page_and_how_it_went(config: MakeConfig) -> None:
    trainer = Trainer(config("max_steps=4", "eval_every=2", "sample_tokens=4"), lambda line: None)
    trainer.fit()
    folder = trainer.run.folder
    (run,) = data_of((folder / "report.html").read_text())["runs"]
    assert run["clock"]["step"] == [0, 1, 2, 2, 3, 4, 4]
    assert run["clock"]["time"] == sorted(run["clock"]["time"])
    assert run["facts"]["status"] == "finished"
    assert run["num_samples"] == 1
    facts = json.loads((folder / "facts.json").read_text())
    assert facts["restarts"] == 0
    assert facts["duration_seconds"] == pytest.approx(facts["ended"] - facts["started"])
    assert time.time() - 600 < facts["started"] < facts["ended"] < time.time()


def test_a_run_that_goes_on_keeps_its_beginning_and_counts_its_restarts(config: MakeConfig) -> None:
    folder = Path(config().run_dir)
    Trainer(config("max_steps=2", "checkpoint.every=2"), lambda line: None).fit()
    facts = json.loads((folder / "facts.json").read_text())
    killed = {**facts["processes"][0], "ended": None, "status": "running"}  # as a SIGKILL leaves it
    (folder / "facts.json").write_text(json.dumps({**facts, "processes": [killed]}))
    Trainer(config("max_steps=4"), lambda line: None).fit()
    after = json.loads((folder / "facts.json").read_text())
    assert (after["restarts"], after["status"], after["started"]) == (1, "finished", facts["started"])
    assert [(process["step"], process["status"]) for process in after["processes"]] == [(0, "killed"), (2, "finished")]
    before = (folder / "facts.json").read_bytes()
    Trainer(config("max_steps=4"), lambda line: None).fit()  # nothing is left to do
    assert (folder / "facts.json").read_bytes() == before


def test_a_page_that_cannot_be_written_is_one_line_and_the_run_goes_on(config: MakeConfig) -> None:
    lines: list[str] = []
    trainer = Trainer(config("max_steps=4", "eval_every=1"), lines.append)
    (trainer.run.folder / "report.html").mkdir(parents=True)
    (trainer.run.folder / "run.lock").touch()
    assert "train/loss" in trainer.fit()
    (line,) = (line for line in lines if line.startswith("report "))
    assert "is not written, training goes on without it: IsADirectoryError" in line


def test_pages_take_a_small_share_of_the_time(config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []

    def slowly(path: Path, runs: Any) -> None:
        written.append(path)
        time.sleep(0.5)  # so the next may come after 50 s

    monkeypatch.setattr("training.services.reporting.write_page", slowly)
    trainer = Trainer(config("max_steps=8", "eval_every=1"), lambda line: None)
    trainer.fit()
    assert written == 2 * [trainer.run.folder / "report.html"], "after the first evaluation and at the end"


# ---- in a browser


def open_page(html: str, folder: Path, script: str, width: int = 1600, height: int = 4000) -> dict[str, Any]:
    """What `script` assigns to `found` once the page has drawn."""
    path = folder / "opened.html"
    run = f"const found = {{}}; try {{ {script} }} catch (error) {{ found.error = String(error); }}"
    write = 'const out = document.createElement("output"); out.id = "found"; out.textContent = JSON.stringify(found);'
    caught = 'window.errors = []; addEventListener("error", (event) => errors.push(event.message));'
    then = f"{run} found.errors = errors; {write} document.body.append(out);"
    later = f"<script>setTimeout(async () => {{ {then} }}, 1500)</script>"
    path.write_text(html.replace("<head>", f"<head><script>{caught}</script>").replace("</body>", later + "</body>"))
    options = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
    options += "--disable-component-update --disable-sync --virtual-time-budget=6000 --dump-dom"
    done = subprocess.run(
        [str(CHROMIUM), *options.split(), f"--user-data-dir={folder / 'chromium'}", f"--window-size={width},{height}",
         path.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = re.search(r'<output id="found">(.*?)</output>', done.stdout, re.DOTALL)
    assert found, done.stderr[-1000:]
    result: dict[str, Any] = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert result["errors"] == []
    assert "error" not in result, result
    return result


@needs_chromium
def test_a_browser_draws_a_panel_for_each_metric_and_a_line_for_each_run(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, [4.0, 3.0, 2.0 + i]) for i, name in enumerate(("a_math", "a_flash"))]
    script = """
      const name = (panel) => panel.querySelector("h3").firstChild.textContent;
      const group = (panel) => panel.closest("section").querySelector("h2").textContent;
      const seen = () => [...document.querySelectorAll(".panel:not([hidden])")];
      const drawn = () => Object.fromEntries(seen().map((p) => [`${name(p)}/${group(p)}`, Number(p.dataset.drawn)]));
      found.panels = drawn();
      found.readout = document.querySelector(".readout").textContent;
      const canvas = document.querySelector("canvas");
      const { width, height } = canvas;
      const pixels = canvas.getContext("2d").getImageData(0, 0, width, height).data;
      const colours = new Set();
      for (let i = 0; i < pixels.length; i += 4)
        if (pixels[i + 3] === 255) colours.add([pixels[i], pixels[i + 1], pixels[i + 2]].join());
      found.colours = [...colours];
      const search = document.getElementById("search");
      search.value = "position"; search.dispatchEvent(new Event("input"));
      found.searched = drawn();
      search.value = ""; search.dispatchEvent(new Event("input"));
      const wait = () => new Promise((resolve) => setTimeout(resolve, 100));
      const over = document.querySelector(".u-over"), box = over.getBoundingClientRect();
      const mouse = (name, share) => (name === "mouseup" ? document : over).dispatchEvent(new MouseEvent(name, {
        clientX: box.left + share * box.width, clientY: box.top + 9, bubbles: true, button: 0, buttons: 1, movementX: 1,
      }));
      mouse("mouseenter", 0.5); mouse("mousemove", 0.5);
      found.hovered = [...document.querySelectorAll(".readout")].map((node) => node.textContent).slice(0, 2);
      mouse("mousedown", 0.25); mouse("mousemove", 0.5); mouse("mousemove", 0.75); mouse("mouseup", 0.75);
      await wait();
      found.zoomed = panels.slice(0, 2).map(({ drawn }) => [drawn.plot.scales.x.min, drawn.plot.scales.x.max]);
      mouse("dblclick", 0.5);
      await wait();
      found.back = [panels[0].drawn.plot.scales.x.min, panels[0].drawn.plot.scales.x.max];
      document.querySelector('#theme [data-value="dark"]').click();
      found.theme = document.documentElement.dataset.theme;
      document.querySelector('#axis [data-value="time"]').click();
      found.times = panels[0].drawn.plot.data[0];
      found.differences = [...document.querySelectorAll(".keys")][0].innerText;
    """
    found = open_page(page([RunReader(run).read() for run in runs]), tmp_path, script)
    assert found["panels"] == {
        "loss/Training": 2, "loss/Validation": 2, "loss by position/Validation": 2,
        "loss by position, over the run/Validation": 2, "right by position/Validation": 2,
        "right by position, over the run/Validation": 2,
    }  # fmt: skip
    assert found["readout"] == "math2.0000flash3.0000"
    assert {"47,111,219", "217,99,10"} <= set(found["colours"]), "the lines of both runs are on the canvas"
    assert set(found["searched"]) == {name for name in found["panels"] if "by position" in name}
    assert found["hovered"] == ["200 tokensmath3.0000flash3.0000", "300 tokensmath2.7500flash2.7500"]
    assert found["zoomed"] == 2 * [pytest.approx([150, 250], abs=2)], "one panel zooms all"
    assert found["back"] == [100, 300]
    assert found["theme"] == "dark"
    assert found["times"] == [1, 2, 3]
    assert "attention.name" in found["differences"]
    assert "seq_len" not in found["differences"]


PROFILE = {
    "steps": [3, 4], "device": "cuda", "span": 0.2, "shares": {"attention": 0.75, "idle": 0.25},
    "longest": [["<b>forward_kernel</b>", "attention", 0.15, 1200]],
    "memory": {
        "ms": [0, 1.5, 4], "gib": {"weights": [1, 1, 1], "forward pass": [0, 2, 1]},
        "peak": {"weights": 1, "forward pass": 2},
        "largest": [{"gib": 2, "group": "forward pass", "frames": ["model/gpt.py:7 forward"]}],
    },
}  # fmt: skip


@needs_chromium
@pytest.mark.parametrize("memory", [PROFILE["memory"], None], ids=["gpu", "cpu"])
def test_a_browser_draws_the_profile_as_bars_and_as_areas(tmp_path: Path, memory: Any) -> None:
    run = write_run(tmp_path / "run", [4.0, 3.0])
    (run / "profile").mkdir()
    (run / "profile/summary.json").write_text(json.dumps({**PROFILE, "memory": memory}))
    script = """
      const node = document.querySelector("section.profile");
      const texts = (selector) => [...node.querySelectorAll(selector)].map((cell) => cell.textContent);
      found.rows = [...node.querySelector("table").rows].map((row) => [...row.cells].map((cell) => cell.textContent));
      found.widths = [...node.querySelectorAll(".share")].map((bar) => bar.getBoundingClientRect().width);
      found.areas = [...node.querySelectorAll("polygon")].map((area) => area.getAttribute("points"));
      found.cells = texts("details td");
    """
    found = open_page(page([RunReader(run).read()]), tmp_path, script)
    assert found["rows"][:2] == [["attention", "", "75.0%", "75.0 ms"], ["idle", "", "25.0%", "25.0 ms"]]
    assert found["widths"][0] == pytest.approx(3 * found["widths"][1], rel=0.01)
    assert found["cells"][:4] == ["attention", "<b>forward_kernel</b>", "1,200", "150.0 ms"]
    if memory is None:
        assert (found["areas"], len(found["rows"])) == ([], 2)
        return
    assert found["rows"][2:] == [
        ["memory at the peak, 3.00 GiB"],
        ["weights", "", "33.3%", "1.000 GiB"],
        ["forward pass", "", "66.7%", "2.000 GiB"],
    ]
    # 3.15 GiB are 210 high: 1 GiB is 66.7 and 3 GiB are 200, from below.
    weights, forward = (area.split() for area in found["areas"])
    assert weights[:5] == ["0.0,143.3", "375.0,143.3", "375.0,143.3", "1000.0,143.3", "1000.0,143.3"]
    assert forward[:5] == ["0.0,143.3", "375.0,143.3", "375.0,10.0", "1000.0,10.0", "1000.0,76.7"]
    assert found["cells"][4:] == ["2.000 GiB", "forward pass", "model/gpt.py:7 forward"]
