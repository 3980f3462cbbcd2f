"""A program of several ranks: trains each of some runs a few steps, and says what became of it.

    RANK=… WORLD_SIZE=… python tests/training/ranks.py CASES.json OUT.pt

CASES.json: name → words of train.py. OUT.pt: name → `trained`. Every rank runs the same cases, one after the other, in
one process group; rank 0 writes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


def trained(words: list[str]) -> dict[str, Any]:
    """Losses and norms of every step, evaluation's loss before and after, and the weights at the end."""
    from scripts.settings import train_config
    from training.parallel.sharding import whole
    from training.run import Run
    from training.runtime import resolve_runtime

    config = train_config(words)
    run = Run(config, resolve_runtime(config), lambda line: None)
    run.batches.open()
    losses, norms, good, tokens = [], [], [], []
    try:
        for step in run.remaining_steps():
            micro_batches = run.batches.next(run.plan.accumulation)
            result = run.train_step(micro_batches, step, run.learning_rate())
            losses.append(result.loss.item())
            norms.append(result.grad_norm.item())
            good.append(bool(result.good))
            tokens.append((result.num_tokens, result.visible_pairs))
    finally:
        run.batches.close()
    weights = {name: whole(p.detach()).clone() for name, p in run.model.named_parameters()}
    return {
        "losses": losses,
        "norms": norms,
        "good": good,
        "tokens": tokens,
        "rows": run.batches.rows,
        "weights": weights,
    }


def main(cases: Path, out: Path) -> None:
    torch.set_num_threads(1)
    from training.parallel.launch import Launch

    results = {name: trained(words) for name, words in json.loads(cases.read_text()).items()}
    if Launch.here().rank == 0:
        torch.save(results, out)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main(Path(sys.argv[1]), Path(sys.argv[2]))
