"""profile=true: where a step's time and memory go, without a change to what is trained."""

from __future__ import annotations

import gzip
import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import LIMIT_S

from training.config import TrainConfig
from training.memory_profile import GROUPS, LARGEST, MOST_POINTS, timeline
from training.profiled import Event, events_of, operators_of, summary, summary_of
from training.services import profiling
from training.trainer import Trainer

ROOT = Path(__file__).parents[2]
MakeConfig = Callable[..., TrainConfig]
ON = ["profile=true", "profile_steps=[2,3]"]


def train(config: TrainConfig) -> tuple[list[str], list[float], Trainer]:
    """What it said, the losses of its record, and the trainer."""
    lines: list[str] = []
    trainer = Trainer(config, lines.append)
    trainer.fit()
    record = (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()
    return lines, [row["train/loss"] for row in map(json.loads, record) if "train/loss" in row], trainer


def summary_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "profile" / "summary.json").read_text())
    return found


# ---- a run


@pytest.mark.parametrize("more", [[], ["tokens_per_step=256", "optimizer=muon", "attention=math"]])
def test_a_run_writes_a_trace_and_a_summary_and_trains_the_same_bits(
    config: MakeConfig, tmp_path: Path, more: list[str]
) -> None:
    lines, losses, _ = train(config(*ON, *more, f"run_dir={tmp_path / 'on'}"))
    _, without, _ = train(config(*more, f"run_dir={tmp_path / 'off'}"))
    assert losses == without
    assert not (tmp_path / "off/profile").exists()
    assert sorted(path.name for path in (tmp_path / "on/profile").iterdir()) == ["summary.json", "trace.json.gz"]
    found = summary_in(tmp_path / "on")
    assert found["steps"] == [2, 3]
    assert sum(found["shares"].values()) == pytest.approx(1)
    assert all(found["shares"][kind] > 0 for kind in ("optimizer", "matrix products", "elementwise", "idle"))
    assert found["memory"] is None
    with gzip.open(tmp_path / "on/profile/trace.json.gz", "rt") as file:
        names = {event["name"] for event in json.load(file)["traceEvents"]}
    assert {"step 2", "step 3"} <= names
    assert "step 4" not in names
    (first,) = (i for i, line in enumerate(lines) if line.startswith("profile "))
    assert lines[first].startswith("profile    steps 2 to 3, ")
    assert [line.split("  ")[0] for line in map(str.strip, lines[first + 1 : first + 7])] == list(found["shares"])
    assert "no memory snapshot" in lines[first + 7]
    assert lines[first + 8].endswith("on/profile/trace.json.gz: open it in chrome://tracing or in Perfetto")
    assert '"shares"' in (tmp_path / "on/report.html").read_text()


def test_steps_under_the_profiler_are_in_no_measurement(config: MakeConfig) -> None:
    _, _, trainer = train(config("max_steps=8", "profile=true", "profile_steps=[5,6]"))
    tokens = trainer.run.plan.tokens_per_step
    assert trainer.run.throughput.total_tokens == (8 - 3 - 2) * tokens, "three are warm-up and two are profiled"


@pytest.mark.parametrize(("steps", "profiles"), [("[2,2]", False), ("[3,4]", True)])
def test_a_resumed_run_profiles_steps_that_are_ahead(
    config: MakeConfig, tmp_path: Path, steps: str, profiles: bool
) -> None:
    train(config("max_steps=2"))
    lines, _, _ = train(config("max_steps=4", "profile=true", f"profile_steps={steps}"))
    assert (tmp_path / "run/profile/summary.json").exists() == profiles
    assert any("was trained earlier: nothing is profiled" in line for line in lines) != profiles


@pytest.mark.parametrize("what", ["profile", "summary_of"])
def test_a_profiler_that_fails_ends_no_run(config: MakeConfig, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("another profiler\nis at work")

    monkeypatch.setattr(profiling, what, fails)
    lines, losses, trainer = train(config(*ON, "max_steps=8"))
    assert len(losses) == 8
    said = [line for line in lines if line.startswith("profile ")]
    assert said == [
        "profile    nothing more is profiled, training goes on: RuntimeError: another profiler is at work",
    ]
    assert trainer.run.throughput.total_tokens > 0, "the pause has ended"


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        (["profile=true"], "ends after the last step, 4; use profile_steps=[3,4]"),
        (["profile_steps=[3]"], "use [10,12]"),
        (["profile_steps=[4,3]"], "use [10,12]"),
        (["profile_steps=[0,3]"], "use [10,12]"),
    ],
)
def test_steps_that_cannot_be_are_refused(config: MakeConfig, typed: list[str], line: str) -> None:
    with pytest.raises(ValueError, match=re.escape(line)):
        config(*typed)


# ---- time


def test_each_moment_counts_once_and_for_a_kernel_before_a_copy() -> None:
    events = [
        Event("forward_kernel", 0, 3),
        Event("Memcpy HtoD", 2, 4),
        Event("nvjet_a", 5, 6),
        Event("triton_poi_fused_add", 5.5, 7),  # half a second beside the product
    ]
    shares = summary(events, span=8)["shares"]
    seconds = {"attention": 3, "copies": 1, "matrix products": 1, "elementwise": 1, "optimizer": 0, "idle": 2}
    assert shares == pytest.approx({kind: number / 8 for kind, number in seconds.items()})


def test_communication_costs_what_runs_beside_no_kernel() -> None:
    events = [
        Event("forward_kernel", 0, 3),
        Event("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 1, 5),
        Event("Memcpy HtoD", 4, 6),
        Event("nvjet_a", 4.5, 5),
    ]
    found = summary(events, span=8)
    seconds = {"attention": 3, "communication": 1.5, "copies": 1, "matrix products": 0.5}
    seconds |= {"elementwise": 0, "optimizer": 0, "idle": 2}
    assert found["shares"] == pytest.approx({kind: number / 8 for kind, number in seconds.items()})
    assert found["seconds"]["communication"] == 4
    assert "communication" not in summary(events[::2], span=8)["shares"]


def range_of(name: str, begin: float, end: float, category: str = "cpu_op", **more: Any) -> dict[str, Any]:
    return {"name": name, "cat": category, "tid": 1, "ts": 1e6 * begin, "dur": 1e6 * (end - begin), **more}


def test_what_an_optimizer_launches_is_the_optimizers() -> None:
    trace = {
        "traceEvents": [
            range_of("Optimizer.step#Muon.step", 4, 5, "user_annotation"),
            range_of("cudaLaunchKernel", 3, 3.1, "cuda_runtime", args={"correlation": 1}),
            range_of("cuLaunchKernelEx", 4.5, 4.6, "cuda_driver", args={"correlation": 2}),
            range_of("nvjet_a", 6, 7, "kernel", args={"correlation": 1}),
            range_of("nvjet_a", 8, 9, "kernel", args={"correlation": 2}),
        ]
    }
    assert [event.kind for event in events_of(trace)] == ["matrix products", "optimizer"]


def test_an_operator_has_its_own_time_and_what_runs_inside_of_attention_is_attention() -> None:
    trace = {
        "traceEvents": [
            range_of("step 7", 0, 20, "user_annotation"),
            range_of("aten::linear", 1, 6),
            range_of("aten::addmm", 2, 5),
            range_of("aten::scaled_dot_product_attention", 7, 10),
            range_of("aten::bmm", 7, 9),
            range_of("Optimizer.step#AdamW.step", 12, 15, "user_annotation"),
            range_of("aten::add_", 13, 14),
            range_of("aten::copy_", 19, 22),  # ends after the step
            range_of("aten::mul", 25, 30),
        ]
    }
    assert sum(event.end - event.begin for event in operators_of(trace)) == pytest.approx(5 + 3 + 3 + 3 + 5)
    found = summary_of(trace, on_gpu=False)
    seconds = {"attention": 3, "optimizer": 3, "matrix products": 5, "copies": 1, "elementwise": 0, "idle": 8}
    assert found["seconds"] == pytest.approx(seconds)
    assert ("aten::linear", "matrix products", pytest.approx(2), 1) in found["longest"]
    with pytest.raises(ValueError, match="no step"):
        summary_of({"traceEvents": []}, on_gpu=False)
    with pytest.raises(ValueError, match="saw nothing run"):  # as where CUPTI may not be used
        summary_of(trace, on_gpu=True)


# ---- memory


def allocation(addr: int, gib: float, time: int, file: str = "", action: str = "alloc") -> dict[str, Any]:
    frames = [{"filename": f, "name": "f", "line": 3} for f in ("/x/torch/nn/functional.py", file) if file]
    return {"action": action, "addr": addr, "size": int(gib * 2**30), "time_us": time, "frames": frames}


def snapshot_of(events: list[dict[str, Any]], there: dict[int, float]) -> dict[str, Any]:
    blocks = [
        {"address": addr, "size": int(gib * 2**30) + 512, "requested_size": int(gib * 2**30), "state": state}
        for addr, gib in there.items()
        for state in ("active_allocated" if gib else "inactive",)
    ]
    return {"device_traces": [events], "segments": [{"device": 0, "address": 0, "blocks": blocks}]}


def test_memory_is_told_by_who_holds_it_from_the_first_event_to_the_last() -> None:
    events = [
        allocation(10, 2, 1000, "/x/training/step.py"),
        allocation(20, 1, 2000),  # by the thread of the backward pass
        allocation(10, 2, 3000, action="free_requested"),
        allocation(10, 0.5, 4000, "/x/training/optimizer.py"),
        allocation(10, 0.5, 5000, action="free_completed"),  # the same free, seen by the GPU
        allocation(4, 0.25, 6000, action="free_requested"),  # was there before
    ]
    found = timeline(snapshot_of(events, {1: 4, 2: 3, 3: 0, 10: 0.5, 20: 1}), 0, {1: "weights", 2: "optimizer"})
    assert found["ms"] == [0, 0, 1, 2, 3, 5]
    assert found["gib"] == {
        "weights": [4.0] * 6,
        "optimizer": [3.0] * 4 + [3.5] * 2,
        "forward pass": [0.0, 2.0, 2.0, 0.0, 0.0, 0.0],
        "gradients and rest": [0.25, 0.25, 1.25, 1.25, 1.25, 1.0],
    }
    assert found["peak"] == {"weights": 4.0, "optimizer": 3.0, "forward pass": 2.0, "gradients and rest": 1.25}
    assert [block["gib"] for block in found["largest"]] == [4, 3, 2, 1, 0.25]
    assert found["largest"][2]["frames"] == ["training/step.py:3 f"]


def test_a_long_timeline_is_thinned_and_keeps_its_peak() -> None:
    events = [allocation(i, 0.5 if i == 777 else 0.001, i) for i in range(20_000)]
    events += [allocation(i, 0.5 if i == 777 else 0.001, 20_000 + i, action="free_requested") for i in range(20_000)]
    found = timeline(snapshot_of(events, {}), 0, {})
    assert len(found["ms"]) <= MOST_POINTS
    highest = max(map(sum, zip(*found["gib"].values(), strict=True)))
    assert highest == pytest.approx(sum(found["peak"].values()), abs=1e-4)
    assert len(found["largest"]) == LARGEST
    assert found["largest"][0]["gib"] == pytest.approx(0.5)
    assert timeline(snapshot_of([], {5: 1}), 0, {5: "weights"})["peak"]["weights"] == 1


def test_the_weights_of_a_sharded_run_are_found_in_memory(tmp_path: Path) -> None:
    words = ["model=tiny", "device=cpu", "tokenizer=bytes", "data=synthetic", "data.length=512", "logger=none"]
    words += ["parallel=fsdp", f"run_dir={tmp_path / 'run'}", f"data.cache_dir={tmp_path}"]
    program = f"""if True:
        from scripts.settings import train_config
        from training.services.profiling import addresses
        from training.trainer import Trainer
        run = Trainer(train_config({words})).run
        shards = [parameter.to_local() for parameter in run.model.parameters() if hasattr(parameter, "to_local")]
        assert shards
        assert all(addresses(run)[shard.untyped_storage().data_ptr()] == "weights" for shard in shards)
    """
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("more", [["compile=true"], ["compile=false", "optimizer=muon"]])
def test_a_run_on_a_gpu_has_a_snapshot_too(config: MakeConfig, tmp_path: Path, more: list[str]) -> None:
    lines, _, _ = train(config("device=cuda", "profile=true", "profile_steps=[3,4]", *more))
    folder = tmp_path / "run"
    found = summary_in(folder)
    assert found["device"] == "cuda"
    assert sum(found["shares"].values()) == pytest.approx(1)
    assert all(found["shares"][kind] > 0 for kind in ("attention", "matrix products", "elementwise", "optimizer"))
    memory = found["memory"]
    another = Trainer(config("device=cuda", f"run_dir={tmp_path / 'another'}", *more))
    parameters = 4 * sum(p.numel() for p in another.run.model.parameters())
    assert memory["peak"]["weights"] * 2**30 >= 0.9 * parameters
    assert all(memory["peak"][group] > 0 for group in GROUPS)
    assert any("step.py" in frame or "model/" in frame for block in memory["largest"] for frame in block["frames"])
    with open(folder / "profile/memory.pickle", "rb") as file:
        assert pickle.load(file)["device_traces"]
    (first,) = (i for i, line in enumerate(lines) if line.startswith("profile "))
    assert [line.split("  ")[0] for line in map(str.strip, lines[first + 7 : first + 11])] == list(GROUPS)
