"""What the tests of training share: a text, a composed configuration, and a model so small that a step takes ms."""

from __future__ import annotations

import gc
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from training.config import TrainConfig, load_config

CONFIGS = Path(__file__).parents[2] / "configs"

TINY = [
    "model=tiny",
    "model.n_layers=1",
    "model.n_heads=2",
    "model.n_kv_heads=1",
    "model.dim=32",
    "model.ffn_dim=64",
    "model.vocab_size=300",
    "seq_len=32",
    "batch_size=4",
    "optimizer=adamw",
    "max_steps=4",
    "eval_tokens=256",
    "log_every=1",
    "sample_tokens=0",
    "device=cpu",
    "logger=none",
]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Two threads win nothing on such small matrices, and on a busy machine wait for each other: 10 × slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 files of a few hundred tokens, with enough of them held out (data.val_fraction=0.3) for several rows."""
    folder = tmp_path_factory.mktemp("text")
    for number in range(24):
        lines = [f"line {place} of file {number} holds {place * number % 17} apples" for place in range(20)]
        (folder / f"{number:02}.txt").write_text("\n".join(lines) + "\n")
    return folder


@cache
def compose_groups(choices: tuple[str, ...]) -> DictConfig:
    """Composed once per choice of groups: Hydra takes longer than all that is tested with it."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", list(choices))


@pytest.fixture
def composed(composes_for_cpu: None) -> Callable[..., DictConfig]:
    """composed("seq_len=64") is what Hydra composes for that command."""

    def compose_it(*overrides: str) -> DictConfig:
        is_choice = [(CONFIGS / override.partition("=")[0]).is_dir() for override in overrides]
        choices = tuple(override for override, choice in zip(overrides, is_choice, strict=True) if choice)
        settings = [override for override, choice in zip(overrides, is_choice, strict=True) if not choice]
        return OmegaConf.merge(compose_groups(choices), OmegaConf.from_dotlist(settings))

    return compose_it


@pytest.fixture
def config(
    composed: Callable[..., DictConfig], text_folder: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> Callable[..., TrainConfig]:
    """config("seq_len=64"): a tiny run on the small text, its run folder inside the test's own."""
    cache = tmp_path_factory.getbasetemp() / "cache"

    def load(*overrides: str) -> TrainConfig:
        data = ["data=text", f"data.path={text_folder}", f"data.cache_dir={cache}", "data.val_fraction=0.3"]
        return load_config(composed(*TINY, *data, f"run_dir={tmp_path / 'run'}", *overrides))

    return load


def has_tmpfs(folder: Path, size: str) -> bool:
    folder.mkdir()
    return subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], stderr=-3).returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    if shutil.which("mount") is None or not has_tmpfs(disk, "20m"):
        pytest.skip("mounting a tmpfs needs root")
    yield disk
    gc.collect()  # tensors of a resumed run are mapped from its files
    subprocess.run(["umount", disk], check=True)
