"""Whatever has state is a part. A checkpoint is the list of a run's parts, and so is a restore."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn


class Part(Protocol):
    """Something of a run that must survive it. `name` is the part's key in a checkpoint."""

    name: str

    def tensors(self) -> dict[str, Tensor]:
        """The state that is tensors, by name; themselves, not copies."""

    def values(self) -> dict[str, Any]:
        """The state that is plain values, as JSON has them."""

    def load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Put back what `tensors` and `values` returned.

        Raises:
            KeyError, TypeError, RuntimeError, ValueError: it is not that.
        """


class Weights:
    """The parameters of a model."""

    name = "model"

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters())

    def values(self) -> dict[str, Any]:
        return {}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Raises ValueError, and loads nothing, where a tensor is missing, is one too many, or has another shape."""
        parameters = dict(self.model.named_parameters())
        if odd := set(tensors) ^ set(parameters):
            there = "" if min(odd) in tensors else "not "
            raise ValueError(f"the weights are of another architecture: {min(odd)} is {there}there")
        for name, parameter in parameters.items():
            if tensors[name].shape != parameter.shape:
                raise ValueError(f"{name} is {tuple(tensors[name].shape)}, the model's is {tuple(parameter.shape)}")
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


class RandomNumbers:
    """The generators of torch, numpy and Python. The loop draws from none today; what will, goes on after a resume."""

    name = "random"

    def tensors(self) -> dict[str, Tensor]:
        cuda = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
        return {"torch": torch.get_rng_state()} | cuda

    def values(self) -> dict[str, Any]:
        name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
        version, words, gauss = random.getstate()
        return {
            "python": [version, list(words), gauss],
            "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
        }

    def load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        torch.set_rng_state(tensors["torch"])
        if "cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["cuda"])
        version, words, gauss = values["python"]
        random.setstate((version, tuple(words), gauss))
        np.random.set_state(tuple(values["numpy"]))
