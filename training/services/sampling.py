"""A continuation of sample_prompt, as the model would write it now."""

from __future__ import annotations

from model.generate import generate
from training.run import Run

from .base import Service


class Sampling(Service):
    name = "sampling"

    def begin(self, run: Run) -> None:
        if self.name in run.progress.unfinished:
            self.after_step(run)

    def after_step(self, run: Run) -> None:
        run.progress.unfinished.discard(self.name)
        if run.config.sample_tokens == 0 or not run.due(run.config.sample_every):
            return
        if run.stop_reason():
            run.progress.unfinished.add(self.name)
        else:
            self.sample(run)

    def sample(self, run: Run) -> None:
        config, tokenizer = run.config, run.batches.corpus.tokenizer
        prompt = [tokenizer.separator_id, *tokenizer.encode(config.sample_prompt)]
        with run.throughput.paused(), run.runtime.autocast():
            ids = generate(run.model, prompt, config.sample_tokens, seed=config.seed, stop_id=tokenizer.separator_id)
        run.log_sample(tokenizer.decode(ids[1:]))
