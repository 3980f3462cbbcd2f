"""How fast a whole model generates, one token a step, at several lengths. On a GPU, in a minute.

    python -m scripts.bench_generate                                     # llama-1b and llama-8b, one row
    python -m scripts.bench_generate --compile --out docs/benchmarks/generate-h200       # the record
    python -m scripts.bench_generate --model llama-8b --batch 16 --compile --attention flash sdpa

Weights are random and the cache is empty: neither changes what is read or computed. A step is one CUDA graph, sampling
included; ms are the median of several runs of steps. GB/s are the bytes of the matrices and of the keys and values that
a step reads, over its time.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from model.attention import ATTENTIONS, AttentionSpec, build_attention
from model.config import ModelConfig
from model.generate import Generator
from model.generate_config import SamplingConfig
from model.gpt import GPT
from scripts.parser import parser_of, positive, row_length
from scripts.record import collect_facts, heading, need_cuda, write, write_json
from scripts.settings import train_config

LENGTHS = (1024, 8192, 32768)
STEPS, RUNS = 20, 5

Row = dict[str, Any]


def build(config: ModelConfig, attention: str, seq_len: int, device: torch.device) -> GPT:
    """With random weights, the matrices of linear layers in bf16, as a trained model is loaded."""
    capability = torch.cuda.get_device_capability(device)
    spec = AttentionSpec.of(config, seq_len=seq_len, dtype="bfloat16", capability=capability)
    with device:
        model = GPT(config, build_attention(ATTENTIONS[attention](name=attention), spec))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.detach().bfloat16(), requires_grad=False)
    return model.requires_grad_(False)


def step_ms(generator: Generator, length: int) -> float:
    """Of the steps from this length on."""
    times = []
    for _ in range(RUNS):
        generator.cache.lengths_B.fill_(length)
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        generator.run_step()
        began.record()
        for _ in range(STEPS):
            generator.run_step()
        ended.record()
        torch.cuda.synchronize()
        times.append(began.elapsed_time(ended) / STEPS)
    return statistics.median(times)


def bytes_read(model: GPT, batch: int, length: int) -> int:
    config, spec = model.config, model.attention.spec
    matrices = sum(module.weight.nbytes for module in model.modules() if isinstance(module, nn.Linear))
    seen = length if spec.window is None else min(length, spec.window)
    return matrices + 2 * 2 * config.n_layers * batch * seen * spec.n_kv_heads * spec.head_dim


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("bench_generate", __doc__)
    names = [name for name in ATTENTIONS if name != "auto"]
    parser.add_argument("--model", nargs="+", default=["llama-1b", "llama-8b"], help="names in configs/model")
    parser.add_argument("--attention", nargs="+", choices=names, default=["flash"], help="default flash")
    parser.add_argument("--batch", nargs="+", type=positive, default=[1], help="rows; default 1")
    parser.add_argument("--length", nargs="+", type=row_length, default=list(LENGTHS), help="tokens; default 1k 8k 32k")
    parser.add_argument("--compile", action="store_true", help="compile the step")
    parser.add_argument("--out", type=Path, help="write OUT.md and OUT.json")
    options = parser.parse_args(argv)
    device = need_cuda("bench_generate")
    facts = collect_facts("bench_generate", sys.argv[1:] if argv is None else argv, device)
    capacity = max(options.length) + STEPS + 2
    rows: list[Row] = []
    for name, attention in product(options.model, options.attention):
        model = build(train_config([f"model={name}", f"seq_len={capacity}"]).model, attention, capacity, device)
        for batch in options.batch:
            settings: dict[str, Any] = {"compile": options.compile, "cuda_graph": True}
            generator = Generator(model, batch, capacity, SamplingConfig(), **settings)
            for length in options.length:
                ms, read = step_ms(generator, length), bytes_read(model, batch, length)
                case = {"model": name, "attention": attention, "batch": batch, "length": length}
                rows.append({**case, "ms": ms, "tokens_per_second": 1000 * batch / ms, "gb_per_s": read / ms / 1e6})
                print(line(rows[-1]), flush=True)
            del generator
        del model
        torch.cuda.empty_cache()
    table = ["| | tokens/s | ms | GB/s |", "|---|---:|---:|---:|", *map(line, rows)]
    if options.out:
        write_json(options.out, facts, rows)
        page = [*heading("Generating a token at a time, random weights in bf16", facts), *table]
        write(options.out.with_name(options.out.name + ".md"), "\n".join(page) + "\n")
    print("\n".join(table))
    return 0


def line(row: Row) -> str:
    what = f"{row['model']}, {row['attention']}, {row['batch']} × {row['length']:,}"
    return f"| {what} | {row['tokens_per_second']:,.1f} | {row['ms']:.3f} | {row['gb_per_s']:,.0f} |"


if __name__ == "__main__":
    raise SystemExit(main())
