"""The files of a run that grow: what a run wrote after a checkpoint is cut when it goes on from there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

RECORDS = ("metrics.jsonl", "samples.md", "bad-steps.jsonl")


class Records:
    """A part: the sizes of the records, by name.

    Args:
        folder: of the run. source: run folder of the checkpoint that is loaded; another one gives this run its records.
    """

    name = "records"

    def __init__(self, folder: Path) -> None:
        self.folder = self.source = folder

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def values(self) -> dict[str, Any]:
        return {name: (self.folder / name).stat().st_size for name in RECORDS if (self.folder / name).exists()}

    def load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Bring the records back to what the checkpoint knew, so that each step is in them once."""
        for name in RECORDS:
            path, size = self.folder / name, int(values.get(name, 0))
            if self.source.resolve() != self.folder.resolve() and (self.source / name).exists():
                with suppress(OSError):
                    shutil.copyfile(self.source / name, path)
            if path.exists() and path.stat().st_size > size:
                os.truncate(path, size)
