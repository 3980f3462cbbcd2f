"""Whole training steps, ours beside a plain GPT-2.

    python -m scripts.bench_training --out docs/benchmarks/training

Our rows are `python train.py …` commands, as a user runs them; their figures are read from metrics.jsonl. The peer is
a plain GPT-2 (below): torch.compile, SDPA, all logits at once; with --nanogpt DIR also karpathy/nanoGPT's own model.py.
Every figure is a median over windows of ten steps after warm-up.

No speed is printed for a wrong model: the peers must give our model's loss for the same weights and tokens, and our
runs with the same data must end at the same loss. With `--long` the command measures models and rows of growing size:
`--long --help`.
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.arithmetic import train_flops_per_token
from model.attention import AttentionConfig, AttentionSpec, build_attention
from model.config import ModelConfig
from model.gpt import GPT
from scripts.parser import parser_of, positive, row_length
from scripts.record import ROOT, collect_facts, heading, need_cuda, write, write_json
from training.hardware import peak_flops
from training.loggers.jsonl import read_metrics

COMMANDS = [
    "attention=sdpa data.document_mask=false",
    "attention=flash data.document_mask=false",
    "attention=sdpa",
    "attention=flex",
    "attention=flash",
]


class PlainBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(self.ln1(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.ln2(x)), approximate="tanh"))


class PlainGPT2(nn.Module):
    """GPT-2 as a person writes it in an afternoon; takes our weights."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.dim)
        self.wpe = nn.Embedding(config.n_positions, config.dim)
        self.blocks = nn.ModuleList(PlainBlock(config.dim, config.n_heads) for _ in range(config.n_layers))
        self.ln = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.ln(x)).flatten(0, 1), targets.flatten())

    def load(self, ours: GPT) -> None:
        names = {"embedding": "wte", "positions": "wpe", "norm": "ln", "attention_norm": "ln1", "mlp_norm": "ln2"}
        state = {}
        for key, value in ours.state_dict().items():
            parts = [part for part in key.split(".") if part not in ("attention", "mlp")]
            state[".".join(names.get(part, part) for part in parts)] = value
        self.load_state_dict(state)


def nanogpt(directory: Path, config: ModelConfig) -> Callable[[Tensor, Tensor], Tensor]:
    """karpathy/nanoGPT's model from a checkout, with its own initialisation."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", directory / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    shape = module.GPTConfig(
        block_size=config.n_positions, vocab_size=config.vocab_size, n_layer=config.n_layers, n_head=config.n_heads,
        n_embd=config.dim, dropout=0.0, bias=True,
    )  # fmt: skip
    model: nn.Module = module.GPT(shape).cuda()
    return model


def checkout(text: str) -> Path:
    """The type of an option: a folder with nanoGPT's model.py."""
    if not (Path(text) / "model.py").is_file():
        raise argparse.ArgumentTypeError(f"{text} has no model.py; name a checkout of karpathy/nanoGPT")
    return Path(text)


def time_peer(
    model: Any, seq_len: int, config: ModelConfig, *, loss_of: Callable[..., Tensor], windows: int
) -> dict[str, float]:
    """Median step time and peak memory of a compiled peer on random tokens, batch 1."""
    compiled = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), fused=True)
    tokens = torch.randint(0, config.vocab_size, (1, seq_len + 1), device="cuda")

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = loss_of(compiled, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(5):
        step()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(windows):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(10):
            step()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - began) / 10)
    return figures(seq_len / statistics.median(times), torch.cuda.max_memory_allocated() / 2**30, config, seq_len)


def figures(tokens_per_second: float, gib: float, config: ModelConfig, seq_len: int) -> dict[str, float]:
    return {
        "tokens_per_second": tokens_per_second,
        "step_ms": 1000 * seq_len / tokens_per_second,
        "tflops": tokens_per_second * train_flops_per_token(config, seq_len / 2) / 1e12,
        "peak_gib": gib,
    }


def time_ours(overrides: str, seq_len: int, config: ModelConfig, windows: int) -> tuple[dict[str, float], float, str]:
    """Run train.py; returns its median figures, its last training loss, and what its start-up line says."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [
            sys.executable, "train.py", f"model={config.name}", f"seq_len={seq_len}", "batch_size=1", "log_every=10",
            f"max_steps={10 * windows + 10}", "logger=none", "sample_tokens=0", f"eval_tokens={seq_len}",
            f"run_dir={run}",            *shlex.split(overrides),
        ]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        rows = [row for row in read_metrics(run / "metrics.jsonl") if "throughput/tokens_per_second" in row][1:]
    attention = next(line for line in done.stdout.splitlines() if line.startswith("attention")).split(maxsplit=1)[1]
    speed = statistics.median(row["throughput/tokens_per_second"] for row in rows)
    memory = max(row["memory/peak_allocated_gib"] for row in rows)
    return figures(speed, memory, config, seq_len), rows[-1]["train/loss"], attention


def main() -> None:
    parser = parser_of("bench_training", __doc__)
    parser.add_argument("--seq-len", type=row_length, default=16384, help="tokens in a row (default 16384)")
    parser.add_argument("--windows", type=positive, default=5, help="windows of ten steps (default 5)")
    parser.add_argument("--nanogpt", type=checkout, help="a checkout of karpathy/nanoGPT, to time its model.py too")
    parser.add_argument("--commands", nargs="*", default=COMMANDS, help="overrides of train.py, one row each")
    parser.add_argument("--out", type=Path, help="write OUT.md and OUT.json")
    args = parser.parse_args()
    device = need_cuda("bench_training")
    seq_len = args.seq_len
    config = ModelConfig(
        "gpt2-124m", 12, 12, 768, 3072, 50304, position="learned", n_positions=seq_len, norm="layernorm", mlp="gelu",
        bias=True, tie_head=True,
    )  # fmt: skip
    rows: list[dict[str, Any]] = []

    facts = collect_facts("bench_training", sys.argv[1:], device)
    facts["peak_flops"] = peak_flops(torch.cuda.get_device_name(), "bfloat16", torch.cuda.get_device_capability())

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        print(cells(row), flush=True)
        if args.out:  # after every row: each takes a minute, and what was measured should survive the next
            write(args.out.with_name(args.out.name + ".md"), markdown(rows, facts, seq_len))
            write_json(args.out, facts, rows)

    spec = AttentionSpec(12, 12, 64, seq_len, "bfloat16", torch.cuda.get_device_capability())
    with device:
        ours = GPT(config, build_attention(AttentionConfig("auto"), spec))
        plain = PlainGPT2(config)
    plain.load(ours)
    tokens = torch.randint(0, config.vocab_size, (1, seq_len + 1), device=device)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        theirs = plain(tokens[:, :-1], tokens[:, 1:]).item()
        difference = abs(ours(tokens[:, :-1], tokens[:, 1:]).item() / seq_len - theirs)
    if not difference < 1e-3 * theirs:
        raise SystemExit(f"error: the plain GPT-2 and ours differ by {difference:.2e} nats with the same weights")
    del ours
    name = "plain GPT-2: torch.compile, SDPA, cross_entropy"
    add({"name": name, **time_peer(plain, seq_len, config, loss_of=lambda m, x, y: m(x, y), windows=args.windows)})
    del plain
    torch.compiler.reset()
    if args.nanogpt:
        peer = nanogpt(args.nanogpt, config)
        add(
            {
                "name": "nanoGPT",
                **time_peer(peer, seq_len, config, loss_of=lambda m, x, y: m(x, y)[1], windows=args.windows),
            }
        )
        del peer
        torch.compiler.reset()
    torch.cuda.empty_cache()

    losses: dict[bool, float] = {}
    for overrides in args.commands:
        result, loss, attention = time_ours(overrides, seq_len, config, args.windows)
        expected = losses.setdefault("document_mask=false" in overrides, loss)
        if not abs(loss - expected) < 0.02 * expected:
            raise SystemExit(
                f"error: train.py {overrides} ends at loss {loss:.4f}, the first such run at {expected:.4f}"
            )
        add({"name": f"train.py {overrides}", "kernel": attention, "loss": loss, **result})


def markdown(rows: list[dict[str, Any]], facts: dict[str, Any], seq_len: int) -> str:
    lines = [
        *heading(f"Training steps, gpt2-124m, sequence {seq_len:,}, batch 1, bf16", facts),
        "TFLOP/s by the causal convention (6N + 6·L·d·S per token), whatever documents mask. Peak: allocated GiB.",
        "",
        "| | tokens/s | step ms | TFLOP/s | peak GiB | kernel |",
        "|---|---:|---:|---:|---:|---|",
    ]
    return "\n".join([*lines, *map(cells, rows)]) + "\n"


def cells(row: dict[str, Any]) -> str:
    return (
        f"| {row['name']} | {row['tokens_per_second']:,.0f} | {row['step_ms']:.1f} | {row['tflops']:.0f} "
        f"| {row['peak_gib']:.1f} | {row.get('kernel', '')} |"
    )


if __name__ == "__main__":
    main()
