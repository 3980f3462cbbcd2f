"""`--help` of every command: how it is called, and a word on each option."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from processes import LIMIT_S

ROOT = Path(__file__).resolve().parents[2]
HYDRA = ("plan", "prepare_data", "inspect_data")
SCRIPTS = ROOT / "scripts"
COMMANDS = [path.stem for path in SCRIPTS.glob("*.py") if '__name__ == "__main__"' in path.read_text("utf-8")]
COMMANDS += [path.parent.name for path in SCRIPTS.glob("*/__main__.py")]


def help_of(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_train_shows_how_it_is_called_its_choices_and_its_settings():
    said = help_of("train.py")
    assert said.startswith("python train.py key=value group=option")
    assert "attention: auto, flash, flex, math, sdpa\n" in said
    assert "\nlearning_rate: " in said


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(COMMANDS) - set(HYDRA)))
def test_a_script_says_how_it_is_called_and_what_each_option_is(name: str) -> None:
    said = help_of("-m", f"scripts.{name}")
    assert said.startswith(f"usage: python -m scripts.{name} ")
    options = re.findall(r"^  (-.*(?:\n {6,}.*)*)", said.partition("options:")[2], re.MULTILINE)
    assert options
    for option in options:
        assert re.search(r"(  |\n)\s*\S.*$", option), f"{option.split()[0]} has no word"
