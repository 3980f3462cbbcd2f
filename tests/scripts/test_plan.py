"""scripts.plan says on one screen what a run will take, before torch loads."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import plan as script
from scripts.plan import described
from scripts.settings import train_config
from training import runtime
from training.cards import CARDS
from training.runtime import resolve_runtime

ROOT = Path(__file__).parents[2]
SCALE = ROOT / "docs" / "scale.md"
COMMAND = "    $ python -m scripts.plan "
MILLION = ["model=llama-1b", "seq_len=1048576", "memory=auto", "precision=bf16-residual"]


def plan(*settings: str) -> subprocess.CompletedProcess[str]:
    """What is printed last is whether torch was imported."""
    code = "import sys, runpy\n"
    code += "try: runpy.run_module('scripts.plan', run_name='__main__')\nfinally: print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, *settings]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def plans(commands: list[str]) -> list[str]:
    """What each prints, of one process."""
    code = "import os, sys, runpy\nalone = dict(os.environ)\n"
    code += "for words in sys.argv[1:]:\n"
    code += "    os.environ.clear(); os.environ.update(alone)\n"  # without the ranks of the one before
    code += "    sys.argv = ['plan', *words.split()]\n"
    code += "    try: runpy.run_module('scripts.plan', run_name='__main__')\n"
    code += "    except SystemExit as ended: assert not ended.code\n"
    code += "    print('\\f')"
    done = subprocess.run([sys.executable, "-c", code, *commands], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split("\f\n")[:-1]


def test_a_million_tokens_are_planned_on_one_screen_without_torch() -> None:
    done = plan("gpu=h200", *MILLION)
    assert done.returncode == 0, done.stderr
    *lines, imported = done.stdout.splitlines()
    assert imported == "False"
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert "llama-1b: 1,235.8M parameters" in text
    policy = re.search(r"^policy  memory=(\w+).*, which memory=auto means here$", text, re.MULTILINE)
    assert policy is not None
    (chosen,) = (line.split() for line in lines if line.startswith("→ ") and not line.startswith("→ the"))
    assert chosen[1] == policy[1]
    peak = re.search(r"^peak    ([\d.]+) GiB, in .*: fits$", text, re.MULTILINE)
    assert peak is not None
    assert peak[1] in chosen
    assert int(chosen[-1].replace(",", "")) >= 1048576
    parts = re.findall(r"^ {8} +([\d.]+)  (?!beside)", text, re.MULTILINE)
    assert sum(map(float, parts)) == pytest.approx(float(peak[1]), abs=0.1)
    none, longest = re.search(r"^  none +([\d,.]+) +[\d,.]+ +([\d,]+)$", text, re.MULTILINE).groups()  # type: ignore[union-attr]
    assert float(none.replace(",", "")) > 1000
    assert int(longest.replace(",", "")) < 131072


def test_the_time_of_products_in_float32_is_not_predicted() -> None:
    """They do not use the tensor cores, whose peak is known."""
    fp32, tf32 = plans([f"gpu=h200 model=llama-1b seq_len=16k precision={name}" for name in ("fp32", "tf32")])
    assert "time    not predicted: this card's peak is not known for float32 products" in fp32
    assert "→ the first that fills" in fp32
    assert re.search(r"^time    [\d.]+ s a step", tf32, re.MULTILINE)


def test_a_policy_that_is_named_is_planned_as_it_is() -> None:
    text = plan("gpu=rtx-4090", "model=llama-1b", "seq_len=16384", "memory=selective").stdout
    assert "policy  memory=selective\n" in text
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"peak    [\d.]+ GiB, in [\w ]+: does not fit", text)
    assert "not measured on this card" in text


def test_many_gpus_are_planned_for_as_one_process_of_them() -> None:
    done = plan("gpu=h100", "gpus=16", "parallel=hsdp", "parallel.context=4", "model=llama-1b", "seq_len=65536")
    assert done.returncode == 0, done.stderr
    text, imported = done.stdout.rsplit("\n", 2)[0], done.stdout.split()[-1]
    assert imported == "False"
    assert "gpus    16 in nodes of 8: parallel=hsdp, 2 × 8 shards, 4 share a row (ulysses)" in text
    assert "step    262,144 tokens (1 × 1 row of 65,536 tokens on each of 4)" in text
    assert re.search(r"GB, all-gather of weights in a node, hidden$", text, re.MULTILINE)
    assert re.search(r"GB, all-reduce of gradients of copies between nodes, hidden$", text, re.MULTILINE)
    assert re.search(r"GB, all-to-all of heads in a node$", text, re.MULTILINE)
    weights = {size: float(re.search(r"([\d.]+)  weights\n", plan(*words).stdout)[1]) for size, words in SHARDS.items()}  # type: ignore[index]
    assert weights[8] == pytest.approx(weights[1] / 8, abs=0.01)


SHARDS = {1: ["gpu=h200", "model=llama-1b"], 8: ["gpu=h200", "gpus=8", "parallel=fsdp", "model=llama-1b"]}


@pytest.mark.parametrize(
    "word", ["gpus=0", "gpus=12", "gpus=8,none", "link=fast", "network=1.2.3", "card=h200", "parallel.context=3 gpus=8"]
)
def test_gpus_that_are_impossible_are_refused_in_one_line(word: str) -> None:
    done = plan("gpu=h200", *word.split())
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")


def test_numbers_of_gpus_are_written_as_other_whole_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.machine.supposed", None)
    monkeypatch.setattr(script, "cluster", script.Cluster())
    words = ["plan", "gpu=h200", "gpus=64,1k", "node=1e1", "seq_len=16k"]
    script.take_cluster(words)
    assert (script.cluster.several, script.cluster.node) == ([64, 1000], 10)
    assert words == ["plan", "seq_len=16k"]


@pytest.mark.slow
def test_the_page_on_scale_is_what_the_command_prints() -> None:
    blocks: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in SCALE.read_text().splitlines():
        if line.startswith(COMMAND):
            lines = blocks.setdefault(line.removeprefix(COMMAND), [])
        elif line.startswith("    ") or not line:
            lines.append(line[4:])
        else:
            lines = []
    assert len(blocks) > 5
    for (words, said), printed in zip(blocks.items(), plans(list(blocks)), strict=True):
        assert "\n".join(said).strip() == printed.strip(), words


def test_a_card_that_is_not_known_is_refused_with_those_that_are() -> None:
    done = plan("gpu=h300", *MILLION)
    assert done.returncode == 2
    assert done.stderr == f"error: gpu=h300 is unknown; use {', '.join(CARDS)}\n"


def test_without_a_gpu_one_must_be_named() -> None:
    done = plan("device=cpu")
    assert done.returncode == 2
    assert done.stderr == f"error: there is no GPU here to plan for; name one: gpu={', '.join(CARDS)}\n"


def test_a_card_may_be_written_in_capitals_and_a_cpu_is_none() -> None:
    done = plan("gpu=RTX-4090", "device=cpu")
    assert (done.returncode, done.stderr) == (2, "error: device=cpu has no GPU to plan for; leave it out\n")


def test_a_host_that_is_too_small_for_what_layers_keep_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "find_gpu", lambda: CARDS["h200"])
    config = train_config(["model=llama-1b", "seq_len=131072", "batch_size=1", "memory=offload", "device=cuda"])
    mine = resolve_runtime(config)
    for gib, short in ((None, False), (1000, False), (16, True)):
        monkeypatch.setattr("scripts.plan.host_memory", lambda gib=gib: gib and gib * 2**30)
        (line,) = (line for line in described(config, mine, is_auto=False) if "memory of the host" in line)
        assert line.endswith("does not fit") == short
