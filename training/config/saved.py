"""A run that goes on: its saved settings, and over them what was typed now."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from model.precision_config import PRECISIONS, precision_named

from .schema import CHOICES

GROUPS = (*CHOICES, "model", "logger")
INSTEAD = {"max_tokens": "max_steps", "resume": "init_from"}
"""Where the first is typed, the second that was saved no longer holds."""


def saved_settings(folder: Path) -> dict[str, Any] | None:
    """What a run folder's config.yaml holds, or a checkpoint's config.json; None where there is neither.

    Raises:
        ValueError: it cannot be read.
    """
    path = folder / "config.yaml"
    try:
        if not path.is_file():
            path = folder / "config.json"  # JSON is YAML
        if not path.is_file():
            return None
        saved = yaml.load(path.read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read ({why}); remove it to go on with the settings as typed") from error
    if not isinstance(saved, dict):
        raise ValueError(f"{path} holds no settings; remove it to go on with the settings as typed")
    return upgraded(saved)


def upgraded(saved: dict[str, Any]) -> dict[str, Any]:
    """Settings that an older version saved, as this one has them: precision was one word, and the moments' dtype the
    optimizer's."""
    name, optimizer = saved.get("precision"), saved.get("optimizer")
    if not isinstance(name, str) or name not in PRECISIONS or not isinstance(optimizer, dict):
        return saved
    others = {key: value for key, value in optimizer.items() if key != "moments"}
    precision = replace(precision_named(name), moments=optimizer.get("moments", "float32"))
    return {**saved, "precision": asdict(precision), "optimizer": others}


def with_saved(composed: DictConfig, saved: dict[str, Any], typed: Iterable[str]) -> DictConfig:
    """The saved settings, with those of `composed` that were typed.

    Args:
        composed: what this command composes; what an older version did not save is taken from it.
        typed: keys and groups ("learning_rate", "model", "model.dim").
    """
    typed = list(typed)
    result = composed.copy()
    OmegaConf.set_struct(result, False)
    for name, value in saved.items():
        if name == "run_dir":
            continue  # a branch has another, and a folder may have been moved
        if name in GROUPS or not OmegaConf.is_dict(result.get(name)):
            result[name] = value
        else:
            result[name] = OmegaConf.merge(result[name], value)
    if result.get("resume") == "none":  # as it began
        result.resume = "auto"
    for name, other in INSTEAD.items():
        if name in typed and other not in typed:
            result[other] = None
    for key in sorted(set(typed) - {"run_dir"}):  # a group before its settings
        *parents, name = key.split(".")
        source, target = _node(composed, parents), _node(result, parents)
        if not OmegaConf.is_dict(target):
            continue
        if OmegaConf.is_dict(source) and name in source:
            target[name] = source[name]
        elif name in target:
            del target[name]
    return result


def _node(config: DictConfig, parents: list[str]) -> Any:
    for name in parents:
        config = config.get(name) if OmegaConf.is_dict(config) else None  # type: ignore[assignment]
    return config
