"""The training loop, and what it is made of."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_model
from torch import Tensor

from data.corpus import Corpus, load_corpus
from data.loader import Batch, Loader, eval_batches
from data.packing import pack
from model.generate import generate
from model.gpt import GPT

from .config import TrainConfig
from .errors import NonFiniteError
from .facts import matmul_peak, run_facts, start_up_lines
from .loggers import build_loggers
from .loggers.base import RunInfo
from .memory import memory_metrics
from .optimizer import Optimizer
from .runtime import attention_for, resolve_runtime
from .schedule import learning_rate
from .throughput import Throughput


class Trainer:
    """One run: everything is built by the constructor, `fit` trains.

    Raises:
        ValueError: something a person chose is impossible; one line says what to do.
    """

    def __init__(self, config: TrainConfig, notify: Callable[[str], None] = print) -> None:
        self.config, self.notify = config, notify
        self.runtime = runtime = resolve_runtime(config)
        attention_for(config, runtime)  # a refusal comes now, not after the data is read
        self.folder = Path(config.run_dir)
        try:
            if self.folder.exists() and any(self.folder.iterdir()):
                raise ValueError(f"run_dir={config.run_dir} already holds a run; choose another folder or remove it")
        except OSError as error:  # a file, a name that is too long, a folder that may not be read
            raise ValueError(f"run_dir={config.run_dir} cannot be used: {error.strerror}; choose another") from error

        self.corpus: Corpus = load_corpus(config.data, config.tokenizer, notify)
        config.check_vocab_size(self.corpus.tokenizer.vocab_size)
        mask = config.data.document_mask
        self.train_rows = pack(self.corpus, "train", config.seq_len, mask, config.data.packing)
        val_rows = pack(self.corpus, "val", self.val_seq_len(), mask)
        self.val_batches = list(eval_batches(val_rows, config.batch_size, config.eval_tokens))
        self.token_bytes = torch.from_numpy(self.corpus.tokenizer.token_bytes().astype(np.int64))

        torch.manual_seed(config.seed)
        if runtime.precision == "tf32":
            torch.set_float32_matmul_precision("high")
        max_documents = max(self.train_rows.max_documents, val_rows.max_documents) if mask else None
        self.attention = attention_for(config, runtime, max_documents)
        with runtime.device:
            self.model = GPT(config.model, self.attention)
        if runtime.compile:
            self.model.compile()
        self.optimizer = Optimizer(self.model, config.optimizer, runtime.device)

        self.throughput = Throughput(
            config.model,
            config.seq_len,
            matmul_peak(runtime),
            synchronize=torch.cuda.synchronize if runtime.device.type == "cuda" else lambda: None,
        )
        self.step = self.last_logged = 0
        self.loggers = build_loggers(config.logger, max_steps=config.num_steps, notify=notify)
        self.summary: dict[str, float] = {}

    def val_seq_len(self) -> int:
        """seq_len, or less where the held-out text does not fill one row of it."""
        available = min(len(part.val.tokens) for part in self.corpus.parts) - 1
        if available < self.config.seq_len:
            self.notify(f"validation rows have {available:,} tokens, all the held-out text there is, not seq_len")
        return min(available, self.config.seq_len)

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return self.step * self.config.step_tokens

    def fit(self) -> dict[str, float]:
        """Train to the last step; returns the last value of every metric."""
        config, device = self.config, self.runtime.device
        self.start()
        batches = Loader(
            self.train_rows, config.batch_size, seed=config.seed, device=device, window=config.model.window
        )
        losses = torch.zeros((), device=device)  # sum over the steps since the last log line
        bad_step = torch.zeros((), device=device)  # first step whose loss or gradients were not finite
        status = "failed"
        try:
            self.evaluate()
            for self.step in range(1, config.num_steps + 1):
                with self.throughput.waiting_for_data():
                    micro_batches = [next(batches) for _ in range(config.accumulation)]
                num_tokens = sum(batch.num_tokens for batch in micro_batches)

                loss = torch.zeros((), device=device)
                for batch in micro_batches:
                    # Divided by the whole step's tokens, not averaged per micro-batch: every token weighs the same.
                    micro_loss = self.loss(batch) / num_tokens
                    micro_loss.backward()
                    loss += micro_loss.detach()

                grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip or math.inf)
                finite = torch.isfinite(loss) & torch.isfinite(grad_norm)
                bad_step = torch.where(finite | (bad_step > 0), bad_step, float(self.step))
                rate = learning_rate(
                    config.schedule, self.step, config.num_steps, config.step_tokens, config.learning_rate
                )
                self.optimizer.step(rate, finite)
                losses += loss
                self.throughput.count_step(num_tokens, sum(batch.visible_pairs for batch in micro_batches))

                if self.due(config.log_every, first=True):
                    self.log_training(losses, bad_step, grad_norm, rate)
                    losses.zero_()
                if self.due(config.eval_every):
                    self.evaluate()
                if self.due(config.sample_every):
                    self.sample()
            self.save()
            status = "finished"
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        finally:
            batches.close()
            self.loggers.finish(status)
        return self.summary

    def due(self, every: int, first: bool = False) -> bool:
        """Whether something done every so many steps (0: never) is due: always at the last step."""
        is_edge = self.step == self.config.num_steps or (first and self.step == 1)
        return is_edge or (every > 0 and self.step % every == 0)

    def loss(self, batch: Batch) -> Tensor:
        """Summed loss of a batch in nats."""
        batch = batch.to(self.runtime.device)
        with self.runtime.autocast():
            return self.model(batch.tokens_BS, batch.targets_BS, batch.starts_BS)

    def log_training(self, losses: Tensor, bad_step: Tensor, grad_norm: Tensor, rate: float) -> None:
        """Report the steps since the last line. The only place where the loop waits for the device."""
        if bad_step > 0:
            raise NonFiniteError(
                f"the loss or a gradient was NaN or infinite at step {int(bad_step)}; no parameter took that step. "
                f"Try a lower learning_rate, a longer schedule.warmup_steps, or precision=fp32"
            )
        since = self.step - self.last_logged
        self.last_logged = self.step
        metrics = {
            "train/loss": losses.item() / since,
            "train/grad_norm": grad_norm.item(),
            "train/learning_rate": rate,
            **self.throughput.report(),
            **memory_metrics(self.runtime.device),
        }
        self.log(metrics)

    @torch.no_grad()
    def evaluate(self) -> None:
        """Loss over the same held-out tokens each time, per token and per byte of text."""
        with self.throughput.paused():
            nats = sum(self.loss(batch).item() for batch in self.val_batches)
        num_tokens = sum(batch.num_tokens for batch in self.val_batches)
        num_bytes = sum(int(self.token_bytes[batch.targets_BS].sum()) for batch in self.val_batches)
        self.log({"val/loss": nats / num_tokens, "val/bits_per_byte": nats / math.log(2) / num_bytes})

    def sample(self) -> None:
        """A continuation of sample_prompt, as the model would write it now."""
        config, tokenizer = self.config, self.corpus.tokenizer
        if config.sample_tokens == 0:
            return
        prompt = [tokenizer.separator_id, *tokenizer.encode(config.sample_prompt)]
        with self.throughput.paused(), self.runtime.autocast():
            ids = generate(self.model, prompt, config.sample_tokens, seed=config.seed, stop_id=tokenizer.separator_id)
        self.loggers.sample(self.step, self.tokens, tokenizer.decode(ids[1:]))

    def log(self, metrics: dict[str, float]) -> None:
        self.summary.update(metrics)
        self.loggers.log(self.step, self.tokens, metrics)

    def start(self) -> None:
        """Make the run folder, say what is about to happen, open the loggers."""
        config = self.config
        facts = run_facts(config, self.runtime, self.attention, self.corpus)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            OmegaConf.save(OmegaConf.create(asdict(config)), self.folder / "config.yaml")
            (self.folder / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")
            self.corpus.tokenizer.save(self.folder / "tokenizer.json")
        except OSError as error:
            raise ValueError(f"run_dir={config.run_dir} cannot be written: {error.strerror}; choose another") from error
        for line in start_up_lines(config, facts):
            self.notify(line)
        self.loggers.start(RunInfo(self.folder.name, self.folder, asdict(config), facts))
        if self.runtime.compile:
            self.notify("compiling  the first steps take up to a minute and are in no measurement")

    def save(self) -> None:
        """The trained weights, as safetensors: written beside their final name first, then renamed."""
        part = self.folder / "model.safetensors.part"
        save_model(self.model, str(part))
        os.replace(part, self.folder / "model.safetensors")
