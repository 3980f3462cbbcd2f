"""The parts of a run as the files of a checkpoint, and back.

A rank reads what it needs: the whole of a tensor that it has whole, its piece of one that is sharded, from whichever
files hold it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from training.parallel.pieces import Piece, piece_of
from training.parallel.sharding import is_sharded, local, sharded_as
from training.parts import Part

from .folder import CONFIG, PIECES, STATE, Manifest, read_json
from .shards import Tensors, file_of, share_of, state_of


class State(NamedTuple):
    """What a checkpoint holds for one rank, by the name of a part."""

    tensors: dict[str, dict[str, Tensor]]
    values: dict[str, dict[str, Any]]

    def validate(self, parts: Iterable[Part]) -> None:
        """Compare all of it with the parts that would load it; nothing is loaded.

        Raises:
            ValueError: names the part, and what differs.
        """
        for part in self._held(parts):
            try:
                part.validate(self.tensors.get(part.name, {}), self.values[part.name])
            except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
                why = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
                raise ValueError(f"{part.name}: {' '.join(why.split())[:200]}") from error

    def load(self, parts: Iterable[Part]) -> None:
        for part in self._held(parts):
            part.load(self.tensors.get(part.name, {}), self.values[part.name])

    def _held(self, parts: Iterable[Part]) -> list[Part]:
        """All but those of each rank, where this rank was not there when the checkpoint was written."""
        return [part for part in parts if not part.per_rank or part.name in self.values]


DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
DTYPES |= {"BOOL": torch.bool}
"""By the names that safetensors has for them."""
_BY_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
UNREADABLE = (OSError, SafetensorError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What safetensors raises where a file is none of its own, or is of an odd dtype."""


class Written(NamedTuple):
    """What one rank writes of a checkpoint."""

    tensors: Tensors
    texts: dict[str, Any]
    """File → its value as JSON, or its content."""
    num_bytes: int
    """Of the tensors of all ranks."""


def written(parts: list[Part], config: dict[str, Any], rank: int = 0, size: int = 1) -> Written:
    """One process: a safetensors file for each part that has tensors. One of many: its share of each."""
    values = {part.name: part.values() for part in parts}
    if size == 1:
        found = {f"{part.name}.safetensors": part.tensors() for part in parts}
        tensors = {
            file: {name: local(tensor) for name, tensor in group.items()} for file, group in found.items() if group
        }
        num_bytes = sum(tensor.nbytes for group in tensors.values() for tensor in group.values())
        return Written(tensors, {STATE: values, CONFIG: config}, num_bytes)
    tensors, pieces, num_bytes = share_of(parts, rank, size)
    own = {part.name: values.pop(part.name) for part in parts if part.per_rank}
    of_run = {STATE: values, CONFIG: config, PIECES: pieces} if rank == 0 else {}
    return Written(tensors, {**of_run, state_of(rank): own}, num_bytes)


# ---- reading


def read(path: Path, manifest: Manifest, parts: list[Part], rank: int = 0) -> State:
    """What this rank goes on with, of a checkpoint that verified.

    Raises:
        ValueError: another program wrote it.
    """
    values = read_values(path, manifest)
    if PIECES in manifest.files:
        values |= read_json(path / state_of(rank)) if state_of(rank) in manifest.files else {}
    elif rank > 0:
        values = {name: value for name, value in values.items() if name not in {p.name for p in parts if p.per_rank}}
    files = _Files(path)
    expected: dict[str, Mapping[str, Tensor]] = {part.name: part.expected() for part in parts}
    stored = _stored(files, manifest, rank)
    return State({part: files.read_all(found, expected.get(part, {})) for part, found in stored.items()}, values)


def read_weights(path: Path, manifest: Manifest) -> dict[str, Tensor]:
    """The whole weights of a checkpoint that verified, by name.

    Raises:
        ValueError: another program wrote it.
    """
    layout, read = weights_in(path, manifest)
    return {name: read(name) for name in layout}


def weights_in(path: Path, manifest: Manifest) -> tuple[dict[str, Tensor], Callable[[str], Tensor]]:
    """The same, one at a time: their names, shapes and dtypes (on the meta device), and what reads one by its name."""
    files = _Files(path)
    stored = dict(sorted(_stored(files, manifest, rank=0).get("model", {}).items()))
    layout = {name: torch.empty(at.shape, dtype=at.dtype, device="meta") for name, at in stored.items()}
    return layout, lambda name: files.read(stored[name])


def read_values(path: Path, manifest: Manifest) -> dict[str, dict[str, Any]]:
    """What a checkpoint that verified holds of the whole run beside tensors: part → values.

    Raises:
        ValueError: another program wrote it.
    """
    values = read_json(path / STATE)
    try:
        if manifest.format == 1:
            values = _values_of_format_1(values, manifest, read_json(path / CONFIG))
        hashes = [values["data"][name] for name in ("text", "tokenizer")]
        if not all(isinstance(of_part, dict) for of_part in values.values()) or {*map(type, hashes)} != {str}:
            raise TypeError
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"{path / STATE} was not written by this version: it is no state of a run") from error
    return values


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Raises ValueError where it is no safetensors file."""
    files = _Files(file.parent)
    return files.read_all(files.stored(file.name), {})


class _Stored(NamedTuple):
    """A tensor on disk: its shape, and where its pieces are, each whole in one file under one name."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: list[tuple[str, str, Piece]]


_Index = dict[str, dict[str, _Stored]]
"""Part → tensor name → where it is."""


def _stored(files: _Files, manifest: Manifest, rank: int) -> _Index:
    """Where the tensors of each part are, those of each rank only of this one."""
    if PIECES in manifest.files:
        return _stored_in_pieces(files, manifest, rank)
    index = {
        name.removesuffix(".safetensors"): files.stored(name)
        for name in manifest.files
        if name.endswith(".safetensors")
    }
    if manifest.format > 1:
        return index
    # Commits up to e18cd2b kept all small parts in loop.safetensors.
    loop = index.pop("loop", {})
    for part, prefix in (("guard", "guard/"), ("random", "rng/")):
        index[part] = {name.removeprefix(prefix): at for name, at in loop.items() if name.startswith(prefix)}
    return index | {"progress": {name: at for name, at in loop.items() if name == "losses"}}


def _stored_in_pieces(files: _Files, manifest: Manifest, rank: int) -> _Index:
    """Raises ValueError where PIECES is not what `shards.pieces_text` writes, or names a file that is not there."""
    index: _Index = {}
    try:
        for part, tensors in read_json(files.folder / PIECES).items():
            index[part] = {}
            for name, entry in tensors.items():
                shape, dtype, pieces = tuple(entry["shape"]), _BY_NAME[entry["dtype"]], []
                for writer, offset, size in entry["pieces"]:
                    piece = Piece(tuple(offset), tuple(size))
                    inside = all(a >= 0 and a + n <= of for a, n, of in zip(*piece, shape, strict=True))
                    if not inside or file_of(part, writer) not in manifest.files:
                        raise ValueError(name)
                    pieces.append((file_of(part, writer), name, piece))
                if sum(piece.numel for *_, piece in pieces) != Piece(shape, shape).numel:
                    raise ValueError(name)
                index[part][name] = _Stored(shape, dtype, pieces)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"{files.folder / PIECES} does not say where the tensors of a run are: {error}") from error
    for file in manifest.files:
        own = re.fullmatch(rf"(\w+)_{rank:05}\.safetensors", file)
        if own and own[1] not in index:
            index[own[1]] = files.stored(file)
    return index


class _Files:
    """The safetensors files of a folder, each opened once.

    Raises:
        ValueError: one cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._opened: dict[str, Any] = {}

    def stored(self, file: str) -> dict[str, _Stored]:
        """The tensors of one file."""
        with self._reading(file) as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            found = {name: (tuple(each.get_shape()), DTYPES[each.get_dtype()]) for name, each in slices.items()}
        return {
            name: _Stored(shape, dtype, [(file, name, Piece((0,) * len(shape), shape))])
            for name, (shape, dtype) in found.items()
        }

    def read_all(self, stored: Mapping[str, _Stored], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by name: of those that are expected sharded what this rank has, of all others the whole."""
        return {name: self.read(at, expected.get(name)) for name, at in stored.items()}

    def read(self, stored: _Stored, like: Tensor | None = None) -> Tensor:
        if like is not None and is_sharded(like) and like.shape != stored.shape:  # which is refused for its shape
            return torch.empty(stored.shape, device="meta", dtype=stored.dtype)
        whole = Piece((0,) * len(stored.shape), stored.shape)
        if like is None or not is_sharded(like):
            return self._read_piece(stored, whole)
        return sharded_as(self._read_piece(stored, piece_of(like)), like)

    def _read_piece(self, stored: _Stored, wanted: Piece) -> Tensor:
        parts = [(file, name, piece, piece.within(wanted)) for file, name, piece in stored.pieces]
        found = [(file, name, piece, common) for file, name, piece, common in parts if common is not None]
        if len(found) == 1 and found[0][3] == wanted:
            file, name, piece, _ = found[0]
            return self._read_box(file, name, piece, wanted)
        # What no piece has would be found as numbers that are not finite.
        result = torch.full(wanted.shape, float("nan") if stored.dtype.is_floating_point else 0, dtype=stored.dtype)
        for file, name, piece, common in found:
            result[common.slices(wanted)] = self._read_box(file, name, piece, common)
        return result

    def _read_box(self, file: str, name: str, piece: Piece, wanted: Piece) -> Tensor:
        """A box of the piece that a file holds under a name."""
        with self._reading(file) as opened:
            if wanted == piece:
                tensor: Tensor = opened.get_tensor(name)
            else:
                tensor = opened.get_slice(name)[wanted.slices(piece)]
            if tensor.shape != wanted.shape:
                raise ValueError(f"{name} is of another shape than {PIECES} says")
            return tensor

    @contextmanager
    def _reading(self, file: str) -> Iterator[Any]:
        try:
            if file not in self._opened:
                self._opened[file] = safe_open(str(self.folder / file), framework="pt")
            yield self._opened[file]
        except UNREADABLE as error:
            why = " ".join(str(error).split())
            raise ValueError(f"{self.folder / file} cannot be read as safetensors: {why}") from error


def _values_of_format_1(state: dict[str, Any], manifest: Manifest, config: dict[str, Any]) -> dict[str, Any]:
    """Commits up to e18cd2b kept the values of all parts at the top of state.json."""
    is_finished = state["reported"] == manifest.step
    return {
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
    }
