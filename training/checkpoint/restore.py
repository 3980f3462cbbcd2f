"""What a run begins with: nothing, the weights of another run, or a checkpoint."""

from __future__ import annotations

import time

from training.parts import Weights
from training.run import Run
from training.run_folder import RunFolder

from . import fits, state
from .initial import load_initial


def restore(run: Run, run_folder: RunFolder) -> None:
    """Load every part from a checkpoint, if there is one to go on from.

    Raises:
        ValueError: resume or init_from names what does not fit.
    """
    began = time.perf_counter()
    config, notify = run.config, run.notify
    found = run_folder.checkpoint(notify)
    ours = run.batches.values()
    if found is None:
        run.records.load({}, {})
        if config.init_from:
            load_initial(Weights(run.model), config, ours["tokenizer"], notify)
        return
    path, manifest = found
    changes = fits.check_resume(path, manifest, config)
    saved = state.read(path, manifest)
    if (theirs := saved.values["data"]["text"]) != ours["text"]:
        raise ValueError(
            f"data.name={config.data.name} does not fit {path}, which was trained on another text "
            f"({theirs[:8]}, not {ours['text'][:8]}); restore it, or use init_from={path} for a new run"
        )
    run.records.source = path.resolve().parent.parent
    try:
        saved.load(run.parts)
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{path} does not hold what this version saves ({why}); name another checkpoint") from error
    if run.records.source == run.folder.resolve():  # a branch has no checkpoint of its own yet
        run.progress.saved = run.progress.step
    seconds = time.perf_counter() - began
    notify(f"resume     step {run.progress.step:,} of {path}, verified and loaded in {seconds:.1f} s")
    for change in changes:
        if not change.startswith(("run_dir ", "resume ", "init_from ")):
            notify(f"           changed: {change}")
    run.add_metrics({"checkpoint/load_seconds": seconds})
