"""How long a call of flash attention keeps the host: microseconds of Python, forward and backward.

    python -m scripts.bench_host                # on a GPU: whole calls, so short that the GPU waits for the host
    python -m scripts.bench_host --no-launch    # anywhere: without the launches of kernels, which Triton makes
    python -m scripts.bench_host --profile      # and where the time goes

Each figure is the smallest of several medians, because other processes only add time. `new shapes` gives each call a
length that no call had before, as packed rows of varying length do. `autograd` is a function of the same tensors that
computes nothing: on a GPU, PyTorch's backward wakes a thread for the device, once for all layers of a model.
"""

from __future__ import annotations

import cProfile
import pstats
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from kernels import flash_attention
from kernels.flash_attention import op
from scripts.parser import parser_of, positive

Inputs = tuple[Tensor, Tensor, Tensor]


class Nothing(torch.autograd.Function):
    """What PyTorch takes for an attention that takes no time."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return q.detach()

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Inputs:
        assert len(ctx.saved_tensors) == 3
        return dout.detach(), dout.detach(), dout.detach()


@contextmanager
def without_launches() -> Iterator[None]:
    """On any machine, as on one with a Hopper GPU whose driver takes no time."""
    from kernels.flash_attention.hopper import host, launches

    counter = torch.zeros(1, dtype=torch.int32)
    with ExitStack() as stack:
        for owner, name, value in (
            (op, "choose_implementation", lambda *_: "hopper"), (host.Launch, "__call__", lambda *_: None),
            (host, "queue_counter", lambda _: counter), (launches, "multiprocessors", lambda _: 132),
        ):  # fmt: skip
            stack.enter_context(patch.object(owner, name, value))
        yield


def inputs_of(device: str, seq_len: int) -> Inputs:
    """A row of one head, in bf16, that wants gradients."""
    q, k, v = (
        torch.randn(1, seq_len, 2, 64, dtype=torch.bfloat16, device=device, requires_grad=True) for _ in range(3)
    )
    return q, k, v


def least_median(call: Callable[[Any], Any], prepare: Callable[[], Any], calls: int, rounds: int) -> float:
    """µs of a call, each of which gets what `prepare` made for it."""
    medians = []
    for _ in range(rounds):
        prepared = [prepare() for _ in range(calls)]
        synchronize()
        times = []
        for x in prepared:
            began = time.perf_counter()
            call(x)
            times.append(time.perf_counter() - began)
        synchronize()
        medians.append(statistics.median(times))
    return 1e6 * min(medians)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(
    device: str, new_shapes: bool, calls: int, rounds: int, attend: Callable[..., Any] = flash_attention
) -> dict[str, float]:
    """µs of the host, forward and backward."""
    lengths = count(65)

    def fresh() -> Inputs:
        return inputs_of(device, next(lengths) if new_shapes else 64)

    def forward(x: Inputs) -> Tensor:
        out = attend(*x)
        assert isinstance(out, Tensor)
        return out

    def backward_of() -> tuple[Tensor, Tensor]:
        out = forward(fresh())
        return out, torch.ones_like(out)

    for _ in range(3):
        torch.autograd.backward(*backward_of())
    return {
        "forward": least_median(forward, fresh, calls, rounds),
        "backward": least_median(lambda x: torch.autograd.backward(x[0], x[1]), backward_of, calls, rounds),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("bench_host", __doc__)
    parser.add_argument("--no-launch", action="store_true", help="leave out the launches, and need no GPU")
    parser.add_argument("--profile", action="store_true", help="print the functions that take the most time")
    parser.add_argument("--calls", type=positive, default=200, help="of which a median is taken (default 200)")
    parser.add_argument("--rounds", type=positive, default=7, help="medians, of which the least is printed (default 7)")
    args = parser.parse_args(argv)
    if not args.no_launch and not torch.cuda.is_available():
        parser.refuse("no CUDA GPU here; pass --no-launch")
    device = "cpu" if args.no_launch else "cuda"
    with without_launches() if args.no_launch else ExitStack():
        for name, new_shapes, attend in (
            ("one shape", False, flash_attention), ("new shapes", True, flash_attention),
            ("autograd", False, Nothing.apply),
        ):  # fmt: skip
            found = measure(device, new_shapes, args.calls, args.rounds, attend)
            print(f"{name:12} forward {found['forward']:6.1f} µs   backward {found['backward']:6.1f} µs", flush=True)
        if args.profile:
            profile(device, args.calls)


def profile(device: str, calls: int) -> None:
    prepared = [inputs_of(device, 64) for _ in range(calls)]
    profiler = cProfile.Profile()
    torch.autograd.set_multithreading_enabled(False)
    with profiler:
        for x in prepared:
            out = flash_attention(*x)
            assert isinstance(out, Tensor)
            torch.autograd.backward(out, torch.ones_like(out))
    pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main()
