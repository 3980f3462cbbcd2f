"""What ends a run that is neither a mistake in the configuration (ValueError) nor a bug."""

from __future__ import annotations


class OutOfMemory(RuntimeError):
    """The device's memory did not suffice; the message says what would help."""


class NonFiniteError(RuntimeError):
    """Steps were bad: NaN, infinite or a spike. No parameter took them."""


class SaveFailed(RuntimeError):
    """What was trained could not be written; one line says what was needed and what to do."""


class Interrupted(KeyboardInterrupt):
    """Someone asked the run to stop; it saved itself, and the same command goes on.

    A KeyboardInterrupt, because it ends a sweep too, and Hydra reports other exceptions in lines of its own.
    """

    code = 75  # EX_TEMPFAIL: try again

    def __init__(self, message: str, code: int = code) -> None:
        super().__init__(message)
        self.code = code
