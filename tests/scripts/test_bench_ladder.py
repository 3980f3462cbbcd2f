"""The ladder measures what train.py does, keeps what it measured, and says what was wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from model.activations_config import SelectiveConfig
from scripts.bench_training import ladder
from scripts.bench_training.ladder import complaints_about, is_checked, main, profile_lines
from scripts.bench_training.measure import Clock, measured, settings
from scripts.bench_training.rungs import RUNGS, Rung
from training.profiled import Event, covered, events_of, exposed, summary

TINY = "model=tiny model.n_layers=3 device=cpu compile=false attention=sdpa optimizer=adamw tokenizer=bytes "
TINY += "batch_size=1 seq_len=64 data.document_mask=false"
SMALL = {
    "none": Rung("memory=none", steps=5, window=2, base=TINY),
    "full": Rung("memory=full memory.tile=24", steps=3, base=TINY),
    "offload": Rung("memory=offload", steps=1, base=TINY),
}
Row = dict[str, Any]
FIGURES: Row = {
    "model": "tiny", "policy": "none", "seq_len": 64, "steps": 4, "step_s": 2.0, "first_step_s": 9.0, "mfu": 0.5,
    "tokens_per_second": 32.0, "tflops": 1.0, "peak_allocated_gib": 3.0, "predicted_gib": 3.1,
    "peak_reserved_gib": 4.0, "pinned_gib": 0.0, "losses": [9.0], "grad_norms": [1.0],
}  # fmt: skip


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU, and in this process, where a run takes a second instead of ten."""
    monkeypatch.setattr(ladder, "need_cuda", lambda script: torch.device("cpu"))
    monkeypatch.setattr(ladder, "run", lambda words, profile=False, gpus=1: measured(list(words)))
    monkeypatch.setattr(ladder, "CHECKED_AT_ONCE", 1)  # Hydra composes one configuration at a time in a process


def record(out: Path) -> dict[str, Row]:
    return {row["rung"]: row for row in json.loads(out.with_suffix(".json").read_text())["rows"]}


# ---- the ladder


def test_every_rung_is_a_run_and_the_record_says_what_was_measured(tmp_path: Path) -> None:
    out = tmp_path / "record"
    assert main(["--out", str(out)], SMALL) == 0
    rows = record(out)
    assert list(rows) == list(SMALL)
    assert [rows[name]["steps"] for name in SMALL] == [4, 2, 1]
    assert rows["full"]["checked"]
    for name, row in rows.items():
        assert row["tokens_per_second"] * row["step_s"] == pytest.approx(64)
        assert row["policy"] == name
        assert row["command"].startswith("python train.py model=tiny")
        assert row["losses"][-1] == pytest.approx(rows["none"]["losses"][-1], rel=0.2)
    assert rows["offload"]["step_s"] == rows["offload"]["first_step_s"]
    # Of three layers two are on the host, each with 64 tokens' input, attention's output and LSE.
    assert rows["offload"]["pinned_gib"] * 2**30 == 2 * 64 * (4 * 128 + 4 * 128 + 4 * 4)
    page = out.with_suffix(".md").read_text()
    assert re.search(r"\| offload \| [\d,]+ \| [\d.]+ \| 1 \(the first\) \|", page)


def test_a_ladder_is_climbed_in_several_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "record"
    call = 0
    monkeypatch.setattr(
        ladder,
        "run",
        lambda words, profile=False, gpus=1: {
            **FIGURES,
            "policy": words[-3].removeprefix("memory="),
            "step_s": float(call),
        },
    )
    main(["--out", str(out), "--rungs", "none"], SMALL)
    first, call = record(out)["none"], 1
    main(["--out", str(out), "--rungs", "offload", "--no-check"], SMALL)
    assert record(out)["none"] == first
    assert not record(out)["offload"]["checked"]
    assert "numbers not checked in this call" in out.with_suffix(".md").read_text()
    call = 2
    main(["--out", str(out), "--rungs", "none"], SMALL)
    assert {name: row["step_s"] for name, row in record(out).items()} == {"none": 2, "offload": 1}


def test_a_profile_stands_beside_the_figures_and_outlives_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, where = tmp_path / "record", summary([Event("forward_kernel", 0, 1)], span=2.0)

    def run(words: list[str], profile: bool) -> Row:
        return {**FIGURES, "profile": where} if profile else FIGURES

    monkeypatch.setattr(ladder, "run", run)
    main(["--out", str(out), "--rungs", "none"], SMALL)
    main(["--out", str(out), "--profile", "none"], SMALL)
    main(["--out", str(out), "--rungs", "none"], SMALL)
    row = record(out)["none"]
    assert row["profile"]["seconds"]["idle"] == 1.0
    assert row["tokens_per_second"] == FIGURES["tokens_per_second"]
    page = out.with_suffix(".md").read_text()
    assert "Where a step's time goes: none" in page
    assert "| attention | 1.000 | 50.0 % |" in page


def test_nanogpt_stands_below_the_rungs_that_it_can_compute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = {key: FIGURES[key] for key in ("tokens_per_second", "step_s", "steps", "tflops", "peak_allocated_gib")}
    asked: list[str] = []

    def run(words: list[str], profile: bool = False, gpus: int = 1, module: str = "measure") -> Row:
        asked.append(" ".join([module, *words]))
        return dict(FIGURES if module == "measure" else theirs)

    monkeypatch.setattr(ladder, "run", run)
    (tmp_path / "model.py").touch()
    rungs = {
        "gpt2-124m-16k": Rung("memory=none", steps=5, base=TINY, nanogpt=True),
        "gpt2-124m-64k": Rung("memory=none", steps=5, base=TINY),
    }
    assert main(["--out", str(tmp_path / "record"), "--nanogpt", str(tmp_path)], rungs) == 0
    assert list(record(tmp_path / "record")) == ["gpt2-124m-16k", "gpt2-124m-16k, nanoGPT", "gpt2-124m-64k"]
    assert asked[1].startswith(f"nanogpt {tmp_path} model=tiny")
    assert len(asked) == 3
    page = (tmp_path / "record.md").read_text()
    assert "| gpt2-124m-16k, nanoGPT | 32 | 2.000 | 4 | 1 | – | 3.0 | – | – | – |" in page
    assert f"`python -m scripts.bench_training.nanogpt {tmp_path} model=tiny" in page


def test_a_folder_without_nanogpt_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--nanogpt", str(tmp_path)])
    assert "has no model.py; name a checkout of karpathy/nanoGPT" in capsys.readouterr().err


def test_the_plot_shows_each_policy_of_one_model() -> None:
    rows = [
        {**FIGURES, "rung": "a", "model": "llama-1b", "policy": "full", "seq_len": 65536},
        {**FIGURES, "rung": "b", "model": "llama-1b", "policy": "offload", "seq_len": 131072},
        {"rung": "c", "model": "llama-1b", "policy": "none", "out_of_memory": "…"},
        {**FIGURES, "rung": "d", "model": "gpt2-124m", "policy": "selective", "seq_len": 16384},
    ]
    plot = ladder.chart(rows)
    assert plot is not None
    assert all(word in plot for word in (">full<", ">offload<", ">64k<", ">128k<", "peak GiB", "TFLOP/s"))
    assert ">selective<" not in plot
    assert ladder.chart(rows[2:]) is None


def test_the_record_of_another_device_is_not_added_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = {"device": {"name": "CARD"}}
    (tmp_path / "record.json").write_text(json.dumps({"facts": facts, "rows": []}))
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "record"), "--rungs", "none"], SMALL)
    assert "is of another device, CARD" in capsys.readouterr().err


def test_what_does_not_fit_is_a_result_and_what_is_refused_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "record"
    monkeypatch.setattr(ladder, "run", lambda words, profile=False, gpus=1: {"out_of_memory": "139 GiB | held"})
    assert main(["--out", str(out), "--rungs", "none"], SMALL) == 0
    assert "| none | out of memory: 139 GiB / held | | | | | | | | |" in out.with_suffix(".md").read_text()
    monkeypatch.undo()
    monkeypatch.setattr(ladder, "need_cuda", lambda script: torch.device("cpu"))
    monkeypatch.setattr(ladder, "run", lambda words, profile=False, gpus=1: measured([*words, "model.dim=7"]))
    assert main(["--out", str(out), "--rungs", "none"], SMALL) == 1
    assert "dim" in record(out)["none"]["refused"]


def test_every_rung_of_the_record_has_one_length_and_what_it_is_about_is_checked() -> None:
    for name, rung in RUNGS.items():
        assert sum(word.startswith("seq_len=") for word in rung.words) == 1, name
        is_plain = not any(part in name for part in ("graphs", "fp8", "selective", "full", "offload"))
        assert is_checked(rung.words) != is_plain, name


@pytest.mark.parametrize(
    ("words", "left_out"),
    [
        ("seq_len=4k cuda_graphs=true", {"cuda_graphs=true"}),
        ("seq_len=4k precision=fp8 precision.scaling=rowwise", {"precision=fp8", "precision.scaling=rowwise"}),
    ],
)
def test_fp8_and_recorded_steps_are_compared_with_bf16_and_plain_ones(
    monkeypatch: pytest.MonkeyPatch, words: str, left_out: set[str]
) -> None:
    asked: list[list[str]] = []
    figures = [{"losses": [1.0], "grad_norms": [1.0]}, {"losses": [1.008], "grad_norms": [1.05]}]
    monkeypatch.setattr(
        ladder, "run", lambda words, profile=False, gpus=1: asked.append(list(words)) or figures[len(asked) - 1]
    )
    said = complaints_about({"rung": words.split()})["rung"]
    assert set(asked[0]) - set(asked[1]) == left_out
    assert (said is None) == ("precision=fp8" in words), "fp8 may be that far off"


def test_a_wrong_policy_has_no_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(words: list[str], profile: bool = False, gpus: int = 1) -> Row:
        wrong = 1.03 if "memory=full" in words else 1.0
        return {"losses": [9.0, 8.0], "grad_norms": [1.0, 2.0 * wrong]}

    monkeypatch.setattr(ladder, "run", run)
    said = complaints_about({"full": SMALL["full"].words})["full"]
    assert said == "grad_norms of step 2: 2.06000, and 2.00000 where everything is kept"
    assert main(["--out", str(tmp_path / "record"), "--rungs", "full"], SMALL) == 1
    row = record(tmp_path / "record")["full"]
    assert row["wrong"] == said
    assert "step_s" not in row


@pytest.mark.parametrize(
    ("words", "seq_len"), [("seq_len=1024k memory=full", 16384), ("seq_len=4096 memory=full memory.tile=8", 4096)]
)
def test_a_policy_is_compared_on_a_short_row_with_keeping_everything(
    monkeypatch: pytest.MonkeyPatch, words: str, seq_len: int
) -> None:
    asked: list[set[str]] = []
    figures = {"losses": [1.0], "grad_norms": [1.0]}
    monkeypatch.setattr(ladder, "run", lambda words, profile=False, gpus=1: asked.append(set(words)) or figures)
    assert complaints_about({"rung": words.split(), "plain": ["memory=none"]}) == {"rung": None}
    ours, theirs = asked
    assert theirs - ours == {"memory=none", "compile=false"}
    assert {word for word in words.split() if word.startswith("memory")} == ours - theirs
    assert f"seq_len={seq_len}" in ours & theirs


def test_settings_of_a_try_are_in_the_command_and_never_in_the_record(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    main(["--list", "--rungs", "full", "--set", "memory.tile=8"], SMALL)
    assert capsys.readouterr().out.split("full", 1)[1].strip().endswith("memory.tile=24 memory.tile=8")
    with pytest.raises(SystemExit):
        main(["--rungs", "full", "--set", "memory.tile=8", "--out", str(tmp_path / "record")], SMALL)


@pytest.mark.slow
def test_a_rung_is_measured_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    words = [*SMALL["none"].words, "max_steps=2", "log_every=1"]
    assert ladder.run(words)["steps"] == 1
    assert ladder.run([*words, "no_setting=1"])["refused"].startswith("no_setting is not a setting")
    assert "exit code 2" in ladder.run([*words, "--no-option"])["failed"]


@pytest.mark.parametrize("name", RUNGS)
def test_a_rung_is_what_its_name_says(name: str) -> None:
    rung = RUNGS[name]
    config = settings([*rung.words, f"max_steps={rung.steps}", "run_dir=x"])
    assert name.startswith(f"{config.model.name}-{config.seq_len // 1024}k".replace("-1024k", "-1m"))
    policy = config.memory.name
    assert (policy in name) == (policy != "none")
    assert rung.window == 1 or rung.steps % rung.window == 0
    assert not isinstance(config.memory, SelectiveConfig) or config.memory.layers == 1


def test_the_first_step_is_measured_only_where_it_is_the_only_one() -> None:
    clock = Clock()
    clock.seconds = {0: 10.0, 1: 60.0, 10: 69.0, 20: 89.0, 30: 99.0}
    assert clock.step_seconds() == (1.0, 29)
    clock.seconds = {0: 10.0, 1: 60.0}
    assert clock.step_seconds() == (50.0, 1)


# ---- where the time goes


def test_a_profiled_step_is_trained_besides_those_that_are_measured() -> None:
    words = [*TINY.split(), "max_steps=4", "log_every=1"]
    found = measured(words, profile=True)
    assert found["steps"] == measured(words)["steps"]
    assert found["profile"]["steps"] == [5, 5]
    assert sum(found["profile"]["seconds"].values()) == pytest.approx(found["profile"]["span"])
    assert "profile" not in measured(words)


NAMES = {
    "attention": [
        "forward_kernel", "backward_kernel", "preprocess_kernel", "dkdv_kernel", "pytorch_flash::flash_fwd_kernel<…>",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma", "triton_tem_fused_flex_attention_0",
    ],
    "matrix products": [
        "nvjet_tst_256x128_64x4_1x2_h_bz_coopA_NNT", "sm90_xmma_gemm_bf16bf16_bf16f32", "triton_tem_fused_mm_3",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16>", "void cublasLt::splitKreduce_kernel<32, 16>",
    ],
    "optimizer": ["void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>"],
    "copies": ["Memcpy DtoH (Device -> Pinned)", "Memcpy HtoD (Pinned -> Device)", "Memset (Device)"],
    "elementwise": [
        "triton_poi_fused_silu_mul_2", "triton_red_fused_flash_attention_native_layer_norm_0", "cross_entropy_kernel",
        "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>",
    ],
}  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in NAMES.items() for name in names])
def test_a_kernel_belongs_to_what_its_name_says(kind: str, name: str) -> None:
    assert Event(name, 0, 1).kind == kind


def test_seconds_of_each_kind_and_what_is_left_are_counted_by_hand() -> None:
    events = [
        Event("forward_kernel", 0.0, 3.0),
        Event("nvjet_a", 4.0, 5.0),
        Event("nvjet_a", 5.0, 5.5),
        Event("triton_poi_fused_add", 5.5, 6.0),
        Event("Memcpy DtoH", 2.0, 4.5),  # one second beside each kernel, and one alone
    ]
    found = summary(events, span=8.0)
    assert found["seconds"] == {
        "attention": 3.0, "optimizer": 0.0, "matrix products": 1.5, "copies": 2.5,
        "elementwise": 0.5, "idle": 2.0,
    }  # fmt: skip
    assert exposed(found) == {"copies": 1.0}
    assert found["longest"][0] == ("forward_kernel", "attention", 3.0, 1)
    assert found["longest"][2] == ("nvjet_a", "matrix products", 1.5, 2)
    lines = profile_lines(found)
    assert "| matrix products | 1.500 | 18.8 % |" in lines
    assert "- 1.500 s, 2 calls, matrix products: `nvjet_a`" in lines


def test_overlapping_times_count_once() -> None:
    assert covered([Event("a", 3, 4), Event("b", 0, 2), Event("c", 1, 3.5), Event("d", 1, 1.5)]) == 4
    assert covered([]) == 0


def test_of_a_trace_only_what_ran_on_the_gpu_counts() -> None:
    trace = {
        "traceEvents": [
            {"cat": "kernel", "name": "k", "ts": 1e6, "dur": 5e5},
            {"cat": "gpu_memcpy", "name": "Memcpy DtoH", "ts": 2e6, "dur": 1e6},
            {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 0, "dur": 9e6},
            {"cat": "gpu_user_annotation", "name": "Optimizer.step#AdamW", "ts": 0, "dur": 9e6},
            {"name": "process_name", "ph": "M"},
        ]
    }
    assert events_of(trace) == [Event("k", 1.0, 1.5), Event("Memcpy DtoH", 2.0, 3.0)]
