"""Counters are read from ncu's report, summed per call, and set beside the fewest bytes; failures are one line."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from scripts import hbm_traffic
from scripts.hbm_traffic import Kernel, Measurement, parse_ncu, plan, split, summarise, why_no_counters

HEADER = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device",'
    '"CC","Section Name","Metric Name","Metric Unit","Metric Value"'
)
SEPARATOR = "at::cuda::<unnamed>::spin_kernel(long)"
SOFTMAX = (
    "void at::native::<unnamed>::cunn_SoftMaxForward<(int)4, float, float, float, SoftMaxForwardEpilogue>(T4 *, int)"
)


def report(kernels: list[tuple[str, str, str, str]], units: tuple[str, str, str] = ("byte", "byte", "ns")) -> str:
    """What `ncu --csv` prints for kernels (name, read, written, time) that run in this order."""
    lines = [
        "==PROF== Connected to process 4242 (/usr/bin/python3.12)",
        '==PROF== Profiling "spin_kernel" - 0: 0%....50%....100% - 1 pass',
        "a line that the profiled program printed",
        "==PROF== Disconnected from process 4242",
        HEADER,
    ]
    metrics = ("dram__bytes_read.sum", "dram__bytes_write.sum", "gpu__time_duration.sum")
    for i, (name, *values) in enumerate(kernels):
        for metric, unit, value in zip(metrics, units, values, strict=True):
            lines.append(
                f'"{i}","4242","python3.12","127.0.0.1","{name}","1","7","(128, 1, 1)","(2048, 8, 1)","0","9.0",'
                f'"Command line profiler metrics","{metric}","{unit}","{value}"'
            )
    return "\n".join(lines) + "\n"


def test_a_report_becomes_kernels_in_order_of_launch():
    text = report([(SEPARATOR, "0", "32", "1,984"), (SOFTMAX, "8,589,934,592", "8,590,131,200", "6,012,416")])
    shuffled = text.splitlines()
    shuffled[5:] = reversed(shuffled[5:])
    for lines in (text, "\n".join(shuffled)):
        assert parse_ncu(lines) == [
            Kernel(SEPARATOR, 0.0, 32.0, pytest.approx(1.984e-6)),
            Kernel(SOFTMAX, 8589934592.0, 8590131200.0, pytest.approx(6.012416e-3)),
        ]


def test_units_are_read_and_not_assumed():
    (kernel,) = parse_ncu(report([("k", "1.5", "2,048", "3.25")], units=("Mbyte", "Kbyte", "us")))
    assert kernel == ("k", pytest.approx(1.5e6), pytest.approx(2.048e6), pytest.approx(3.25e-6))
    with pytest.raises(ValueError, match="furlong"):
        parse_ncu(report([("k", "1", "1", "1")], units=("byte", "byte", "furlong")))


def test_a_report_that_lacks_something_is_refused():
    with pytest.raises(ValueError, match="no table"):
        parse_ncu("==PROF== Connected to process 1\n==WARNING== No kernels were profiled.\n")
    with pytest.raises(ValueError, match=r"dram__bytes_read.*'n/a'"):
        parse_ncu(report([("k", "n/a", "1", "1")]))
    without_time = "\n".join(line for line in report([("k", "1", "1", "1")]).splitlines() if "gpu__time" not in line)
    with pytest.raises(ValueError, match="gpu__time_duration"):
        parse_ncu(without_time)


def test_kernels_belong_to_the_separator_before_them():
    a, b, c = (Kernel(name, 1.0, 1.0, 1.0) for name in "abc")
    separator = Kernel(SEPARATOR, 0.0, 0.0, 0.0)
    assert split([separator, a, b, separator, c]) == [[a, b], [c]]


def test_the_kernels_of_a_call_are_summed():
    measurements = plan([2048], heads=8, head_dim=64)[:2]
    separator = Kernel(SEPARATOR, 9e9, 9e9, 9e9)
    kernels = [separator, Kernel("a", 1, 20, 0.5), Kernel("b", 300, 4000, 0.25), separator, Kernel("c", 5, 6, 0.125)]
    math, flash = summarise(measurements, kernels)
    assert (math["function"], math["kernels"]) == ("math", 2)
    assert (math["read_bytes"], math["written_bytes"], math["seconds"]) == (301, 4020, 0.75)
    assert (flash["function"], flash["read_bytes"], flash["written_bytes"], flash["seconds"]) == ("flash", 5, 6, 0.125)
    with pytest.raises(ValueError, match="1 measurements, 1 with kernels, of 2"):
        summarise(measurements, kernels[:3])
    with pytest.raises(ValueError, match="2 measurements, 1 with kernels, of 2"):
        summarise(measurements, kernels[:4])


def test_the_fewest_bytes_by_hand():
    H, S, D = 8, 2048, 64
    vector, square, statistic = H * S * D * 2, H * S * S * 2, H * S * 4
    fewest = {(m.function, m.backward): m.fewest_bytes for m in plan([S], H, D)}
    assert fewest["math", False] == 4 * vector + 4 * square
    assert fewest["math", True] == 12 * vector + 11 * square
    assert fewest["flash", False] == 4 * vector + statistic
    assert fewest["flash", True] == 17 * vector + 6 * statistic
    assert hbm_traffic.FUNCTIONS["flash"].keywords == {"implementation": "triton"}, "whose steps these are"


def test_both_functions_run_forward_and_only_where_asked_backward(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("triton")
    gradients: list[tuple[torch.Tensor, ...]] = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args: gradients.append(grad(*args)))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v, dout = (torch.randn(1, 32, 2, 16, dtype=torch.bfloat16, device=device) for _ in range(4))
    for m in plan([32], heads=2, head_dim=16):
        hbm_traffic.call(m, q, k, v, dout)
    math, flash = gradients
    for theirs, ours in zip(math, flash, strict=True):
        torch.testing.assert_close(ours, theirs, atol=0.03, rtol=0.03)


def test_what_keeps_ncu_from_the_counters_is_one_line():
    refused = (
        "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance Counters\n"
    )
    assert "no permission" in (why_no_counters(refused) or "")
    failed = "==PROF== Connected\n==ERROR== Failed to initialize the profiler: LibraryNotLoaded\n"
    assert why_no_counters(failed) == (
        "ncu could not read the GPU's hardware counters: Failed to initialize the profiler: LibraryNotLoaded"
    )
    assert why_no_counters(report([("k", "1", "1", "1")])) is None


@pytest.fixture
def ncu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine with ncu, which prints what the test wants; `commands` are what was run."""
    fake = SimpleNamespace(output="", returncode=0, commands=[])

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        if command[0] != "/bin/ncu":
            return subprocess.CompletedProcess(command, 0, "abc\n", "")  # git
        fake.commands.append(command)
        return subprocess.CompletedProcess(command, fake.returncode, fake.output, "")

    monkeypatch.setattr(hbm_traffic, "need_cuda", lambda script: torch.device("cpu"))
    monkeypatch.setattr(hbm_traffic.shutil, "which", lambda name: "/bin/ncu")
    monkeypatch.setattr(subprocess, "run", run)
    return fake


def test_a_run_records_bytes_time_and_how_much_less_flash_moves(
    ncu: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    math = [
        (SEPARATOR, "0", "0", "9"),
        ("a", "6,000,000", "1,000,000", "3,000,000"),
        ("b", "2,000,000", "0", "1,000,000"),
    ]
    flash = [(SEPARATOR, "0", "0", "9"), ("c", "1,000,000", "500,000", "500,000")]
    ncu.output = report([*math, *flash, *math, *flash])
    assert hbm_traffic.main(["--seq-len", "2048", "--out", str(tmp_path / "traffic")]) == 0

    (command,) = ncu.commands
    assert command[command.index("--clock-control") + 1] == "none"
    assert command[command.index("--profile-from-start") + 1] == "off"
    assert command[-7:] == ["--profiled", "--seq-len", "2048", "--heads", "8", "--head-dim", "64"]

    rows = json.loads((tmp_path / "traffic.json").read_text())["rows"]
    assert [(row["function"], row["backward"]) for row in rows] == [
        ("math", False), ("flash", False), ("math", True), ("flash", True)
    ]  # fmt: skip
    assert (rows[0]["read_bytes"], rows[0]["written_bytes"], rows[0]["kernels"]) == (8e6, 1e6, 2)
    text = (tmp_path / "traffic.md").read_text()
    fewest = Measurement("flash", 2048, 8, 64, backward=False).fewest_bytes
    line = (
        f"| flash, forward, S 2,048 | 1 | 1.0 | 0.5 | {fewest / 1e6:.1f} | {1.5e6 / fewest:.1f} | 0.500 | 6.0× | 8.0× |"
    )
    assert line in text
    assert "    python -m scripts.hbm_traffic --seq-len 2048 --out" in text
    assert "| math, forward, S 2,048 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("output", "returncode", "expected"),
    [
        ("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission", 1, "ERR_NVGPUCTRPERM"),
        ("==ERROR== Failed to initialize the profiler: LibraryNotLoaded", 0, "LibraryNotLoaded"),
        ("==WARNING== No kernels were profiled.", 0, "no table of metrics"),
    ],
)
def test_no_counters_is_one_line_and_code_2(
    ncu: SimpleNamespace, output: str, returncode: int, expected: str, capsys: pytest.CaptureFixture[str]
):
    ncu.output, ncu.returncode = output + "\n", returncode
    with pytest.raises(SystemExit) as stopped:
        hbm_traffic.main([])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert expected in error
    assert error.count("\n") == 1


def test_a_program_that_fails_under_ncu_shows_its_own_error(ncu: SimpleNamespace):
    ncu.output, ncu.returncode = "torch.OutOfMemoryError: CUDA out of memory.\n", 1
    with pytest.raises(SystemExit, match="OutOfMemoryError"):
        hbm_traffic.main([])


def test_without_ncu_it_ends_with_code_2(ncu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setattr(hbm_traffic.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        hbm_traffic.main([])
    assert stopped.value.code == 2
    assert "Nsight Compute" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_with_code_2():
    with pytest.raises(SystemExit) as stopped:
        hbm_traffic.main([])
    assert stopped.value.code == 2
