"""The training loop, and what it is made of."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import save_model
from torch import Tensor

from data.corpus import Corpus, load_corpus
from data.loader import Batch, Loader, eval_batches
from data.packing import pack, training_rows
from model.generate import generate
from model.gpt import GPT

from .checkpoint import fits, state
from .checkpoint import folder as checkpoints
from .checkpoint.saver import Saver, Tensors, save_problem
from .config import TrainConfig
from .errors import SaveFailed
from .facts import matmul_peak, run_facts, start_up_lines
from .guard import Guard
from .hardware import versions
from .interrupt import Interrupt
from .loggers import build_loggers
from .loggers.base import RunInfo
from .memory import memory_metrics
from .optimizer import Optimizer
from .run_folder import RunFolder
from .run_folder import check as check_run_folder
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
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(config.deterministic)
        attention_for(config, runtime)  # a refusal comes now, not after the data is read
        check_run_folder(config)
        self.folder = Path(config.run_dir)

        self.corpus: Corpus = load_corpus(config.data, config.tokenizer, notify, config.model.vocab_size)
        mask = config.data.document_mask
        self.train_rows = training_rows(self.corpus, config.seq_len, mask, config.data.packing)
        val_rows = pack(self.corpus, "val", self.val_seq_len(), mask)
        self.val_batches = list(eval_batches(val_rows, config.batch_size, config.eval_tokens))

        torch.manual_seed(config.seed)
        # Of the process, so of the next job of a sweep, too, unless it says otherwise.
        torch.set_float32_matmul_precision("high" if runtime.precision == "tf32" else "highest")
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
        self.step = 0
        self.reported = self.saved = -1  # the last step with its evaluation and sample done; with a checkpoint
        self.val_loss = -1, math.nan  # the step of the last evaluation, and its loss
        self.losses = torch.zeros(2, device=runtime.device)  # sum and number since the last log line
        self.guard = Guard(config.bad_step, runtime.device, notify, self.folder / "bad-steps.jsonl")
        self.interrupt = Interrupt(self.folder, config.max_time)
        self.saver = Saver(self.folder, config.checkpoint, notify)
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
        """Train to the last step; returns the last value of every metric.

        Raises:
            ValueError: the run folder cannot be written, or resume and init_from name what does not fit.
            NonFiniteError, SaveFailed, Interrupted: see `training.errors`.
        """
        self.run_folder = RunFolder(self.config)
        status = "failed"
        with self.interrupt:  # to the very end: a second SIGTERM must not cut short what the first one asked for
            try:
                with closing(self.start()) as batches:
                    self.train(batches)
                self.save_weights()
                self.saver.finish(raises=True)
                status = "finished"
            except KeyboardInterrupt:
                status = "interrupted"
                raise
            finally:
                self.saver.finish()
                if self.loggers.started:
                    self.loggers.finish(status)
                self.run_folder.close()
        return self.summary

    def train(self, batches: Loader) -> None:
        """The loop, from the step after the one restored to the last."""
        config, device = self.config, self.runtime.device
        first = self.step + 1
        self.report()
        self.stop_if_asked()
        for self.step in range(first, config.num_steps + 1):
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
            good = self.guard.check(self.step, loss, grad_norm)
            rate = learning_rate(config.schedule, self.step, config.num_steps, config.step_tokens, config.learning_rate)
            self.optimizer.step(rate, good)
            self.losses += torch.where(good, torch.stack([loss, torch.ones_like(loss)]), 0.0)
            self.throughput.count_step(num_tokens, sum(batch.visible_pairs for batch in micro_batches))

            if self.step == first:  # now the optimizer's moments are there, and no step is measured yet
                self.saver.reserve(self.tensors())
            if self.due(config.log_every, first=True):
                self.log_training(grad_norm, rate)
            self.report()
            self.stop_if_asked()
            if self.due(config.checkpoint.every):
                self.save()

    def due(self, every: int, first: bool = False) -> bool:
        """Whether something done every so many steps (0: never) is due: always at the last step."""
        is_edge = self.step == self.config.num_steps or (first and self.step == 1)
        return is_edge or (every > 0 and self.step % every == 0)

    def loss(self, batch: Batch) -> Tensor:
        """Summed loss of a batch in nats."""
        batch = batch.to(self.runtime.device)
        with self.runtime.autocast():
            return self.model(batch.tokens_BS, batch.targets_BS, batch.starts_BS)

    def log_training(self, grad_norm: Tensor, rate: float) -> None:
        """Report the steps since the last line. The only place where the loop waits for the device."""
        bad = self.guard.report(self.rows_of)
        nats, count = self.losses.tolist()
        self.losses.zero_()
        metrics = {
            "train/loss": nats / count if count else math.nan,
            "train/grad_norm": grad_norm.item(),
            "train/learning_rate": rate,
            **bad,
            **self.throughput.report(),
            **memory_metrics(self.runtime.device),
            **self.saver.metrics(),
        }
        self.log(metrics)

    def rows_of(self, step: int) -> list[int]:
        """Positions of the rows that a step read: `train_rows.at(seed, position)` is each of them."""
        rows = self.config.step_tokens // self.config.seq_len
        return list(range((step - 1) * rows, step * rows))

    def report(self) -> None:
        """Evaluation and sample, where due and not done yet. What an interruption cuts, the resumed run does."""
        if self.reported == self.step:
            return
        if (self.step == 0 or self.due(self.config.eval_every)) and not self.evaluate():
            return
        if self.step > 0 and self.due(self.config.sample_every):
            self.sample()
        self.reported = self.step

    @torch.no_grad()
    def evaluate(self) -> bool:
        """Loss over the same held-out tokens each time, per token and per byte of text; whether it was completed."""
        nats = 0.0
        with self.throughput.paused():
            for batch in self.val_batches:
                if self.interrupt.reason():
                    return False
                nats += self.loss(batch).item()
        num_tokens = sum(batch.num_tokens for batch in self.val_batches)
        count_bytes = self.corpus.tokenizer.count_bytes
        num_bytes = sum(count_bytes(batch.tokens_BS.numpy(), batch.targets_BS.numpy()) for batch in self.val_batches)
        self.val_loss = self.step, nats / num_tokens
        self.log({"val/loss": nats / num_tokens, "val/bits_per_byte": nats / math.log(2) / num_bytes})
        return True

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

    def start(self) -> Loader:
        """Restore what there is to go on from, write what the run is, say what is about to happen, open the loggers.

        Returns:
            The batches of the steps to come.
        """
        config = self.config
        facts = run_facts(config, self.runtime, self.attention, self.corpus)
        try:
            events = self.restore()
            checkpoints.write_whole(
                self.folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(asdict(config))).encode()
            )
            checkpoints.write_whole(self.folder / "facts.json", (json.dumps(facts, indent=2) + "\n").encode())
            self.corpus.tokenizer.save(self.folder / "tokenizer.json")
        except OSError as error:
            why = f"run_dir={config.run_dir} cannot be written: {error.strerror}"
            raise ValueError(f"{why}; free some space or make it writable, or choose another") from error
        for line in start_up_lines(config, facts):
            self.notify(line)
        self.loggers.start(RunInfo(self.folder.name, self.folder, asdict(config), facts, self.step, events))
        if self.runtime.compile:
            self.notify("compiling  the first steps take up to a minute and are in no measurement")
        return Loader(
            self.train_rows,
            config.batch_size,
            seed=config.seed,
            device=self.runtime.device,
            first=self.step * config.step_tokens // config.seq_len,
            window=config.model.window,
        )

    def restore(self) -> int:
        """Go on from a checkpoint, if there is one; returns the number of logged events before it."""
        began = time.perf_counter()
        found = self.run_folder.checkpoint(self.notify)
        if found is None:
            self.run_folder.cut_records({}, None)
            if self.config.init_from:
                tokenizer = self.corpus.manifest["tokenizer"]["sha256"]
                state.load_initial(self.model, self.config, tokenizer, self.notify)
            return 0
        path, manifest = found
        changes = fits.check_resume(path, manifest, self.config)
        values = state.read(path)
        if values["data"] != (ours := self.corpus.manifest["hash"]):
            raise ValueError(
                f"data.name={self.config.data.name} does not fit {path}, which was trained on another text "
                f"({values['data'][:8]}, not {ours[:8]}); restore it, or use init_from={path} for a new run"
            )
        try:
            loop = state.read_tensors(path / "loop.safetensors")
            state.load_model_tensors(self.model, path / "model.safetensors")
            state.load_optimizer_tensors(self.model, self.optimizer, path / "optimizer.safetensors")
            state.set_random(loop, values["random"])
            self.guard.load(loop)
            self.losses.copy_(loop["losses"])
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(
                f"{path} does not hold what this version saves ({why}); name another checkpoint"
            ) from error
        self.step, self.reported, self.summary = manifest.step, values["reported"], values["summary"]
        source = path.resolve().parent.parent
        self.run_folder.cut_records(values["records"], source)
        if source == self.folder.resolve():  # a branch has no checkpoint of its own yet
            self.saved = self.step
        seconds = time.perf_counter() - began
        self.notify(f"resume     step {self.step:,} of {path}, verified and loaded in {seconds:.1f} s")
        for change in changes:
            if not change.startswith(("run_dir ", "resume ", "init_from ")):
                self.notify(f"           changed: {change}")
        self.saver.add_metrics({"checkpoint/load_seconds": seconds})
        return int(values["events"])

    def stop_if_asked(self) -> None:
        """Save and raise Interrupted, where the run was asked to stop and is not at its end anyway."""
        at_the_end = self.step == self.config.num_steps and self.reported == self.step
        if self.interrupt.reason() and not at_the_end:
            self.save(wait=True)
            raise self.interrupt.end(checkpoints.path_of(self.folder, self.step))

    def tensors(self) -> Tensors:
        """All that a checkpoint holds of this run, beside what is JSON."""
        return {
            "model.safetensors": dict(self.model.named_parameters()),
            "optimizer.safetensors": state.optimizer_tensors(self.model, self.optimizer),
            "loop.safetensors": {"losses": self.losses, **self.guard.tensors(), **state.random_tensors()},
        }

    def save(self, wait: bool = False) -> None:
        """A checkpoint of this step, unless it is there; with `wait`, come back when it is."""
        if self.saved == self.step:
            return
        self.guard.report(self.rows_of)  # a run that must stop is not saved over a good one
        values = {
            "reported": self.reported,
            "records": self.run_folder.record_sizes(),
            "events": self.loggers.events,
            "summary": self.summary,
            "random": state.random_json(),
            "data": self.corpus.manifest["hash"],
            "tokenizer": self.corpus.manifest["tokenizer"]["sha256"],
        }
        step, val_loss = self.val_loss
        facts: dict[str, Any] = {
            "step": self.step,
            "tokens": self.tokens,
            "world_size": 1,
            "val_loss": val_loss if step == self.step and math.isfinite(val_loss) else None,
            "versions": versions(),
        }
        self.saver.save(self.tensors(), {"state.json": values, "config.json": asdict(self.config)}, facts, wait)
        self.saved = self.step

    def save_weights(self) -> None:
        """The trained weights alone, for whoever uses the model: whole or not there."""
        target = self.folder / "model.safetensors"
        try:
            # In a folder that the next process sweeps: safetensors, killed, leaves a file of a random name behind.
            with checkpoints.part_of(checkpoints.checkpoints_of(self.folder) / "step-weights") as part:
                save_model(self.model, str(part / target.name))
                shutil.copymode(self.folder / "config.yaml", part / target.name)
                checkpoints.sync(part / target.name)
                os.replace(part / target.name, target)
                checkpoints.sync(self.folder)
        except (OSError, SafetensorError) as error:
            needed = sum(parameter.nbytes for parameter in self.model.parameters())
            raise SaveFailed(f"{target} was not written: {save_problem(error, self.folder, needed)}") from error
