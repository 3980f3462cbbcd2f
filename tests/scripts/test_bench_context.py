"""The benchmark of context parallelism holds each method against float64, and prints no time of a wrong one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import ROOT, run_ranks

from scripts import bench_context
from scripts.bench_context import CHECKED, batch_of, packed_starts, table


@pytest.mark.slow
def test_two_ranks_write_a_record(tmp_path: Path) -> None:
    shape = ["--device=cpu", "--attention=math", "--heads=4:2", "--head-dim=16"]
    words = [*shape, "--tokens=64", "--documents=30", "--repeat=1"]
    out = tmp_path / "record"
    run_ranks(["-m", "scripts.bench_context", *words, f"--out={out}"], 2)
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert [(row["rows"], row["method"], row["gpus"]) for row in rows] == [
        (kind, method, gpus)
        for kind in ("causal", "packed")
        for method, gpus in (("one GPU", 1), ("ulysses", 2), ("all-gather", 2))
    ]
    for row in rows:
        assert 0 < max(row["errors"].values()) < 2
        assert row["forward_ms"] > 0
        assert row["imbalance"] < 1.1
    record = out.with_suffix(".md").read_text()
    assert "torchrun --nproc-per-node=2 -m scripts.bench_context" in record
    assert record.count("| causal | 64 |") == 3


def test_a_wrong_method_gets_no_time() -> None:
    row: dict[str, Any] = {"rows": "causal", "tokens": 64, "gpus": 2, "method": "ulysses"}
    wrong = row | {"errors": {"out": 1.0, "dq": 7.5}, "wrong": "dq is off by 7.5 ×"}
    assert table([wrong])[-1] == "| causal | 64 | 2 | ulysses | – | dq is off by 7.5 × | – | – | – | – | 7.50 |"


def test_packed_rows_are_documents() -> None:
    starts = packed_starts(4096, 100)
    assert starts.dtype == torch.int32
    assert (starts.diff() >= 0).all()
    assert (starts[0] <= torch.arange(4096)).all()
    assert 20 < len(starts.unique()) < 80
    assert batch_of(4, None).visible_pairs == 10
    assert CHECKED >= 128


@pytest.mark.slow
def test_it_needs_several_processes() -> None:
    process = subprocess.run(
        [sys.executable, "-m", "scripts.bench_context", "--device=cpu"], cwd=ROOT, capture_output=True, text=True
    )
    assert process.returncode == 2
    assert process.stderr.startswith("error: scripts.bench_context needs several processes; use torchrun")


def test_one_gpu_attends_to_a_row_of_its_own() -> None:
    shape = bench_context.Shape(2, 1, 16, torch.float32, torch.device("cpu"))
    attention = bench_context.whole(shape, "math", 8, None)
    assert attention.pairs == 36
    assert attention.own.tolist() == list(range(8))
