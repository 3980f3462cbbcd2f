"""A program of several ranks: trains each of some runs a few steps, and says what became of it.

    PYTHONPATH=. RANK=… WORLD_SIZE=… python tests/training/ranks.py CASES.json OUT.pt

CASES.json: name → arguments of `trained`; OUT.pt: name → what it returned. Every rank runs the same cases, one after
the other, in one process group; rank 0 writes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch


def trained(words: list[str], poisoned: list[int] | None = None) -> dict[str, Any]:
    """What every step did, an evaluation before and after, and the weights and moments at the end.

    Args:
        words: of train.py. poisoned: a step, and the data rank whose loss is NaN in it.
    """
    from scripts.settings import train_config
    from training.parallel.sharding import is_sharded, named_parameters, whole
    from training.run import Run
    from training.runtime import resolve_runtime
    from training.services.evaluation import measure

    config = train_config(words)
    run = Run(config, resolve_runtime(config), lambda line: None)

    def evaluated() -> dict[str, float] | None:
        count_bytes = run.batches.corpus.tokenizer.count_bytes
        return measure(run.train_step, run.batches.val_batches, count_bytes, run.world, is_recall=config.data.is_recall)

    def weights() -> dict[str, torch.Tensor]:
        return {name: whole(p.detach()).clone() for name, p in named_parameters(run.model).items()}

    loss = run.train_step.loss
    first, before, steps = weights(), evaluated(), []
    run.batches.open()
    try:
        for step in run.remaining_steps():
            is_poisoned = poisoned == [step, run.world.data_rank]
            run.train_step.loss = lambda batch, bad=is_poisoned: loss(batch) * (torch.nan if bad else 1.0)  # type: ignore[method-assign, misc]
            result = run.train_step(run.batches.next(run.plan.accumulation), step, run.learning_rate())
            steps.append([tensor.item() for tensor in result[:3]] + list(result[3:]))
    finally:
        run.batches.close()
    return {
        "steps": steps,
        "rows": run.batches.rows,
        "evaluations": [before, evaluated()],
        "first": first,
        "weights": weights(),
        "sharded": [name for name, p in named_parameters(run.model).items() if is_sharded(p)],
        "moments": {name: whole(tensor).clone() for name, tensor in run.optimizer.tensors().items()},
    }


def main(cases: Path, out: Path) -> None:
    from training.parallel import gradients
    from training.parallel.launch import speaks

    torch.set_num_threads(1)
    gradients.SMALL = 1000  # some of these are added up where they lie, others together
    results = {name: trained(**case) for name, case in json.loads(cases.read_text()).items()}
    if speaks():
        torch.save(results, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
