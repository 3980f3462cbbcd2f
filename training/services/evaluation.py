"""The loss over held-out text, the same tokens each time: as a whole, and by how many tokens were read before."""

from __future__ import annotations

import math

import numpy as np

from data.loader import IGNORE_INDEX, Batch
from training.metrics import TOKENS_READ, loss_at
from training.run import Run

from .base import Service


class Evaluation(Service):
    name = "evaluation"

    def begin(self, run: Run) -> None:
        if self.name in run.progress.unfinished:
            with run.startup.timed("evaluation"):
                self.evaluate(run)

    def after_step(self, run: Run) -> None:
        if run.due(run.config.eval_every):
            self.evaluate(run)

    def evaluate(self, run: Run) -> None:
        """Log the loss per token and per byte of text, and per token by the tokens read before it.

        A request to stop cuts it, and the resumed run does it again.
        """
        run.progress.unfinished.add(self.name)
        batches = run.batches.val_batches
        nats, tokens = (np.zeros(len(TOKENS_READ)) for _ in range(2))  # by range of tokens read
        with run.throughput.paused():
            for batch in batches:
                if run.stop_reason():
                    return
                losses_BS = run.train_step.losses(batch).double().cpu().numpy()
                nats += sum_by_tokens_read(batch, losses_BS)
                tokens += sum_by_tokens_read(batch, batch.targets_BS.numpy() != IGNORE_INDEX)
        loss = nats.sum() / tokens.sum()
        count_bytes = run.batches.corpus.tokenizer.count_bytes
        num_bytes = sum(count_bytes(batch.tokens_BS.numpy(), batch.targets_BS.numpy()) for batch in batches)
        run.progress.val_loss = run.progress.step, float(loss)
        metrics = {"val/loss": float(loss), "val/bits_per_byte": float(nats.sum()) / math.log(2) / num_bytes}
        if np.count_nonzero(tokens) > 1:  # else it would be val/loss again
            metrics |= {loss_at(TOKENS_READ[i]): float(nats[i] / tokens[i]) for i in np.flatnonzero(tokens)}
        run.log(metrics)
        run.progress.unfinished.remove(self.name)


def sum_by_tokens_read(batch: Batch, values_BS: np.ndarray) -> np.ndarray:
    """Sums of a value of each token of a batch, float64, one for each of TOKENS_READ.

    A prediction is made from the tokens of its document up to its own place: the first from 1.
    """
    read_BS = np.broadcast_to(batch.positions_BS.numpy() + 1, values_BS.shape)
    ranges_BS = np.searchsorted(TOKENS_READ, read_BS)  # the first end that is not below
    return np.bincount(ranges_BS.ravel(), values_BS.ravel(), minlength=len(TOKENS_READ))
