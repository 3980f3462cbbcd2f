"""Whatever has state is a part. A checkpoint is the list of a run's parts, and so is a restore."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model.linear import refresh

from .parallel.sharding import local, local_part, named_parameters


class Part:
    """Something of a run that must survive it."""

    name: str
    """The part's key in a checkpoint."""
    per_rank = False
    """Whether each rank has a state of its own. Otherwise it is the run's: the same on all ranks, or sharded."""

    def tensors(self) -> dict[str, Tensor]:
        """The state that is tensors, by name; themselves, not copies."""
        return {}

    def values(self) -> dict[str, Any]:
        """The state that is plain values, as JSON has them."""
        return {}

    def expected(self) -> dict[str, Tensor]:
        """What `load` takes: names, shapes, dtypes and shards count, not where a tensor is or what is in it."""
        return self.tensors()

    def validate(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Compare with what `tensors` and `values` return, and change nothing. Whoever wrote them, `load` then works.

        Raises:
            ValueError: names what differs. KeyError, TypeError: a value is not there, or is of another kind.
        """
        raise NotImplementedError

    def load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Put back what `tensors` and `values` returned, once every part of the run has validated its own."""
        raise NotImplementedError


def check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], finite: bool = True) -> None:
    """Compare names, shapes and dtypes, and look for NaN and infinity.

    Raises:
        ValueError: names the first tensor that differs.
    """
    if odd := set(found) ^ set(expected):
        raise ValueError(f"{min(odd)} is {'one too many' if min(odd) in found else 'not there'}")
    for name, like in expected.items():
        tensor = found[name]
        if tensor.shape != like.shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, not {tuple(like.shape)}")
        if tensor.dtype != like.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, not {like.dtype}")
        if finite and not local(tensor).isfinite().all():
            raise ValueError(f"{name} has numbers that are not finite")


def check_count(name: str, value: Any) -> None:
    """Raises ValueError where a value is no whole number from 0."""
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{name} is {str(value)[:40]}, no count")


class Weights(Part):
    """The parameters of a model. Of a sharded one they are DTensors; `load` takes those, or whole tensors."""

    name = "model"

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def tensors(self) -> dict[str, Tensor]:
        return named_parameters(self.model)

    def validate(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        check_tensors(tensors, self.tensors())

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        for name, parameter in self.tensors().items():
            local(parameter).copy_(local_part(tensors[name], parameter))
        refresh(self.model)


class RandomNumbers(Part):
    """The generators of torch, numpy and Python. The loop draws from none today; what will, goes on after a resume.

    A rank that was not there when the checkpoint was written keeps those of its start.
    """

    name = "random"
    per_rank = True

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

    def validate(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Asks generators that nobody draws from. NumPy's would read beyond its words where a position is forged."""
        ours, theirs = self.tensors(), dict(tensors)
        if not ours.keys() & theirs.keys() & {"cuda"}:  # a run may go on without the GPU that it had, or with one
            ours.pop("cuda", None)
            theirs.pop("cuda", None)
        check_tensors(theirs, ours)
        for name, state in theirs.items():
            torch.Generator("cuda" if name == "cuda" else "cpu").set_state(state)
        version, words, gauss = values["python"]
        random.Random().setstate((version, tuple(words), gauss))
        name, keys, position, has_gauss, cached = values["numpy"]
        for number, least, most in ((len(keys), 624, 624), (position, 0, 624), (has_gauss, 0, 1)):
            if type(number) is not int or not least <= number <= most:
                raise ValueError("numpy's state is none")
        if any(type(number) not in (float, type(None)) for number in (gauss, cached)):
            raise ValueError("a Gaussian number kept for later is none")
        np.random.RandomState().set_state((name, keys, position, has_gauss, cached))

    def load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        torch.set_rng_state(tensors["torch"])
        if "cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["cuda"])
        version, words, gauss = values["python"]
        random.setstate((version, tuple(words), gauss))
        np.random.set_state(tuple(values["numpy"]))
