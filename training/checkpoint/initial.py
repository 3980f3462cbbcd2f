"""init_from=PATH: a new run that begins with old weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from data.tokenizer import Tokenizer
from model.huggingface.folder import is_huggingface
from model.huggingface.shards import read_weights
from model.huggingface.weights import from_theirs
from training.config import TrainConfig
from training.parts import Weights
from training.run_folder import find

from . import fits, state
from .folder import candidates, is_checkpoint


def load_initial(weights: Weights, config: TrainConfig, tokenizer_sha256: str, notify: Callable[[str], None]) -> None:
    """The weights of a checkpoint, of a run's newest good checkpoint, of a safetensors file, or of a folder of
    transformers.

    Raises:
        ValueError: there are none, they are of another architecture, or of another tokenizer.
    """
    assert config.init_from is not None
    value, path = config.init_from, Path(config.init_from)
    if path.is_file():
        _load(weights, state.read_tensors(path), path)
        notify(f"init       weights of {path}; a file does not say whether its tokenizer is this run's")
        return
    if not is_checkpoint(path) and not candidates(path) and fits.holds_weights(path):
        _load_folder(weights, path, config, tokenizer_sha256, notify)
        return
    found, manifest = find(value, "init_from", notify)
    if state.read_values(found, manifest)["data"]["tokenizer"] != tokenizer_sha256:
        raise _of_another_tokenizer(value, "train on the text and tokenizer.vocab_size it was trained with")
    changes = fits.check_init(found, manifest, config)
    _load(weights, state.read_weights(found, manifest), found)
    notify(f"init       weights of {found} (step {manifest.step:,}), verified")
    for change in changes:
        notify(f"           changed: {change}")


def _load_folder(
    weights: Weights, path: Path, config: TrainConfig, tokenizer_sha256: str, notify: Callable[[str], None]
) -> None:
    changes = fits.check_weights(path, config)
    file = path / "tokenizer.json"
    if file.is_file():
        # Its separator is no matter of the embeddings: this run's is taken.
        theirs = Tokenizer.load(file, getattr(config.tokenizer, "separator", None))
        if theirs.sha256 != tokenizer_sha256:
            raise _of_another_tokenizer(config.init_from, f"use tokenizer=file tokenizer.path={file}")
    if is_huggingface(path):
        tensors = from_theirs(config.model, read_weights(path), str(path))
    else:
        tensors = state.read_tensors(path / "model.safetensors")
    _load(weights, tensors, path)
    unknown = "" if file.is_file() else "; whether its tokenizer is this run's cannot be told without a tokenizer.json"
    notify(f"init       weights of {path}{unknown}")
    for change in changes:
        notify(f"           changed: {change}")


def _of_another_tokenizer(value: str | None, remedy: str) -> ValueError:
    return ValueError(
        f"init_from={value} was trained with another tokenizer, so its embeddings mean other tokens; {remedy}"
    )


def _load(weights: Weights, tensors: dict[str, Tensor], file: Path) -> None:
    dtype = next(iter(weights.tensors().values())).dtype
    tensors = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    try:
        weights.validate(tensors, {})
    except ValueError as error:
        raise ValueError(f"{file} does not fit: {error}") from error
    weights.load(tensors, {})
