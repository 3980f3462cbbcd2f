"""W&B's workspace: what it shows, without W&B."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from processes import LIMIT_S

from scripts import wandb_dashboard
from training.config import TrainConfig
from training.dashboard import translated, workspace
from training.metrics import METRICS

ROOT = Path(__file__).resolve().parents[2]
WITHOUT = "import sys\nfor name in ('wandb', 'wandb_workspaces', 'torch', 'hydra'): sys.modules[name] = None\n"
WITHOUT += "import runpy; sys.argv = ['wandb_dashboard', *sys.argv[1:]]\n"
WITHOUT += "runpy.run_module('scripts.wandb_dashboard', run_name='__main__')"


def without_packages(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)


def sections(plain: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    return {section["name"]: section["panels"] for section in plain["sections"]}


def test_every_metric_has_its_place_once_and_no_panel_shows_another() -> None:
    found = sections(workspace("us", "flash-gpt", "mine"))
    assert list(found) == ["learning", "throughput", "memory", "time", "by attention"]
    by_attention = found.pop("by attention")
    shown = [name for panels in found.values() for panel in panels for name in panel["y"]]
    assert sorted(shown) == sorted(METRICS)
    assert all(panel["groupby"] is None for panels in found.values() for panel in panels)
    assert {panel["groupby"] for panel in by_attention} == {"attention.name"}
    assert all(set(panel["y"]) <= METRICS.keys() for panel in by_attention)


def test_metrics_that_differ_in_a_range_share_a_panel_and_others_do_not() -> None:
    learning = sections(workspace("us", "flash-gpt", "mine"))["learning"]
    titles = [panel["title"] for panel in learning]
    assert titles.count("val/loss_at_…, lower is better") == 1
    assert titles.count("train/loss, lower is better") == 1
    by_range = next(panel for panel in learning if panel["title"].startswith("val/loss_at_"))
    assert by_range["y"] == [name for name in METRICS if name.startswith("val/loss_at_")]


def test_runs_are_grouped_by_a_setting_that_they_have() -> None:
    assert "attention" in TrainConfig.__dataclass_fields__


def test_the_dry_run_needs_no_package_and_prints_what_would_be_saved() -> None:
    done = without_packages("--dry-run", "--project", "ours", "--entity", "us")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == workspace("us", "ours", "flash-gpt")


def test_without_the_package_one_line_says_how_to_install_it() -> None:
    done = without_packages()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {wandb_dashboard.INSTALL}\n"


def test_what_w_and_b_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def save(options: Any) -> str:
        raise RuntimeError("404\nno such \x1b[31mview")

    monkeypatch.setattr(wandb_dashboard, "save", save)
    assert wandb_dashboard.main(["--update", "https://wandb.ai/us/ours?nw=x"]) == 2
    assert capsys.readouterr().err == (
        "error: W&B did not take the workspace: RuntimeError: 404 no such \\x1b[31mview\n"
    )


def test_w_and_b_takes_the_workspace_as_it_stands() -> None:
    pytest.importorskip("wandb_workspaces")
    plain = workspace("us", "ours", "mine")
    model = translated(plain)._to_model()
    sent = json.loads(model.model_dump_json(by_alias=True, exclude_none=True))["spec"]["section"]["panelBankConfig"]
    assert [section["name"] for section in sent["sections"]] == [section["name"] for section in plain["sections"]]
    for section, ours in zip(sent["sections"], plain["sections"], strict=True):
        lines = [panel["config"] for panel in section["panels"]]
        assert [line["metrics"] for line in lines] == [panel["y"] for panel in ours["panels"]]
        assert {line["xAxis"] for line in lines} == {"tokens"}
    assert {panel["config"]["groupBy"] for panel in sent["sections"][-1]["panels"]} == {"attention.value.name"}

    again = translated(workspace("us", "ours", "newer"), existing=translated(plain))
    assert (again.name, len(again.sections)) == ("newer", len(plain["sections"]))
