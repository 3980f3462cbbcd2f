"""The loss over held-out text, the same tokens each time: as a whole, and by how many tokens were read before. Where
there are questions, the share of right answers: as a whole, and by how far back it was told."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from data.answers import distances
from data.loader import IGNORE_INDEX, Batch
from data.progress import bar
from training.metrics import DISTANCES, TOKENS_READ, loss_at, recall_at
from training.parallel.world import World
from training.run import Run
from training.step import Forward

from .base import Service


class Evaluation(Service):
    """The loss on held-out text, every `eval_every` steps, before the first and after the last."""

    name = "evaluation"

    def begin(self, run: Run) -> None:
        if self.name in run.progress.unfinished:
            with run.startup.timed("evaluation"):
                self.evaluate(run)

    def after_step(self, run: Run) -> None:
        if run.due(run.config.eval_every):
            self.evaluate(run)

    def evaluate(self, run: Run) -> None:
        """Log what `measure` finds.

        A request to stop cuts it, and the resumed run does it again.
        """
        run.progress.unfinished.add(self.name)
        with run.throughput.paused():
            metrics = measure(
                run.train_step,
                run.batches.val_batches,
                run.batches.corpus.tokenizer.count_bytes,
                run.world,
                is_recall=run.config.data.is_recall,
                stopped=run.stop_reason,
            )
        if metrics is None:
            return
        run.progress.val_loss = run.progress.step, metrics["val/loss"]
        run.log(metrics)
        run.progress.unfinished.remove(self.name)


def measure(
    forward: Forward,
    batches: Sequence[Batch],
    count_bytes: Callable[[np.ndarray, np.ndarray], int],
    world: World,
    *,
    is_recall: bool,
    stopped: Callable[[], object] = lambda: None,
) -> dict[str, float] | None:
    """The metrics of held-out text: the loss per token and per byte, per token by the tokens read before, and recall.

    Args:
        batches: the same on every rank: each reads its own of them, and all get the same metrics.
        count_bytes: of text, from tokens and targets. stopped: asked before each batch whether to return None.
    """
    nats, tokens = (np.zeros(len(TOKENS_READ)) for _ in range(2))  # by range of tokens read
    right, asked = (np.zeros(len(DISTANCES)) for _ in range(2))  # by range of distances
    with bar("evaluating", len(batches), "batches") as advance:
        for first in range(0, len(batches), world.data_size):
            if stopped():
                return None
            number = first + world.data_rank
            # Where no batch is left, a rank computes one again: all compute together.
            batch = batches[min(number, len(batches) - 1)]
            losses_BS = forward.losses(batch).double().cpu().numpy()
            predicted = forward.predictions(batch).cpu().numpy() if is_recall else None
            advance(min(world.data_size, len(batches) - first))
            if number >= len(batches) or world.context_rank > 0:  # ranks that share rows find the same
                continue
            nats += sum_by_tokens_read(batch, losses_BS)
            tokens += sum_by_tokens_read(batch, batch.targets_BS.numpy() != IGNORE_INDEX)
            if predicted is not None:
                counted = count_right(batch, predicted)
                right, asked = right + counted[0], asked + counted[1]
    nats, tokens, right, asked = (world.sum(torch.from_numpy(sums)).numpy() for sums in (nats, tokens, right, asked))
    loss = nats.sum() / tokens.sum()
    num_bytes = sum(count_bytes(batch.tokens_BS.numpy(), batch.targets_BS.numpy()) for batch in batches)
    metrics = {"val/loss": float(loss), "val/bits_per_byte": float(nats.sum()) / math.log(2) / num_bytes}
    if np.count_nonzero(tokens) > 1:  # else it would be val/loss again
        metrics |= {loss_at(TOKENS_READ[i]): float(nats[i] / tokens[i]) for i in np.flatnonzero(tokens)}
    if is_recall:
        metrics |= {"val/recall": float(right.sum() / asked.sum())}
        metrics |= {recall_at(DISTANCES[i]): float(right[i] / asked[i]) for i in np.flatnonzero(asked)}
    return metrics


def sum_by_tokens_read(batch: Batch, values_BS: np.ndarray) -> np.ndarray:
    """Sums of a value of each token of a batch, float64, one for each of TOKENS_READ.

    A prediction is made from the tokens of its document up to its own place: the first from 1.
    """
    read_BS = np.broadcast_to(batch.positions_BS.numpy() + 1, values_BS.shape)
    return _sum_by_range(TOKENS_READ, read_BS, values_BS)


def count_right(batch: Batch, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Right answers and questions of a batch, float64, one for each of DISTANCES, by how far away the key was told.

    Args:
        predicted: (targets,) the token that a model takes for each, in the order of rows and places.
    """
    targets_BS = batch.targets_BS.numpy()
    is_right = predicted == targets_BS[targets_BS != IGNORE_INDEX]
    away = distances(batch.tokens_BS.numpy(), targets_BS)
    return _sum_by_range(DISTANCES, away, is_right), _sum_by_range(DISTANCES, away, np.ones_like(away))


def _sum_by_range(ends: tuple[int, ...], tokens: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Sums of values by which of the ends is the first that their number of tokens is not above."""
    ranges = np.searchsorted(ends, tokens)
    return np.bincount(ranges.ravel(), values.ravel(), minlength=len(ends))
