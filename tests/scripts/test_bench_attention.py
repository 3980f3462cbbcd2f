"""The benchmark counts right, covers what it promises, and never prints a speed for a wrong result."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor

from kernels import attention
from scripts.bench_attention import check as checks
from scripts.bench_attention import peers, report, run, timing
from scripts.bench_attention.cases import GROUPS, MILLION, Case, choose_cases, on_grid
from scripts.bench_attention.peers import PEERS, Build, Implementation, why_left_out
from scripts.bench_attention.report import Row
from scripts.bench_attention.run import parse_args, run_case
from scripts.bench_attention.timing import Timing

CPU = torch.device("cpu")
SVG = "{http://www.w3.org/2000/svg}"
CAUSAL = Case(16, 48, 2, 4, 4)
FULL = Case(16, 48, 2, 4, 4, causal=False)
WINDOW = Case(16, 48, 2, 4, 4, window=5)
DOCUMENTS = Case(16, 48, 2, 4, 4, documents=(20, 1, 27))
GROUPED = Case(16, 48, 2, 4, 2)
KINDS = pytest.mark.parametrize("case", [CAUSAL, FULL, WINDOW, DOCUMENTS, GROUPED], ids=lambda case: case.label)


def exact(case: Case, starts: Tensor | None, device: torch.device) -> Implementation:
    """The definition in float32, as an implementation to measure."""
    options: dict[str, Any] = {"causal": case.causal, "window": case.window, "starts": starts}
    return Implementation(lambda q, k, v: attention(q.float(), k.float(), v.float(), **options).to(q.dtype))


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], Any]]:
    """What was timed; every call takes 2 ms on the GPU, and 3 from Python."""
    calls: list[Callable[[], Any]] = []

    def gpu_time(call: Callable[[], Any], budget_ms: float) -> Timing:
        calls.append(call)
        call()
        return Timing(2.0, waits=False)

    monkeypatch.setattr(run, "gpu_time", gpu_time)
    monkeypatch.setattr(run, "call_ms", lambda call, budget_ms: 3.0)
    return calls


def measure(case: Case, build: Build, monkeypatch: pytest.MonkeyPatch, peer: str = "flex") -> Row:
    monkeypatch.setitem(PEERS, peer, build)
    (row,) = run_case(case, [peer], CPU, 1.0)
    return row


# ---- counting and covering


def test_flops_are_four_per_pair_and_element_of_head_dim():
    assert Case(64, 1024, 16, 32, 32, causal=False).flops == 4 * 16 * 32 * 64 * 1024 * 1024
    assert Case(64, 1024, 16, 32, 32).flops == 4 * 16 * 32 * 64 * 1024 * 1024 / 2
    assert Case(64, 1024, 16, 32, 8).flops == Case(64, 1024, 16, 32, 32).flops  # each query head does its own work


def test_masked_pairs_are_counted_exactly():
    assert Case(16, 8, 1, 1, 1, window=3).pairs == 1 + 2 + 3 * 6
    assert Case(16, 8, 1, 1, 1, documents=(3, 5)).pairs == (1 + 2 + 3) + (1 + 2 + 3 + 4 + 5)
    assert Case(16, 8, 1, 1, 1, documents=(3, 5), window=2).pairs == (1 + 2 * 2) + (1 + 2 * 4)


def test_the_default_run_covers_what_the_record_promises():
    args = parse_args([])
    cases = choose_cases(args.only, args.head_dim, args.seq_len)
    assert len(set(cases)) == len(cases)
    for D in (64, 128, 256):
        for S in (1024, 4096, 16384, 65536):
            for causal in (True, False):
                case = Case(D, S, max(1, 16384 // S), 2048 // D, 2048 // D, causal=causal)
                assert case in cases
                assert case.is_grid
    special = [case for case in cases if not case.is_grid]
    assert len(cases) == 24 + 4 + len(special)
    for D, causal in product((96, 192), (True, False)):
        assert Case(D, 16384, 1, 2048 // D, 2048 // D, causal=causal) in cases
    for D in (64, 128):
        assert Case(D, 16384, 1, 2048 // D, 2048 // D, deterministic=True) in special
        assert Case(D, 16384, 1, 2048 // D, 2048 // D, softcap=50.0) in special
        assert Case(D, 1024, 1, 2048 // D, 2048 // D) in special
        assert Case(D, 16384, 1, 32, 32) in cases
        assert Case(D, 16384, 1, 32, 8) in special
        assert Case(D, 16384, 1, 2048 // D, 2048 // D, window=1024) in special
        (documents,) = (case for case in special if case.documents and case.head_dim == D)
        assert sum(documents.documents) / len(documents.documents) == 1024
        assert min(documents.documents) > 0
    assert Case(64, 51200, 32, 8, 8, dtype="float16") in special
    assert Case(64, 2**20, 1, 8, 8) in special


def test_options_select():
    chosen = parse_args(shlex.split("--only causal --head-dim 64 128 --seq-len 16384 --peers flash flex"))
    assert choose_cases(chosen.only, chosen.head_dim, chosen.seq_len) == [on_grid(64, 16384), on_grid(128, 16384)]
    assert chosen.peers == ["flash", "flex"]
    # The rows with documents bring the row that they are compared with, and D 128 alone leaves out D 64's shapes.
    assert on_grid(128, 16384) in choose_cases(["documents"], [128], [])
    assert choose_cases(["notes", "million"], [128], []) == []
    quick = parse_args(["--quick"])
    assert len(choose_cases(quick.only, quick.head_dim, quick.seq_len)) == 6


def test_what_would_not_fit_or_take_seconds_is_left_out():
    assert why_left_out("sdpa-math", on_grid(64, 4096)) is None
    assert "scores" in (why_left_out("sdpa-math", on_grid(64, 16384)) or "")
    assert why_left_out("sdpa-efficient", on_grid(64, 65536)) is not None
    assert why_left_out("flex", Case(64, 2**20, 1, 8, 8)) is not None
    assert why_left_out("flex", Case(64, 51200, 32, 8, 8, dtype="float16")) is None
    for case in choose_cases(GROUPS, [64, 128, 256], [1024, 65536]):
        assert why_left_out("flash", case) is None


# ---- right and wrong


@KINDS
def test_what_is_right_is_timed_forward_and_backward(case: Case, timed: list[Any], monkeypatch: pytest.MonkeyPatch):
    row = measure(case, exact, monkeypatch)
    assert set(row["errors"]) == {"out", "dq", "dk", "dv"}
    assert len(timed) == 2
    assert row["forward_tflops"] == pytest.approx(case.flops / 2e-3 / 1e12)
    assert row["backward_tflops"] == pytest.approx(2.5 * case.flops / 2e-3 / 1e12)


def test_the_projects_own_backends_run(timed: list[Any]):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = run_case(GROUPED, ["flash", "sdpa-math", "flex"], device, 1.0)
    assert [row.get("forward_ms") for row in rows] == [2.0, 2.0, 2.0]


def test_the_portable_kernels_are_measured_beside_ours_only_where_ours_are_others(
    timed: list[Any], monkeypatch: pytest.MonkeyPatch
):
    (row,) = run_case(CAUSAL, ["flash-triton"], CPU, 1.0)
    assert row["left_out"] == "is what flash runs on this GPU"
    monkeypatch.setattr(peers, "choose_implementation", lambda *_: "hopper")
    (row,) = run_case(CAUSAL, ["flash-triton"], CPU, 1.0)
    assert row["forward_ms"] == 2.0


def test_gradients_that_should_be_deterministic_are_computed_twice(timed: list[Any], monkeypatch: pytest.MonkeyPatch):
    runs = iter(range(1, 100))
    another_each_time = with_gradients("q", lambda x: x * (1 + 1e-3 * next(runs)))
    case = replace(CAUSAL, deterministic=True)
    assert "two runs differ" in measure(case, another_each_time, monkeypatch)["wrong"]
    assert "forward_ms" in measure(case, exact, monkeypatch)
    assert "forward_ms" in measure(CAUSAL, another_each_time, monkeypatch)
    assert "switch" in run_case(case, ["sdpa-math"], CPU, 1.0)[0]["left_out"]


def test_short_rows_are_also_timed_as_calls_from_python(timed: list[Any], monkeypatch: pytest.MonkeyPatch):
    assert measure(CAUSAL, exact, monkeypatch)["backward_call_ms"] == 3.0
    monkeypatch.setattr(run, "MOST_TOKENS_CALLED", 47)
    assert "backward_call_ms" not in measure(CAUSAL, exact, monkeypatch)


def without_the_mask(case: Case, starts: Tensor | None, device: torch.device) -> Implementation:
    return Implementation(lambda q, k, v: attention(q, k, v, causal=not case.causal))  # type: ignore[arg-type,return-value]


def with_gradients(name: str, change: Callable[[Tensor], Tensor]) -> Build:
    """Right output; this gradient changed on its way back."""

    def build(case: Case, starts: Tensor | None, device: torch.device) -> Implementation:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            x = {"q": q, "k": k, "v": v}
            x[name] = x[name].clone()
            x[name].register_hook(change)
            return exact(case, starts, device).attend(x["q"], x["k"], x["v"])

        return Implementation(attend)

    return build


def with_output(change: Callable[[Tensor], None]) -> Build:
    def build(case: Case, starts: Tensor | None, device: torch.device) -> Implementation:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = exact(case, starts, device).attend(q, k, v)
            with torch.no_grad():
                change(out)
            return out

        return Implementation(attend)

    return build


def shift_last_row(x: Tensor) -> Tensor:
    return torch.cat([x[:, :-1], x[:, :1]], 1)


WRONG: dict[str, Build] = {
    "no mask": without_the_mask,
    "dq too large": with_gradients("q", lambda x: x * 1.05),
    "dk in its last row": with_gradients("k", shift_last_row),
    "dv missing": with_gradients("v", torch.zeros_like),
    "dv NaN": with_gradients("v", lambda x: x * torch.nan),
    "out in its last row": with_output(lambda x: x[-1, -1, -1].zero_()),  # type: ignore[arg-type,return-value]
    "out NaN": with_output(lambda x: x[-1, 7, -1, 3].fill_(torch.nan)),  # type: ignore[arg-type,return-value]
}


@pytest.mark.parametrize("build", WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("sampled", [False, True], ids=["every row", "sampled rows"])
@KINDS
def test_what_is_wrong_is_never_timed(
    build: Build, sampled: bool, case: Case, timed: list[Any], monkeypatch: pytest.MonkeyPatch
):
    if sampled:
        monkeypatch.setattr(checks, "checked_rows", lambda case: [(6, 11), (43, 48)])
    assert "wrong" not in measure(case, exact, monkeypatch)
    timed.clear()
    row = measure(case, build, monkeypatch)
    assert row["wrong"]
    assert not timed
    assert not [name for name in row if name.endswith(("_ms", "_tflops"))]
    assert report.cell(row) == "WRONG"
    assert report.failures([row])


def test_a_tensor_of_twice_the_usual_error_is_wrong_and_of_the_usual_error_is_not(
    timed: list[Any], monkeypatch: pytest.MonkeyPatch
):
    inputs = checks.make_inputs(CAUSAL, CPU)
    check = checks.Check.of(CAUSAL, inputs)
    usual = checks.standard(CAUSAL, inputs, check.dout, torch.bfloat16)
    errors = {name: checks.error(usual[name], check.truth[name]) / limit for name, limit in check.limits.items()}
    for error in errors.values():
        assert 0.45 < error <= 0.5


def test_long_rows_are_sampled_in_the_middle_and_at_the_end():
    assert checks.checked_rows(on_grid(64, 16384)) == [(0, 16384)]
    assert checks.checked_rows(on_grid(64, 65536)) == [(32717, 32845), (65408, 65536)]
    assert len(checks.checked_rows(Case(64, 16384, 1, 32, 8))) == 2  # four query heads share the scores of one


def test_gradients_of_sampled_rows_are_those_of_a_zero_gradient_elsewhere(monkeypatch: pytest.MonkeyPatch):
    inputs = checks.make_inputs(WINDOW, CPU)
    rows = [(6, 11), (43, 48)]
    dout = checks.only_rows(inputs.dout, rows)
    assert dout[:, 11:43].count_nonzero() == 0
    assert torch.equal(dout[:, 43:48], inputs.dout[:, 43:48])
    dense = checks.standard(WINDOW, inputs, dout, torch.float64)
    monkeypatch.setattr(checks, "checked_rows", lambda case: rows)
    sampled = checks.standard(WINDOW, inputs, dout, torch.float64)
    for name in ("dq", "dk", "dv"):
        torch.testing.assert_close(sampled[name], dense[name])
    torch.testing.assert_close(sampled["out"], checks.at_rows(dense["out"], rows))


def test_a_peer_may_refuse_or_be_missing_but_ours_may_not(timed: list[Any], monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any) -> Implementation:
        raise RuntimeError("no kernel for this\nand a long trace")

    row = measure(CAUSAL, refuse, monkeypatch)
    assert row["refused"] == "RuntimeError: no kernel for this"
    assert report.cell(row) == "–"
    assert not report.failures([row])
    assert report.failures([measure(CAUSAL, refuse, monkeypatch, peer="flash")])
    assert "not installed" in measure(CAUSAL, peers.package("no_such_module"), monkeypatch)["left_out"]


@pytest.mark.parametrize(
    "case",
    [CAUSAL, FULL, WINDOW, DOCUMENTS, replace(CAUSAL, deterministic=True), replace(FULL, softcap=5.0)],
    ids=lambda case: case.label,
)
def test_flash_attn_packages_are_called_by_their_conventions(
    case: Case, timed: list[Any], monkeypatch: pytest.MonkeyPatch
):
    def flash_attn_func(
        q: Tensor, k: Tensor, v: Tensor, causal: bool = False, window_size: tuple[int, int] = (-1, -1),
        deterministic: bool = False, softcap: float = 0.0,
    ) -> tuple[Tensor, None]:  # fmt: skip
        assert deterministic == case.deterministic
        window = None if window_size == (-1, -1) else window_size[0] + 1  # counts the keys to the left
        out = attention(q, k, v, causal=causal, window=window, softcap=softcap)
        assert isinstance(out, Tensor)
        return out, None

    def flash_attn_varlen_func(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, causal: bool,
    ) -> Tensor:  # fmt: skip
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        lengths = cu_seqlens_q.diff().tolist()
        assert max(lengths) == max_seqlen_q == max_seqlen_k
        parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
        return torch.cat([flash_attn_func(*(x[None] for x in part), causal=causal)[0][0] for part in parts])

    functions = SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)
    installed = {"whole": functions, "fa3_fwd_interface": functions}

    def import_module(name: str) -> Any:
        if name not in installed:
            raise ImportError(f"No module named {name!r}")
        return installed[name]

    monkeypatch.setattr(peers, "import_module", import_module)
    row = measure(case, peers.package("missing", "whole", "fa3_fwd_interface"), monkeypatch, peer="fa4")
    assert row["forward_ms"] == row["backward_ms"] == 2.0
    forward_only = measure(case, peers.package("fa3_fwd_interface", "whole"), monkeypatch, peer="fa3")
    assert forward_only["forward_ms"] == 2.0
    assert set(forward_only["errors"]) == {"out"}  # its backward is not even called
    assert "backward_ms" not in forward_only
    missing = measure(case, peers.package("missing", "gone"), monkeypatch, peer="fa3")
    assert missing["left_out"] == "not installed (No module named 'missing'; No module named 'gone')"


# ---- time


class FakeGPU:
    """A host and a GPU with clocks of their own, in seconds, and the parts of torch.cuda that the timing uses."""

    def __init__(self, launch: float, kernels: Sequence[float]) -> None:
        self.launch, self.kernels = launch, kernels
        self.host = self.gpu = 0.0

    def run(self) -> None:
        """A call: launches of its kernels one after the other."""
        for seconds in self.kernels:
            self.host += self.launch
            self._queue(seconds)

    def _queue(self, seconds: float) -> None:
        self.gpu = max(self.gpu, self.host) + seconds

    def _sleep(self, cycles: int) -> None:
        self._queue(cycles / 1.98e9)

    def zero_(self) -> None:
        self._queue(1e-4)

    def synchronize(self) -> None:
        self.host = max(self.host, self.gpu)

    def Event(self, enable_timing: bool) -> FakeGPU.Stamp:
        return FakeGPU.Stamp(self)

    class Stamp:
        def __init__(self, gpu: FakeGPU) -> None:
            self.gpu = gpu

        def record(self) -> None:
            self.gpu._queue(0)
            self.at = self.gpu.gpu

        def query(self) -> bool:
            return self.at <= self.gpu.host

        def elapsed_time(self, end: FakeGPU.Stamp) -> float:
            return 1000 * (end.at - self.at)


def fake_gpu(monkeypatch: pytest.MonkeyPatch, launch: float, kernels: Sequence[float]) -> FakeGPU:
    gpu = FakeGPU(launch, kernels)
    monkeypatch.setattr(timing.torch, "cuda", gpu)
    monkeypatch.setattr(timing, "l2_flush", lambda: gpu)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: gpu.host)
    return gpu


def test_a_slow_host_does_not_enter_the_time_on_the_gpu(monkeypatch: pytest.MonkeyPatch):
    gpu = fake_gpu(monkeypatch, launch=4e-4, kernels=[1e-4, 2e-4, 1e-4])
    ms, waits = timing.gpu_time(gpu.run, budget_ms=20)
    assert ms == pytest.approx(0.4)
    assert not waits
    assert timing.call_ms(gpu.run, budget_ms=20) == pytest.approx(1.2, rel=0.1)


def test_a_fast_host_costs_a_call_nothing(monkeypatch: pytest.MonkeyPatch):
    gpu = fake_gpu(monkeypatch, launch=1e-5, kernels=[1e-3, 2e-3])
    assert timing.gpu_time(gpu.run, budget_ms=20) == (pytest.approx(3.0), False)
    assert timing.call_ms(gpu.run, budget_ms=20) == pytest.approx(3.0, rel=0.05)


def test_a_call_that_waits_for_the_gpu_is_said_to_have_gaps(monkeypatch: pytest.MonkeyPatch):
    gpu = fake_gpu(monkeypatch, launch=1e-4, kernels=[1e-3, 1e-3])

    def waiting() -> None:
        gpu.run()
        gpu.synchronize()
        gpu.run()

    ms, waits = timing.gpu_time(waiting, budget_ms=20)
    assert waits
    assert ms == pytest.approx(4.1)


# ---- the record


def measured(case: Case, peer: str, forward: float | None, backward: float | None, **more: Any) -> Row:
    row: Row = {"peer": peer, **asdict(case), **more}
    for name, tflops, times in (("forward", forward, 1.0), ("backward", backward, 2.5)):
        if tflops is not None:
            row |= {f"{name}_tflops": tflops, f"{name}_ms": times * case.flops / tflops / 1e9}
    return row


def test_a_table_shows_speeds_and_ratios_to_flex_and_to_the_best_other():
    case = on_grid(64, 16384)
    rows = [
        measured(case, "flash", 400, 300),
        measured(case, "flash-triton", 600, 600),  # no other: it is ours
        measured(case, "flex", 320, 200),
        measured(case, "fa3", 500, None),
        {"peer": "sdpa-math", **asdict(case), "left_out": "too large"},
        {"peer": "sdpa-flash", **asdict(case), "wrong": "dq is off"},
        # not among the figures that the means are taken over
        *(measured(other, peer, 1, 1) for other in (on_grid(64, 65536), WINDOW) for peer in ("flash", "flex")),
    ]
    text = "\n".join(report.tables(rows))
    assert "## head_dim 64" in text
    assert "| | flash | flash-triton | sdpa-flash | flex | fa3 | flash ÷ flex | flash ÷ best other |" in text
    figures = "2 figures (D 64 and 128, S up to 16,384): geometric mean"
    least = "smallest 0.80 (D 64, causal, S 16,384, forward)"
    assert f"- flash ÷ the fastest other, {figures} 1.095; 1 or more at 1; {least}." in text
    assert f"- flash ÷ flex, {figures} 1.369; 1 or more at 2" in text
    assert (
        "| causal, S 16,384 | 400 / 300 | 600 / 600 | WRONG | 320 / 200 | 500 / – | 1.25 / 1.50 | 0.80 / 1.50 |" in text
    )
    assert "- sdpa-math (D 64, causal, S 16,384): left out, too large" in text
    assert "- sdpa-flash (D 64, causal, S 16,384): wrong, dq is off" in text


def test_documents_are_compared_with_the_row_without():
    (documents,) = (case for case in choose_cases(["documents"], [128], []) if case.documents)
    plain = on_grid(128, 16384)
    rows = [measured(plain, "flash", 500, 400), measured(documents, "flash", 250, 100)]
    fewer = plain.pairs / documents.pairs
    text = "\n".join(report.tables(rows))
    gains = f"{fewer / 2:.1f}× / {fewer / 4:.1f}×"
    assert f"- flash, D 128, S 16,384: documents of 1,024 tokens on average, {gains} the speed without them." in text


def test_the_price_of_determinism_is_shown():
    rows = [
        measured(on_grid(64, 16384), "flash", 500, 400),
        measured(on_grid(64, 16384, deterministic=True), "flash", 500, 320),
    ]
    assert "- flash, D 64, S 16,384: deterministic gradients take 25 % more time." in report.tables(rows)


def test_the_price_of_a_soft_cap_is_shown():
    rows = [
        measured(on_grid(64, 16384), "flash", 500, 400),
        measured(on_grid(64, 16384, softcap=50.0), "flash", 400, 360),
    ]
    assert "- flash, D 64, S 16,384: 0.80× / 0.90× the speed with a soft cap of 50." in report.tables(rows)


def test_calls_of_short_rows_stand_beside_their_time_on_the_gpu():
    case = on_grid(64, 1024)
    calls = {"forward_ms": 0.2, "forward_call_ms": 0.25, "backward_ms": 0.5, "backward_call_ms": 0.55}
    rows = [
        measured(case, "flash", 1, 1) | calls,
        measured(case, "fa3", 1, None) | {"forward_ms": 0.3, "forward_call_ms": 0.3},
    ]
    text = "\n".join(report.tables(rows))
    assert "| D 64, causal, S 1,024 | forward | 200 → 250 | 300 → 300 |" in text
    assert "| D 64, causal, S 1,024 | backward | 500 → 550 | – |" in text


def test_errors_are_shown_at_the_longest_row_that_is_compared_in_full():
    errors = {"out": 0.00312, "dq": 0.0041, "dk": 0.005, "dv": 0.0033}
    rows = [
        measured(on_grid(64, S), peer, 1, 1, errors=errors | {"out": S / 1e7})
        for S in (4096, 16384, 65536)
        for peer in ("flash", "fa4")
    ]
    (line,) = (line for line in report.tables(rows) if "4.10" in line)
    assert line == "| D 64, causal, S 16,384 | 1.64, 4.10, 5.00, 3.30 | 1.64, 4.10, 5.00, 3.30 |"


def test_times_with_gaps_in_them_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run, "gpu_time", lambda call, budget_ms: Timing(2.0, waits=True))
    monkeypatch.setattr(run, "call_ms", lambda call, budget_ms: 3.0)
    row = measure(CAUSAL, exact, monkeypatch)
    assert any("waits, the GPU waited for launches" in line for line in report.tables([row]))


def long_rows(extra: int = 0) -> list[Row]:
    rows = []
    for case in MILLION:
        forward = case.seq_len * 8 * (64 * 2 + 4)  # out, LSE
        backward = case.seq_len * 8 * (64 * 2 * 4 + 8)  # and dq, dk, dv and the row statistic
        assert report.outputs_bytes(case) == (forward, backward)
        growth = extra * case.seq_len**2
        rows.append(
            measured(
                case, "flash", 400, 300, forward_bytes=forward + growth, backward_bytes=backward + growth, errors={}
            )
        )
    return rows


def test_memory_that_grows_linearly_is_shown_and_memory_that_does_not_fails():
    text = "\n".join(report.tables(long_rows()))
    assert "| 1,048,576 | 1,056.0 | 1,056.0 | 4,160.0 | 4,160.0 |" in text
    assert "Linear in S: bytes per token differ by 0.00 % at most." in text
    assert not report.failures(long_rows())
    assert "NOT LINEAR IN S" in "\n".join(report.tables(long_rows(extra=1)))
    assert report.failures(long_rows(extra=1)) == ["peak memory does not grow linearly in S"]


def test_the_plot_has_a_panel_per_head_dim_direction_and_mask():
    rows = [
        measured(on_grid(D, S, causal=causal), peer, 300, None if peer == "fa3" else 200)
        for D in (64, 128) for S in (1024, 4096) for causal in (True, False) for peer in ("flash", "fa3")
    ]  # fmt: skip
    plots = report.charts(rows)
    groups = {ending: list(ElementTree.fromstring(svg).iter(f"{SVG}g")) for ending, svg in plots.items()}
    assert {ending: len(found) for ending, found in groups.items()} == {".svg": 8, "-causal.svg": 2, "-ratio.svg": 2}
    assert [len(list(panel.iter(f"{SVG}circle"))) for panel in groups["-ratio.svg"]] == [4, 4]  # forward alone
    assert report.charts([measured(WINDOW, "flash", 1, 1)]) == {}


@pytest.fixture
def small_run(monkeypatch: pytest.MonkeyPatch, timed: list[Any]) -> list[str]:
    """main() on two tiny cases on the CPU, with one right implementation that the test may break."""
    monkeypatch.setattr(run, "need_cuda", lambda script: CPU)
    monkeypatch.setattr(run, "choose_cases", lambda *_: [CAUSAL, DOCUMENTS])
    monkeypatch.setitem(PEERS, "flex", exact)
    return ["--peers", "flex"]


def test_a_run_writes_markdown_and_json_with_its_facts(small_run: list[str], tmp_path: Path):
    assert run.main([*small_run, "--out", str(tmp_path / "a.b")]) == 0
    record = json.loads((tmp_path / "a.b.json").read_text())
    assert [row["forward_ms"] for row in record["rows"]] == [2.0, 2.0]
    assert record["rows"][1]["documents"] == [20, 1, 27]
    assert {"device", "versions", "commit", "command"} <= set(record["facts"])
    text = (tmp_path / "a.b.md").read_text()
    assert f"torch {record['facts']['versions']['torch']}" in text
    assert f"    python -m scripts.bench_attention --peers flex --out {tmp_path / 'a.b'}" in text


def test_a_wrong_result_ends_the_run_with_code_1_and_shows_no_speed(
    small_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(PEERS, "flex", with_gradients("q", lambda x: x * 1.05))
    assert run.main([*small_run, "--out", str(tmp_path / "record")]) == 1
    printed = capsys.readouterr()
    assert printed.out.count("| WRONG |") == 2
    assert "FAILED flex dq is off by" in printed.err
    assert "| WRONG |" in (tmp_path / "record.md").read_text()
    assert "_tflops" not in (tmp_path / "record.json").read_text()


def test_a_killed_run_leaves_what_it_had(small_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def build(case: Case, starts: Tensor | None, device: torch.device) -> Implementation:
        if case.documents:
            raise KeyboardInterrupt
        return exact(case, starts, device)

    monkeypatch.setitem(PEERS, "flex", build)
    with pytest.raises(KeyboardInterrupt):
        run.main([*small_run, "--out", str(tmp_path / "record")])
    (row,) = json.loads((tmp_path / "record.json").read_text())["rows"]
    assert row["forward_ms"] == 2.0
    assert "| flex |" in (tmp_path / "record.md").read_text()


def test_the_final_tables_of_a_full_run_fit_two_screens():
    args = parse_args([])
    rows = [
        measured(case, peer, 400, 300, forward_bytes=case.seq_len, backward_bytes=case.seq_len)
        for case in choose_cases(args.only, args.head_dim, args.seq_len)
        for peer in PEERS
    ]
    assert len([line for line in report.tables(rows) if line]) <= 86


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_with_code_2():
    with pytest.raises(SystemExit) as stopped:
        run.main([])
    assert stopped.value.code == 2
