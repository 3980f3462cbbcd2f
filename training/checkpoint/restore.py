"""What a run begins with: nothing, the weights of another run, or a checkpoint."""

from __future__ import annotations

import time
from pathlib import Path

from training.config import TrainConfig
from training.parts import Weights
from training.run import Run
from training.run_folder import RunFolder

from . import fits, state
from .folder import Manifest
from .initial import load_initial


def restore(run: Run, run_folder: RunFolder) -> None:
    """Load every part from a checkpoint, if there is one to go on from.

    Raises:
        ValueError: resume or init_from names what does not fit.
    """
    began = time.perf_counter()
    config, notify = run.config, run.notify
    found = run_folder.checkpoint(notify)
    if found is None:
        if config.init_from:
            tokenizer = run.batches.values()["tokenizer"]
            run.together.each(lambda: load_initial(Weights(run.model), config, tokenizer, notify))
        run.records.load({}, {})
        return
    path, manifest = found
    changes = fits.check_resume(path, manifest, config)
    saved = run.together.each(lambda: _read(run, path, manifest))
    # So far nothing was changed; from here on only a disk can refuse.
    run.records.source = run.together.first(lambda: run_folder.origin(path))
    saved.load(run.parts)
    if run.records.source == run.folder:  # a branch has no checkpoint of its own yet
        run.progress.saved = run.progress.step
    seconds = time.perf_counter() - began
    notify(f"resume     step {run.progress.step:,} of {path}, verified and loaded in {seconds:.1f} s")
    for change in changes:
        if not change.startswith(("run_dir ", "resume ", "init_from ")):
            notify(f"           changed: {change}")
    run.add_metrics({"checkpoint/load_seconds": seconds})


def _read(run: Run, path: Path, manifest: Manifest) -> state.State:
    """This rank's state, compared with the parts of the run.

    Raises:
        ValueError: it does not fit.
    """
    config, ours = run.config, run.batches.values()
    saved = state.read(path, manifest, run.parts, run.world.rank)
    fits.check_tokenizer(path, config, saved.values["data"]["tokenizer"], ours["tokenizer"])
    if (theirs := saved.values["data"]["text"]) != ours["text"]:
        raise ValueError(
            f"data.name={config.data.name} does not fit {path}, which was trained on another text "
            f"({theirs[:8]}, not {ours['text'][:8]}); restore it, or use init_from={path} for a new run"
        )
    try:
        saved.validate(run.parts)
        _check_position(saved, manifest, config)
    except ValueError as error:
        raise ValueError(
            f"{path} does not hold what this version saves ({error}); remove it to go on from the one before"
        ) from error
    return saved


def _check_position(saved: state.State, manifest: Manifest, config: TrainConfig) -> None:
    """Raises ValueError unless manifest and state are those of the same step."""
    step, rows = saved.values["progress"]["step"], saved.values["data"]["rows"]
    if step != manifest.step:
        raise ValueError(f"progress: step is {step}, the manifest's is {manifest.step}")
    if not rows * config.seq_len == manifest.tokens == step * config.plan.tokens_per_step:
        raise ValueError(f"data: {rows:,} rows and {manifest.tokens:,} tokens are not those of {step:,} steps")
    if step and not saved.tensors.get("optimizer"):
        raise ValueError("optimizer: nothing is there")
