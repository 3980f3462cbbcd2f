"""scripts.bench_precision compares losses seed by seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from scripts import bench_precision
from scripts.bench_precision import main, page

Row = dict[str, Any]


def losses(start: float) -> Row:
    """Those of 40 steps, of which every tenth is written down, falling by 0.2 each."""
    return {
        "train/loss": [[step, start - 0.02 * step] for step in (10, 20, 30, 40)],
        "val/loss": [[0, 9.0], [20, start], [40, start - 0.5]],
    }


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What was trained, which takes no time: the second variant is 1 % above the first with seed 0, 3 % with seed 1."""
    runs: list[tuple[str, int]] = []

    def train(variant: str, seed: int, steps: int) -> Row:
        runs.append((variant, seed))
        factor = 1.0 if variant == "precision=bf16" else 1.01 + 0.02 * seed
        first = losses(4.0 + seed)
        return {name: [[step, factor * loss] for step, loss in found] for name, found in first.items()}

    monkeypatch.setattr(bench_precision, "train", train)
    monkeypatch.setattr(bench_precision, "need_cuda", lambda script: torch.device("cpu"))
    return runs


def test_variants_are_compared_seed_by_seed(tmp_path: Path, trained: list[tuple[str, int]]) -> None:
    words = ["precision=bf16", "precision=fp8", "--seeds", "0", "1", "--steps", "40", "--out", str(tmp_path / "loss")]
    main(words)
    assert trained == [(variant, seed) for seed in (0, 1) for variant in words[:2]]
    written = (tmp_path / "loss.md").read_text()
    # Seeds 0 and 1 begin at 3.8 and 4.8: a mean of 4.3, and a deviation of 0.71.
    assert "| 1 to 10 | 4.3000 ± 16.44 % | +2.00 % (+1.00, +3.00) |" in written
    assert "| 40 | 4.0000 ± 17.68 % | +2.00 % (+1.00, +3.00) |" in written
    assert "| 0 |" not in written
    assert "loss.svg" in written
    assert (tmp_path / "loss.svg").exists()


def test_what_is_there_is_not_trained_again(tmp_path: Path, trained: list[tuple[str, int]]) -> None:
    words = ["precision=bf16", "precision=fp8", "--steps", "40", "--out", str(tmp_path / "loss")]
    main([*words, "--seeds", "0"])
    main([*words, "--seeds", "0", "1"])
    assert trained[2:] == [("precision=bf16", 1), ("precision=fp8", 1)]


def test_a_seed_that_only_one_variant_has_is_in_no_difference() -> None:
    rows = [{"variant": "a", "seed": seed, "run": "model=tiny", **losses(4.0)} for seed in (0, 1)]
    rows += [{"variant": "b", "seed": 1, "run": "model=tiny", **losses(4.4)}]
    facts = {"device": {"name": "one"}, "versions": {}, "commit": "c", "command": "c", "run": "r"}
    assert "| 20 | 4.0000 ± 0.00 % | +10.00 % (+10.00) |" in page(rows, facts, None)
    assert "| 20 | 4.0000 ± 0.00 % | – |" in page([rows[0], rows[1], rows[2] | {"seed": 2}], facts, None)


def test_too_few_steps_are_refused(trained: list[tuple[str, int]], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--steps", "39"])
    assert capsys.readouterr().err.strip().endswith("use 40")
    assert not trained


@pytest.mark.parametrize(
    ("variant", "line"),
    [
        ("precision=fp9", "precision=fp9 is unknown; use auto, bf16"),
        ("precision.scaling=rowwise precision=fp8 model.colour=3", "model.colour"),
        ("precision=fp8 precision.scaling=none", "precision.scaling=none is not possible"),
    ],
)
def test_a_mistyped_variant_is_refused_before_the_first_is_trained(
    variant: str, line: str, trained: list[tuple[str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["precision=bf16", variant])
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1
    assert not trained


def test_a_record_of_other_runs_is_not_added_to(
    tmp_path: Path, trained: list[tuple[str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["precision=bf16", "--seeds", "0", "--out", str(tmp_path / "loss"), "--steps"]
    main([*words, "40"])
    with pytest.raises(SystemExit):
        main([*words, "80"])
    assert "max_steps=40; choose another --out" in capsys.readouterr().err
    assert len(trained) == 1


def test_the_first_variant_that_is_asked_for_is_compared_with(tmp_path: Path, trained: list[tuple[str, int]]) -> None:
    out = ["--steps", "40", "--out", str(tmp_path / "loss"), "--seeds"]
    main(["precision=fp8", "precision=tf32", *out, "0"])
    main(["precision=bf16", "precision=fp8", *out, "0", "1"])
    assert "`precision=bf16`, seeds 0, 1 | `precision=fp8` | `precision=tf32` |" in (tmp_path / "loss.md").read_text()


@pytest.mark.parametrize("last", range(40, 200, 10))
def test_the_picture_of_a_short_run_has_points(last: int) -> None:
    logged = [[step, 4.0] for step in (1, *range(10, last + 1, 10))]
    row = {"variant": "a", "seed": 0, "run": "model=tiny", "train/loss": logged, "val/loss": [[last, 4.0]]}
    assert "<circle" in str(bench_precision.chart([row]))
