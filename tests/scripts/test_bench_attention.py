"""The benchmark counts right, covers what it promises, and never prints a speed for a wrong result."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor

from kernels import attention
from scripts import bench_attention as bench
from scripts.bench_attention import Case, Row, choose_cases, on_grid, parse_args, run_case

CPU = torch.device("cpu")
CAUSAL = Case(16, 48, 2, 4, 4)
FULL = Case(16, 48, 2, 4, 4, causal=False)
WINDOW = Case(16, 48, 2, 4, 4, window=5)
DOCUMENTS = Case(16, 48, 2, 4, 4, documents=(20, 1, 27))
GROUPED = Case(16, 48, 2, 4, 2)
KINDS = pytest.mark.parametrize("case", [CAUSAL, FULL, WINDOW, DOCUMENTS, GROUPED], ids=lambda case: case.label)


def exact(case: Case, starts: Tensor | None, device: torch.device) -> bench.Attend:
    """The definition in float32, as an implementation to measure."""
    options: dict[str, Any] = {"causal": case.causal, "window": case.window, "starts": starts}
    return lambda q, k, v: attention(q.float(), k.float(), v.float(), **options).to(q.dtype)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], Any]]:
    """What was timed; every call takes 2 ms."""
    calls: list[Callable[[], Any]] = []

    def median_ms(run: Callable[[], Any], budget_ms: float) -> float:
        calls.append(run)
        run()
        return 2.0

    monkeypatch.setattr(bench, "median_ms", median_ms)
    monkeypatch.setattr(bench, "launch_us", lambda run: 50.0)
    return calls


def measure(case: Case, build: bench.Build, monkeypatch: pytest.MonkeyPatch, peer: str = "flex") -> Row:
    monkeypatch.setitem(bench.PEERS, peer, build)
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
    assert len(cases) == 24 + len(special)
    for D in (64, 128):
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
    assert bench.why_left_out("sdpa-math", on_grid(64, 4096)) is None
    assert "scores" in (bench.why_left_out("sdpa-math", on_grid(64, 16384)) or "")
    assert bench.why_left_out("sdpa-efficient", on_grid(64, 65536)) is not None
    assert bench.why_left_out("flex", Case(64, 2**20, 1, 8, 8)) is not None
    assert bench.why_left_out("flex", Case(64, 51200, 32, 8, 8, dtype="float16")) is None
    for case in choose_cases(bench.GROUPS, [64, 128, 256], [1024, 65536]):
        assert bench.why_left_out("flash", case) is None


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


def without_the_mask(case: Case, starts: Tensor | None, device: torch.device) -> bench.Attend:
    return lambda q, k, v: attention(q, k, v, causal=not case.causal)  # type: ignore[return-value]


def with_gradients(name: str, change: Callable[[Tensor], Tensor]) -> bench.Build:
    """Right output; this gradient changed on its way back."""

    def build(case: Case, starts: Tensor | None, device: torch.device) -> bench.Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            x = {"q": q, "k": k, "v": v}
            x[name] = x[name].clone()
            x[name].register_hook(change)
            return exact(case, starts, device)(x["q"], x["k"], x["v"])

        return attend

    return build


def with_output(change: Callable[[Tensor], None]) -> bench.Build:
    def build(case: Case, starts: Tensor | None, device: torch.device) -> bench.Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = exact(case, starts, device)(q, k, v)
            with torch.no_grad():
                change(out)
            return out

        return attend

    return build


def shift_last_row(x: Tensor) -> Tensor:
    return torch.cat([x[:, :-1], x[:, :1]], 1)


WRONG: dict[str, bench.Build] = {
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
    build: bench.Build, sampled: bool, case: Case, timed: list[Any], monkeypatch: pytest.MonkeyPatch
):
    if sampled:
        monkeypatch.setattr(bench, "checked_rows", lambda case: [(6, 11), (43, 48)])
    assert "wrong" not in measure(case, exact, monkeypatch)
    timed.clear()
    row = measure(case, build, monkeypatch)
    assert row["wrong"]
    assert not timed
    assert not [name for name in row if name.endswith(("_ms", "_tflops"))]
    assert bench.cell(row) == "WRONG"
    assert bench.failures([row])


def test_a_tensor_of_twice_the_usual_error_is_wrong_and_of_the_usual_error_is_not(
    timed: list[Any], monkeypatch: pytest.MonkeyPatch
):
    inputs = bench.make_inputs(CAUSAL, CPU)
    check = bench.Check.of(CAUSAL, inputs)
    usual = bench.standard(CAUSAL, inputs, check.dout, torch.bfloat16)
    errors = {name: bench.distance(usual[name], check.truth[name]) / limit for name, limit in check.limits.items()}
    for error in errors.values():
        assert 0.45 < error <= 0.5


def test_long_rows_are_sampled_in_the_middle_and_at_the_end():
    assert bench.checked_rows(on_grid(64, 16384)) == [(0, 16384)]
    assert bench.checked_rows(on_grid(64, 65536)) == [(32717, 32845), (65408, 65536)]
    assert len(bench.checked_rows(Case(64, 16384, 1, 32, 8))) == 2  # four query heads share the scores of one


def test_gradients_of_sampled_rows_are_those_of_a_zero_gradient_elsewhere(monkeypatch: pytest.MonkeyPatch):
    inputs = bench.make_inputs(WINDOW, CPU)
    rows = [(6, 11), (43, 48)]
    dout = bench.only_rows(inputs.dout, rows)
    assert dout[:, 11:43].count_nonzero() == 0
    assert torch.equal(dout[:, 43:48], inputs.dout[:, 43:48])
    dense = bench.standard(WINDOW, inputs, dout, torch.float64)
    monkeypatch.setattr(bench, "checked_rows", lambda case: rows)
    sampled = bench.standard(WINDOW, inputs, dout, torch.float64)
    for name in ("dq", "dk", "dv"):
        torch.testing.assert_close(sampled[name], dense[name])
    torch.testing.assert_close(sampled["out"], bench.at_rows(dense["out"], rows))


def test_a_peer_may_refuse_or_be_missing_but_ours_may_not(timed: list[Any], monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any) -> bench.Attend:
        raise RuntimeError("no kernel for this\nand a long trace")

    row = measure(CAUSAL, refuse, monkeypatch)
    assert row["refused"] == "RuntimeError: no kernel for this"
    assert bench.cell(row) == "–"
    assert not bench.failures([row])
    assert bench.failures([measure(CAUSAL, refuse, monkeypatch, peer="flash")])
    assert "not installed" in measure(CAUSAL, bench.package("no_such_module"), monkeypatch)["left_out"]


@pytest.mark.parametrize("case", [CAUSAL, FULL, WINDOW, DOCUMENTS], ids=lambda case: case.label)
def test_flash_attn_packages_are_called_by_their_conventions(
    case: Case, timed: list[Any], monkeypatch: pytest.MonkeyPatch
):
    def flash_attn_func(
        q: Tensor, k: Tensor, v: Tensor, causal: bool = False, window_size: tuple[int, int] = (-1, -1)
    ) -> tuple[Tensor, None]:
        window = None if window_size == (-1, -1) else window_size[0] + 1  # counts the keys to the left
        out = attention(q, k, v, causal=causal, window=window)
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

    module = SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setattr(bench, "import_module", lambda name: {"package": module}[name])
    row = measure(case, bench.package("package"), monkeypatch, peer="fa4")
    assert row["forward_ms"] == row["backward_ms"] == 2.0
    forward_only = measure(case, bench.package("package"), monkeypatch, peer="fa3")
    assert forward_only["forward_ms"] == 2.0
    assert set(forward_only["errors"]) == {"out"}  # its backward is not even called
    assert "backward_ms" not in forward_only


# ---- the record


def measured(case: Case, peer: str, forward: float | None, backward: float | None, **more: Any) -> Row:
    row: Row = {"peer": peer, **bench.asdict(case), **more}
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
        {"peer": "sdpa-math", **bench.asdict(case), "left_out": "too large"},
        {"peer": "sdpa-flash", **bench.asdict(case), "wrong": "dq is off"},
    ]
    text = "\n".join(bench.tables(rows))
    assert "## head_dim 64" in text
    assert "| | flash | flash-triton | sdpa-flash | flex | fa3 | flash ÷ flex | flash ÷ best other |" in text
    assert "geometric mean 1.095, from 0.80 to 1.50; at least as fast in 1." in text
    assert "| causal, S 16,384 | 400 / 300 | 600 / 600 | WRONG | 320 / 200 | 500 / – | 1.25 / 1.50 | 0.80 / 1.50 |" in text
    assert "- sdpa-math (D 64, causal, S 16,384): left out, too large" in text
    assert "- sdpa-flash (D 64, causal, S 16,384): wrong, dq is off" in text


def test_documents_are_compared_with_the_row_without():
    (documents,) = (case for case in choose_cases(["documents"], [128], []) if case.documents)
    plain = on_grid(128, 16384)
    rows = [measured(plain, "flash", 500, 400), measured(documents, "flash", 250, 100)]
    fewer = plain.pairs / documents.pairs
    text = "\n".join(bench.tables(rows))
    assert f"{fewer / 2:.1f}× / {fewer / 4:.1f}× the speed of the same row without documents" in text
    assert "16 documents of 1,024 tokens on average, D 128" in text


def long_rows(extra: int = 0) -> list[Row]:
    rows = []
    for case in bench.MILLION:
        forward = case.seq_len * 8 * (64 * 2 + 4)  # out, LSE
        backward = case.seq_len * 8 * (64 * 2 * 4 + 8)  # and dq, dk, dv and the row statistic
        assert bench.outputs_bytes(case) == (forward, backward)
        growth = extra * case.seq_len**2
        rows.append(
            measured(
                case, "flash", 400, 300, forward_bytes=forward + growth, backward_bytes=backward + growth, errors={}
            )
        )
    return rows


def test_memory_that_grows_linearly_is_shown_and_memory_that_does_not_fails():
    text = "\n".join(bench.tables(long_rows()))
    assert "| 1,048,576 | 1,056.0 | 1,056.0 | 4,160.0 | 4,160.0 |" in text
    assert "Linear in S: bytes per token differ by 0.00 % at most." in text
    assert not bench.failures(long_rows())
    assert "NOT LINEAR IN S" in "\n".join(bench.tables(long_rows(extra=1)))
    assert bench.failures(long_rows(extra=1)) == ["peak memory does not grow linearly in S"]


def test_the_plot_has_a_panel_per_head_dim_direction_and_mask():
    rows = [
        measured(on_grid(D, S, causal=causal), peer, 300, None if peer == "fa3" else 200)
        for D in (64, 128) for S in (1024, 4096) for causal in (True, False) for peer in ("flash", "fa3")
    ]  # fmt: skip
    svg = bench.chart(rows)
    assert svg is not None
    groups = list(ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}g"))
    assert len(groups) == 8
    assert bench.chart([measured(WINDOW, "flash", 1, 1)]) is None


@pytest.fixture
def small_run(monkeypatch: pytest.MonkeyPatch, timed: list[Any]) -> list[str]:
    """main() on two tiny cases on the CPU, with one right implementation that the test may break."""
    monkeypatch.setattr(bench, "need_cuda", lambda script: CPU)
    monkeypatch.setattr(bench, "choose_cases", lambda *_: [CAUSAL, DOCUMENTS])
    monkeypatch.setitem(bench.PEERS, "flex", exact)
    return ["--peers", "flex"]


def test_a_run_writes_markdown_and_json_with_its_facts(small_run: list[str], tmp_path: Path):
    assert bench.main([*small_run, "--out", str(tmp_path / "a.b")]) == 0
    record = json.loads((tmp_path / "a.b.json").read_text())
    assert [row["forward_ms"] for row in record["rows"]] == [2.0, 2.0]
    assert record["rows"][1]["documents"] == [20, 1, 27]
    assert {"device", "versions", "commit", "command"} <= set(record["facts"])
    text = (tmp_path / "a.b.md").read_text()
    assert f"torch {torch.__version__}" in text
    assert f"    python -m scripts.bench_attention --peers flex --out {tmp_path / 'a.b'}" in text


def test_a_wrong_result_ends_the_run_with_code_1_and_shows_no_speed(
    small_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(bench.PEERS, "flex", with_gradients("q", lambda x: x * 1.05))
    assert bench.main([*small_run, "--out", str(tmp_path / "record")]) == 1
    printed = capsys.readouterr()
    assert printed.out.count("| WRONG |") == 2
    assert "FAILED flex dq is off by" in printed.err
    assert "| WRONG |" in (tmp_path / "record.md").read_text()
    assert "_tflops" not in (tmp_path / "record.json").read_text()


def test_a_killed_run_leaves_what_it_had(small_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def build(case: Case, starts: Tensor | None, device: torch.device) -> bench.Attend:
        if case.documents:
            raise KeyboardInterrupt
        return exact(case, starts, device)

    monkeypatch.setitem(bench.PEERS, "flex", build)
    with pytest.raises(KeyboardInterrupt):
        bench.main([*small_run, "--out", str(tmp_path / "record")])
    (row,) = json.loads((tmp_path / "record.json").read_text())["rows"]
    assert row["forward_ms"] == 2.0


def test_the_final_table_of_a_full_run_fits_a_screen():
    args = parse_args([])
    rows = [
        measured(case, peer, 400, 300, forward_bytes=case.seq_len, backward_bytes=case.seq_len)
        for case in choose_cases(args.only, args.head_dim, args.seq_len)
        for peer in bench.PEERS
    ]
    assert len([line for line in bench.tables(rows) if line]) <= 60


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_with_code_2():
    with pytest.raises(SystemExit) as stopped:
        bench.main([])
    assert stopped.value.code == 2
