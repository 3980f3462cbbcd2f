"""What Hydra says of a mistake in several lines, in one: what, which value, what to do instead."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .config.load import one_line
from .config.names import dotted_keys, unknown_key

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
PLUGINS = {
    "hydra/launcher": {
        "joblib": "hydra-joblib-launcher",
        "submitit_local": "hydra-submitit-launcher",
        "submitit_slurm": "hydra-submitit-launcher",
        "ray": "hydra-ray-launcher",
        "ray_aws": "hydra-ray-launcher",
        "rq": "hydra-rq-launcher",
    },
    "hydra/sweeper": {
        "optuna": "hydra-optuna-sweeper 'SQLAlchemy<2' 'alembic<1.14'",
        "ax": "hydra-ax-sweeper",
        "nevergrad": "hydra-nevergrad-sweeper",
    },
}


def typed_words() -> list[str]:
    """The settings of this process's command, behind which `cli.settings_first` has put its flags and their values."""
    return list(takewhile(lambda word: not word.startswith("-"), sys.argv[1:]))


def explain(error: Exception, words: Sequence[str]) -> str:
    """The line for an exception of Hydra, OmegaConf or a check, which these settings met."""
    text = str(error)
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return one_line(error)
    # attention=null, attention=3, attention='${x}': Hydra does not say which.
    if "Config group override must be" in text or "Error resolving interpolation" in text:
        for group, value in settings_in(words):
            if options(group) and value not in options(group):
                return f"{group}={value} is not possible; use {', '.join(options(group))}"
    for word in words:
        if re.match(r"[+~]*(=|$)", word):
            return f"cannot read the command: {word} names nothing; write key=value"
        if "=" not in word and Path(word).exists():
            return f"cannot read the command: {word} is no setting; run_dir={word} goes on with a run"
    several = re.search(r"Ambiguous value for argument '([^']+)'", text)
    if several:
        return f"{several[1]} is several values; add -m to run each in turn (a list: [a,b]; one text: \"'a,b'\")"
    present = re.search(r"Could not append to config. An item is already at '([^']+)'", text)
    if present:
        return f"{present[1]} is a setting already; write {present[1]}=…, without +"
    absent = re.search(r"Could not delete (?:from config\. )?'([^']+)'", text)
    if absent:
        return f"~{absent[1].removeprefix('~')} takes away what is not there; leave it out"
    key = re.search(r"Could not override '([^']+)'", text)
    if key:
        return _unknown_setting(key[1], words)
    option = re.search(r"Could not find '((?:hydra/)?[^'/]+)/([^']*)'", text)
    if option:
        return _unknown_option(*option.groups())
    merging = re.search(r"Error merging override (\S+)", text)
    if merging:
        return f"{merging[1]} is not possible; --hydra-help lists Hydra's own settings, --cfg job all others"
    first = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    if isinstance(error, OverrideParseException):
        first = first.removeprefix("LexerNoViableAltException: ")
        where = "the command" if error.override is None or error.override in first else error.override
        return f"cannot read {where}: {first}; write key=value, and special characters in two quotes: \"key='a b'\""
    return first


def _unknown_setting(key: str, words: Sequence[str]) -> str:
    group, _, field = key.partition(".")
    if not field and options(group):
        return f"{group} is a choice, not a setting; use {', '.join(options(group))}"
    owners = [name for name in options(group) if field in keys_of(CONFIGS / group / f"{name}.yaml")]
    if field and owners:
        return f"{key} belongs to {group}={' or '.join(owners)}; choose that too"
    return unknown_key(key, _settings(words))


def _unknown_option(group: str, name: str) -> str:
    if group in PLUGINS:
        if package := PLUGINS[group].get(name):
            return f"{group}={name} is not installed: pip install {package}, or leave it out"
        return f"{group}={name} is unknown; use basic, or a plug-in of Hydra: {', '.join(PLUGINS[group])}"
    if not options(group):
        return f"{group}={name} is not a setting of flash-gpt; leave it out (--hydra-help lists Hydra's own)"
    near = get_close_matches(name, options(group), n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"{group}={name} is unknown; use {', '.join(options(group))}{hint}"


def refuse_lists(words: Sequence[str]) -> None:
    """attention=[math,sdpa] would be one laid over the other, without a word."""
    for group, value in settings_in(words):
        if value.startswith("[") and options(group):
            raise ValueError(f"{group}={value} is not possible; name one, or -m {group}=a,b to run each in turn")


def settings_in(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(key or group, value) as they were typed, unread."""
    for word in words:
        key, equals, value = word.partition("=")
        if equals:
            yield key.lstrip("+~"), value


def options(group: str) -> list[str]:
    """The names that a group has; none of what is no group."""
    if not group:
        return []
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def keys_of(option: Path) -> set[str]:
    """The settings in an option's file: its own, and those of the files that it builds on."""
    content: Any = OmegaConf.load(option)
    bases = [base for base in content.pop("defaults", []) if isinstance(base, str) and base != "_self_"]
    files = [option.parent / f"{base.partition('@')[0]}.yaml" for base in bases]
    return {*dotted_keys(content), *(key for file in files for key in keys_of(file))}


def set_by_experiment(name: str) -> set[str]:
    """The settings and groups that configs/experiment/NAME.yaml decides."""
    path = CONFIGS / "experiment" / f"{name}.yaml"
    if not path.is_file():
        return set()
    content: Any = OmegaConf.load(path)
    chosen = [str(key) for default in content.get("defaults", []) if OmegaConf.is_dict(default) for key in default]
    own = OmegaConf.masked_copy(content, [key for key in content if key not in ("defaults", "hydra")])
    groups = {key.removeprefix("override ").removeprefix("/") for key in chosen}
    leaves = {key for key in dotted_keys(own) if not OmegaConf.is_dict(OmegaConf.select(own, key))}
    return groups | leaves


def _settings(words: Sequence[str]) -> list[str]:
    """Every setting of the configuration with the options that were chosen, and the names of the groups."""
    chosen = [f"{group}={name}" for group, name in settings_in(words) if name in options(group)]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return [*dotted_keys(compose("train", chosen)), "experiment"]
