"""Four ranks train what one process trains: losses, gradients, rows, evaluation, weights and moments."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from processes import LIMIT_S, ROOT, fork_ranks, start_ranks, wait_until
from safetensors.torch import load_file

from tests.training.conftest import TINY
from training.checkpoint.folder import candidates
from training.loggers import read_metrics

SIZE = 4
# A vocabulary and a width that four shards do not divide evenly.
SMALL = [*TINY, "model.n_layers=2", "model.vocab_size=301", "model.ffn_dim=50", "max_steps=3", "tokens_per_step=256"]
SMALL += ["tokenizer=bytes", "schedule.warmup_steps=0", "eval_tokens=224"]
RECALL = ["data=synthetic", "data.task=recall", "data.pairs=4", "seq_len=256", "data.length=256", "eval_tokens=1280"]
RECALL += ["tokens_per_step=1024"]
CASES: dict[str, list[str]] = {
    "documents, accumulated": ["tokens_per_step=512", "data.document_mask=true"],
    "window, clipped": ["model.window=7", "data.document_mask=false", "grad_clip=0.05"],
    "Muon": ["optimizer=muon"],
    "recomputed, bf16 moments": ["memory=full", "memory.tile=24", "precision.moments=bfloat16"],
    "poisoned": ["bad_step.action=skip", "optimizer=muon"],
    "added up in bf16": ["precision.reduction=bfloat16"],
    # One row a micro-batch in one process, too, for scales are those of the micro-batch.
    "fp8": ["precision=fp8", "memory=full", "model.ffn_dim=48", "batch_size=1"],
    "GPT-2, recall": ["model=gpt2-124m", "model.dim=32", "model.ffn_dim=50", "model.n_heads=2", *RECALL],
}
PARALLEL = {"data": ["parallel=data"], "fsdp": ["parallel=fsdp"], "hsdp": ["parallel=hsdp", "parallel.shards=2"]}
PARALLEL |= {
    "context": ["parallel=data", "parallel.context=4"],  # two heads: by all-gather
    "context, data": ["parallel=data", "parallel.context=2", "parallel.context_method=all-gather"],
    "context, fsdp": ["parallel=fsdp", "parallel.context=2"],  # by Ulysses
}
"""How four ranks are arranged."""
EXACT = 1e-5
"""Of float32 sums in another order. Muon's iteration is in bf16, and moments in bf16 are rounded."""
LOOSE = {"Muon": 3e-4, "poisoned": 3e-4, "recomputed, bf16 moments": 1e-4, "added up in bf16": 5e-3}
WHOLE_ONLY = "fp8"
"""The case that parallel=data alone can, with rows that are whole: scales are those of a rank's tokens."""


QUICK = "documents, accumulated"
QUICK_WAYS = ("data", "context, fsdp")
"""The case of the tests that are not slow, and its arrangements: hsdp, too, is trained in test_checkpoint_shards.py."""


def arrangements(case: str) -> list[str]:
    return ["data"] if case == WHOLE_ONLY else list(PARALLEL)


def is_quick(case: str, parallel: str) -> bool:
    return case == QUICK and parallel in QUICK_WAYS


def trained_by_ranks(cases: dict[str, dict[str, Any]], size: int, folder: Path) -> dict[str, Any]:
    """Name → what `ranks.trained` returned on rank 0 of `size`."""
    (folder / "cases.json").write_text(json.dumps(cases))
    fork_ranks(["tests/training/ranks.py", str(folder / "cases.json"), str(folder / "out.pt")], size)
    results: dict[str, Any] = torch.load(folder / "out.pt")
    return results


@pytest.fixture(scope="module")
def results(
    request: pytest.FixtureRequest, text_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, Any]]:
    """By case, of one process; and by "case/parallel", of four ranks. Of all cases where a slow test asks for them."""
    asked = (item for item in request.session.items if item.path == request.path)
    slow = any(item.get_closest_marker("slow") for item in asked)
    folder = tmp_path_factory.mktemp("parallel")
    text = ["data=text", f"data.path={text_folder}", f"data.cache_dir={folder / 'cache'}", "data.val_fraction=0.3"]
    cases = {}
    for name in CASES if slow else [QUICK]:
        words = CASES[name]
        own = ["data.documents=120", f"data.cache_dir={folder / 'cache'}"] if "data=synthetic" in words else text
        case: dict[str, Any] = {"words": [*SMALL, *own, f"run_dir={folder / 'run'}", *words]}
        cases[name] = case | ({"poisoned": [2, 0]} if name == "poisoned" else {})
    alone = {name: ranks.trained(**case) for name, case in cases.items()}
    spread = {
        f"{name}/{parallel}": case | {"words": [*case["words"], "batch_size=1", *more]}
        for name, case in cases.items()
        for parallel, more in PARALLEL.items()
        if parallel in arrangements(name) and (slow or is_quick(name, parallel))
    }
    return alone, trained_by_ranks(spread, SIZE, folder)


@pytest.mark.parametrize(
    ("case", "parallel"),
    [
        pytest.param(case, way, marks=[] if is_quick(case, way) else [pytest.mark.slow])
        for case in CASES
        for way in arrangements(case)
    ],
)
def test_four_ranks_train_what_one_process_trains(
    results: tuple[dict[str, Any], dict[str, Any]], case: str, parallel: str
) -> None:
    one, four = results[0][case], results[1][f"{case}/{parallel}"]
    rtol = LOOSE.get(case, EXACT)
    for mine, theirs in zip(four["steps"], one["steps"], strict=True):
        assert mine[2:] == theirs[2:], "whether it was good, learning rate, tokens and visible pairs"
        assert mine[:2] == pytest.approx(theirs[:2], rel=rtol, nan_ok=True), "loss and gradient norm"
    assert four["rows"] == one["rows"]
    for mine, theirs in zip(four["evaluations"], one["evaluations"], strict=True):
        assert mine == pytest.approx(theirs, rel=rtol)
    for kind in ("weights", "moments"):
        assert four[kind].keys() == one[kind].keys()
        for name, tensor in one[kind].items():
            error = (four[kind][name].double() - tensor.double()).norm() / (tensor.double().norm() + 1e-12)
            assert error < 10 * rtol, f"{name}: {error:.1e}"


@pytest.mark.slow
def test_a_loss_that_is_not_finite_on_one_rank_skips_the_step_on_all(
    results: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    for parallel in PARALLEL:
        steps = results[1][f"poisoned/{parallel}"]["steps"]
        assert [good for _, _, good, *_ in steps] == [True, False, True]
        assert math.isnan(steps[1][0])


@pytest.mark.slow
@pytest.mark.parametrize("parallel", PARALLEL)
def test_gradients_are_rounded_where_they_are_added_up_in_bf16(
    results: tuple[dict[str, Any], dict[str, Any]], parallel: str
) -> None:
    one, four = results[0]["added up in bf16"], results[1][f"added up in bf16/{parallel}"]
    assert four["steps"][0][0] == pytest.approx(one["steps"][0][0], rel=EXACT), "the loss of the first step is not"
    norms = zip(one["steps"], four["steps"], strict=True)
    assert any(theirs[1] != pytest.approx(ours[1], rel=EXACT) for ours, theirs in norms), "a norm of gradients is"


def test_first_weights_are_those_of_one_process_bit_for_bit(
    results: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    for name, four in results[1].items():
        for key, tensor in results[0][name.partition("/")[0]]["first"].items():
            assert torch.equal(four["first"][key], tensor), f"{name}: {key}"


def test_after_an_evaluation_matrices_are_shards_again(results: tuple[dict[str, Any], dict[str, Any]]) -> None:
    for name, four in results[1].items():
        matrices = [key for key, tensor in four["weights"].items() if tensor.dim() == 2]
        is_whole = PARALLEL[name.partition("/")[2]][0] == "parallel=data"
        assert four["sharded"] == ([] if is_whole else matrices)


# ---- ranks that fail, vanish or are asked to stop

FAILS = """
import sys, torch
from training.parallel.watch import watched
from training.parallel.world import World

world = World.start(torch.device("cpu"))
with watched(world):
    if str(world.rank) in sys.argv[1]:
        raise ValueError("no room on this disk")
    world.wait()
"""


@pytest.mark.parametrize(
    ("failing", "says"),
    [
        ("1", [r"", r"error: rank 1 on \S+: no room on this disk\n"]),
        pytest.param("01", [r"error: no room on this disk\n", r""], marks=pytest.mark.slow),
    ],
)
def test_an_error_is_told_once_and_ends_all_ranks(failing: str, says: list[str]) -> None:
    both = start_ranks(["-c", FAILS, failing], 2)
    said = [rank.communicate(timeout=LIMIT_S)[0] for rank in both]
    assert [rank.returncode for rank in both] == [2, 2], said
    for pattern, text in zip(says, said, strict=True):
        assert re.fullmatch(pattern, text)


@pytest.mark.slow
def test_a_mistake_in_the_command_is_told_once_by_torchrun_too() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py"]
    done = subprocess.run([*command, "sequence_length=3"], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 1, "whatever the codes of its ranks"
    assert re.search(r"exitcode *: 2 ", done.stderr)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors == ["error: sequence_length is not a setting; did you mean seq_len?"]


@pytest.mark.slow
def test_a_lost_rank_ends_the_run_which_goes_on_with_other_ranks(text_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [*SMALL, "data=text", f"data.path={text_folder}", f"data.cache_dir={tmp_path}", "batch_size=1"]
    words += ["tokens_per_step=384", "max_steps=1000000", "eval_every=0", "checkpoint.every=5", f"run_dir={run}"]

    def begun(number: int, parallel: str) -> list[subprocess.Popen[str]]:
        processes = start_ranks(["train.py", *words, f"parallel={parallel}"], number)
        newest = max((path.name for path in candidates(run)), default="")
        wait_until(lambda: max((path.name for path in candidates(run)), default="") > newest, processes[0])
        return processes

    three = begun(3, "data")
    three[2].kill()
    said = [process.communicate(timeout=LIMIT_S)[0] for process in three]
    assert [process.returncode for process in three] == [75, 75, -9]
    assert len(re.findall(r"error: rank 2 on \S+ is lost: it has not answered for \d+ s", "".join(said))) == 1
    assert "Traceback" not in "".join(said)
    assert json.loads((run / "facts.json").read_text())["ranks"][2]["host"]

    two = begun(2, "data")
    two[1].send_signal(signal.SIGTERM)  # one rank alone is asked
    said = [process.communicate(timeout=LIMIT_S)[0] for process in two]
    assert [process.returncode for process in two] == [75, 75]
    assert re.search(r"resume     step \d+ of", said[0])
    assert re.search(r"interrupted by SIGTERM; saved", said[0])
    assert said[1] == ""
    steps = [record["step"] for record in read_metrics(run / "metrics.jsonl") if "train/loss" in record]
    assert steps == sorted(set(steps)), "one log, each step once"


@pytest.mark.slow
def test_one_process_writes_the_weights_of_which_it_has_the_only_shard(text_folder: Path, tmp_path: Path) -> None:
    words = [*SMALL, "data=text", f"data.path={text_folder}", f"data.cache_dir={tmp_path}", "max_steps=1"]
    for parallel in ("data", "fsdp"):
        run = [sys.executable, "train.py", *words, f"parallel={parallel}", f"run_dir={tmp_path / parallel}"]
        done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)
        assert done.returncode == 0, done.stderr
    mine, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("fsdp", "data"))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_sharded_model_writes_samples_between_evaluations(text_folder: Path, tmp_path: Path) -> None:
    words = [*SMALL, "data=text", f"data.path={text_folder}", f"data.cache_dir={tmp_path}", "parallel=fsdp"]
    words += ["max_steps=4", "sample_every=2", "eval_every=3", "sample_tokens=5", f"run_dir={tmp_path / 'run'}"]
    done = subprocess.run(
        [sys.executable, "train.py", *words], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sample after step") == 2


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1, 2])
def test_gpus_train_what_one_trains_alone(text_folder: Path, tmp_path: Path, size: int) -> None:
    if torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} GPUs")
    text = ["data=text", f"data.path={text_folder}", f"data.cache_dir={tmp_path}", "data.val_fraction=0.3"]
    words = [*SMALL, *text, "device=cuda", f"run_dir={tmp_path / 'run'}", "tokens_per_step=512"]
    eager, compiled = ["compile=false", "precision=fp32"], ["compile=true", "precision=fp32"]
    bf16 = ["compile=false", "precision=bf16", "attention=flash"]
    kinds = {"fp32": eager, "Muon": [*eager, "optimizer=muon"], "compiled": compiled, "bf16": bf16}
    kinds |= {"recomputed": [*bf16, "memory=full", "memory.tile=24"]}
    ways = {"fsdp": ["parallel=fsdp"], "offload": ["parallel=fsdp", "parallel.offload=true"]}
    if size > 1:
        ways |= {"data": ["parallel=data"], "Ulysses": ["parallel=fsdp", "parallel.context=2"]}
        ways |= {"all-gather": ["parallel.context=2", "parallel.context_method=all-gather"]}
    alone = trained_by_ranks({kind: {"words": [*words, *how]} for kind, how in kinds.items()}, 1, tmp_path)
    cases: dict[str, dict[str, Any]] = {
        f"{kind}/{way}": {"words": [*words, "batch_size=1", *how, *more]}
        for kind, how in kinds.items()
        for way, more in ways.items()
    }
    found = trained_by_ranks(cases, size, tmp_path)
    for name, mine in found.items():
        kind = name.partition("/")[0]
        # bf16: embeddings are gathered in bf16, and gradients of weights are rounded to it once a micro-batch.
        rtol = 1e-5 if kind in ("fp32", "compiled") else 2e-2
        for ours, theirs in zip(mine["steps"], alone[kind]["steps"], strict=True):
            assert ours[:2] == pytest.approx(theirs[:2], rel=rtol), name
