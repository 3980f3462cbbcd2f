"""Checkpoints of several ranks: whole or not there, and read by any number of ranks, each its pieces."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import fork_ranks
from safetensors.torch import load_file, save_model
from shards_ranks import build, check_read, numbers, train
from torch.distributed.tensor import Replicate, Shard

from data import disk
from scripts.checkpoint import main as checkpoint_script
from tests.training.conftest import TINY
from training.checkpoint import folder as checkpoints
from training.checkpoint import state
from training.checkpoint.folder import DamagedCheckpoint
from training.checkpoint.saver import Saver
from training.checkpoint.shards import Layout, written_by
from training.config import CheckpointConfig
from training.loggers import read_metrics
from training.parallel.pieces import Piece, piece_at
from training.parallel.together import Together
from training.trained import find, load_model, read_state

HOW = ("whole", "shards", "copies")
ALONE = Together()
EXACT = ("step", "tokens", "train/loss", "train/grad_norm", "train/learning_rate", "val/loss", "val/bits_per_byte")


# ---- runs

HALF = 3
"""The step after which a run is asked to stop, of 6."""
RESUMED = {
    "four as hsdp": (4, ["parallel=hsdp", "parallel.shards=2"]),
    "four as data": (4, ["parallel=data"]),
    "two as fsdp": (2, ["parallel=fsdp"]),
    "one": (1, []),
}
"""What goes on with the run that four ranks begin as fsdp."""
QUICK = ("four as hsdp", "one", "from one", "fsdp, accumulated")
"""What is tried where no slow test is asked for; two ranks begin only for one that is."""


def each(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in names]


def run_words(folder: Path, text: Path, name: str, more: list[str]) -> list[str]:
    words = [*TINY, "data=text", f"data.path={text}", f"data.cache_dir={folder / 'cache'}", "data.val_fraction=0.3"]
    words += ["model.n_layers=2", "model.vocab_size=301", "tokenizer=bytes", "batch_size=1", "tokens_per_step=256"]
    words += ["max_steps=6", "checkpoint.every=2", "eval_every=2", "bad_step.spike_sigma=9", "bad_step.spike_window=2"]
    return [*words, "schedule.warmup_steps=0", "sample_tokens=4", *more, f"run_dir={folder / name}"]


TRAFFIC = {
    "data": ["parallel=data"],
    "data, accumulated": ["parallel=data", "tokens_per_step=512"],
    "fsdp": ["parallel=fsdp"],
    "fsdp, accumulated": ["parallel=fsdp", "tokens_per_step=512"],
    "fsdp, not resharded": ["parallel=fsdp", "parallel.reshard=false"],
    "fsdp, recomputed": ["parallel=fsdp", "memory=full", "memory.keep_attention=0"],
    "fsdp, Muon": ["parallel=fsdp", "optimizer=muon"],
    "hsdp": ["parallel=hsdp", "parallel.shards=2"],
    "hsdp, accumulated": ["parallel=hsdp", "parallel.shards=2", "tokens_per_step=512"],
    "data, in bf16": ["parallel=data", "precision.reduction=bfloat16"],
    "hsdp, in bf16": ["parallel=hsdp", "parallel.shards=2", "precision.reduction=bfloat16"],
    "by heads, repeated": ["parallel=data", "parallel.context=2", "tokens_per_step=512"],
    "by heads, recomputed": ["parallel=fsdp", "parallel.context=2", "memory=full", "memory.keep_attention=0"],
    "by heads, in groups": [
        *("parallel=data", "parallel.context=2", "model.n_heads=4", "model.n_kv_heads=2"),
        *("memory=full", "memory.head_groups=2", "batch_size=2"),
    ],
    "by keys": ["parallel=data", "parallel.context=4", "data.document_mask=false", "tokens_per_step=512"],
    "by keys, window": ["parallel=data", "parallel.context=4", "model.window=7", "data.document_mask=false"],
    "by keys, recomputed": [
        *("parallel=fsdp", "parallel.context=4", "data.document_mask=false", "memory=full", "memory.keep_attention=0")
    ],
}
"""Steps whose traffic is counted, of 4 ranks. Four divides all rows of these matrices."""


def write_runs(folder: Path, text: Path, slow: bool) -> None:
    """What four ranks train, and what two go on with. "from one" is a run of one process that was stopped."""

    def run(name: str, more: list[str], stop_at: int = 0, copies: list[str] | None = None) -> dict[str, Any]:
        return {"words": run_words(folder, text, name, more), "stop_at": stop_at, "copies": copies or []}

    going_on = {
        size: [run(name, more) for name, (by, more) in RESUMED.items() if by == size and (slow or name in QUICK)]
        for size in (2, 4)
    }
    begun = run("four", ["parallel=fsdp"], HALF, list(RESUMED))
    (folder / "runs-4.json").write_text(json.dumps([begun, *going_on[4], run("from one", ["parallel=fsdp"])]))
    (folder / "runs-2.json").write_text(json.dumps(going_on[2]))
    traffic = {
        name: run("traffic", ["model.vocab_size=304", *more])["words"]
        for name, more in TRAFFIC.items()
        if slow or name in QUICK
    }
    (folder / "traffic-4.json").write_text(json.dumps(traffic))
    train(**run("from one", [], HALF), ranks=ALONE)
    train(**run("undisturbed", []), ranks=ALONE)


@pytest.fixture(scope="module")
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> Path:
    """Runs of a small model, each with a checkpoint of 4 ranks: held whole, in shards, and in two copies of two shards;
    and one of a process alone. The ranks check what they read on the way, and what a save that fails leaves behind."""
    folder = tmp_path_factory.mktemp("shards")
    (folder / "alone").mkdir()
    facts: dict[str, Any] = {"step": 4, "tokens": 0, "world_size": 1, "val_loss": None, "versions": {}}
    _, parts = build(None, seed=4)
    torch.manual_seed(4000)
    Saver(folder / "alone", CheckpointConfig(), print).save(state.written(parts, {}), facts, wait=True)
    asked = (item for item in request.session.items if item.path == request.path)
    slow = any(item.get_closest_marker("slow") for item in asked)
    write_runs(folder, text_folder, slow)
    for size in (4, 2) if slow else (4,):
        fork_ranks(["tests/training/shards_ranks.py", str(folder)], size)
    train(run_words(folder, text_folder, "one", []), stop_at=0, copies=[], ranks=ALONE)
    return folder


@pytest.mark.parametrize("name", each([*RESUMED, "from one"]))
def test_a_run_goes_on_with_another_number_of_ranks_as_if_nothing_had_been(saved: Path, name: str) -> None:
    records = [
        [{key: value for key, value in line.items() if key in EXACT} for line in read_metrics(run / "metrics.jsonl")]
        for run in (saved / name, saved / "undisturbed")
    ]
    assert [line["step"] for line in records[0]] == [line["step"] for line in records[1]], "each step is there once"
    for mine, theirs in zip(*records, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
    mine, theirs = (load_file(run / "model.safetensors") for run in (saved / name, saved / "undisturbed"))
    assert mine.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert torch.allclose(mine[key], tensor, rtol=1e-3, atol=1e-5), key
    assert (saved / name / "samples.md").read_text() == (saved / "undisturbed" / "samples.md").read_text()


def test_whoever_uses_a_model_takes_it_from_shards(saved: Path, text_folder: Path) -> None:
    (path,) = [path for path in checkpoints.candidates(saved / "four") if path.name == "step-00000003"]
    weights = state.read_weights(path, checkpoints.verify(path))
    model, _ = load_model(str(saved / "four"), device="cpu")
    assert all(torch.equal(weights[name], parameter) for name, parameter in model.named_parameters())
    converted = read_state(find(str(saved / "four"), print))
    assert converted.keys() == weights.keys()
    words = run_words(saved, text_folder, "begun with shards", [f"init_from={saved / 'four'}", "learning_rate=1e-30"])
    train([*words, "max_steps=1"], stop_at=0, copies=[], ranks=ALONE)
    begun = load_file(saved / "begun with shards" / "model.safetensors")
    assert all(torch.allclose(begun[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("name", each(TRAFFIC))
def test_a_step_sends_what_the_plan_says(saved: Path, name: str) -> None:
    found = json.loads((saved / "traffic.json").read_text())[name]
    assert found["counted"] == pytest.approx(found["planned"], rel=1e-9)


def test_any_number_of_ranks_reads_what_four_wrote(saved: Path) -> None:
    for step, how in enumerate((*HOW, "alone"), 1):
        assert check_read(saved / how, None, step, 0, ALONE) > 0
    read = json.loads((saved / "read-by-4.json").read_text())
    for how in HOW:  # rank 0 of 4 has 2, 1 and 3 of 7, 2 and 10 rows of 3, 7 and 3 numbers
        assert read[f"{how} as whole"] == 4 * (7 * 3 + 2 * 7 + 10 * 3) + BIASES
        assert read[f"{how} as shards"] == 4 * (2 * 3 + 1 * 7 + 3 * 3) + BIASES
        assert read[f"{how} as copies"] == 4 * (4 * 3 + 1 * 7 + 5 * 3) + BIASES


@pytest.mark.slow
def test_two_ranks_read_halves_of_what_four_wrote(saved: Path) -> None:
    read = json.loads((saved / "read-by-2.json").read_text())
    assert {read[f"{how} as shards"] for how in HOW} == {4 * (4 * 3 + 1 * 7 + 5 * 3) + BIASES}


BIASES = 7 * 4
"""Bytes, which every rank reads."""


@pytest.mark.parametrize("how", HOW)
def test_the_final_weights_are_the_file_of_one_process(saved: Path, tmp_path: Path, how: str) -> None:
    model, _ = build(None, seed=HOW.index(how) + 1)
    save_model(model, str(tmp_path / "model.safetensors"))
    assert (saved / how / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


@pytest.mark.parametrize("how", HOW)
def test_every_number_is_written_once_and_by_ranks_in_equal_shares(saved: Path, how: str) -> None:
    path = checkpoints.path_of(saved / how, HOW.index(how) + 1)
    files = {name: load_file(path / name) for name in checkpoints.read_manifest(path).files if name[-5:] != ".json"}
    _, parts = build(None, seed=1)
    expected = sum(tensor.nbytes for tensor in numbers(parts).values())
    sizes = {name: sum(tensor.nbytes for tensor in group.values()) for name, group in files.items()}
    sizes = {name: size for name, size in sizes.items() if not name.startswith("random")}
    of_rank = [sum(size for name, size in sizes.items() if f"_{rank:05}." in name) for rank in range(4)]
    assert sum(of_rank) == expected
    assert max(of_rank) <= expected / 4 + 4 * 30, "the largest tensor that is whole has 30 numbers"


def test_pieces_are_what_the_mesh_gives() -> None:
    assert [piece_at((7, 3), (4,), (rank,), (Shard(0),)) for rank in range(4)] == [
        Piece((0, 0), (2, 3)),
        Piece((2, 0), (2, 3)),
        Piece((4, 0), (2, 3)),
        Piece((6, 0), (1, 3)),
    ]
    assert piece_at((5,), (4,), (3,), (Shard(0),)) == Piece((5,), (0,)), "three ranks of two have all of it"
    assert piece_at((4, 4), (2, 2), (1, 0), (Shard(0), Shard(1))) == Piece((2, 0), (2, 2))
    assert piece_at((8, 1), (2, 2), (1, 1), (Shard(0), Shard(0))) == Piece((6, 0), (2, 1))
    both = Piece((2, 0), (4, 4)).within(Piece((0, 1), (3, 2)))
    assert both == Piece((2, 1), (1, 2))
    assert Piece((), ()).within(Piece((), ())) == Piece((), ()), "a scalar"


def test_a_thousand_ranks_share_a_large_model_evenly() -> None:
    mesh = (16, 64), tuple(range(1024))
    shapes = [(128256, 4096)] + [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)] * 4
    layouts = tuple(
        Layout("model", str(n), shape, torch.float32, mesh, (Replicate(), Shard(0))) for n, shape in enumerate(shapes)
    )
    loads, largest = [0] * 1024, 0
    for layout, written in zip(layouts, written_by(layouts, 1024), strict=True):
        assert sum(piece.numel for _, piece in written) == layout.num_bytes // 4
        for rank, piece in written:
            loads[rank] += piece.numel
            largest = max(largest, piece.numel)
    assert max(loads) <= sum(loads) / 1024 + largest


# ---- looked after


def copy(saved: Path, tmp_path: Path) -> tuple[Path, Path]:
    run = tmp_path / "run"
    shutil.copytree(saved / "shards", run)
    return run, checkpoints.path_of(run, 2)


def test_the_script_knows_them(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, path = copy(saved, tmp_path)
    assert checkpoint_script(["verify", str(run)]) == 0
    assert "step 2   0 tokens" in (said := capsys.readouterr().out)
    assert "4 ranks" in said
    assert checkpoint_script(["export", str(path), str(tmp_path / "out.safetensors")]) == 0
    exported, whole = load_file(tmp_path / "out.safetensors"), load_file(run / "model.safetensors")
    assert exported.keys() == whole.keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in exported.items())
    capsys.readouterr()
    (path / "optimizer_00003.safetensors").unlink()
    assert checkpoint_script(["verify", str(run)]) == 1
    assert "DAMAGED: optimizer_00003.safetensors: No such file" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        checkpoint_script(["export", str(run), str(tmp_path / "other.safetensors")])
    assert ended.value.code == 2
    assert "holds no good checkpoint" in capsys.readouterr().err


FORGERIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a rank that wrote nothing": lambda entry: entry["pieces"][0].__setitem__(0, 9),
    "a piece outside": lambda entry: entry["pieces"][0].__setitem__(1, [90, 0]),
    "a piece below zero": lambda entry: entry["pieces"][0].__setitem__(1, [-1, 0]),
    "a piece that is missing": lambda entry: entry["pieces"].pop(),
    "a dtype that is none": lambda entry: entry.update(dtype="load"),
    "no shape": lambda entry: entry.pop("shape"),
    "too many dimensions": lambda entry: entry.update(shape=[7, 3, 1]),
    "a piece of another shape": lambda entry: entry.update(pieces=[[0, [0, 0], [3, 3]], [1, [3, 0], [4, 3]]]),
    "pieces over each other": lambda entry: entry["pieces"].__setitem__(3, [3, [0, 0], [1, 3]]),
    "no pieces": lambda entry: entry.update(pieces=None),
}


@pytest.mark.parametrize("what", FORGERIES)
def test_pieces_that_a_right_manifest_vouches_for_are_compared_before_anything_is_loaded(
    saved: Path, tmp_path: Path, what: str
) -> None:
    _, path = copy(saved, tmp_path)
    pieces = json.loads((path / checkpoints.PIECES).read_text())
    FORGERIES[what](pieces["model"]["blocks.0.weight"])
    rewrite(path, checkpoints.PIECES, json.dumps(pieces).encode())
    _, parts = build(None, seed=77)
    before = numbers(parts)
    with pytest.raises(ValueError, match=r"pieces\.json|cannot be read|not finite") as refused:
        state.read(path, checkpoints.verify(path), parts).validate(parts)
    assert "\n" not in str(refused.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in numbers(parts).items())


def test_a_manifest_of_shards_without_pieces_is_none(saved: Path, tmp_path: Path) -> None:
    _, path = copy(saved, tmp_path)
    manifest = checkpoints.read_manifest(path)
    del manifest.files[checkpoints.PIECES]
    (path / checkpoints.MANIFEST).write_bytes(manifest.to_json())
    with pytest.raises(DamagedCheckpoint, match="does not list the files of a checkpoint"):
        checkpoints.read_manifest(path)


def rewrite(path: Path, name: str, data: bytes) -> None:
    """Another content of a file, with a manifest that is right."""
    manifest = checkpoints.read_manifest(path)
    (path / name).write_bytes(data)
    manifest.files[name] = [len(data), disk.sha256(data)]
    (path / checkpoints.MANIFEST).write_bytes(manifest.to_json())
