"""Tasks of lm-evaluation-harness with a model of ours, in this process: our attention, the whole context.

https://github.com/EleutherAI/lm-evaluation-harness, 0.4.13. Where a task's text begins, a document begins: after a
separator, as in training.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
    raise ValueError(
        f"--tasks needs lm-evaluation-harness ({error.name} is not installed): pip install -e '.[evaluate]'"
    ) from error

from training.terminal import say
from training.trained import load_model

from .scoring import Scorer

TASKS = Path(__file__).parent / "tasks"


def evaluate_tasks(options: argparse.Namespace, notify: Callable[[str], None]) -> dict[str, object]:
    """Print a table of the tasks' metrics, and return them.

    Raises:
        ValueError: the model cannot be had, or there is no such task.
    """
    manager = TaskManager(
        include_path=[str(TASKS), *([options.include_path] if options.include_path else [])],
        metadata={} if options.seq_len is None else {"seq_len": options.seq_len},
    )
    names = [name.strip() for name in options.tasks.split(",") if name.strip()]
    if unknown := [name for name in names if not manager.match_tasks([name])]:
        raise ValueError(f"--tasks {unknown[0]}: lm-evaluation-harness has no such task; `lm_eval ls tasks` lists them")
    model, tokenizer = load_model(
        options.run, attention=options.attention, device=options.device, precision=options.precision, notify=notify
    )
    notify(f"attention  {model.attention.describe()}")
    found: Any = simple_evaluate(
        model=OurModel(Scorer(model, tokenizer, options.batch_size, notify)),
        tasks=names,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        task_manager=manager,
        log_samples=False,
        bootstrap_iters=0,
    )
    results: dict[str, dict[str, Any]] = found["results"]
    for task, metrics in results.items():
        for name, value in metrics.items():
            if isinstance(value, float) and "stderr" not in name:
                say(f"{task:<32} {name.partition(',')[0]:<20} {value:.4f}")
    return {"tasks": results, "num_samples": found.get("n-samples", {})}


class OurModel(TemplateLM):
    """A `Scorer`, as lm-evaluation-harness asks it."""

    def __init__(self, scorer: Scorer) -> None:
        super().__init__()
        self.scorer = scorer

    @property
    def eot_token_id(self) -> int:
        return self.scorer.tokenizer.separator_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **others: Any) -> list[int]:
        ids = self.scorer.tokenizer.encode(string)
        return ids if add_special_tokens is False else [self.eot_token_id, *ids]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **others: Any
    ) -> list[tuple[float, bool]]:
        return self.scorer.score([(context, continuation) for _, context, continuation in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text, in pieces of the length of a row in training, each after one token."""
        totals = []
        for request in requests:
            ids = self.scorer.tokenizer.encode(request.args[0])
            windows = get_rolling_token_windows(ids, self.eot_token_id, self.scorer.seq_len, context_len=1)
            scores = self.scorer.score([make_disjoint_window(window) for window in windows])
            totals.append(sum(logprob for logprob, _ in scores))
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        texts = []
        for request in requests:
            prompt, asked = request.args
            stops = asked.get("until") or []
            temperature = float(asked.get("temperature", 0.0)) if asked.get("do_sample") else 0.0
            texts.append(
                self.scorer.continue_(
                    self.tok_encode(prompt),
                    int(asked.get("max_gen_toks", 256)),
                    [stops] if isinstance(stops, str) else stops,
                    temperature,
                )
            )
        return texts
