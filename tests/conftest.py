"""Shared by all tests."""

from __future__ import annotations

import gc
import os
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch and NumPy: each core has a process, and a second thread in it would only wait.
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"), "1")

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    # Before anything imports Triton, which asks once: our kernels then run in its interpreter.
    os.environ["TRITON_INTERPRET"] = "1"

from training import cli

# Under nohup, and in the background of a script, these are ignored, and so they would be in the processes of tests.
for number, usual in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, usual)

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    # Python and every run of the trainer would walk a million imported objects again and again, 0.1 s each time.
    gc.disable()

# On a busy machine an example takes as long as it takes.
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """One process where tests share a GPU, or where single files are asked for; else as many as there are cores."""
    return 0 if ON_GPU or all(".py" in argument for argument in config.args) else None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    for item in items:
        if "gpu" in item.keywords and not ON_GPU:
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))
        if MADE_ONCE.get(item.path.name) in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group(item.path.name))  # for --dist loadgroup
    everything = list(items)
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    yield
    config.stash[LEFT_OUT] = left_out(everything, items)
    if worker := getattr(config, "workerinput", None):
        Path(worker["left_out"]).write_text(config.stash[LEFT_OUT])


# Fixtures that start many processes for all tests of a file: one process runs these tests, also of the slow ones.
MADE_ONCE = {"test_parallel.py": "results", "test_trouble.py": "ended", "test_checkpoint_shards.py": "saved"}
MADE_ONCE |= {"test_command_line.py": "answers"}
# What takes longest begins first.
LONGEST = ("test_compile_hopper.py", "test_compile_portable.py", "test_parallel.py", "test_trouble.py")
LONGEST += ("test_command_line.py", "test_checkpoint_shards.py", "test_flash_attention.py", "test_context.py")
LEFT_OUT = pytest.StashKey[str]()


def left_out(everything: list[pytest.Item], selected: list[pytest.Item]) -> str:
    """One line: what this run does not test, why, and what does."""
    chosen = set(selected)
    count = Counter("slow" if "slow" in item.keywords else "other" for item in everything if item not in chosen)
    skipped = sum("gpu" in item.keywords for item in selected) if not ON_GPU else 0
    parts = [f"{skipped} gpu (no CUDA GPU here)"] if skipped else []
    parts += [f"{count['slow']} slow (.ci/run does, with pytest -m slow)"] if count["slow"] else []
    parts += [f"{count['other']} others (python -m pytest does)"] if count["other"] else []
    return "not tested: " + ", ".join(parts) if parts else ""


def pytest_collection_finish() -> None:
    gc.freeze()  # a collection that a test asks for need not walk what was imported


@pytest.fixture(autouse=ON_GPU)
def frees_gpu_memory() -> Iterator[None]:
    """Tests share a GPU, and some measure what a run takes of it."""
    yield
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()  # 32 MiB for each stream that computed a product
    torch.cuda.empty_cache()


def pytest_report_collectionfinish(config: pytest.Config) -> str:
    return config.stash.get(LEFT_OUT, "")


# With several processes each collects, and the first tells the one that prints.


def pytest_configure_node(node: Any) -> None:
    file, node.workerinput["left_out"] = tempfile.mkstemp(prefix="flash-gpt-tests-")
    os.close(file)


def pytest_xdist_node_collection_finished(node: Any) -> None:
    file = Path(node.workerinput["left_out"])
    if line := file.read_text() if node.gateway.id == "gw0" else "":
        node.config.get_terminal_writer().line(line)
    file.unlink()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _garbage() -> Iterator[None]:
    yield
    if not gc.isenabled():
        gc.collect(1)  # what is new since the last test


@pytest.fixture
def composes_for_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra composes configs/ on any machine as on one without a GPU."""
    monkeypatch.setattr(cli, "_runs_on_gpu", lambda: False)
    cli.register_resolvers()
