"""Combinations run each in a process of its own; what becomes of them is a result, and a page."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from processes import ROOT, run_unread

from data import disk
from scripts.compare import __main__ as process
from scripts.compare import command, jobs
from scripts.compare.command import main, split
from scripts.compare.jobs import combinations
from scripts.record import STYLE, font, png

Compare = Callable[..., int]

TRAIN = """
import json, os, pathlib, sys, time
settings = dict(word.split("=", 1) for word in sys.argv[1:])
attention, seq_len = settings["attention"], int(settings["seq_len"])
with open(os.environ["CALLS"], "a") as calls:
    calls.write(f"{attention} {seq_len}\\n")
if attention == "math" and seq_len >= 4096:
    sys.exit(sys.stderr.write("error: out of GPU memory: 1 GiB wanted. What helps: less\\n") and 3)
if attention == "flash":
    sys.exit(sys.stderr.write("error: attention=flash needs an NVIDIA GPU; use sdpa\\n") and 2)
if seq_len >= 8192:
    needs = "tiny needs 223 GiB (predicted, in the loss); a card has 139.8 GiB of memory; use a smaller one"
    sys.exit(sys.stderr.write(f"error: {needs}\\n") and 2)
if attention == os.environ.get("BREAKS"):
    raise RuntimeError("a bug")
if attention == os.environ.get("HANGS"):
    time.sleep(60)
run = pathlib.Path(settings["run_dir"].strip("'"))
run.mkdir(parents=True)
assert settings["checkpoint.save"] == "false"
(run / "config.yaml").write_text(f"seq_len: {seq_len}\\n")
facts = {"attention": f"{attention}: <b>kernels</b>", "precision": "fp32", "device": {"name": "a card"},
         "versions": {"torch": "2"}, "git_commit": "abc"}
(run / "facts.json").write_text(json.dumps(facts))
speed = {"math": 100.0, "sdpa": 200.0, "flex": 150.0}[attention] * 1000 / seq_len
loss = 5.0 + float(os.environ.get("OFF", 0)) * (attention == "flex")
windows = [{"throughput/tokens_per_second": speed * s, "time/step_ms": 9.0, "memory/peak_allocated_gib": s / 2,
            "throughput/mfu": 0.5, "train/loss": loss} for s in (0.1, 1, 1.2, 1)]
lines = [{"step": i, "tokens": i, "time": 1.0 + i, **window} for i, window in enumerate(windows, 1)]
lines.append({"step": 4, "tokens": 4, "time": 9.0, "val/loss": loss})
(run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, composes_for_cpu: None) -> Path:
    """A train.py that only pretends; the runs that it was asked for, one a line."""
    (tmp_path / "train.py").write_text(TRAIN)
    monkeypatch.setattr(jobs, "ROOT", tmp_path)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    return tmp_path / "calls"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def results(out: Path) -> dict[tuple[str, str], dict[str, Any]]:
    rows = json.loads((out / "report.json").read_text())["rows"]
    return {(row["settings"]["attention"], row["settings"]["seq_len"]): row for row in rows}


def test_out_of_memory_and_a_refusal_are_results_with_their_line(
    calls: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["attention=math,sdpa,flex,flash", "seq_len=4096,1024"]
    assert main([*settings, "--out", str(out)]) == 0
    found = results(out)
    assert len(found) == 8
    assert found["sdpa", "1024"]["outcome"] == "done"
    assert found["sdpa", "1024"]["tokens_per_second"] == pytest.approx(200_000 / 1024), "the median after the first"
    assert found["sdpa", "1024"]["peak_gib"] == 0.6
    assert found["math", "4096"]["outcome"] == "out of memory"
    assert found["math", "4096"]["why"] == "out of GPU memory: 1 GiB wanted. What helps: less"
    assert found["flash", "1024"]["outcome"] == "refused"
    said = capsys.readouterr().out
    assert "1,024 tokens: sdpa is fastest, 195 tokens/s; 1.33 × as fast as flex with the same memory; 2.00 ×" in said
    assert "8/8   attention=flash seq_len=4096   refused: attention=flash needs an NVIDIA GPU; use sdpa" in said
    assert calls.read_text().splitlines()[0] == "math 1024", "the shortest rows come first"


def test_the_page_and_the_picture_hold_a_line_for_each_value(calls: Path, out: Path) -> None:
    main(["attention=math,sdpa,flex", "seq_len=1024,4096,2048", "--out", str(out)])
    picture = ElementTree.fromstring((out / "report.svg").read_text())
    if font():
        raster = (out / "report.png").read_bytes()
        size = struct.unpack(">II", raster[16:24])  # of a PNG's first chunk
        assert list(size) == [2 * round(float(side)) for side in picture.attrib["viewBox"].split()[2:]]
    texts = [text.text for text in picture.iter("{http://www.w3.org/2000/svg}text")]
    legend = ["sdpa", "flex", "math (out of memory at 4,096)"]
    assert [text for text in texts if text in legend] == legend, "the fastest first"
    assert {"tokens/s, higher is better", "step, ms", "peak memory, GiB", "MFU, fraction of the peak"} <= set(texts)
    dots = list(picture.iter("{http://www.w3.org/2000/svg}circle"))
    assert len(dots) == 4 * 8, "four figures of nine combinations, one of which did not fit"
    html = (out / "report.html").read_text()
    assert "{{" not in html
    assert "<b>kernels" not in html
    assert not re.findall(r"(?:src|href)\s*=|url\(", html)
    assert "out of memory" in html
    assert "losses agree, 0.5% is allowed" in html
    assert "prefers-color-scheme: dark" in html
    assert "flex 4096" in (out / "runs.html").read_text()


def test_what_is_predicted_not_to_fit_is_named_in_the_picture(calls: Path, out: Path) -> None:
    assert main(["attention=sdpa,flex", "seq_len=1024,8192", "--out", str(out)]) == 0
    assert results(out)["flex", "8192"]["outcome"] == "does not fit"
    assert "flex (does not fit at 8,192)" in (out / "report.svg").read_text()
    page = (out / "report.md").read_text()
    assert "| 8,192 | does not fit | does not fit |" in page
    assert "- attention=sdpa seq_len=8192, attention=flex seq_len=8192: does not fit. tiny needs 223 GiB" in page


@pytest.mark.skipif(font() is None, reason="no font that a PNG's words could be drawn with")
def test_a_png_is_drawn_on_white() -> None:
    word = '<svg class="chart" viewBox="0 0 40 20" xmlns="http://www.w3.org/2000/svg" width="40" height="20">{}</svg>'
    drawn = png(word.format(f'<style>{STYLE}</style><rect class="ground" width="40" height="20" fill="white"/>'))
    assert drawn == png(word.format("")), "white, as without a ground"


def test_started_again_it_runs_what_is_missing(
    calls: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["attention=math,sdpa", "seq_len=1024,4096", "--out", str(out)]
    monkeypatch.setenv("BREAKS", "sdpa")
    assert main(command) == 1
    assert results(out)["sdpa", "1024"]["outcome"] == "failed"
    assert results(out)["sdpa", "1024"]["why"] == "RuntimeError: a bug"
    assert "a combination failed" in capsys.readouterr().err
    monkeypatch.delenv("BREAKS")
    calls.unlink()
    assert main(command) == 0
    assert calls.read_text().splitlines() == ["sdpa 1024", "sdpa 4096"]
    calls.unlink()
    assert main([*command, "--steps", "50"]) == 0
    assert len(calls.read_text().splitlines()) == 4, "other steps are other runs"


def test_losses_that_differ_are_an_error(calls: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFF", "0.03")
    assert main(["attention=sdpa,flex", "seq_len=1024", "--out", str(out)]) == 1
    html = (out / "report.html").read_text()
    assert "losses DO NOT AGREE" in html
    assert "train loss 5.0000 to 5.0300, 0.600% apart and not the 0.5% that is allowed" in html
    assert main(["attention=sdpa,flex", "seq_len=1024", "--out", str(out), "--tolerance", "0.01"]) == 0
    assert main(["attention=sdpa,flex", "seq_len=1024", "learning_rate=1e-3,2e-3", "--out", str(out)]) == 1


def test_what_takes_too_long_is_ended(calls: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HANGS", "sdpa")
    assert main(["attention=sdpa", "seq_len=1024", "--out", str(out), "--limit", "0.02"]) == 1
    assert results(out)["sdpa", "1024"]["outcome"] == "too long"


def test_a_comparison_that_is_killed_ends_its_run_too(
    calls: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HANGS", "flex")
    began: list[subprocess.Popen[bytes]] = []

    def begin(*args: Any, **options: Any) -> subprocess.Popen[bytes]:
        began.append(popen(*args, **options))
        return began[-1]

    popen = subprocess.Popen
    monkeypatch.setattr(jobs.subprocess, "Popen", begin)
    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=kill_once, args=(2, began), daemon=True).start()
    assert main(["attention=sdpa,flex", "seq_len=1024", "--out", str(out)]) == 130
    assert "stopped after 1 of 2; the same command goes on" in capsys.readouterr().out
    assert began[1].poll() is not None
    assert signal.getsignal(signal.SIGTERM) == before


def kill_once(number: int, began: list[Any]) -> None:
    """SIGTERM to this process once so many others have begun."""
    while len(began) < number:
        time.sleep(0.01)
    time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGTERM)


UNREAD = """
import runpy, sys
from pathlib import Path
from scripts.compare import jobs
jobs.ROOT = Path(sys.argv.pop(1))
runpy.run_module("scripts.compare", run_name="__main__")
"""


def test_a_reader_that_went_away_ends_no_comparison(calls: Path, out: Path) -> None:
    words = ["attention=math,sdpa", "seq_len=1024", "device=cpu", "--out", str(out)]
    done = run_unread(["-c", UNREAD, str(calls.parent), *words], cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(results(out)) == 2


def test_ctrl_c_before_the_first_run_is_silent(
    out: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "check", interrupted)
    monkeypatch.setattr(sys, "argv", ["compare", "--out", str(out)])
    assert process.main() == 130
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["attentoin=math"], "attentoin is not a setting; did you mean attention?"),
        (["attention=math,flsh"], "attention=flsh is unknown; use auto, flash, flex, math, sdpa (did you mean flash?)"),
        (
            ["attention=sdpa", "seq_len=64,abc"],
            "seq_len: Value 'abc' of type 'str' could not be converted to Integer; use a whole number",
        ),
        (
            ["attention=sdpa", "seq_len=64", "model.dim=64,x"],
            "model.dim: Value 'x' of type 'str' could not be converted to Integer; use a whole number",
        ),
        (["seq_len"], "cannot read seq_len; write key=value or key=a,b"),
        (["seq_len=1", "seq_len=2"], "seq_len is there twice; write all its values as seq_len=a,b"),
        (["run_dir=x"], "run_dir is set by the comparison; use --steps and --out"),
        (["--steps", "3"], "--steps 3 measures nothing: the first three are warm-up; use 5 or more"),
        (["--out", "train.py"], "--out train.py cannot be written: File exists; name another folder"),
        (["attention=flash", "seq_len=64"], "attention=flash needs an NVIDIA GPU; use sdpa"),
    ],
)
def test_what_cannot_work_is_one_line(
    calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str],
    line: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {line}"


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "facts.json", "run.lock"])
def test_the_folder_of_a_run_is_refused_before_anything_runs(
    calls: Path, out: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    out.mkdir()
    (out / name).touch()
    (out / "report.html").write_text("the run's own")
    assert main(["attention=sdpa", "seq_len=1024", "--out", str(out)]) == 2
    line = f"error: --out {out} is the folder of a run, whose report.html would be lost; name another folder\n"
    assert capsys.readouterr().err == line
    assert (out / "report.html").read_text() == "the run's own"
    assert not calls.exists()


def test_a_folder_that_takes_no_files_is_refused_before_anything_runs(
    calls: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(dir: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(dir / "tmpx"))

    out.mkdir()
    monkeypatch.setattr(disk, "TemporaryFile", refused)  # root may write everywhere
    assert main(["attention=sdpa", "seq_len=1024", "--out", str(out)]) == 2
    line = f"error: --out {out} cannot be written: Permission denied; name another folder\n"
    assert capsys.readouterr().err == line
    assert not calls.exists()


def test_values_and_combinations() -> None:
    assert split("1,2,1") == ["1", "2"]
    assert split("[0.9,0.95],[0.8,0.9]") == ["[0.9,0.95]", "[0.8,0.9]"]
    found = combinations({"attention": ["a", "b"], "seq_len": ["16k", "512"]})
    assert [(job["seq_len"], job["attention"]) for job in found] == [
        ("512", "a"), ("512", "b"), ("16k", "a"), ("16k", "b"),
    ]  # fmt: skip


@pytest.mark.slow
def test_real_runs_of_a_tiny_model_are_measured_and_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for number in range(12):
        lines = "\n".join(f"{i} green bottles of {number} standing on the wall" for i in range(200))
        (text / f"{number}.txt").write_text(lines)
    for name in [name for name in os.environ if name.startswith("TRITON_INTERPRET")]:
        monkeypatch.delenv(name)
    small = ["model.n_layers=1", "model.n_heads=2", "model.n_kv_heads=1", "model.dim=32", "model.ffn_dim=64"]
    small += ["model.vocab_size=300", "batch_size=1", "data=text", f"data.path={text}", "data.val_fraction=0.3"]
    small += [f"data.cache_dir={tmp_path / 'cache'}", "device=cpu", "model=tiny", "eval_tokens=256"]
    out = tmp_path / "out"
    assert main(["attention=math,sdpa", "seq_len=64", *small, "--steps", "8", "--out", str(out)]) == 0
    found = results(out)
    assert {row["outcome"] for row in found.values()} == {"done"}
    losses = [row["train_loss"] for row in found.values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert all(row["tokens_per_second"] > 0 and 0.1 < row["peak_gib"] < 8 for row in found.values())
