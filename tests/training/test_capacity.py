"""Models that no machine holds are refused by arithmetic alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from training import capacity
from training.capacity import check_capacity, host_memory
from training.config import TrainConfig
from training.machine import Gpu

MakeConfig = Callable[..., TrainConfig]


@pytest.mark.parametrize("setting", ["model.n_layers=100000000", "model.dim=1000000000000", "model.vocab_size=1e12"])
def test_a_model_that_no_machine_holds_is_refused_with_the_machines_memory(config: MakeConfig, setting: str) -> None:
    with pytest.raises(ValueError, match=r"model\.dim=.* GiB; this machine has [\d.,]+ GiB of memory; use a smaller"):
        check_capacity(config(setting), None)


def test_the_line_is_drawn_at_the_bytes_of_the_state(config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    adamw, muon = config(), config("optimizer=muon")
    matrices = 32 * 64 + 32 * 32 + 3 * 32 * 64  # of the layer: of these Muon keeps one moment, not two
    parameters = 2 * 300 * 32 + matrices + 3 * 32  # embeddings and head, one layer, norms
    for chosen, needed in ((adamw, 16 * parameters), (muon, 16 * parameters - 4 * matrices)):
        monkeypatch.setattr(capacity, "host_memory", lambda needed=needed: needed)
        check_capacity(chosen, None)
        monkeypatch.setattr(capacity, "host_memory", lambda needed=needed: needed - 1)
        with pytest.raises(ValueError, match="this machine has"):
            check_capacity(chosen, None)


def test_on_a_gpu_its_memory_counts(config: MakeConfig) -> None:
    check_capacity(config(), Gpu("NVIDIA H200", (9, 0), 141 * 10**9))
    check_capacity(config("model.dim=65536"), Gpu("a driver that does not say", (9, 0)))
    with pytest.raises(ValueError, match=r"NVIDIA H200 has 131\.3 GiB"):
        check_capacity(config("model.n_layers=50000000"), Gpu("NVIDIA H200", (9, 0), 141 * 10**9))


def test_this_machine_has_memory() -> None:
    memory = host_memory()
    assert memory is not None
    assert memory > 2**28
