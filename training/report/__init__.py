"""A picture of runs: run folders are read into series, and series written into one HTML page that loads nothing.

`python -m scripts.report RUN [RUN …]` writes a page by hand; every run writes its own as it goes. Needs no torch.
"""

from __future__ import annotations

from .page import page, write_page
from .read import RunReader, runs_at

__all__ = ["RunReader", "page", "runs_at", "write_page"]
