"""The files of a run that grow: what a run wrote after a checkpoint is cut when it goes on from there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from data import disk

from .parts import Part, check_count, check_tensors
from .run_folder import RECORDS


class Records(Part):
    """A part: the sizes of the records, by name.

    Args:
        folder: of the run. source: the run folder whose records the loaded checkpoint counts on; where that is another
            one, this run gets a copy of them. None: nobody knows where they are. is_ours: False of other ranks than
            the first, which leave the files alone.
    """

    name = "records"

    def __init__(self, folder: Path, notify: Callable[[str], None], is_ours: bool = True) -> None:
        self.folder, self.notify, self.is_ours = folder, notify, is_ours
        self.source: Path | None = folder

    def values(self) -> dict[str, Any]:
        return {name: (self.folder / name).stat().st_size for name in RECORDS if (self.folder / name).exists()}

    def validate(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        check_tensors(tensors, {})
        for name, size in values.items():
            check_count(name, size)

    def load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Bring the records back to what the checkpoint knew, so that each step is in them once.

        Raises:
            ValueError: they cannot be written.
        """
        for name in RECORDS if self.is_ours else ():
            path, size = self.folder / name, values.get(name, 0)
            try:
                if self.source != self.folder:
                    self._fetch(name)
                found = path.stat().st_size if path.exists() else 0
                if found > size:
                    os.truncate(path, size)
            except OSError as error:
                why = f"{path} cannot be written: {error.strerror}"
                raise ValueError(f"{why}; free some space or make it writable, or choose another run_dir") from error
            if found < size:
                there = f"{found:,} of the {size:,} bytes that the checkpoint counts on"
                self.notify(f"record     {path} has {there}: what earlier steps logged is missing")

    def _fetch(self, name: str) -> None:
        path = self.folder / name
        if self.source is not None and (self.source / name).exists():
            with disk.replacing(path) as part:
                shutil.copyfile(self.source / name, part)
        else:
            path.unlink(missing_ok=True)
