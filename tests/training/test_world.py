"""What ranks agree on: in a world of one nothing is computed; two real processes get the same answers."""

from __future__ import annotations

import pytest
import torch
from processes import run_ranks

from training.parallel import watch as watching
from training.parallel.watch import Watch
from training.parallel.world import World

TWO_RANKS = """
import torch
from training.parallel.world import World

world = World.start(torch.device("cpu"))
total = world.sum(torch.tensor([1.0 + world.rank, 10.0]))
print(
    world.rank, world.size, world.is_first, total.tolist(), world.count([21, world.rank]),
    world.all(torch.tensor(True)).item(), world.all(torch.tensor(world.rank == 0)).item(),
    repr(world.first_reason("")), repr(world.first_reason("SIGTERM" if world.rank == 1 else "")),
)
torch.distributed.destroy_process_group()
"""

SHARDS = """
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from training.parallel.config import FsdpConfig
from training.parallel.sharding import local, sharded_as, whole
from training.parallel.world import World

world = World.start(torch.device("cpu"), FsdpConfig())
like = distribute_tensor(torch.zeros(3, 2), world.mesh, [Shard(0)])
moment = torch.full_like(local(like), 1.0 + world.rank, dtype=torch.bfloat16)
print(whole(sharded_as(moment, like)).tolist(), whole(sharded_as(moment, like)).dtype)
DeviceMesh.device_type = property(lambda mesh: "cuda")
print(local(sharded_as(moment, like)).data_ptr() == moment.data_ptr())
torch.distributed.destroy_process_group()
"""


def test_a_world_of_one_gives_back_what_it_is_given() -> None:
    world = World.start(torch.device("cpu"))
    assert (world.rank, world.size, world.is_first) == (0, 1, True)
    tensor, flag = torch.ones(2), torch.tensor(True)
    assert world.sum(tensor) is tensor
    assert world.all(flag) is flag
    assert (world.count([5]), world.first_reason("SIGTERM"), world.first_reason("")) == ([5], "SIGTERM", "")
    assert not torch.distributed.is_initialized()


def test_two_ranks_agree() -> None:
    agreed = "[3.0, 20.0] [42, 1] True False '' 'SIGTERM'\n"
    assert run_ranks(["-c", TWO_RANKS], 2) == [f"0 2 True {agreed}", f"1 2 False {agreed}"]


@pytest.mark.slow
def test_a_shard_in_the_memory_of_the_host_stays_there_whatever_the_device_of_its_mesh() -> None:
    assert run_ranks(["-c", SHARDS], 2) == ["[[1.0, 1.0], [1.0, 1.0], [2.0, 2.0]] torch.bfloat16\nTrue\n"] * 2


def test_a_lost_rank_is_told_once_whichever_thread_leaves_first(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(watching, "say_error", said.append)
    monkeypatch.setattr(watching.os, "_exit", lambda code: None)
    watch = Watch(torch.distributed.HashStore(), rank=1, size=2)
    with monkeypatch.context() as held_up:
        held_up.setattr(watch, "_leave", lambda *args, **options: None)  # the thread, once it has found it
        watch._tell(0, "has not answered for 9 s")
    verdict = watch.verdict()
    assert verdict is not None
    watch.leave("", verdict[1])  # the main thread
    assert said == [verdict[0]]
    watch.leave(*verdict)
    assert len(said) == 1
    watch.close()
