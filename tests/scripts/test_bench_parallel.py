"""The lines are commands for any number of GPUs, and the record compares a line with what one GPU does alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scripts.bench_parallel import LINES, cells, command, complaints_about, main, record_at
from scripts.bench_training import ladder
from scripts.settings import train_config

FACTS = {"device": {"name": "CARD"}, "versions": {"torch": "2.13"}, "commit": "abc", "command": "run"}


@pytest.mark.parametrize("name", LINES)
def test_every_line_is_a_run_on_one_gpu_and_on_several(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for gpus in (1, 4):
        monkeypatch.setenv("WORLD_SIZE", str(gpus))
        monkeypatch.setenv("RANK", "0")
        config = train_config([*LINES[name].words(gpus), "device=cpu"])
        assert config.parallel.context == (gpus if LINES[name].method else 1)
        assert config.seq_len == LINES[name].seq_len(gpus)


def measured(line: str, gpus: int, tflops: float) -> dict[str, Any]:
    return {
        "line": line, "gpus": gpus, "commit": "abc", "command": command(LINES[line], gpus), "seq_len": 16384,
        "tokens_per_second": 1e5, "step_s": 0.5, "attended_tflops": tflops, "tflops": 2 * tflops, "mfu": 0.8,
        "peak_allocated_gib": 30.0, "predicted_gib": 31.0,
    }  # fmt: skip


def test_a_line_is_held_against_one_gpu_whichever_line_that_ran_for(tmp_path: Path) -> None:
    record = record_at(tmp_path / "out", FACTS)
    record.put(measured("data", 1, 500.0))
    record.put(measured("fsdp", 2, 960.0))  # of two GPUs, whose one is the same command
    record.put({"commit": "abc", "line": "data", "gpus": 4, "command": "c", "failed": "a rank | died"})
    text = (tmp_path / "out.md").read_text()
    assert "| fsdp | 2 | 16,384 | 100,000 | 0.500 | 480 | 40.0 % | 96.0 % | 30.0 | 31.0 |" in text
    assert "| data | 4 | failed: a rank / died |" in text
    assert "CARD" in text
    assert (tmp_path / "out.svg").exists()
    again = record_at(tmp_path / "out", FACTS)
    assert again.rows == record.rows
    assert [row["line"] for row in json.loads((tmp_path / "out.json").read_text())["rows"]] == ["data", "data", "fsdp"]


def test_without_one_gpu_there_is_no_efficiency() -> None:
    assert "| – |" in cells(measured("data", 2, 900.0), None)


def test_the_numbers_are_those_of_one_gpu_with_as_many_tokens_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def run(words: tuple[str, ...], gpus: int = 1) -> dict[str, Any]:
        asked.append((gpus, [word for word in words if "tokens_per_step" in word or "seq_len" in word]))
        return {"losses": [2.0 if gpus == 1 else 2.1], "grad_norms": [1.0]}

    monkeypatch.setattr(ladder, "run", run)
    several = [("data", 2), ("row-32k-each-ulysses", 2), ("row-32k-each-all-gather", 2)]
    wrong = complaints_about(several)
    assert list(wrong) == several
    assert all("losses of step 1: 2.10000, and 2.00000" in str(complaint) for complaint in wrong.values())
    own, shared = ["seq_len=16384", "tokens_per_step=32768"], ["seq_len=16384", "tokens_per_step=16384"]
    assert sorted(asked) == [(1, shared), (1, own), (2, shared), (2, shared), (2, own)]  # both methods have one beside


def test_the_list_needs_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "--gpus", "2", "--lines", "data"]) == 0
    assert capsys.readouterr().out.startswith("data ")
    assert "torchrun --nproc-per-node=2 train.py" in command(LINES["data"], 2)
