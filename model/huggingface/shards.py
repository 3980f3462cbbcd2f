"""Weights in safetensors files: one, or several with an index."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .folder import INDEX, WEIGHTS, weight_files, write_json


def write_weights(folder: Path, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, shard_bytes: int) -> int:
    """Write model.safetensors, or where the tensors have more than `shard_bytes`, model-00001-of-… and an index.

    Returns:
        the number of parameters.
    """
    shards: list[dict[str, Tensor]] = [{}]
    room = shard_bytes
    for name, tensor in tensors:
        size = tensor.numel() * dtype.itemsize
        if shards[-1] and size > room:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensor
        room -= size
    total = 0
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        # Converted here, a shard at a time; cloned, for tensors that share memory cannot be written.
        save({key: tensor.to(dtype, copy=True) for key, tensor in shard.items()}, folder / name, {"format": "pt"})
        places |= dict.fromkeys(shard, name)
        total += sum(tensor.numel() for tensor in shard.values())
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total * dtype.itemsize}, "weight_map": places})
    return total


def save(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Write one file, with the mode of any new file: safetensors' own would be for its owner alone."""
    file.touch()
    mode = file.stat().st_mode
    save_file(tensors, file, metadata)  # another file, put in the place of this one
    file.chmod(mode)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, mapped from its files where they are not used.

    Raises:
        ValueError: a file is missing or damaged.
    """
    return dict(_tensors(folder))


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for file in weight_files(folder):
        try:
            with safe_open(str(file), framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118
                    yield key, opened.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
