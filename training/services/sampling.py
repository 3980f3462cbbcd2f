"""A continuation of sample_prompt, as the model would write it now."""

from __future__ import annotations

from model.attention.config import AttentionConfig
from model.attention.math import MathAttention
from model.generate import Generator
from model.generate_config import SamplingConfig
from model.text import encode, write
from training.parallel.sharding import gathered
from training.run import Run

from .base import Service


class Sampling(Service):
    """What the model writes, every `sample_every` steps and at the end."""

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
        # A row of training is as long as the model is known to work, and as a table of learned positions reaches.
        num_tokens = min(config.sample_tokens, config.seq_len - 1)
        prompt = encode(tokenizer, config.sample_prompt)[-(config.seq_len - num_tokens) :]
        # Rows of any length are read by the definition of attention, which compiles nothing for them.
        attention = MathAttention(run.model.attention.spec, AttentionConfig(name="math"))
        with run.throughput.paused(), gathered(run.model):
            generator = Generator(run.model, 1, len(prompt) + num_tokens, SamplingConfig(), attention=attention)
            pieces = write(generator, tokenizer, [prompt], num_tokens, seed=config.seed)
            continuation = "".join(piece.text for piece in pieces)
        run.log_sample(config.sample_prompt + continuation)
