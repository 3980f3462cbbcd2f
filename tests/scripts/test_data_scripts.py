"""Preparing and inspecting data as a person does: real processes, what they print, and their exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    (folder / "text").mkdir()
    for number in range(12):
        lines = (f"{place} green bottles of {number} standing on the wall\n" for place in range(30))
        (folder / "text" / f"{number}.txt").write_text("".join(lines))
    return folder


def run(home, script, *settings):
    given = [f"data.cache_dir={home}/cache", "data.val_fraction=0.3", "tokenizer=bytes", "device=cpu", *settings]
    command = [sys.executable, "-m", f"scripts.{script}", "data=text", *given]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"HOME": str(home)}, capture_output=True, text=True)


def test_prepare_names_the_folder_it_made_and_makes_it_once(home):
    first, again = (run(home, "prepare_data", f"data.path={home}/text") for _ in range(2))
    assert (first.returncode, first.stderr, again.returncode, again.stderr) == (0, "", 0, "")
    made, summary, folder = first.stdout.splitlines()
    assert made == f"data       text: tokenizing, once, into {folder}"
    assert summary.startswith("data       text ")
    assert ": 12 documents, 0.0 MB, " in summary
    assert again.stdout.splitlines() == [summary, folder]
    names = {path.name for path in Path(folder).iterdir()}
    assert names == {
        *("train.bin", "train_starts.bin", "val.bin", "val_starts.bin", "tokenizer.json", "manifest.json"),
    }


def test_inspect_shows_counts_lengths_and_documents_with_their_boundaries(home):
    done = run(home, "inspect_data", f"data.path={home}/text", "seq_len=4096", "data.packing=best_fit")
    assert (done.returncode, done.stderr) == (0, "")
    out = done.stdout
    assert "every byte as it was written" in out
    assert "tokens in a document   documents   of all tokens" in out
    assert "up to         2,048" in out
    assert "end_to_end  " in out
    assert "best_fit    " in out
    row = out[out.index("row 0 of training") : out.index("row 1 of training")]
    assert row.count("── tokens ") >= 3  # rows of 4,096 hold two whole documents and a piece
    assert "<|endoftext|>0 green bottles of " in row


def test_a_damaged_file_is_named_and_made_anew(home):
    folder = Path(run(home, "prepare_data", f"data.path={home}/text", "data.val_fraction=0.4").stdout.splitlines()[-1])
    content = bytearray((folder / "train.bin").read_bytes())
    content[100] ^= 1
    (folder / "train.bin").write_bytes(content)
    done = run(home, "inspect_data", f"data.path={home}/text", "data.val_fraction=0.4")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(
        f"data       {folder}/train.bin is damaged (SHA-256): preparing {folder.name} again\n"
    )
    assert "every byte as it was written" in done.stdout


@pytest.mark.parametrize("script", ["prepare_data", "inspect_data"])
def test_a_mistake_is_one_line_and_exit_code_2(home, script):
    done = run(home, script, f"data.path={home}/nowhere")
    assert done.returncode == 2
    assert done.stderr == f"error: data.path={home}/nowhere does not exist: name a file, a folder or a glob\n"
    assert done.stdout == ""
