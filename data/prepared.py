"""Folders of token files on the disk: what their manifest says is compared with them before they are used."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data import disk
from data.hashes import hash_files

SPLITS = ("train", "val")
TOKEN_FILES = tuple(name for split in SPLITS for name in (f"{split}.bin", f"{split}_starts.bin"))
FILES = (*TOKEN_FILES, "tokenizer.json")
MANIFEST = "manifest.json"


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a complete folder; None where it is damaged, or a file is missing or of another size."""
    try:
        manifest = disk.unsealed((folder / MANIFEST).read_text(encoding="utf-8"), optional=True)
        width = np.dtype(manifest["dtype"]).itemsize
        sizes = {f"{split}.bin": manifest[split]["tokens"] * width for split in SPLITS}
        sizes |= {f"{split}_starts.bin": manifest[split]["documents"] * 8 for split in SPLITS}
        is_whole = (
            manifest["files"].keys() == manifest["sha256"].keys() == {*FILES}
            and all(manifest["files"][name] == size for name, size in sizes.items())
            and all(os.path.getsize(folder / name) == size for name, size in manifest["files"].items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest if is_whole else None


def is_prepared(folder: Path, facts: dict[str, Any], notify: Callable[[str], None] = lambda line: None) -> bool:
    """Whether a folder holds what was once written for `facts`. Damage is named. All files are read, but for large ones
    that were read before and have not changed since, by their inode, size and times."""
    manifest = read_manifest(folder)
    if manifest is None or manifest.get("hash") != facts["hash"]:
        if folder.exists():
            notify(f"data       {folder} is damaged (its manifest or the size of a file): preparing it again")
        return False
    try:
        hashes, _ = hash_files([folder / name for name in FILES], folder.parent)
    except ValueError:
        hashes = []
    damaged = hashes != [manifest["sha256"][name] for name in FILES] and damaged_files(folder)
    if damaged:
        notify(f"data       {folder / damaged[0]} is damaged (SHA-256): preparing {folder.name} again")
    return not damaged


def open_prepared(folder: Path) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], dict[str, Any]]:
    """Tokens and document starts of each split, memory-mapped, and the manifest."""
    manifest = read_manifest(folder)
    assert manifest is not None
    streams: dict[str, tuple[np.ndarray, np.ndarray]] = {
        split: (
            np.memmap(folder / f"{split}.bin", np.dtype(manifest["dtype"]), "r"),
            np.memmap(folder / f"{split}_starts.bin", np.int64, "r"),
        )
        for split in SPLITS
    }
    return streams, manifest


def damaged_files(folder: Path) -> list[str]:
    """The names of files that are not what the manifest says, byte for byte. Reads everything.

    Raises:
        OSError: a file cannot be read.
    """
    manifest = disk.unsealed((folder / MANIFEST).read_text(encoding="utf-8"), optional=True)
    return [name for name, digest in manifest["sha256"].items() if disk.sha256_file(folder / name) != digest]
