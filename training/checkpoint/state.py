"""The parts of a run as the files of a checkpoint, and back."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from training.parallel.sharding import whole
from training.parts import Part

from .folder import CONFIG, STATE, Manifest, read_json
from .saver import Tensors


class State(NamedTuple):
    """What a checkpoint holds, by the name of a part."""

    tensors: dict[str, dict[str, Tensor]]
    values: dict[str, dict[str, Any]]

    def validate(self, parts: Iterable[Part]) -> None:
        """Compare all of it with the parts that would load it; nothing is loaded.

        Raises:
            ValueError: names the part, and what differs.
        """
        for part in parts:
            try:
                part.validate(self.tensors.get(part.name, {}), self.values[part.name])
            except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
                why = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
                raise ValueError(f"{part.name}: {' '.join(why.split())[:200]}") from error

    def load(self, parts: Iterable[Part]) -> None:
        for part in parts:
            part.load(self.tensors.get(part.name, {}), self.values[part.name])


def files_of(parts: Iterable[Part]) -> Tensors:
    """One safetensors file for each part that has tensors: file → name → tensor. All ranks ask, for sharded tensors are
    gathered."""
    return {
        f"{part.name}.safetensors": {name: whole(tensor.detach()) for name, tensor in tensors.items()}
        for part in parts
        if (tensors := part.tensors())
    }


def values_of(parts: Iterable[Part]) -> dict[str, dict[str, Any]]:
    """What state.json holds: part → values."""
    return {part.name: part.values() for part in parts}


def read(path: Path, manifest: Manifest) -> State:
    """A checkpoint that verified.

    Raises:
        ValueError: another program wrote it.
    """
    tensors = {name.removesuffix(".safetensors"): read_tensors(path / name) for name in tensor_files(manifest)}
    values = read_json(path / STATE)
    try:
        if manifest.format == 1:
            tensors, values = _from_format_1(tensors, values, manifest, read_json(path / CONFIG))
        hashes = [values["data"][name] for name in ("text", "tokenizer")]
        if not all(isinstance(of_part, dict) for of_part in values.values()) or {*map(type, hashes)} != {str}:
            raise TypeError
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"{path / STATE} was not written by this version: it is no state of a run") from error
    return State(tensors, values)


def tensor_files(manifest: Manifest) -> list[str]:
    return [name for name in manifest.files if name.endswith(".safetensors")]


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Raises ValueError where it is no safetensors file."""
    try:
        with safe_open(str(file), framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, AttributeError, RuntimeError, TypeError, ValueError) as error:  # odd dtypes, too
        raise ValueError(f"{file} cannot be read as safetensors: {' '.join(str(error).split())}") from error


def _from_format_1(
    tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], manifest: Manifest, config: dict[str, Any]
) -> State:
    """Commits up to e18cd2b kept all small parts in loop.safetensors, and their values at the top of state.json."""
    loop = tensors["loop"]

    def named(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in loop.items() if name.startswith(prefix)}

    is_finished = state["reported"] == manifest.step
    return State(
        tensors={
            "model": tensors["model"],
            "optimizer": tensors["optimizer"],
            "guard": named("guard/"),
            "progress": {"losses": loop["losses"]},
            "random": named("rng/"),
        },
        values={
            "model": {},
            "optimizer": {},
            "guard": {},
            "progress": {
                "step": manifest.step,
                "events": state["events"],
                "unfinished": [] if is_finished else ["evaluation", "sampling"],
                "summary": state["summary"],
            },
            "random": state["random"],
            "data": {
                "text": state["data"],
                "tokenizer": state["tokenizer"],
                "rows": manifest.tokens // config["seq_len"],
            },
            "records": state["records"],
        },
    )
