"""The trained weights alone, for whoever uses the model."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_model
from torch import Tensor, nn

from data import disk
from training.errors import SaveFailed
from training.parallel.sharding import is_sharded, whole
from training.parallel.together import Together

from .folder import ALONE, Manifest
from .saver import check_written, save_problem
from .state import DTYPES, weights_in

NAMES = {dtype: name for name, dtype in DTYPES.items()}


def save_weights(model: nn.Module, run_dir: Path, ranks: Together = ALONE) -> None:
    """Write model.safetensors into `run_dir`: whole, or not at all. Collective; rank 0 writes.

    Raises:
        SaveFailed: with one line that says why, on every rank.
    """
    target = run_dir / "model.safetensors"
    try:
        with ExitStack() as stack:
            # In a folder that the next process sweeps: safetensors, killed, leaves a file of a random name behind.
            part = ranks.first(lambda: stack.enter_context(disk.part_of(target)))
            if ranks.size == 1 and not any(map(is_sharded, model.parameters())):
                save_model(model, str(part / target.name))
                check_written(part / target.name, model.parameters())
            else:
                _save_gathered(model, part / target.name, ranks)
            ranks.first(lambda: _put_in_place(part / target.name, target))
    except (OSError, SafetensorError) as error:
        needed = sum(parameter.nbytes for parameter in model.parameters())
        raise SaveFailed(f"{target} was not written: {save_problem(error, run_dir, needed)}") from error


def _put_in_place(part: Path, target: Path) -> None:
    shutil.copymode(target.with_name("config.yaml"), part)
    disk.sync(part)
    os.replace(part, target)
    disk.sync(target.parent)


def export_weights(path: Path, manifest: Manifest, file: Path) -> int:
    """Write the whole weights of a checkpoint that verified as one safetensors file; returns its bytes.

    Raises:
        ValueError: another program wrote the checkpoint. OSError: the file cannot be written.
    """
    layout, read = weights_in(path, manifest)
    with disk.replacing(file) as part:
        stream(part, layout, {}, map(read, layout))
    return file.stat().st_size


def _save_gathered(model: nn.Module, file: Path, ranks: Together) -> None:
    """What `save_model` writes, from tensors in shards: one of them is whole at a time."""
    tensors, shared = distinct(model.state_dict(keep_vars=True))
    names = ordered(tensors)

    def save() -> None:
        gathered = (whole(tensors[name].detach()) for name in names)
        try:
            if ranks.is_first:
                stream(file, {name: tensors[name] for name in names}, shared, gathered)
        finally:
            for _ in gathered:  # all ranks gather all, whatever became of the file
                pass

    ranks.each(save)


def distinct(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a state under one name each, and which name stands for each of the others."""
    first: dict[int, str] = {}
    shared = {}
    for name in sorted(state):
        if (kept := first.setdefault(id(state[name]), name)) != name:
            shared[name] = kept
    return {name: tensor for name, tensor in state.items() if name not in shared}, shared


def ordered(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names in the order in which safetensors writes them."""
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))


def stream(file: Path, layout: Mapping[str, Tensor], shared: Mapping[str, str], tensors: Iterable[Tensor]) -> None:
    """Write a safetensors file from tensors that come one after the other.

    Args:
        layout: shapes and dtypes by name, `ordered`; the tensors come in the same order.
        shared: goes into the metadata, as `save_model` puts it there.
    Raises:
        OSError: it cannot be written.
    """
    header: dict[str, object] = {"__metadata__": dict(shared)} if shared else {}
    end = 0
    for name, like in layout.items():
        start, end = end, end + like.numel() * like.dtype.itemsize
        header[name] = {"dtype": NAMES[like.dtype], "shape": list(like.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            opened.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    if file.stat().st_size != 8 + len(text) + end:  # not every file system tells that it is full
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
