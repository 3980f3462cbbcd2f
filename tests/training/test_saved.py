"""A run goes on from its folder alone: saved settings, and over them what is typed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from training.config import load_config
from training.config.saved import saved_settings, with_saved
from training.mistakes import set_by_experiment

Composed = Callable[..., DictConfig]
BEGAN = ["model.dim=64", "optimizer=adamw", "schedule=wsd", "seq_len=64", "max_steps=7", "learning_rate=1e-3", "seed=3"]


def save(folder: Path, composed: Composed, *overrides: str) -> dict[str, Any]:
    """What the trainer leaves in a run folder."""
    settings = asdict(load_config(composed(*overrides, f"run_dir={folder}")))
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(settings)))
    return settings


def go_on(folder: Path, composed: Composed, *typed: str) -> dict[str, Any]:
    saved = saved_settings(folder)
    assert saved is not None
    keys = [word.partition("=")[0] for word in (*typed, "run_dir=")]
    return asdict(load_config(with_saved(composed(*typed, f"run_dir={folder}"), saved, keys)))


def test_the_folder_alone_is_all_its_settings(composed: Composed, tmp_path: Path) -> None:
    assert saved_settings(tmp_path) is None
    began = save(tmp_path, composed, *BEGAN, "batch_size=3", "tokens_per_step=384")
    assert go_on(tmp_path, composed) == began


def test_the_same_command_is_the_same_settings(composed: Composed, tmp_path: Path) -> None:
    began = save(tmp_path, composed, *BEGAN)
    assert go_on(tmp_path, composed, *BEGAN) == began


@pytest.mark.parametrize(
    ("typed", "changes"),
    [
        ("learning_rate=2e-3", {"learning_rate": 2e-3}),
        ("seed=0", {"seed": 0}),  # the default, but typed
        (
            "checkpoint.every=5",
            {"checkpoint": {"save": True, "every": 5, "keep_last": 2, "keep_every": 0, "keep_best": True}},
        ),
        ("max_steps=9", {"max_steps": 9}),
        ("max_tokens=1000000", {"max_tokens": 1_000_000, "max_steps": None}),
        ("attention=math", {"attention": {"name": "math"}}),
        (
            "schedule=cosine",
            {"schedule": {"name": "cosine", "warmup_steps": None, "warmup_tokens": None, "min_ratio": 0.1}},
        ),
    ],
)
def test_what_is_typed_beside_the_folder_is_a_change_and_nothing_else_is(
    composed: Composed, tmp_path: Path, typed: str, changes: dict[str, Any]
) -> None:
    began = save(tmp_path, composed, *BEGAN)
    assert go_on(tmp_path, composed, typed) == began | changes


def test_a_run_that_began_with_resume_none_goes_on(composed: Composed, tmp_path: Path) -> None:
    save(tmp_path, composed, "resume=none")
    assert go_on(tmp_path, composed)["resume"] == "auto"


def test_a_run_that_began_with_other_weights_may_be_told_to_go_on_from_a_checkpoint(
    composed: Composed, tmp_path: Path
) -> None:
    save(tmp_path, composed, "init_from=weights")
    assert go_on(tmp_path, composed)["init_from"] == "weights"
    assert go_on(tmp_path, composed, "resume=elsewhere")["init_from"] is None


def test_a_branch_has_the_settings_of_the_run_and_a_folder_of_its_own(composed: Composed, tmp_path: Path) -> None:
    began = save(tmp_path, composed, *BEGAN)
    checkpoint = tmp_path / "checkpoints" / "step-00000004"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.json").write_text(json.dumps(began))
    for source in (tmp_path, checkpoint):
        saved = saved_settings(source)
        assert saved is not None
        branch = with_saved(composed(f"resume={source}", "seed=5"), saved, ["resume", "seed"])
        settings = asdict(load_config(branch))
        assert settings.pop("run_dir").startswith("runs/2"), "the name of a new run"
        assert settings == {key: began[key] for key in settings} | {"resume": str(source), "seed": 5}


def test_the_name_of_a_branch_is_made_of_the_settings_that_it_has(composed: Composed, tmp_path: Path) -> None:
    save(tmp_path, composed, *BEGAN)
    saved = saved_settings(tmp_path)
    assert saved is not None
    assert load_config(with_saved(composed("resume=x"), saved, ["resume"])).run_dir.endswith("_tiny_auto_64")


def test_what_an_older_version_did_not_save_has_its_default(composed: Composed, tmp_path: Path) -> None:
    began = save(tmp_path, composed, *BEGAN)
    saved = saved_settings(tmp_path)
    assert saved is not None
    del saved["optimized_metric"], saved["checkpoint"]["keep_best"], saved["schedule"]["decay_fraction"]
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(saved)))
    assert go_on(tmp_path, composed) == began


@pytest.mark.parametrize("content", [b"- a list\n", b"a: [", b"\xff\xfe\x00", b""])
def test_saved_settings_that_cannot_be_read_are_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.yaml .*; remove it to go on with the settings as typed") as refused:
        saved_settings(tmp_path)
    assert "\n" not in str(refused.value)


def test_an_experiment_types_what_its_file_says() -> None:
    keys = set_by_experiment("gpt2-124m-16k")
    assert {"model", "schedule", "seq_len", "max_tokens", "schedule.warmup_tokens"} <= keys
    assert "learning_rate" in keys
    assert "seed" not in keys
    assert "data.path" in set_by_experiment("overfit")
    assert set_by_experiment("no such") == set()
