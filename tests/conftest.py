"""Shared by all tests."""

from __future__ import annotations

import pytest
import torch

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
