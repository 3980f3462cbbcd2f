"""What happens around the steps: one small file each, called at four points, in list order.

A new service is a file with a `Service` and a line in `build_services`.
"""

from __future__ import annotations

from .base import Service
from .checkpointing import Checkpointing
from .evaluation import Evaluation
from .first_step import FirstStep
from .garbage import Garbage
from .live import Live
from .logging import Logging
from .profiling import Profiling
from .reporting import Reporting
from .sampling import Sampling
from .stopping import Stopping


def build_services() -> list[Service]:
    """The services of a run, in the order in which they are called."""
    # Profiling is first: what others do after a step is in no profile.
    around: list[Service] = [Profiling(), Live(), Reporting()]
    return [*around, FirstStep(), Logging(), Garbage(), Evaluation(), Sampling(), Stopping(), Checkpointing()]


__all__ = ["Service", "build_services"]
