"""The trained weights alone, for whoever uses the model."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file, save_model
from torch import nn

from data import disk
from training.errors import SaveFailed
from training.parallel.sharding import is_sharded, named_parameters, whole

from .saver import check_written, save_problem


def save_weights(model: nn.Module, run_dir: Path, is_first: bool = True) -> None:
    """Write model.safetensors into `run_dir`: whole, or not at all. All ranks ask, for shards are gathered.

    Args:
        is_first: whether this rank writes.
    Raises:
        SaveFailed: with one line that says why.
    """
    target = run_dir / "model.safetensors"
    parameters = named_parameters(model)
    shards = {name: whole(p.detach()) for name, p in parameters.items() if is_sharded(p)}
    if not is_first:
        return
    try:
        # In a folder that the next process sweeps: safetensors, killed, leaves a file of a random name behind.
        with disk.part_of(target) as part:
            if shards:
                others = {name: p.detach() for name, p in parameters.items() if name not in shards}
                save_file(shards | others, str(part / target.name), metadata={"format": "pt"})
            else:
                save_model(model, str(part / target.name))
            check_written(part / target.name, model.parameters())
            shutil.copymode(run_dir / "config.yaml", part / target.name)
            disk.sync(part / target.name)
            os.replace(part / target.name, target)
            disk.sync(run_dir)
    except (OSError, SafetensorError) as error:
        needed = sum(parameter.nbytes for parameter in model.parameters())
        raise SaveFailed(f"{target} was not written: {save_problem(error, run_dir, needed)}") from error
