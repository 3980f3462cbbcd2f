"""One rank of test_checkpoint_shards.py: saves and reads the parts of a small model held in several ways, and trains.

    RANK=0 WORLD_SIZE=4 … python tests/training/shards_ranks.py FOLDER

FOLDER/runs-4.json holds the runs that 4 ranks train, one after the other: words of train.py, a step after which one
rank is asked to stop (0: none), and the names of copies that are made of the run folder.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scripts.settings import train_config
from training.capacity import workload
from training.checkpoint import folder as checkpoints
from training.checkpoint import saver as saving
from training.checkpoint import state, weights
from training.checkpoint.saver import Saver
from training.config import CheckpointConfig, OptimizerConfig
from training.errors import Interrupted, SaveFailed
from training.optimizer import Optimizer
from training.parallel.sharding import local, local_part, whole
from training.parallel.together import Together
from training.parallel.world import World
from training.parts import Part, RandomNumbers, Weights
from training.run import Run
from training.runtime import resolve_runtime
from training.traffic import sent_in_step
from training.trainer import Trainer

DATA = {"text": "", "tokenizer": ""}


class Data(Part):
    """The position in the text, which is the run's."""

    name = "data"

    def values(self) -> dict[str, Any]:
        return DATA

    def validate(self, tensors: Any, values: Any) -> None:
        assert values == DATA

    def load(self, tensors: Any, values: Any) -> None:
        pass


def build(shape: tuple[int, ...] | None, seed: int) -> tuple[nn.Module, list[Part]]:
    """A model whose matrices do not divide by 4, after one step; its numbers are those of the seed, held in any way."""
    torch.manual_seed(seed)
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(3, 7, bias=True), nn.Linear(7, 2, bias=False)])
    model.embedding = nn.Embedding(10, 3)
    model.head = nn.Linear(3, 10, bias=False)
    model.head.weight = model.embedding.weight
    if shape is not None:
        names = ("replica", "shard")[-len(shape) :]
        small = {p for p in model.parameters() if p.dim() < 2}
        fully_shard(model, mesh=init_device_mesh("cpu", shape, mesh_dim_names=names), ignored_params=small)
    optimizer = Optimizer(model, OptimizerConfig(), torch.device("cpu"))
    for number, parameter in enumerate(model.parameters()):
        torch.manual_seed(seed + number)
        gradient = torch.randn(parameter.shape)
        parameter.grad = parameter.detach().clone()
        local(parameter.grad).copy_(local_part(gradient, parameter))
    optimizer.step(0.1, torch.tensor(True))
    return model, [Weights(model), optimizer, RandomNumbers(), Data()]


def numbers(parts: list[Part]) -> dict[str, Tensor]:
    """The whole of all tensors that are the run's."""
    tensors = {f"{part.name}/{name}": t for part in parts if not part.per_rank for name, t in part.tensors().items()}
    return {name: whole(tensor) for name, tensor in tensors.items()}


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    ranks, lines = Together.of(rank, size), list[str]()
    meshes: dict[str, tuple[int, ...] | None] = {"whole": None, "shards": (size,)}
    if size == 4:
        meshes["copies"] = (2, 2)
    facts: dict[str, Any] = {"tokens": 0, "world_size": size, "val_loss": None, "versions": {}}

    if rank == 0:
        for how in meshes:
            (folder / how).mkdir(exist_ok=True)
            (folder / how / "config.yaml").touch()
    dist.barrier()

    def save(how: str, step: int, wait: bool = True) -> Saver:
        _, parts = build(meshes[how], seed=step)
        torch.manual_seed(1000 * step + rank)
        saver = Saver(folder / how, CheckpointConfig(keep_last=9), lines.append, ranks)
        saver.save(state.written(parts, {}, rank, size), {**facts, "step": step}, wait)
        return saver

    if size == 4:
        for step, how in enumerate(meshes, 1):
            save(how, step)
            model, _ = build(meshes[how], seed=step)
            weights.save_weights(model, folder / how, ranks)
        check_failures(folder, ranks, save, lines)
    read = {}
    for step, wrote in enumerate(("whole", "shards", "copies", "alone"), 1):
        for how, shape in meshes.items():
            read[f"{wrote} as {how}"] = check_read(folder / wrote, shape, step, rank, ranks)
    if rank == 0:
        (folder / f"read-by-{size}.json").write_text(json.dumps(read))
    if (cases := folder / f"traffic-{size}.json").exists():
        counted = {name: count_traffic(words) for name, words in json.loads(cases.read_text()).items()}
        if rank == 0:
            (folder / "traffic.json").write_text(json.dumps(counted))
    for run in json.loads((folder / f"runs-{size}.json").read_text()):
        train(**run, ranks=ranks)
    dist.destroy_process_group()


def train(words: list[str], stop_at: int, copies: list[str], ranks: Together) -> None:
    config = train_config(words)
    runtime = resolve_runtime(config)
    trainer = Trainer(config, lambda line: None, runtime, World.start(runtime.device, config.parallel))
    run, check = trainer.run, trainer.run.guard.check

    def ask(step: int, *rest: Tensor) -> Tensor:
        if step == stop_at and ranks.rank == ranks.size - 1:
            run.interrupt._reason = "SIGTERM"
        return check(step, *rest)

    run.guard.check = ask  # type: ignore[method-assign]
    with pytest.raises(Interrupted) if stop_at else nullcontext():
        trainer.fit()
    for name in copies:
        ranks.first(lambda name=name: shutil.copytree(run.folder, run.folder.with_name(name)))  # type: ignore[misc]


class Counted(TorchDispatchMode):
    """Bytes that this rank sends, by collective, as `training.traffic` counts them; small sums are left out."""

    SMALL = 16

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, float] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind, _, name = func._schema.name.partition("::")
        if kind in ("c10d", "_c10d_functional") and len(args) > 1:  # others wait
            self.count(name, args)
        return func(*args, **(kwargs or {}))

    def count(self, name: str, args: Any) -> None:
        first, second = args[0], args[1]
        if name == "allreduce_":
            n = dist.ProcessGroup.unbox(second).size()
            kind, sent = "all-reduce", sum(2 * t.nbytes * (n - 1) / n for t in first if t.numel() > self.SMALL)
        elif name == "broadcast_":
            n = dist.ProcessGroup.unbox(second).size()
            kind, sent = "broadcast", sum(t.nbytes * (n - 1) / n for t in first)
        elif name == "all_gather_into_tensor":  # of a DTensor
            kind, sent = "all-gather", first.nbytes * (second - 1)
        elif name == "_allgather_base_":
            kind, sent = "all-gather", first.nbytes - second.nbytes
        elif name == "_reduce_scatter_base_":
            kind, sent = "reduce-scatter", second.nbytes - first.nbytes
        else:
            assert sum(t.numel() for t in tree_leaves(args) if isinstance(t, Tensor)) <= self.SMALL, name
            return
        self.bytes[kind] = self.bytes.get(kind, 0.0) + sent


def count_traffic(words: list[str]) -> dict[str, dict[str, float]]:
    """Of one training step, the second: what was sent by each rank, or by the one that sends most, and what the plan
    says."""
    config = train_config(words)
    runtime = resolve_runtime(config)
    world = World.start(runtime.device, config.parallel)
    run = Run(config, runtime, lambda line: None, world)
    run.batches.open()
    all_to_all, exchanged = dist.all_to_all_single, list[float]()

    def exchange(
        output: Tensor, given: Tensor, receive: Any, send: Any, group: dist.ProcessGroup, async_op: bool
    ) -> Any:
        share = 1 / group.size() if send is None else send[group.rank()] / len(given)
        exchanged.append(given.nbytes * (1 - share))
        return all_to_all(output, given, receive, send, group=group, async_op=async_op)

    for step in (1, 2):
        exchanged.clear()
        micro_batches = run.batches.next(run.plan.accumulation)
        # What happens inside of an operator, such as attention over several ranks, no mode sees.
        with Counted() as counted, patch.object(dist, "all_to_all_single", exchange):
            run.train_step(micro_batches, step, 0.1)
    run.batches.close()
    planned: dict[str, float] = {}
    for sent in sent_in_step(workload(config, runtime), run.plan.accumulation):
        planned[sent.collective] = planned.get(sent.collective, 0.0) + sent.bytes
    if exchanges := [max(sizes) for sizes in zip(*world.gather(exchanged), strict=True)]:  # the others wait for it
        counted.bytes["all-to-all"] = sum(exchanges)
    return {"counted": {kind: sent for kind, sent in counted.bytes.items() if sent}, "planned": planned}


def check_read(run: Path, shape: tuple[int, ...] | None, step: int, rank: int, ranks: Together) -> int:
    """Returns the bytes of tensors that this rank read of the weights."""
    found = checkpoints.newest(run, print, ranks)
    assert found is not None
    path, manifest = found
    _, parts = build(shape, seed=77)
    saved = state.read(path, manifest, parts, rank)
    saved.validate(parts)
    saved.load(parts)
    drawn = torch.rand(3)
    _, expected = build(None, seed=step)
    found_numbers = numbers(parts)
    for name, tensor in numbers(expected).items():
        assert torch.equal(found_numbers[name], tensor), name
    if rank < manifest.world_size:
        torch.manual_seed(1000 * step + rank)
        assert torch.equal(drawn, torch.rand(3)), "each rank has its own random numbers"
    return sum(local(tensor).nbytes for tensor in saved.tensors["model"].values())


def check_failures(folder: Path, ranks: Together, save: Callable[..., Saver], lines: list[str]) -> None:
    """One rank that cannot write its share: all know, nothing is left, and the checkpoint before stays."""
    there = sorted(path.name for path in (folder / "shards" / "checkpoints").iterdir())
    written, needed = saving._save_tensors, saving.need_space

    def fail(*arguments: Any) -> None:
        if ranks.rank == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written(*arguments)

    def full(*arguments: Any) -> None:
        if ranks.rank == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        needed(*arguments)

    for name, failing, rank in (("_save_tensors", fail, 2), ("need_space", full, 3)):
        setattr(saving, name, failing)
        with pytest.raises(SaveFailed, match=f"not written, older ones are untouched: rank {rank}: disk full: "):
            save("shards", 9)
        saver = save("shards", 9, wait=False)
        saver.finish()
        assert f"rank {rank}: disk full: " in lines[-1], lines
        assert lines[-1].endswith("; training goes on")
        saving._save_tensors, saving.need_space = written, needed
    verify = checkpoints.verify

    def differs(path: Path, names: list[str]) -> Any:
        if ranks.rank == 1:
            (path / names[0]).write_bytes(b"?" * (path / names[0]).stat().st_size)
        return verify(path, names)

    checkpoints.verify = differs
    saver = save("shards", 9, wait=False)
    saver.finish()
    checkpoints.verify = verify
    assert "did not read back as written and is removed, older ones are untouched: rank 1: " in lines[-1], lines
    ranks.each(lambda: None)
    assert sorted(path.name for path in (folder / "shards" / "checkpoints").iterdir()) == there


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
