"""The numbers that follow from a configuration: how long the run is, and what one optimizer step is made of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """The numbers that follow from the settings."""

    max_steps: int
    """Optimizer steps of the run."""
    tokens_per_step: int
    """Tokens of an optimizer step."""
    accumulation: int
    """Micro-batches of an optimizer step, of each rank."""

    @classmethod
    def of(
        cls,
        *,
        seq_len: int,
        batch_size: int,
        tokens_per_step: int | None,
        max_steps: int | None,
        max_tokens: int,
        data_size: int = 1,
    ) -> Plan:
        """The plan of a run.

        Args:
            tokens_per_step: None for one micro-batch of batch_size × seq_len tokens on each rank.
            max_steps: None for as many steps as max_tokens needs.
            data_size: ranks with rows of their own; those that share rows count as one.
        Raises:
            ValueError: tokens_per_step is not a multiple of the micro-batches; the line names the nearest that is.
        """
        micro_batch = batch_size * seq_len * data_size
        if tokens_per_step is None:
            tokens_per_step = micro_batch
        if tokens_per_step < micro_batch or tokens_per_step % micro_batch:
            nearest = max(1, (tokens_per_step + micro_batch // 2) // micro_batch) * micro_batch
            ranks = f" × {data_size} ranks" if data_size > 1 else ""
            raise ValueError(
                f"tokens_per_step={tokens_per_step} is not a multiple of batch_size × seq_len{ranks} = {micro_batch}; "
                f"use {nearest}, or null for one micro-batch{' a rank' if ranks else ''}"
            )
        if max_steps is None:
            max_steps = -(-max_tokens // tokens_per_step)
        return cls(max_steps, tokens_per_step, tokens_per_step // micro_batch)
