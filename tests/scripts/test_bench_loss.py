"""The benchmark of the loss holds every implementation against float64, and prints no time of a wrong one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import linear_cross_entropy
from kernels.linear_cross_entropy import linear_cross_entropy_reference
from scripts import bench_loss
from scripts.bench_loss import Peer, Size, Truth, limits_of, main, make_inputs, measure, plain, run, table

SIZE = Size(300, 90, 16)


@pytest.fixture(name="truth")
def _truth(inputs: bench_loss.Inputs) -> Truth:
    return Truth.of(inputs)


@pytest.fixture(name="inputs")
def _inputs() -> bench_loss.Inputs:
    return make_inputs(SIZE, torch.device("cpu"))


def test_the_truth_is_what_autograd_finds_in_float64(inputs, truth):
    x, w = (t.double().requires_grad_() for t in inputs[:2])
    loss = linear_cross_entropy_reference(x, w, inputs.targets_N)
    grad_x, grad_weight = torch.autograd.grad(loss, (x, w))
    torch.testing.assert_close(truth.loss, loss.detach())
    torch.testing.assert_close(truth.grad_x, grad_x[truth.tokens])
    torch.testing.assert_close(truth.grad_weight, grad_weight[truth.words])
    assert truth.errors(loss, 2 * grad_x, grad_weight) == pytest.approx({"loss": 0, "dx": 1, "dweight": 0})


def test_plain_and_ours_are_within_their_limits(inputs, truth):
    plains = truth.errors(*run(Peer(plain, torch.float32), inputs))
    assert 1e-5 < plains["dx"] < 0.02
    ours = truth.errors(*run(Peer(lambda *args: linear_cross_entropy(*args, chunk_size=64), torch.float32), inputs))
    limits = limits_of("ours", plains)
    assert all(ours[part] <= limits[part] for part in limits)
    assert limits_of("Liger-Kernel", plains) == dict.fromkeys(limits, bench_loss.WORST)


def test_a_wrong_implementation_gets_no_time(inputs, truth):
    def halved(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return plain(x, weight, targets) / 2

    row = measure("ours", Peer(halved, torch.float32), inputs, truth, limits_of("ours", None))
    assert row["wrong"].startswith("loss is off by 5.0e-01, dx is off by")
    assert "ms" not in row


def test_the_table_has_times_beside_plains_and_reasons_in_their_place():
    errors = {"loss": 1e-6, "dx": 2e-3, "dweight": 3e-3}
    rows: list[dict[str, Any]] = [
        {"size": "300x90x16", "peer": "plain", "errors": errors, "ms": 2.0, "temporaries_mib": 3000.0},
        {"size": "300x90x16", "peer": "ours", "errors": errors, "ms": 1.0, "temporaries_mib": 200.0},
        {"size": "300x90x16", "peer": "other", "wrong": "out of memory"},
    ]
    assert table(rows)[2:] == [
        "| 300 × 90 × 16 | plain | 2.00 | 1.00 | 3,000 | 1.0e-06 | 2.0e-03 | 3.0e-03 |",
        "| 300 × 90 × 16 | ours | 1.00 | 0.50 | 200 | 1.0e-06 | 2.0e-03 | 3.0e-03 |",
        "| 300 × 90 × 16 | other | out of memory | – | – | – | – | – |",
    ]


def test_without_a_gpu_one_line_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: scripts.bench_loss needs a CUDA GPU, and this machine has none\n"


@pytest.mark.gpu
def test_measures_everything_that_is_here(tmp_path, capsys):
    assert main(["--sizes", "4096x5000x256", "--out", str(tmp_path / "record")]) == 0
    assert "| 4,096 × 5,000 × 256 | ours |" in capsys.readouterr().out
    assert (tmp_path / "record.md").is_file()
    assert (tmp_path / "record.json").is_file()
