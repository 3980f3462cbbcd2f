"""The loss over held-out text: the same tokens each time."""

from __future__ import annotations

import math

import torch

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

    @torch.no_grad()
    def evaluate(self, run: Run) -> None:
        """Log the loss per token and per byte of text. A request to stop cuts it, and the resumed run does it again."""
        run.progress.unfinished.add(self.name)
        batches, nats = run.batches.val_batches, 0.0
        with run.throughput.paused():
            for batch in batches:
                if run.stop_reason():
                    return
                nats += run.train_step.loss(batch).item()
        num_tokens = sum(batch.num_tokens for batch in batches)
        count_bytes = run.batches.corpus.tokenizer.count_bytes
        num_bytes = sum(count_bytes(batch.tokens_BS.numpy(), batch.targets_BS.numpy()) for batch in batches)
        run.progress.val_loss = run.progress.step, nats / num_tokens
        run.log({"val/loss": nats / num_tokens, "val/bits_per_byte": nats / math.log(2) / num_bytes})
        run.progress.unfinished.remove(self.name)
