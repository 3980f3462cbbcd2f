"""init_from=PATH: a new run that begins with old weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from training.config import TrainConfig
from training.parts import Weights
from training.run_folder import find

from . import fits, state


def load_initial(weights: Weights, config: TrainConfig, tokenizer_sha256: str, notify: Callable[[str], None]) -> None:
    """The weights of a checkpoint, of a run's newest good checkpoint, or of a safetensors file.

    Raises:
        ValueError: there are none, they are of another architecture, or of another tokenizer.
    """
    assert config.init_from is not None
    value, path = config.init_from, Path(config.init_from)
    if path.is_file():
        _load(weights, path)
        notify(f"init       weights of {path}; whether its tokenizer is this run's cannot be told from a file")
        return
    found, manifest = find(value, "init_from", notify)
    if state.read(found, manifest).values["data"]["tokenizer"] != tokenizer_sha256:
        raise ValueError(
            f"init_from={value} was trained with another tokenizer, so its embeddings mean other tokens; "
            f"train on the text and tokenizer.vocab_size it was trained with"
        )
    changes = fits.check_init(found, manifest, config)
    _load(weights, found / "model.safetensors")
    notify(f"init       weights of {found} (step {manifest.step:,}), verified")
    for change in changes:
        notify(f"           changed: {change}")


def _load(weights: Weights, file: Path) -> None:
    tensors, dtype = state.read_tensors(file), next(iter(weights.tensors().values())).dtype
    tensors = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    try:
        weights.validate(tensors, {})
    except ValueError as error:
        raise ValueError(f"{file} does not fit: {error}") from error
    weights.load(tensors, {})
