"""What of a run must survive, as named tensors and JSON, and whether it fits the run that would go on with it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from training.optimizer import Optimizer
from training.run_folder import compare, find


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Moments and counts by parameter: {"blocks.0.mlp.down.weight/exp_avg": …}."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}/{key}": value
        for inner in optimizer.all
        for parameter, entries in inner.state.items()
        for key, value in entries.items()
    }


@torch.no_grad()
def load_model_tensors(model: nn.Module, file: Path) -> None:
    """Copy weights into the model.

    Raises:
        ValueError: a tensor is missing, is one too many, or has another shape.
    """
    parameters = dict(model.named_parameters())
    saved = read_tensors(file)
    if odd := set(saved) ^ set(parameters):
        raise ValueError(f"{file} is of another architecture: {min(odd)} is {'' if min(odd) in saved else 'not '}there")
    for name, parameter in parameters.items():
        if saved[name].shape != parameter.shape:
            raise ValueError(f"{file}: {name} is {tuple(saved[name].shape)}, the model's is {tuple(parameter.shape)}")
        parameter.copy_(saved[name])


def load_optimizer_tensors(model: nn.Module, optimizer: Optimizer, file: Path) -> None:
    owners = {
        parameter: inner for inner in optimizer.all for group in inner.param_groups for parameter in group["params"]
    }
    parameters = dict(model.named_parameters())
    for name, value in read_tensors(file).items():
        parameter_name, _, key = name.rpartition("/")
        parameter = parameters[parameter_name]
        owners[parameter].state[parameter][key] = value.to(parameter.device)


STATE = {
    "reported": int, "events": int, "records": dict, "summary": dict, "random": dict, "data": str, "tokenizer": str
}  # fmt: skip


def read(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint that verified; ValueError where another program wrote it."""
    values = read_json(path / "state.json")
    for key, kind in STATE.items():
        if not isinstance(values.get(key), kind):
            raise ValueError(f"{path / 'state.json'} was not written by this version: {key} is no {kind.__name__}")
    return values


def read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read as JSON") from error
    return values if isinstance(values, dict) else {}


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Raises ValueError where it is no safetensors file."""
    try:
        with safe_open(str(file), framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read as safetensors: {' '.join(str(error).split())}") from error


def load_initial(model: nn.Module, value: str, tokenizer_sha256: str, notify: Callable[[str], None]) -> None:
    """init_from=PATH: the weights of a checkpoint, of a run's newest good checkpoint, or of a safetensors file.

    Raises:
        ValueError: there are none, they are of another architecture, or of another tokenizer.
    """
    path = Path(value)
    if path.is_file():
        load_model_tensors(model, path)
        notify(f"init       weights of {path}; whether its tokenizer is this run's cannot be told from a file")
        return
    found, manifest = find(value, "init_from", notify)
    if read(found)["tokenizer"] != tokenizer_sha256:
        raise ValueError(
            f"init_from={value} was trained with another tokenizer, so its embeddings mean other tokens; "
            f"train on the text and tokenizer.vocab_size it was trained with"
        )
    load_model_tensors(model, found / "model.safetensors")
    notify(f"init       weights of {found} (step {manifest.step:,}), verified")


# ---- random numbers: nothing in the loop draws any today, and whatever will draws the same after a resume


def random_tensors() -> dict[str, Tensor]:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"rng/torch": torch.get_rng_state()} | ({} if cuda is None else {"rng/cuda": cuda})


def random_json() -> dict[str, Any]:
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, words, gauss = random.getstate()
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
    }


def set_random(tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    torch.set_rng_state(tensors["rng/torch"])
    if "rng/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng/cuda"])
    version, words, gauss = values["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(values["numpy"]))


# ---- does it fit?


def check_fits(path: Path, ours: dict[str, Any], our_data: str) -> list[str]:
    """Compare a checkpoint's configuration with this run's.

    Args:
        ours: this run's configuration, as plain values. our_data: the hash of its corpus.
    Returns:
        What differs and may: "learning_rate 0.001 → 0.0005".
    Raises:
        ValueError: names the first field that must not differ, with both values.
    """
    changes = compare(path, read_json(path / "config.json"), ours)
    state = read(path)
    if state["data"] != our_data:
        raise ValueError(
            f"data.name={ours['data']['name']} does not fit {path}, which was trained on another text "
            f"({state['data'][:8]}, not {our_data[:8]}); restore it, or use init_from={path} for a new run"
        )
    return changes
