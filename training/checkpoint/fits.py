"""Whether a run can go on from a checkpoint, or begin with its weights, as far as the configuration tells.

Needs no torch, so that the answer comes before anything slow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from training.config import TrainConfig

from .folder import CONFIG, Manifest, read_json

# A run that goes on with another value of one of these would be neither the old run nor a new one.
MUST_AGREE = (
    "model",
    "tokenizer",
    "optimizer.name",
    "seq_len",
    "tokens_per_step",
    "seed",
    "data.document_mask",
    "data.packing",
    "data.val_fraction",
)
MAY_DIFFER = ("model.loss_chunk_size",)  # memory, not meaning

# What the weights are weights of. Not all of it shows in their shapes: 2 heads of 16 are as wide as 4 of 8.
ARCHITECTURE = tuple(
    f"model.{name}"
    for name in (
        "n_layers",
        "n_heads",
        "n_kv_heads",
        "head_dim",
        "dim",
        "ffn_dim",
        "vocab_size",
        "position",
        "norm",
        "mlp",
        "bias",
        "tie_head",
        "qk_norm",
    )
)


def check_resume(path: Path, manifest: Manifest, config: TrainConfig) -> list[str]:
    """Compare the configuration of a checkpoint with that of the run that would go on from it.

    Returns:
        What differs and may: "learning_rate 0.001 → 0.0005".
    Raises:
        ValueError: names the first field that must not differ, with both values.
    """
    differing = list(differences(path, config))
    for key, old, new in differing:
        if _among(key, MUST_AGREE) and key not in MAY_DIFFER:
            new_run = f"init_from={path} for a new run that begins with its weights"
            remedy = "begin a new run in another run_dir" if _among(key, (*ARCHITECTURE, "tokenizer")) else new_run
            raise ValueError(f"{_does_not_fit(path, key, old, new)}, or {remedy}")
    if manifest.step > config.plan.max_steps:
        raise ValueError(
            f"max_steps={config.plan.max_steps} is less than the {manifest.step} steps of {path}; raise it"
        )
    return [f"{key} {old} → {new}" for key, old, new in differing]


def check_init(path: Path, manifest: Manifest, config: TrainConfig) -> list[str]:
    """The same for a new run that begins with the weights: returns how the model differs, raises where it must not."""
    differing = [difference for difference in differences(path, config) if difference[0].startswith("model.")]
    for key, old, new in differing:
        if key in ARCHITECTURE:
            raise ValueError(_does_not_fit(path, key, old, new))
    return [f"{key} {old} → {new}" for key, old, new in differing if key not in (*MAY_DIFFER, "model.name")]


def differences(path: Path, config: TrainConfig) -> Iterator[tuple[str, Any, Any]]:
    """(field, the checkpoint's value, this run's), sorted."""
    before, now = dict(flat(read_json(path / CONFIG))), dict(flat(asdict(config)))
    for values in (before, now):  # null means one micro-batch: what that is, is compared
        if values.get("tokens_per_step") is None and "batch_size" in values:
            values["tokens_per_step"] = values["batch_size"] * values["seq_len"]
    for key in sorted(set(before) | set(now)):
        if before.get(key) != now.get(key):
            yield key, before.get(key), now.get(key)


def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _among(key: str, fields: tuple[str, ...]) -> bool:
    return any(key == field or key.startswith(f"{field}.") for field in fields)


def _does_not_fit(path: Path, key: str, old: Any, new: Any) -> str:
    return f"{key}={new} does not fit {path}, which was trained with {key}={old}; use that"
