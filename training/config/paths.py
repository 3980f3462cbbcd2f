"""Paths as people write them: ~ and $VARIABLES, from the shell, in quotes or in a YAML file."""

from __future__ import annotations

import os
import re

VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")  # ${…} is OmegaConf's, and comes here escaped only


def expand_path(path: str, setting: str) -> str:
    """`path` with ~ and $VARIABLES replaced. Without HOME the user database knows what ~ is.

    Raises:
        ValueError: a variable is not set, or ~ leads nowhere.
    """
    for plain, braced in VARIABLE.findall(path):
        name = plain or braced
        if name not in os.environ:
            raise ValueError(f"{setting}={path} needs the variable {name}, which is not set; write the path out")
    expanded = os.path.expanduser(os.path.expandvars(path))
    if expanded.startswith("~"):
        raise ValueError(f"{setting}={path} begins with a home folder that is not known; write the path out")
    return expanded


def in_quotes(text: str) -> str:
    """As the value of a setting, whatever it has in it: Hydra reads commas, spaces, = and brackets otherwise."""
    escaped = text.replace("'", r"\'")
    return f"'{escaped}'"
