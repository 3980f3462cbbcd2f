"""Bad steps: a loss or gradient that is not finite, or a loss far above its recent course.

Everything is decided on the device, before the update and without waiting for it; the host looks at log lines.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import BadStepConfig
from .errors import NonFiniteError
from .parallel.world import World
from .parts import Part, check_tensors

COUNTERS = ("skipped", "in_a_row", "worst_in_a_row", "step", "loss", "grad_norm")
"""Bad steps so far, now in a row, most in a row since the last look; the first since then, its loss, its norm."""


class Guard(Part):
    """Keeps bad steps out of the parameters, and stops the run or counts them, as `config` says. A part.

    A loss is a spike when it is more than `spike_sigma` standard deviations above the mean of the last `spike_window`
    good losses; before there are that many, none is.
    """

    name = "guard"

    def __init__(self, config: BadStepConfig, world: World, notify: Callable[[str], None], record: Path) -> None:
        self.config, self.world, self.notify, self.record = config, world, notify, record
        self.losses = torch.zeros(config.spike_window, device=world.device)
        self.num_good = torch.zeros((), dtype=torch.int64, device=world.device)
        self.counters = torch.zeros(len(COUNTERS), dtype=torch.float64, device=world.device)
        self.seen = 0
        """Bad steps the host knows of; and the same where the device reads it."""
        self._seen = torch.zeros((), dtype=torch.float64, device=world.device)

    def tensors(self) -> dict[str, Tensor]:
        return {"losses": self.losses, "num_good": self.num_good, "counters": self.counters}

    def validate(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        window = tensors["losses"]
        expected = {**self.tensors(), "losses": self.losses.new_empty(window.numel())}
        check_tensors(tensors, expected, finite=False)  # loss and norm of a bad step may be anything
        counts = torch.cat([tensors["num_good"].double()[None], tensors["counters"][:4]])
        if not (counts.isfinite() & (counts >= 0) & (counts == counts.round())).all():
            raise ValueError("its counts are no counts")
        if not window.isfinite().all():
            raise ValueError("the last good losses are not finite")

    def load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Another spike_window than the checkpoint's begins its window anew."""
        self.counters.copy_(tensors["counters"])
        self._look(int(self.counters[0]))
        if tensors["losses"].shape == self.losses.shape:
            self.losses.copy_(tensors["losses"])
            self.num_good.copy_(tensors["num_good"])

    def _look(self, seen: int) -> None:
        self.seen = seen
        self._seen.fill_(seen)

    def check(self, step: int | Tensor, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Whether a step may update the parameters: a bool scalar on the device. No synchronisation.

        Args:
            step: its number, or that in a float64 scalar on the device. loss: of the whole step, on all ranks.
            grad_norm: global.
        """
        good = self.world.all(torch.isfinite(loss) & torch.isfinite(grad_norm))
        if self.config.spike_sigma > 0:
            full = self.num_good >= self.config.spike_window
            limit = self.losses.mean() + self.config.spike_sigma * self.losses.std()
            good &= ~full | (loss <= limit)
        skipped, in_a_row, worst, *first = self.counters.unbind()
        if self.config.action == "stop":
            good &= skipped == self._seen  # the parameters stay those that met the bad batch until the host sees it
        slot = (self.num_good % self.config.spike_window)[None]  # self.losses[a scalar] would wait for the device
        self.losses.scatter_(0, slot, torch.where(good, loss, self.losses.gather(0, slot)))
        self.num_good += good
        in_a_row = torch.where(good, 0.0, in_a_row + 1)
        is_first = ~good & (skipped == self._seen)
        number = step if isinstance(step, Tensor) else torch.full_like(skipped, step)
        now = (number, loss.double(), grad_norm.double())
        first = [torch.where(is_first, new, old) for new, old in zip(now, first, strict=True)]
        counters = [skipped + ~good, in_a_row, torch.maximum(worst, in_a_row), *first]
        self.counters.copy_(torch.stack(counters))  # in place, as all that a recorded step keeps
        return good

    def report(self, rows_of: Callable[[int], list[int]]) -> dict[str, float]:
        """Look at what happened since the last report. Waits for the device.

        Args:
            rows_of: the training rows that a step read, to find the batch again.
        Returns:
            The number of steps skipped so far, if any.
        Raises:
            NonFiniteError: by config, at the first bad step or at too many in a row.
        """
        skipped, _, worst, step, loss, grad_norm = self.counters.tolist()
        new = int(skipped) - self.seen
        if new:
            self._look(int(skipped))
            self.counters[2] = self.counters[1]
            rows = rows_of(int(step))
            facts = {"step": int(step), "loss": str(loss), "grad_norm": str(grad_norm), "rows": rows, "bad_steps": new}
            try:
                if self.world.is_first:
                    with open(self.record, "a", encoding="utf-8") as file:
                        file.write(json.dumps(facts) + "\n")
            except OSError as error:
                where = f"its rows were {rows[0]} to {rows[-1]}, which {self.record} does not hold: {error.strerror}"
                self.notify(f"bad step   {int(step)}: {where}")
            finite = all(map(torch.isfinite, torch.tensor([loss, grad_norm])))
            what = (
                f"the loss spiked to {loss:.4g} at step {int(step)}"
                if finite
                else f"the loss or a gradient was NaN or infinite at step {int(step)}"
            )
            if self.config.action == "stop":
                raise NonFiniteError(
                    f"{what}; no parameter took that step, and {self.record} holds its rows. Try a lower "
                    f"learning_rate, a longer schedule.warmup_steps, precision=fp32 if it is another, or "
                    f"bad_step.action=skip"
                )
            if worst >= self.config.most_in_a_row:
                raise NonFiniteError(
                    f"{what}, and {int(worst)} steps in a row were bad (bad_step.most_in_a_row="
                    f"{self.config.most_in_a_row}); no parameter took them. Resume from an earlier checkpoint "
                    f"with a lower learning_rate"
                )
            more = f", and {new - 1} more since the last line" if new > 1 else ""
            self.notify(f"skipped    {what}{more}; {int(skipped)} so far; rows of step {int(step)} in {self.record}")
        return {"train/skipped_steps": skipped} if skipped else {}
