"""What ends a run that is neither a mistake in the configuration (ValueError) nor a bug."""

from __future__ import annotations


class OutOfMemory(RuntimeError):
    """The device's memory did not suffice; the message says what would help."""


class NonFiniteError(RuntimeError):
    """The loss or a gradient became NaN or infinite. No parameter took that step."""
