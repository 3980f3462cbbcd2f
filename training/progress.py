"""How far a run has come, and what its log lines say so far."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .parts import Part, check_count, check_tensors
from .step import StepResult


class Progress(Part):
    """The counters of a run. A part: a resumed run goes on counting.

    Attributes:
        step: the last step that was trained; 0 before the first.
        saved: the last step with a checkpoint in the run folder; −1 without one.
        unfinished: services with work at this step that is still to do. A new run begins with an evaluation; after
            that, only a request to stop leaves something, and the resumed run does it first.
        val_loss: the last validation loss, and the step that it is of.
        events: log lines and samples so far.
        summary: the last value of every metric.
    """

    name = "progress"

    def __init__(self, device: torch.device) -> None:
        self.step, self.saved, self.events = 0, -1, 0
        self.unfinished = {"evaluation"}
        self.val_loss = -1, math.nan
        self.summary: dict[str, float] = {}
        self._losses = torch.zeros(2, device=device)  # sum and number of good steps since the last log line

    def add(self, result: StepResult) -> None:
        """Count a step's loss into the next log line. Does not wait for the device."""
        counted = torch.stack([result.loss, torch.ones_like(result.loss)])
        self._losses += torch.where(result.good, counted, 0.0)

    def mean_loss(self) -> float:
        """Mean over the good steps since the last call, NaN without one. Waits for the device."""
        nats, count = self._losses.tolist()
        self._losses.zero_()
        return nats / count if count else math.nan

    def tensors(self) -> dict[str, Tensor]:
        return {"losses": self._losses}

    def values(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "events": self.events,
            "unfinished": sorted(self.unfinished),
            "summary": self.summary,
        }

    def validate(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        check_tensors(tensors, self.tensors())
        check_count("the number of losses", round(tensors["losses"][1].item()))
        check_count("step", values["step"])
        check_count("events", values["events"])
        unfinished, summary = values["unfinished"], values["summary"]
        if not (isinstance(unfinished, list) and all(isinstance(name, str) for name in unfinished)):
            raise ValueError("unfinished is no list of names")
        if not (isinstance(summary, dict) and all(map(_is_number, summary.values()))):
            raise ValueError("summary has values that are no numbers")

    def load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        self._losses.copy_(tensors["losses"])
        self.step, self.events = values["step"], values["events"]
        self.unfinished, self.summary = set(values["unfinished"]), dict(values["summary"])


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)
