"""Whether a run can go on from a checkpoint, or begin with its weights, as far as the configuration tells.

Needs no torch, so that the answer comes before anything slow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from data.config import FileTokenizer
from model.arithmetic import parameter_count
from model.huggingface.folder import is_huggingface, read_settings, weight_files
from model.huggingface.settings import understand
from training.config import TrainConfig
from training.config.saved import saved_settings, upgraded

from .folder import CONFIG, STATE, Manifest, read_json

# A run that goes on with another value of one of these would be neither the old run nor a new one.
MUST_AGREE = (
    "model",
    "optimizer.name",
    "seq_len",
    "tokens_per_step",
    "seed",
    "data.document_mask",
    "data.packing",
    "data.val_fraction",
)
MAY_DIFFER = ("model.loss_chunk_size",)  # memory, not meaning

# What may change when no step is left: text and tokenizer are compared by their content, wherever they lie, and the
# others say nothing about how the run was trained.
MAY_CHANGE_AT_THE_END = ("data", "tokenizer", "run_dir", "resume", "init_from", "max_time", "max_steps", "max_tokens")

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
        "qkv_bias",
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
            remedy = "begin a new run in another run_dir" if _among(key, ARCHITECTURE) else new_run
            raise ValueError(f"{_does_not_fit(path, key, old, new)}, or {remedy}")
        if key == "init_from" and new is not None:
            began = f"init_from={old}" if old else "random weights"
            raise ValueError(
                f"init_from={new} begins a new run, and {path} is of one that began with {began}; choose another "
                f"run_dir, or leave init_from out to go on"
            )
    _check_named_tokenizer(path, manifest, config)
    max_steps = config.plan.max_steps
    if manifest.step > max_steps:
        raise ValueError(f"max_steps={max_steps} is less than the {manifest.step} steps of {path}; raise it")
    if manifest.step == max_steps:
        _check_unchanged(path, config, differing)
    return [f"{key} {old} → {new}" for key, old, new in differing]


def check_init(path: Path, manifest: Manifest, config: TrainConfig) -> list[str]:
    """The same for a new run that begins with the weights: returns how the model differs, raises where it must not."""
    differing = [difference for difference in differences(path, config) if difference[0].startswith("model.")]
    _check_architecture(path, differing)
    return [f"{key} {old} → {new}" for key, old, new in differing if key not in (*MAY_DIFFER, "model.name")]


def holds_weights(path: Path) -> bool:
    """Whether a folder has weights without a checkpoint: transformers' own, or of a run that has none any more."""
    return is_huggingface(path) or ((path / "config.yaml").is_file() and (path / "model.safetensors").is_file())


def check_weights(path: Path, config: TrainConfig) -> list[str]:
    """`check_init` for a folder that `holds_weights`.

    Raises:
        ValueError: also where this model cannot be what transformers describes, and where weights cannot be read.
    """
    if is_huggingface(path):
        model: Any = asdict(understand(read_settings(path), str(path / "config.json")))
    else:
        model = (saved_settings(path) or {}).get("model")
    for file in weight_files(path):
        count_in(file)
    if not isinstance(model, dict):
        raise ValueError(f"{path / 'config.yaml'} does not say what model it is of; name another folder")
    before, now = dict(flat(model, "model.")), flat(asdict(config.model), "model.")
    differing = [(key, before[key], new) for key, new in now if key in before and before[key] != new]
    _check_architecture(path, differing)
    return [f"{key} {old} → {new}" for key, old, new in differing if key not in (*MAY_DIFFER, "model.name")]


def check_file(file: Path, config: TrainConfig) -> None:
    """`check_init` for a safetensors file, which says how many parameters its model has, and no more.

    Raises:
        ValueError: also where it is none.
    """
    found, ours = count_in(file), parameter_count(config.model).total
    if found != ours:
        raise ValueError(
            f"{file} does not fit: it holds {found:,} parameters, and model.name={config.model.name} has {ours:,}; "
            f"choose the model that it is of"
        )


def count_in(file: Path) -> int:
    """The numbers in a safetensors file, by its header.

    Raises:
        ValueError: it cannot be read as one.
    """
    try:
        with safe_open(str(file), framework="np") as opened:
            return sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        why = " ".join(str(error).split())
        raise ValueError(
            f"init_from: {file} cannot be read as safetensors: {why}; name a run, a checkpoint or a model.safetensors"
        ) from error


def differences(path: Path, config: TrainConfig) -> Iterator[tuple[str, Any, Any]]:
    """(field, the checkpoint's value, this run's), sorted."""
    before, now = dict(flat(upgraded(read_json(path / CONFIG)))), dict(flat(asdict(config)))
    before.setdefault("model.qkv_bias", False)  # older versions had none
    for values in (before, now):  # null means one micro-batch: what that is, is compared
        rows, tokens = values.get("batch_size"), values.get("seq_len")
        if values.get("tokens_per_step") is None and isinstance(rows, int) and isinstance(tokens, int):
            values["tokens_per_step"] = rows * tokens
    for key in sorted(set(before) | set(now)):
        if before.get(key) != now.get(key):
            yield key, before.get(key), now.get(key)


def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _check_unchanged(path: Path, config: TrainConfig, differing: list[tuple[str, Any, Any]]) -> None:
    """Raises ValueError where a run that has nothing left to train would be said to have other settings than it had."""
    in_both = (
        dict(flat(upgraded(read_json(path / CONFIG)))).keys() & dict(flat(asdict(config))).keys()
    )  # versions differ
    for key, old, new in differing:
        if key in in_both and not _among(key, MAY_CHANGE_AT_THE_END):
            raise ValueError(
                f"{key}={new} comes too late for {path}, the last step of the run, which had {key}={old}; "
                f"raise max_steps to train further with it, or choose another run_dir"
            )


def _check_named_tokenizer(path: Path, manifest: Manifest, config: TrainConfig) -> None:
    """Compare tokenizers as far as that is possible before the text is read, wherever their files lie.

    Raises:
        ValueError: they differ; or this run's cannot be read.
    """
    before, now = read_json(path / CONFIG).get("tokenizer"), asdict(config.tokenizer)
    if before == now and now["name"] != "file":  # a file may have changed
        return
    if now["name"] == "bpe":  # one that is learned is known when it is learned
        size = before.get("vocab_size") if isinstance(before, dict) and before.get("name") == "bpe" else None
        if size is not None and size != now["vocab_size"]:
            raise ValueError(_does_not_fit(path, "tokenizer.vocab_size", size, now["vocab_size"]))
        return
    from data.corpus import load_named_tokenizer

    config.tokenizer.check()
    tokenizer = load_named_tokenizer(config.tokenizer)
    state = read_json(path / STATE)
    saved = state if manifest.format == 1 else state.get("data")
    if tokenizer is not None and isinstance(saved, dict):
        check_tokenizer(path, config, saved.get("tokenizer"), tokenizer.sha256)


def check_tokenizer(path: Path, config: TrainConfig, saved: Any, ours: str) -> None:
    """Raises ValueError where the SHA-256 of two tokenizers differs: but not of two that were learned alike.

    Then it is the texts that differ, and that is what to say.
    """
    kind, before = config.tokenizer, read_json(path / CONFIG).get("tokenizer")
    if saved == ours or (kind.name == "bpe" and before == asdict(kind)):
        return
    setting = f"tokenizer.path={kind.path}" if isinstance(kind, FileTokenizer) else f"tokenizer={kind.name}"
    own = path.parent.parent / "tokenizer.json"
    remedy = f"use tokenizer=file tokenizer.path={own}" if own.is_file() else "use the one that it was trained with"
    if own.is_file() and isinstance(before, dict) and before.get("separator"):
        remedy += f" tokenizer.separator='{before['separator']}'"
    raise ValueError(f"{setting} does not fit {path}, which was trained with another tokenizer; {remedy}")


def _among(key: str, fields: tuple[str, ...]) -> bool:
    return any(key == field or key.startswith(f"{field}.") for field in fields)


def _check_architecture(path: Path, differing: list[tuple[str, Any, Any]]) -> None:
    """Raises ValueError with the first setting of the architecture that differs, and all that are to be typed."""
    found = [difference for difference in differing if difference[0] in ARCHITECTURE]
    if found:
        typed = {None: "null", True: "true", False: "false"}
        words = [f"{key}={typed[old] if old is None or isinstance(old, bool) else old}" for key, old, _ in found]
        instead = "that" if len(words) == 1 else " ".join(words)
        raise ValueError(_does_not_fit(path, *found[0]).removesuffix("that") + instead)


def _does_not_fit(path: Path, key: str, old: Any, new: Any) -> str:
    return f"{key}={new} does not fit {path}, which was trained with {key}={old}; use that"
