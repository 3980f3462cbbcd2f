"""A configuration is written to the run folder and uploaded with the run, so nothing secret may be in it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

SECRET_KEY = re.compile(r"(api_?key|secret|password|passwd|credential|(^|_)token$)", re.IGNORECASE)
"""Names of settings that hold a secret, whatever its value looks like."""

SECRET_VARIABLE = re.compile(r"(API_?KEY|ACCESS_?KEY|SECRET|SECRET_?KEY|TOKEN|PASSWORD|PASSWD)$", re.IGNORECASE)
"""Names of environment variables that hold one: WANDB_API_KEY, HF_TOKEN, AWS_SECRET_ACCESS_KEY, …"""
SHORTEST = 10  # a shorter value of such a variable would be found in innocent texts

# Forms that nothing else has. An old key of W&B is 40 hexadecimal digits, which a commit's hash is too: such a key is
# known by the environment alone.
SECRET_FORMS = re.compile(
    r"""
    ://[^/\s:@]+:[^/\s@]+@                                  # a URL with a password
    | (?<![A-Za-z0-9])(?:
        hf_[A-Za-z0-9]{20,} | hf_oauth_[\w.-]{20,} | api_org_[A-Za-z0-9]{20,}   # Hugging Face
        | wandb_v\d_[\w-]{20,} | local-[0-9a-f]{40}         # W&B, and its own servers
        | gh[pousr]_[A-Za-z0-9]{30,} | github_pat_\w{30,} | glpat-[\w-]{20,}
        | sk-(?:ant|proj)-[\w-]{20,} | sk-[A-Za-z0-9]{32,}
        | xox[abprs]-[\w-]{10,} | AIza[\w-]{35} | A[KS]IA[A-Z0-9]{16}(?![A-Za-z0-9])
    )
    | -----BEGIN\ [A-Z ]*PRIVATE\ KEY-----
    """,
    re.VERBOSE,
)


def refuse_secrets(items: Any, prefix: str = "") -> None:
    """Look through nested mappings and lists.

    Raises:
        ValueError: names the key, never the value.
    """
    _refuse(items, prefix, _secret_values())


def _refuse(items: Any, prefix: str, secrets: list[str]) -> None:
    for name, value in items.items() if isinstance(items, Mapping) else enumerate(items):
        key = str(name)
        if isinstance(value, Mapping | list | tuple):
            _refuse(value, f"{prefix}{key}.", secrets)
            continue
        text = str(value)
        if is_secret(key, secrets):
            raise ValueError(_line(f"a name under {prefix.rstrip('.') or 'the settings'}"))
        if value and (SECRET_KEY.search(key) or is_secret(text, secrets)):
            raise ValueError(_line(f"{prefix}{key}"))


def is_secret(text: str, secrets: list[str] | None = None) -> bool:
    """Whether a text has a secret in it: one of a known form, or the value of a variable that holds one."""
    secrets = _secret_values() if secrets is None else secrets
    return bool(SECRET_FORMS.search(text)) or any(secret in text for secret in secrets)


def _secret_values() -> list[str]:
    return [
        value
        for name, value in os.environ.items()
        if SECRET_VARIABLE.search(name) and len(value) >= SHORTEST and not value.startswith("/")
    ]


def _line(key: str) -> str:
    return (
        f"{key} looks like a secret, and the config is saved and uploaded with the run; "
        f"use the environment instead (WANDB_API_KEY, HF_TOKEN)"
    )
