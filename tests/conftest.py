"""Shared by all tests."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Before anything imports Triton, which asks once: our kernels then run in its interpreter.
    os.environ["TRITON_INTERPRET"] = "1"

from training import cli


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def composes_for_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra composes configs/ on any machine as on one without a GPU."""
    monkeypatch.setattr(cli, "_runs_on_gpu", lambda: False)
    cli.register_resolvers()
