"""Recorded steps: they can be repeated, have the numbers of a run without graphs, and are chosen where that pays.

Without a GPU a function is run anew in place of each replay, and must call the same operators with the same numbers and
the same tensors as when it was recorded: then a graph, which knows nothing else, does the same.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.precision_config import precision_named
from training import graphed_step
from training import run as run_module
from training.checkpoint import folder as checkpoints
from training.config import TrainConfig
from training.graphed_step import Function, GraphedStep
from training.graphs import check_graphs, uses_graphs
from training.loggers import read_metrics
from training.machine import Gpu
from training.run import Run
from training.runtime import Runtime
from training.trainer import Trainer

MakeConfig = Callable[..., TrainConfig]
OPTIONS = ["attention=sdpa", "learning_rate=1e-2", "max_steps=8", "eval_every=3", "log_every=3", "sample_tokens=2"]
OPTIONS += ["checkpoint.every=4", "checkpoint.keep_last=9", "schedule.warmup_steps=3"]
HOST_READS = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero"}


class Log(TorchDispatchMode):
    """What a function calls: operators, their numbers, and for each tensor where its memory comes from."""

    def __init__(self, name: str, memory: dict[int, Any]) -> None:
        super().__init__()
        self.name, self.memory = name, memory
        self.calls: list[Any] = []
        self.made: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        said = [self.said(x) for x in tree_leaves((args, kwargs))]
        result = func(*args, **(kwargs or {}))
        assert func.name() not in HOST_READS, f"{self.name} waits for the device in {func.name()}"
        if not func.name().startswith("profiler::"):  # ranges of a trace
            self.calls.append((func.name(), said))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given:
                self.memory[x.untyped_storage()._cdata] = self.name, len(self.calls)
                self.made.append(x)
        return result

    def said(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return repr(x)
        storage = x.untyped_storage()
        return self.memory.get(storage._cdata, storage._cdata), tuple(x.shape), x.stride(), x.storage_offset()


class Repeated:
    """A recorder whose replays run the function, and compare it with the first time."""

    peak = 0

    def __init__(self) -> None:
        self.memory: dict[int, Any] = {}
        self.replayed: dict[str, int] = {}

    def rehearse(self, function: Function) -> None:
        function()

    def record(self, function: Function) -> Function:
        name = function.__name__
        logs: list[Log] = []
        """The first and the last. What they made stays, so that no other tensor has its place in memory."""

        def replay() -> None:
            log = Log(name, self.memory)
            with log:
                function()
            for now, before in zip(log.calls, (logs or [log])[0].calls, strict=True):
                assert now == before, f"{name} is not what was recorded"
            logs[1:] = [log]
            self.replayed[name] = self.replayed.get(name, 0) + 1

        return replay


@pytest.fixture
def graphed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs record their steps, with `Repeated`."""
    monkeypatch.setattr(run_module, "uses_graphs", lambda config, runtime: True)
    monkeypatch.setattr(graphed_step, "CudaGraphs", lambda device: Repeated())


def fit(config: TrainConfig) -> Trainer:
    trainer = Trainer(config, lambda line: None)
    trainer.fit()
    return trainer


def losses(folder: Path) -> list[float]:
    return [x[key] for x in read_metrics(folder / "metrics.jsonl") for key in ("train/loss", "val/loss") if key in x]


def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Learning rates are float32 numbers, as those of a graph are."""
    plain = Run.learning_rate
    monkeypatch.setattr(Run, "learning_rate", lambda run: torch.tensor(plain(run)).item())


SMALL_GPT2 = ["model=gpt2-124m", "model.n_layers=1", "model.n_heads=2", "model.n_kv_heads=2", "model.dim=32"]
SMALL_GPT2 += ["model.ffn_dim=64", "model.vocab_size=300"]
CASES = {
    "documents": ["data.document_mask=true"],
    "micro-batches": ["tokens_per_step=384"],
    "bf16, micro-batches": [
        "precision=bf16",
        "precision.moments=bfloat16",
        "tokens_per_step=256",
        "model.tie_head=true",
    ],
    "fp8, layers computed again": ["precision=fp8", "memory=full", "memory.tile=16", "data.document_mask=true"],
    "gpt2, clipped": [*SMALL_GPT2, "grad_clip=0.1", "bad_step.spike_sigma=6", "bad_step.spike_window=4"],
}


@pytest.mark.usefixtures("graphed")
@pytest.mark.parametrize("case", CASES)
def test_a_recorded_step_can_be_repeated_and_gives_the_bits_of_a_plain_one(
    config: MakeConfig, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_float32(monkeypatch)
    options = [*OPTIONS, *CASES[case]]
    trainer = fit(config(*options, f"run_dir={tmp_path / 'graphs'}"))
    step = trainer.run.train_step
    assert isinstance(step, GraphedStep)
    assert isinstance(step.recorder, Repeated)
    further = {"_further": 6 * (trainer.run.plan.accumulation - 1)} if trainer.run.plan.accumulation > 1 else {}
    assert step.recorder.replayed == {"_first": 6, "_update": 6, **further}
    monkeypatch.setattr(run_module, "uses_graphs", lambda config, runtime: False)
    fit(config(*options, f"run_dir={tmp_path / 'plain'}"))
    assert losses(tmp_path / "graphs") == losses(tmp_path / "plain")
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("graphs", "plain")]
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name


@pytest.mark.usefixtures("graphed")
def test_a_run_that_goes_on_has_the_bits_of_one_that_never_stopped(config: MakeConfig, tmp_path: Path) -> None:
    whole, branch = tmp_path / "whole", tmp_path / "branch"
    fit(config(*OPTIONS, f"run_dir={whole}"))
    fit(config(*OPTIONS, f"run_dir={branch}", f"resume={checkpoints.path_of(whole, 4)}"))
    assert (branch / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.usefixtures("graphed")
def test_bad_steps_are_left_out_counted_and_named_by_their_number(config: MakeConfig) -> None:
    lines: list[str] = []
    options = [*OPTIONS, "bad_step.action=skip", "log_every=1", "max_steps=9"]
    trainer = Trainer(config(*options), lines.append)
    run = trainer.run
    backward = run.train_step.backward
    is_bad = torch.zeros(())

    def spoilt(*args: Any) -> Tensor:
        loss = backward(*args)
        for parameter in run.model.parameters():
            assert parameter.grad is not None
            parameter.grad.add_(is_bad)
        return loss

    def before(run: Run) -> None:
        is_bad.fill_(float("nan") if run.progress.step in (4, 7, 8) else 0.0)

    run.train_step.backward = spoilt  # type: ignore[method-assign]
    trainer.services[0].before_step = before  # type: ignore[method-assign]
    summary = trainer.fit()
    assert summary["train/skipped_steps"] == 3
    skipped = [line for line in lines if line.startswith("skipped")]
    assert [f"at step {number};" in line for number, line in zip((4, 7, 8), skipped, strict=True)] == [True] * 3


def test_what_a_graph_would_keep_from_step_to_step_is_caught(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check itself: a number, or a tensor, that the function brings along."""
    for keep in ("number", "tensor"):
        recorder, state = Repeated(), [torch.zeros(2)]

        def function(keep: str = keep, state: list[Tensor] = state, count: list[int] = [0]) -> None:  # noqa: B006
            count[0] += 1
            if keep == "tensor":
                state[0] = state[0] + 1
            else:
                state[0].add_(count[0])

        replay = recorder.record(function)
        replay()
        with pytest.raises(AssertionError, match="not what was recorded"):
            replay()


# ---- when


H200 = Runtime(Gpu("NVIDIA H200", (9, 0), 140 * 2**30), precision_named("bf16"), True)
GPT2 = [
    "model=gpt2-124m",
    "model.dim=768",
    "model.n_layers=12",
    "model.n_heads=12",
    "model.n_kv_heads=12",
    "batch_size=1",
]
GPT2 += ["model.ffn_dim=3072", "model.vocab_size=50304", "model.n_positions=65536", "max_steps=500", "attention=flash"]


@pytest.mark.parametrize(
    ("options", "used"),
    [
        (["seq_len=4096"], True),
        (["seq_len=65536"], False),
        (["seq_len=4096", "batch_size=16"], False),
        (["seq_len=4096", "max_steps=20"], False),
        (["seq_len=4096", "optimizer=muon"], False),
        (["seq_len=4096", "memory=offload"], False),
        (["seq_len=4096", "cuda_graphs=false"], False),
        (["seq_len=65536", "cuda_graphs=true"], True),
    ],
)
def test_auto_records_where_the_gpu_would_wait_for_its_host(config: MakeConfig, options: list[str], used: bool) -> None:
    assert uses_graphs(config(*GPT2, "cuda_graphs=auto", *options), H200) == used


@pytest.mark.parametrize(
    ("options", "gpu", "said"),
    [
        ([], None, "a CPU has none"),
        (["memory=offload"], H200.gpu, "memory=offload copies"),
        (["optimizer=muon"], H200.gpu, "the step of optimizer=muon reads"),
        (["parallel=fsdp"], H200.gpu, "the weights of parallel=fsdp are gathered"),
    ],
)
def test_what_cannot_be_recorded_is_refused_where_it_is_asked_for(
    config: MakeConfig, options: list[str], gpu: Gpu | None, said: str
) -> None:
    runtime = Runtime(gpu, precision_named("bf16"), True)
    check_graphs(config(*options, "cuda_graphs=auto"), runtime)
    check_graphs(config(*options), runtime)
    with pytest.raises(ValueError, match=rf"cuda_graphs=true: {said}.*; use cuda_graphs=auto or false"):
        check_graphs(config(*options, "cuda_graphs=true"), runtime)
    check_graphs(config("cuda_graphs=true"), H200)


def test_steps_of_several_processes_are_not_recorded(config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, auto = config("cuda_graphs=true"), config(*GPT2, "seq_len=4096", "cuda_graphs=auto")
    assert uses_graphs(auto, H200)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not uses_graphs(auto, H200)
    with pytest.raises(ValueError, match="cuda_graphs=true: steps of several processes are not recorded; use"):
        check_graphs(asked, H200)


# ---- on a GPU


ON_GPU = [
    "device=cuda",
    "attention=flash",
    "model.n_layers=4",
    "model.n_heads=4",
    "model.n_kv_heads=4",
    "model.dim=256",
]
ON_GPU += ["model.ffn_dim=1024", "seq_len=512", "batch_size=2", "max_steps=20", "log_every=1", "eval_every=7"]
ON_GPU += [
    "learning_rate=3e-3",
    "checkpoint.every=10",
    "checkpoint.keep_last=9",
    "sample_tokens=4",
    "deterministic=true",
]
ON_GPU_CASES = {
    "documents": ["data.document_mask=true"],
    "rows": ["data.document_mask=false", "precision=bf16-residual", "precision.moments=bfloat16"],
    "micro-batches": ["tokens_per_step=4096"],
    "uncompiled": ["compile=false"],
    "sdpa": ["attention=sdpa"],
    "selective": ["memory=selective"],
    "full": ["memory=full", "memory.tile=256", "tokens_per_step=2048"],
    "fp8": ["precision=fp8"],
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", ON_GPU_CASES)
def test_on_a_gpu_20_steps_have_the_losses_of_a_run_without_graphs(
    config: MakeConfig, tmp_path: Path, case: str
) -> None:
    """To the rounding of a division by the number of targets, on the host or on the device, which grows."""
    if case == "fp8" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("fp8 needs Hopper")
    found = {}
    for graphs in ("true", "false"):
        folder = tmp_path / graphs
        trainer = fit(config(*ON_GPU, *ON_GPU_CASES[case], f"cuda_graphs={graphs}", f"run_dir={folder}"))
        assert isinstance(trainer.run.train_step, GraphedStep) == (graphs == "true")
        records = list(read_metrics(folder / "metrics.jsonl"))
        found[graphs] = losses(folder), max(x.get("memory/peak_allocated_gib", 0.0) for x in records[-5:])
    assert found["true"][0] == pytest.approx(found["false"][0], rel=2e-3 if case != "fp8" else 1e-2)
    assert found["true"][0][:4] == pytest.approx(found["false"][0][:4], rel=1e-5 if case != "fp8" else 1e-3)
    assert found["true"][1] == pytest.approx(found["false"][1], rel=0.25), (
        "memory is that of a step, not of what is kept"
    )


@pytest.mark.gpu
def test_on_a_gpu_a_recorded_run_goes_on_and_leaves_bad_steps_out(config: MakeConfig, tmp_path: Path) -> None:
    whole, branch = tmp_path / "whole", tmp_path / "branch"
    fit(config(*ON_GPU, "cuda_graphs=true", f"run_dir={whole}"))
    fit(config(*ON_GPU, "cuda_graphs=true", f"run_dir={branch}", f"resume={checkpoints.path_of(whole, 10)}"))
    assert losses(branch) == losses(whole)
    assert (branch / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    options = ["bad_step.action=skip", "bad_step.most_in_a_row=99", "learning_rate=9", "grad_clip=0", "max_steps=30"]
    trainer = fit(config(*ON_GPU, *options, "cuda_graphs=true", f"run_dir={tmp_path / 'wild'}"))
    assert all(parameter.isfinite().all() for parameter in trainer.run.model.parameters())
