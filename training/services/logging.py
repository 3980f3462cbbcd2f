"""Writes what the run is into its folder, says what is about to happen, and logs the steps since the last line."""

from __future__ import annotations

from dataclasses import asdict

from omegaconf import OmegaConf

from data import disk
from data.progress import doing
from training import history
from training.facts import start_up_lines
from training.loggers.base import RunInfo
from training.memory import memory_metrics
from training.run import Run

from .base import Service


class Logging(Service):
    """config.yaml, facts.json and the start-up lines at the beginning; a log line every `log_every` steps."""

    def __init__(self) -> None:
        self.trains = False
        """Whether facts.json is of this process."""

    def begin(self, run: Run) -> None:
        """Raises ValueError where the run folder cannot be written."""
        config, facts, folder = run.config, run.facts(), run.folder
        if not run.world.is_first:
            return
        try:
            disk.write_whole(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(asdict(config))))
            if run.progress.step < run.plan.max_steps or not (folder / history.FACTS).exists():  # of who trained it
                history.begin(folder, facts, run.progress.step)
                self.trains = True
            run.batches.corpus.tokenizer.save(folder / "tokenizer.json")
        except OSError as error:
            why = f"run_dir={config.run_dir} cannot be written: {error.strerror}"
            raise ValueError(f"{why}; free some space or make it writable, or choose another") from error
        for line in start_up_lines(config, run.runtime, facts):
            run.notify(line)
        progress = run.progress
        with run.startup.timed("loggers"):
            doing("opening the loggers")
            run.loggers.start(RunInfo(folder.name, folder, asdict(config), facts, progress.step, progress.events))
        if progress.step == run.plan.max_steps and not progress.unfinished:
            run.notify(f"finished   {progress.step:,} of {run.plan.max_steps:,} steps: nothing is left to do")
        elif run.runtime.compile:
            run.notify("compiling  the first steps take up to a minute and are not measured")

    def after_step(self, run: Run) -> None:
        """The only place where the loop waits for the device."""
        if not run.due(run.config.log_every, first=True):
            return
        bad = run.guard.report(run.rows_of)
        run.log(
            {
                "train/loss": run.progress.mean_loss(),
                "train/grad_norm": run.last.grad_norm.item(),
                "train/learning_rate": run.last.learning_rate,
                **bad,
                **run.throughput.report(),
                **memory_metrics(run.world, run.train_step.replayed_peak),
                **run.take_metrics(),
            }
        )

    def end(self, run: Run, status: str) -> None:
        if run.loggers.started:
            run.loggers.finish(status)
        if self.trains:
            try:
                history.end(run.folder, status)
            except (OSError, ValueError) as error:
                run.notify(f"record     {run.folder / history.FACTS} does not say how the run ended: {error}")
