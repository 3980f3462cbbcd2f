"""The head and its loss, forward and backward: python -m scripts.bench_loss --out docs/benchmarks/linear-cross-entropy

`ours` is kernels/linear_cross_entropy.py as the trainer calls it: bf16 hidden states, a float32 weight under autocast,
whose gradient is float32. `plain` is F.linear and F.cross_entropy under torch.compile, with the same inputs. PyTorch's
F.linear_cross_entropy, from 2.13 on, and Liger-Kernel, where it is installed, get the weight in bf16, and so does
`ours, bf16 weight`.

Each is first held against float64: the losses' sum over all tokens, dX of a sample of tokens, dW of a sample of the
vocabulary. Ours gets no time where an error is more than twice that of `plain`, the others none beyond 5 %.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import linear_cross_entropy
from scripts.bench_attention.timing import Memory, gpu_time
from scripts.parser import parser_of
from scripts.record import collect_facts, heading, need_cuda, write, write_json

MIB = 2**20
SIZES = ("16384x50304x768", "16384x128256x2048", "131072x128256x2048")
SAMPLE = 64  # tokens, and words
WORST = 0.05
"""Relative error of a peer beyond which it computes something else."""
BUDGET_MS = 500

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class Size(NamedTuple):
    tokens: int
    vocabulary: int
    width: int

    @classmethod
    def of(cls, text: str) -> Size:
        """From 16384x50304x768."""
        return cls(*map(int, text.split("x")))


class Peer(NamedTuple):
    loss: Loss
    """(x, weight, targets) → the sum over tokens."""
    weight: torch.dtype


def plain(x_NE: Tensor, weight_VE: Tensor, targets_N: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x_NE, weight_VE).float(), targets_N, reduction="sum")


def peers() -> Iterator[tuple[str, Peer]]:
    yield "plain", Peer(torch.compile(plain, dynamic=False), torch.float32)
    yield "ours", Peer(linear_cross_entropy, torch.float32)
    yield "ours, bf16 weight", Peer(linear_cross_entropy, torch.bfloat16)
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        options = torch.nn.LinearCrossEntropyOptions()
        pytorchs = partial(F.linear_cross_entropy, reduction="sum", options=options)
        yield "F.linear_cross_entropy", Peer(pytorchs, torch.bfloat16)
    if find_spec("liger_kernel"):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        yield "Liger-Kernel", Peer(partial(liger_fused_linear_cross_entropy, reduction="sum"), torch.bfloat16)


class Inputs(NamedTuple):
    x_NE: Tensor
    weight_VE: Tensor
    targets_N: Tensor


def make_inputs(size: Size, device: torch.device) -> Inputs:
    """bf16 hidden states of size 1, as after a norm; a float32 weight that bf16 holds exactly; one target in eight
    ignored. The others follow Zipf's law, as words do."""
    torch.manual_seed(0)
    N, V, E = size
    x_NE = torch.randn(N, E, device=device).bfloat16()
    weight_VE = torch.empty(V, E, device=device).normal_(std=2 / E**0.5).bfloat16().float()
    ranks_N = torch.exp(torch.rand(N, device=device) * torch.log(torch.tensor(float(V))).item()).long() - 1
    targets_N = ranks_N.clamp(0, V - 1)
    targets_N[::8] = -100
    return Inputs(x_NE, weight_VE, targets_N)


class Truth(NamedTuple):
    """In float64; dX of the tokens, dW of the words that were drawn."""

    loss: Tensor
    grad_x: Tensor
    grad_weight: Tensor
    tokens: Tensor
    words: Tensor

    @classmethod
    def of(cls, inputs: Inputs) -> Truth:
        x_NE, weight_VE, targets_N = inputs
        N, V = len(x_NE), len(weight_VE)
        weight = weight_VE.double()
        kept_N = targets_N >= 0
        lse_N = torch.cat([(x.double() @ weight.t()).logsumexp(-1) for x in x_NE.split(1024)])
        own_N = torch.cat(
            [
                (x.double() * weight[t.clamp_min(0)]).sum(-1)
                for x, t in zip(x_NE.split(1024), targets_N.split(1024), strict=True)
            ]
        )
        tokens = torch.randperm(N, device=x_NE.device)[:SAMPLE]
        # Half of them the most frequent: their gradients are sums of the most terms.
        words = torch.cat([torch.arange(SAMPLE // 2), torch.randperm(V)[: SAMPLE // 2]]).unique().to(x_NE.device) % V

        def gradient(rows: Tensor | slice, columns: Tensor | slice) -> Tensor:
            probabilities = (x_NE[rows].double() @ weight[columns].t() - lse_N[rows, None]).exp()
            ids = torch.arange(V, device=x_NE.device)[columns]
            return (probabilities - (targets_N[rows, None] == ids).double()) * kept_N[rows, None]

        everything = slice(None)
        return cls(
            ((lse_N - own_N) * kept_N).sum(),
            gradient(tokens, everything) @ weight,
            gradient(everything, words).t() @ x_NE.double(),
            tokens,
            words,
        )

    def errors(self, loss: Tensor, grad_x: Tensor, grad_weight: Tensor) -> dict[str, float]:
        """Relative: of the loss, and of the gradients by their norms."""
        pairs = {
            "loss": (loss, self.loss),
            "dx": (grad_x[self.tokens], self.grad_x),
            "dweight": (grad_weight[self.words], self.grad_weight),
        }
        return {name: ((got.double() - exact).norm() / exact.norm()).item() for name, (got, exact) in pairs.items()}


def run(peer: Peer, inputs: Inputs) -> list[Tensor]:
    """loss, dX, dW."""
    x_NE = inputs.x_NE.detach().requires_grad_()
    weight_VE = inputs.weight_VE.to(peer.weight).detach().requires_grad_()
    return step(peer, x_NE, weight_VE, inputs.targets_N)


def step(peer: Peer, x_NE: Tensor, weight_VE: Tensor, targets_N: Tensor) -> list[Tensor]:
    with torch.autocast(x_NE.device.type, torch.bfloat16, enabled=peer.weight == torch.float32):
        loss = peer.loss(x_NE, weight_VE, targets_N)
    return [loss.detach(), *torch.autograd.grad(loss, (x_NE, weight_VE))]


def measure(name: str, peer: Peer, inputs: Inputs, truth: Truth, limits: dict[str, float]) -> dict[str, Any]:
    """Errors, then bytes beyond inputs and gradients, then milliseconds; `wrong` in place of these beyond a limit."""
    row: dict[str, Any] = {"peer": name}
    try:
        row["errors"] = errors = truth.errors(*run(peer, inputs))
        # Of NaN nothing is true: it is beyond any limit.
        beyond = [f"{part} is off by {errors[part]:.1e}" for part, most in limits.items() if not errors[part] <= most]
        if beyond:
            return row | {"wrong": ", ".join(beyond)}
        x_NE = inputs.x_NE.detach().requires_grad_()
        weight_VE = inputs.weight_VE.to(peer.weight).detach().requires_grad_()
        memory = Memory(x_NE.device)
        step(peer, x_NE, weight_VE, inputs.targets_N)
        gradients = sum(t.numel() * t.element_size() for t in (x_NE, weight_VE))
        row["temporaries_mib"] = (memory.peak() - gradients) / MIB
        row["ms"] = gpu_time(lambda: step(peer, x_NE, weight_VE, inputs.targets_N), BUDGET_MS).ms
    except torch.OutOfMemoryError:
        row["wrong"] = "out of memory"
    return row


def limits_of(name: str, plains: dict[str, float] | None) -> dict[str, float]:
    """How large each error may be: ours twice that of `plain`, where that fits into memory."""
    if not name.startswith("ours") or plains is None:
        return dict.fromkeys(("loss", "dx", "dweight"), WORST)
    return {part: 2 * error + 1e-6 for part, error in plains.items()}


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "| tokens × vocabulary × width | | ms | ÷ plain | temporaries MiB | error of loss | dX | dW |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    times = {row["size"]: row["ms"] for row in rows if row["peer"] == "plain" and "ms" in row}
    for row in rows:
        size = " × ".join(f"{number:,}" for number in Size.of(row["size"]))
        errors = [f"{row['errors'][part]:.1e}" if "errors" in row else "–" for part in ("loss", "dx", "dweight")]
        if "ms" in row:
            ratio = f"{row['ms'] / times[row['size']]:.2f}" if row["size"] in times else "–"
            figures = [f"{row['ms']:.2f}", ratio, f"{row['temporaries_mib']:,.0f}"]
        else:
            figures = [row["wrong"], "–", "–"]
        lines.append(f"| {' | '.join([size, row['peer'], *figures, *errors])} |")
    return lines


def markdown(rows: Sequence[dict[str, Any]], facts: dict[str, Any]) -> str:
    text = (
        "Forward and backward of the head and its loss, bf16, the L2 cache emptied before each call. Temporaries: the "
        "highest memory beyond the inputs\nand both gradients. Errors are relative, against float64, of a sample of "
        f"{SAMPLE} tokens (dX) and as many words (dW); the weight is float32 where no\nother is named."
    )
    return "\n".join([*heading("The head and its loss", facts), text, "", *table(rows)]) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = parser_of("bench_loss", __doc__)
    parser.add_argument(
        "--sizes",
        nargs="+",
        default=SIZES,
        metavar="TOKENSxVOCABULARYxWIDTH",
        help="default: those of GPT-2 and Llama 3.2",
    )
    parser.add_argument("--out", type=Path, help="write OUT.md and OUT.json")
    args = parser.parse_args(argv)
    device = need_cuda("bench_loss")
    facts = collect_facts("bench_loss", argv, device, ["liger-kernel"])
    rows: list[dict[str, Any]] = []
    for size in args.sizes:
        inputs = make_inputs(Size.of(size), device)
        truth = Truth.of(inputs)
        torch.compiler.reset()
        plains = None
        for name, peer in peers():
            torch.cuda.empty_cache()
            row = {"size": size, **measure(name, peer, inputs, truth, limits_of(name, plains))}
            plains = row.get("errors") if name == "plain" else plains
            rows.append(row)
            print(table(rows)[-1], flush=True)
            if args.out:  # after every row, so that what was measured survives the next
                write(args.out.with_name(args.out.name + ".md"), markdown(rows, facts))
                write_json(args.out, facts, rows)
    print("\n".join(["", *table(rows)]))
    return 1 if any("wrong" in row for row in rows if row["peer"].startswith("ours")) else 0


if __name__ == "__main__":
    sys.exit(main())
