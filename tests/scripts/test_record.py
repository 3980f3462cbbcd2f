"""Records say what they stand on, are written whole, and draw what was measured."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from scripts import record
from scripts.record import Panel, collect_facts, heading, line_chart, need_cuda, write

SVG = "{http://www.w3.org/2000/svg}"


def test_the_heading_names_hardware_versions_commit_and_the_exact_command():
    facts = collect_facts("bench_x", ["--only", "a b"], torch.device("cpu"), ["pytest", "no-such-package"])
    assert facts["versions"]["torch"] == version("torch")
    assert facts["versions"]["pytest"] == pytest.__version__
    assert "no-such-package" not in facts["versions"]
    text = "\n".join(heading("Title", facts | {"commit": "abc"}))
    for expected in (
        "# Title",
        f"torch {version('torch')}",
        "commit abc",
        "    python -m scripts.bench_x --only 'a b'",
    ):
        assert expected in text


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "new" / "out.json"
    write(path, "old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write(path, "new")
    assert path.read_text() == "old"


def test_without_a_gpu_a_script_ends_with_one_line_and_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        need_cuda("bench_x")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: scripts.bench_x needs a CUDA GPU, and this machine has none\n"


def test_the_chart_puts_points_where_they_belong():
    series = {"a": [(1024.0, 100.0), (4096.0, 400.0)], "b": [(2048.0, 200.0)]}
    root = ElementTree.fromstring(line_chart("T < U", "TFLOP/s", [[Panel("one", series)]], ["a", "b"]))
    dots = [(float(dot.get("cx", "")), float(dot.get("cy", ""))) for dot in root.iter(f"{SVG}circle")]
    (x0, y0), (x2, y2), (x1, y1) = dots
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)  # 2k lies halfway between 1k and 4k
    assert y0 - y1 == pytest.approx((y0 - y2) / 3, abs=0.2)  # 100, 200, 400, upwards
    assert y2 >= 0
    assert y0 <= record.HEIGHT
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert {"T < U", "a", "b", "one, TFLOP/s", "1k", "2k", "4k", "0", "400"} <= set(texts)


@pytest.mark.parametrize(
    ("highest", "labels"), [(1.13, ["0", "0.2", "1.2"]), (730, ["0", "100", "800"]), (9, ["0", "2", "10"])]
)
def test_the_y_axis_has_round_steps_and_not_too_many(highest: float, labels: list[str]):
    root = ElementTree.fromstring(line_chart("T", "U", [[Panel("one", {"a": [(1024.0, highest)]})]], ["a"]))
    shown = [text.text for text in root.iter(f"{SVG}text") if text.get("text-anchor") == "end"]
    assert [shown[0], shown[1], shown[-1]] == labels
    assert len(shown) <= record.MOST_STEPS + 1


def test_a_record_keeps_what_it_has_in_the_order_of_the_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts, out = {"device": {"name": "CARD"}}, tmp_path / "out"

    def opened(facts: dict[str, Any], out: Path | None = out) -> record.Record:
        page, chart = (
            (lambda rows, facts, plot: f"{len(rows)} rows, {plot}\n"),
            (lambda rows: "<svg/>" if rows[1:] else None),
        )
        return record.Record(out, facts, ("line", "gpus"), ["first", "second"], page, chart)

    first = opened(facts)
    first.put({"line": "second", "gpus": 2, "s": 1.0})
    assert (out.with_suffix(".md").read_text(), out.with_suffix(".svg").exists()) == ("1 rows, None\n", False)
    again = opened(facts)
    for row in (("gone", 1), ("second", 1), ("first", 2), ("second", 2)):
        again.put({"line": row[0], "gpus": row[1], "s": 2.0})
    assert [(row["line"], row["gpus"]) for row in again.rows] == [
        ("gone", 1), ("first", 2), ("second", 1), ("second", 2)
    ]  # fmt: skip
    assert again.row("second", 2)["s"] == 2.0, "in the place of the first"
    assert again.row("second", 3) == {}
    assert out.with_suffix(".md").read_text() == "4 rows, out.svg\n"
    assert opened(facts).rows == again.rows
    with pytest.raises(SystemExit):
        opened({"device": {"name": "OTHER"}})
    assert "is of another device, CARD; choose another --out" in capsys.readouterr().err
    opened(facts, None).put({"line": "first", "gpus": 1})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.json", "out.md", "out.svg"]
