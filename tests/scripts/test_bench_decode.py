"""The benchmarks of decoding count the bytes that must be read, and print no speed for a wrong result."""

from __future__ import annotations

import pytest
import torch

from kernels import attention
from model.config import ModelConfig
from scripts import bench_decode, bench_generate
from scripts.bench_attention.timing import Timing
from scripts.bench_decode import Case, Inputs, measure, table

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _on_any_machine(monkeypatch):
    monkeypatch.setitem(bench_decode.SHAPES, "small", (4, 2, 16))
    monkeypatch.setattr(bench_decode, "gpu_time", lambda call, budget: Timing(0.5, waits=False))


def exact(inputs, length):
    k, v = (x.float() for x in inputs.views(length))
    return lambda: attention(inputs.q.float(), k, v).to(inputs.q.dtype)


def test_bytes_are_those_of_the_keys_and_values_of_all_rows():
    assert Case("llama-8b", 3, 1024).bytes_read == 2 * 3 * 1024 * 8 * 128 * 2


def test_a_right_result_has_a_speed_and_a_wrong_one_has_none(monkeypatch):
    case, inputs = Case("small", 2, 1024), Inputs.of("small", 2, 2048, CPU)

    def absent(inputs, length):
        raise ModuleNotFoundError("not installed")

    def shorter(inputs, length):  # loses the tail
        return exact(inputs, length - 100)

    for name, peer in (("right", exact), ("wrong", shorter), ("absent", absent)):
        monkeypatch.setitem(bench_decode.PEERS, name, peer)
    names = ["right", "wrong", "absent"]
    right, wrong, left_out = rows = measure(case, inputs, names)
    assert right["gb_per_s"] == pytest.approx(case.bytes_read / 0.5e-3 / 1e9)
    assert inputs.lengths.tolist() == [1024, 1024]
    assert "off by" in wrong["wrong"]
    assert "ms" not in wrong
    assert left_out["left_out"] == "ModuleNotFoundError: not installed"
    assert table(rows, names)[2] == "| small, 2 × 1k | 1 | wrong | 500.0 |"


def test_our_kernel_and_pytorchs_are_measured_beside_each_other():
    case, inputs = Case("small", 1, 128), Inputs.of("small", 1, 256, CPU)
    for row in measure(case, inputs, ["flash_decode", "flash_attention", "sdpa"]):
        assert "gb_per_s" in row, row


@pytest.mark.parametrize("script", [bench_decode, bench_generate])
def test_without_a_gpu_it_says_so_in_one_line(monkeypatch, capsys, script):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        script.main([])
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(("window", "seen"), [(None, 500), (100, 100)])
def test_a_step_reads_its_matrices_once_and_the_keys_and_values_that_are_seen(monkeypatch, window, seen):
    config = ModelConfig("m", n_layers=2, n_heads=4, n_kv_heads=2, dim=64, ffn_dim=96, vocab_size=101, window=window)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: None)
    model = bench_generate.build(config, "math", 600, CPU)
    a_layer = 64 * (4 + 2 + 2) * 16 + 4 * 16 * 64 + 3 * 64 * 96
    matrices = 2 * (2 * a_layer + 64 * 101)
    assert bench_generate.bytes_read(model, 3, 500) == matrices + 2 * 2 * 2 * 3 * seen * 2 * 16
    assert model.embedding.weight.dtype == torch.float32
