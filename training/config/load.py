"""From what Hydra composed to a checked `TrainConfig`, or one line that says why not."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from functools import cache
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from model.config import ModelConfig, RotaryConfig
from training.checkpoint.config import CheckpointConfig
from training.guard_config import BadStepConfig
from training.loggers import LoggerConfig, WandbConfig
from training.require import require

from ..numbers import whole_number, whole_number_keys
from .names import dotted_keys, unknown_key
from .paths import expand_path
from .schema import CHOICES, TrainConfig
from .secrets import refuse_secrets

SECTIONS: dict[str, type[Any]] = {
    "model": ModelConfig,
    "model.rotary": RotaryConfig,
    "logger": LoggerConfig,
    "logger.wandb": WandbConfig,
    "checkpoint": CheckpointConfig,
    "bad_step": BadStepConfig,
}
PATHS = ("run_dir", "resume", "init_from")


def load_config(composed: DictConfig | Mapping[str, Any]) -> TrainConfig:
    """Turn a composed configuration into a checked `TrainConfig`.

    Whole numbers may be written as 1e6, 2B or 16k, paths with ~ and $VARIABLES. What depends on the machine is checked
    by `training.runtime`.

    Raises:
        ValueError: one line that names the field, the value and what to do instead.
    """
    typed = with_types(composed)
    try:
        loaded = OmegaConf.to_object(typed)
    except OmegaConfBaseException as error:
        raise ValueError(one_line(error)) from error
    assert isinstance(loaded, TrainConfig)
    _refuse_what_cannot_be_used(asdict(loaded))
    written_out: dict[str, Any] = {name: expand_path(getattr(loaded, name) or "", name) or None for name in PATHS}
    return replace(loaded, tokens_per_step=loaded.plan.tokens_per_step, **written_out)


def with_types(composed: DictConfig | Mapping[str, Any]) -> DictConfig:
    """Every setting as a value of its own type, which need not be one that a run can use.

    Raises:
        ValueError: one line, such as for seq_len=abc.
    """
    raw = resolved(composed)
    refuse_secrets(raw)
    _refuse_what_is_no_section(raw)
    try:
        typed = OmegaConf.merge(_schema(raw), raw)
    except ConfigKeyError as error:
        raise ValueError(unknown_key(str(error.full_key or error.key), dotted_keys(_whole_schema(raw)))) from error
    except OmegaConfBaseException as error:
        raise ValueError(one_line(error)) from error
    assert isinstance(typed, DictConfig)
    return typed


def resolved(composed: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Every setting as a plain value, whole numbers read.

    Raises:
        ValueError: an interpolation leads nowhere, or a setting was taken away.
    """
    try:
        config = copy.deepcopy(composed) if isinstance(composed, DictConfig) else OmegaConf.create(dict(composed))
        written: Any = OmegaConf.to_container(config, resolve=False)
        for key in _whole_numbers():  # before anything is resolved: other values are computed from these
            value = _at(written, key)
            if (number := whole_number(value, key)) is not value:
                OmegaConf.update(config, key, number)
        _refuse_what_is_missing(config)
        raw: Any = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(one_line(error)) from error
    return raw


def _at(settings: Any, key: str) -> Any:
    for name in key.split("."):
        settings = settings.get(name) if isinstance(settings, dict) else None
    return settings


@cache
def _whole_numbers() -> frozenset[str]:
    return whole_number_keys(TrainConfig, CHOICES)


def _refuse_what_is_missing(config: DictConfig) -> None:
    """`~model` would be met first by whatever is computed from it."""
    for field in fields(TrainConfig):
        if field.name not in config:
            how = f"use {', '.join(CHOICES[field.name])}" if field.name in CHOICES else "give it a value"
            raise ValueError(f"{field.name} is not set; leave out ~{field.name}, or {how}")


def _refuse_what_is_no_section(raw: dict[str, Any]) -> None:
    """`model.rotary=10000`, where a group of settings stands."""
    for key, kind in SECTIONS.items():
        group, _, name = key.rpartition(".")
        parent = _at(raw, group) if group else raw
        if not isinstance(parent, dict) or isinstance(value := parent.get(name, {}), dict):
            continue
        inside = [field.name for field in fields(kind) if field.name != "name"]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        settings = f"{key}.{inside[0]}={value}" if key == "model.rotary" and is_number else f"{key}.{inside[0]}=…"
        raise ValueError(f"{key}={value} is not possible: settings stand in it; leave it out, or use {settings}")


def _schema(raw: dict[str, Any]) -> DictConfig:
    """`TrainConfig` with the class of each option that was chosen."""
    schema = OmegaConf.structured(TrainConfig)
    for group, options in CHOICES.items():
        chosen = raw.get(group)
        name = chosen.get("name") if isinstance(chosen, dict) else chosen
        if not isinstance(name, str) or name not in options:
            raise ValueError(f"{group}.name={name} is unknown; use {', '.join(options)}")
        schema[group] = OmegaConf.structured(options[name])
    return schema


def _whole_schema(raw: dict[str, Any]) -> DictConfig:
    """With the keys of the sections, too."""
    schema = _schema(raw)
    for key, kind in SECTIONS.items():
        if "." not in key:
            schema[key] = kind
    return schema


REMEDIES = {
    "to Integer": "use a whole number",
    "to Float": "use a number",
    "valid bool": "use true or false",
    "not a ListConfig": "use a list: [a,b]",
    "value 'None'": "it needs a value",
}


def one_line(error: OmegaConfBaseException) -> str:
    """What OmegaConf says of a value, and what to do instead."""
    reason = str(error.msg or error).splitlines()[0].removesuffix(".")
    remedy = next((remedy for words, remedy in REMEDIES.items() if words in reason), None)
    variable = re.search(r"Interpolation key '(\w+)' not found", reason)
    if variable and variable[1] in os.environ:
        remedy = f"a variable of the environment is ${variable[1]}, without braces"
    if "not a ListConfig" in reason:
        reason = "this is no list"
    key = f"{error.full_key}: " if error.full_key else ""
    return f"{key}{reason}; {remedy or 'python train.py --cfg job shows what it may be'}"


def _refuse_what_cannot_be_used(items: Mapping[str, Any], prefix: str = "") -> None:
    """NaN, infinity and what 64 bits cannot hold are values of their types, and nothing that a run can use; nor is a
    text that cannot be written as UTF-8, as the name of a file from another time may be.

    Raises:
        ValueError: names the key and the value.
    """
    for key, value in items.items():
        if isinstance(value, Mapping):
            _refuse_what_cannot_be_used(value, f"{prefix}{key}.")
            continue
        within = not isinstance(value, int | float) or abs(value) < 2**63  # of NaN nothing is true
        require(within, f"{prefix}{key}", value, "use a finite number below 2⁶³")
        is_text = not isinstance(value, str) or value.encode("utf-8", "replace").decode() == value
        require(is_text, f"{prefix}{key}", ascii(value), "use a name that is UTF-8")
