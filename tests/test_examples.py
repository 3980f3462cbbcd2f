"""The files in examples/ run as they stand; `test_sweep_examples.py` has the sweeps."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from processes import LIMIT_S

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"


def run_alone(tmp_path: Path, file: str) -> str:
    """What a Python example prints where of this repository only the kernels can be seen, as `flash_gpt`."""
    (tmp_path / "flash_gpt").symlink_to(ROOT / "kernels")
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(EXAMPLES / file)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_page_lists_every_example():
    listed = re.findall(r"\]\(([\w/.]+)\)", (EXAMPLES / "README.md").read_text("utf-8"))
    files = (path for path in EXAMPLES.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert set(listed) == {str(path.relative_to(EXAMPLES)) for path in files} - {"README.md"}


def test_packed_attention_is_the_definition(tmp_path: Path):
    said = run_alone(tmp_path, "packed_attention.py")
    found = re.fullmatch(r"3 documents, 40 tokens: largest difference from the definition (\S+)\n", said)
    assert found, said
    assert float(found[1]) < 1e-5


@pytest.mark.slow
def test_a_model_of_transformers_has_the_same_loss_with_our_attention(tmp_path: Path):
    pytest.importorskip("transformers")
    assert re.fullmatch(r"{'eager': 5\.\d+, 'FlashGPT': 5\.\d+}\n", run_alone(tmp_path, "transformers_attention.py"))


@pytest.mark.slow
def test_own_text_becomes_a_model_that_writes_and_a_folder_of_transformers(tmp_path: Path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(12):
        (texts / f"{number}.txt").write_text(f"The {number}th text says something. " * 60)
    run = tmp_path / "run"
    small = ["max_steps=2", "seq_len=64", "batch_size=2", "eval_tokens=256", "sample_tokens=0", "device=cpu"]
    small += [f"data.cache_dir={tmp_path / 'cache'}", "tokenizer=bytes", "model.vocab_size=257", "logger=none"]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "RUN": str(run)}
    command = ["bash", str(EXAMPLES / "own_text.sh"), str(texts), *small]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (run / "huggingface" / "model.safetensors").exists()
    assert "\nThe " in done.stdout


def test_the_slurm_example_submits_the_job_under_its_name(tmp_path: Path):
    """What the job does is tested in tests/scripts/test_checkpoint_script.py."""
    sbatch = tmp_path / "sbatch"
    sbatch.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    sbatch.chmod(0o755)
    folder = tmp_path / "repository"
    (folder / "examples").mkdir(parents=True)
    script = folder / "examples" / "slurm_resume.sh"
    script.write_bytes((EXAMPLES / "slurm_resume.sh").read_bytes())
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", str(script), "long", "model=gpt2-124m"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    *options, job, run_dir, setting = done.stdout.splitlines()[:-1]
    assert (job, run_dir, setting) == ("scripts/slurm_train.sbatch", "run_dir=runs/long", "model=gpt2-124m")
    assert "--output=runs/long.log" in options
    assert (ROOT / job).exists()
    assert (folder / "runs").is_dir()
