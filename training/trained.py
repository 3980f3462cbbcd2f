"""A trained model and its tokenizer, from a run folder, a checkpoint or a folder of transformers, to be used.

What can be refused is refused before torch loads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.tokenizer import Tokenizer
from model.attention import ATTENTIONS, AttentionConfig, AttentionSpec, build_attention, choose_attention
from model.config import ModelConfig
from model.huggingface.folder import is_huggingface, read_separator, read_settings
from model.huggingface.settings import understand

from .checkpoint import folder as checkpoints
from .checkpoint.folder import DamagedCheckpoint
from .config.saved import saved_settings
from .run_folder import run_nearby
from .runtime import resolve_device

if TYPE_CHECKING:
    import torch

    from model.gpt import GPT

PRECISIONS = ("auto", "bf16", "tf32", "fp32")
WEIGHTS, TOKENIZER = "model.safetensors", "tokenizer.json"
NAMED = "a run folder, a checkpoint in one, or a folder of transformers"


@dataclass(frozen=True)
class Found:
    """Where a trained model lies."""

    weights: Path
    """A safetensors file, or a folder of transformers."""
    settings: dict[str, Any]
    """Of the run that trained it."""
    tokenizer: Path
    what: str
    """For a line on the screen."""

    @property
    def model(self) -> ModelConfig:
        """Raises ValueError where another version wrote it."""
        try:
            config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), self.settings["model"]))
        except (KeyError, OmegaConfBaseException) as error:
            raise ValueError(f"{self.what} has no model that this version knows: {error}") from error
        assert isinstance(config, ModelConfig)
        return config


def find(path: str, notify: Callable[[str], None]) -> Found:
    """The newest good checkpoint of a run, its model.safetensors if there is none, the checkpoint that is named, or a
    folder of transformers.

    Raises:
        ValueError: there is nothing to load, it is damaged, or of transformers and none of ours.
    """
    place = Path(path)
    if not os.path.isdir(place):
        raise ValueError(f"{path} is no folder; name {NAMED}{_such_as(place)}")
    if checkpoints.is_checkpoint(place):
        return _checkpoint(place)
    for candidate in checkpoints.candidates(place):
        try:
            return _checkpoint(candidate)
        except DamagedCheckpoint as damage:
            notify(str(damage))
    if is_huggingface(place):
        return _huggingface(place)
    settings = saved_settings(place)
    if settings is None or not (place / WEIGHTS).is_file():
        raise ValueError(f"{path} holds no trained model; name {NAMED}{_such_as(place)}")
    return Found(place / WEIGHTS, settings, place / TOKENIZER, str(place / WEIGHTS))


def _such_as(place: Path) -> str:
    near = run_nearby(place)
    return f", such as {near}" if near else ""


def _checkpoint(place: Path) -> Found:
    try:
        manifest = checkpoints.read_manifest(place)
        files = checkpoints.weight_files(manifest)
        checkpoints.verify(place, only=[*files, checkpoints.CONFIG])
    except DamagedCheckpoint as damage:
        raise DamagedCheckpoint(f"checkpoint {place} is damaged and not used: {damage}") from damage
    if not files:
        raise DamagedCheckpoint(f"checkpoint {place} is not used: it has no {WEIGHTS}")
    settings = saved_settings(place)
    assert settings is not None
    tokenizer = place.resolve().parent.parent / TOKENIZER
    weights = place / WEIGHTS if WEIGHTS in files else place
    return Found(weights, settings, tokenizer, f"{place} (step {manifest.step:,})")


def _huggingface(place: Path) -> Found:
    described = read_settings(place)
    config = understand(described, str(place / "config.json"), name=place.resolve().name)
    if not (place / TOKENIZER).is_file():
        raise ValueError(
            f"{place} has no {TOKENIZER}: AutoTokenizer.from_pretrained(…) of it and save_pretrained write one"
        )
    settings = {
        "model": asdict(config),
        "seq_len": config.n_positions if config.position == "learned" else described["max_position_embeddings"],
        "tokenizer": {"separator": read_separator(place)},
    }
    return Found(place, settings, place / TOKENIZER, str(place))


def read_state(found: Found) -> dict[str, torch.Tensor]:
    """The weights, whole, by name.

    Raises:
        ValueError: the file cannot be read.
    """
    with _opened(found.weights, found.model) as (names, read):
        return {name: read(name) for name in sorted(names)}


def load_model(
    path: str | Found,
    *,
    attention: str = "auto",
    device: str = "auto",
    precision: str = "auto",
    seq_len: int | None = None,
    max_documents: int | None = None,
    notify: Callable[[str], None] = lambda line: None,
) -> tuple[GPT, Tokenizer]:
    """A trained model, ready to generate or to be evaluated, and its tokenizer.

    In bf16 the weights of linear layers are kept in bf16: what autocast, under which the model is to be called, would
    make of them at each call. All else stays float32.

    Args:
        path: a run folder, a checkpoint, or a folder of transformers; or what `find` found there.
        attention: auto, math, sdpa, flex or flash. device: auto, cuda or cpu.
        precision: auto (bf16 on a GPU from the A100 on, else fp32), bf16, tf32 or fp32.
        seq_len: of the rows to come; None: as in training. max_documents: most of them in a row; None: rows are one.
        notify: takes one line on what was loaded, and one for each checkpoint that is damaged.
    Raises:
        ValueError: one line: nothing there, damaged, or impossible on this machine.
    """
    found = path if isinstance(path, Found) else find(path, notify)
    config = found.model
    seq_len = seq_len or found.settings.get("seq_len")
    if type(seq_len) is not int:
        raise ValueError(f"{found.what} was saved without its seq_len: this version cannot use it")
    separator = (found.settings.get("tokenizer") or {}).get("separator")
    tokenizer = Tokenizer.load(found.tokenizer, separator)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{found.tokenizer} has {tokenizer.vocab_size} ids, and the model {config.vocab_size}: not its own"
        )
    config.check_seq_len(seq_len)
    spec, precision = _spec(config, seq_len, max_documents, device, precision)
    if attention not in ATTENTIONS:
        raise ValueError(f"attention={attention} is unknown; use {', '.join(ATTENTIONS)}")
    chosen = choose_attention(ATTENTIONS[attention](name=attention), spec)
    return _load(found.weights, config, chosen, spec, precision, found.what, notify), tokenizer


def _spec(
    config: ModelConfig, seq_len: int, max_documents: int | None, device: str, precision: str
) -> tuple[AttentionSpec, str]:
    for name, value, allowed in (
        ("device", device, ("auto", "cuda", "cpu")),
        ("precision", precision, PRECISIONS),
    ):
        if value not in allowed:
            raise ValueError(f"{name}={value} is unknown; use {', '.join(allowed)}")
    gpu, precision = resolve_device(device, precision)
    spec = AttentionSpec.of(
        config,
        seq_len=seq_len,
        dtype="bfloat16" if precision == "bf16" else "float32",
        capability=gpu.capability if gpu else None,
        max_documents=max_documents,
    )
    return spec, precision


def _load(
    file: Path,
    config: ModelConfig,
    attention: AttentionConfig,
    spec: AttentionSpec,
    precision: str,
    what: str,
    notify: Callable[[str], None],
) -> GPT:
    import torch
    from torch.overrides import TorchFunctionMode

    from model.gpt import GPT

    device = torch.device(spec.device)
    if precision == "tf32":
        torch.set_float32_matmul_precision("high")
    with device:
        backend = build_attention(attention, spec)

    class WithoutInitialization(TorchFunctionMode):
        """Memory that nobody touches costs nothing; the meta device would, with 2 s for PyTorch's compiler."""

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(func, "__module__", None) == "torch.nn.init":
                return args[0] if args else kwargs["tensor"]
            return func(*args, **(kwargs or {}))

    with WithoutInitialization():
        model = GPT(config, backend)
    _read_weights(model, file, device, torch.bfloat16 if precision == "bf16" else torch.float32)
    count = sum(parameter.numel() for parameter in model.parameters())
    notify(f"model      {what}: {config.name}, {count:,} parameters, {precision} on {device.type}")
    return model.eval()


def _read_weights(model: GPT, file: Path, device: torch.device, linear_dtype: torch.dtype) -> None:
    """Put the weights of a file in the place of a model's own, one at a time."""
    import torch
    from torch import nn

    from model.rotary import inverse_frequencies

    names = {name for name, _ in model.named_parameters()}
    is_linear = {
        f"{name}.{part}"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        for part in ("weight", "bias")
    }
    with _opened(file, model.config) as (found, get_tensor):
        if odd := names ^ found:
            raise ValueError(f"{file} does not fit: {min(odd)} is {'not there' if min(odd) in names else 'too many'}")
        for name, parameter in list(model.named_parameters()):
            tensor = get_tensor(name)
            if tensor.shape != parameter.shape:
                raise ValueError(f"{file} does not fit: {name} is {(*tensor.shape,)}, not {(*parameter.shape,)}")
            tensor = tensor.to(device, linear_dtype if name in is_linear else torch.float32)
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
    if model.config.tie_head:  # the table that is looked up stays float32; that of the output is as a linear layer's
        table = model.embedding.weight.detach()
        model.head.weight = nn.Parameter(table.to(linear_dtype), requires_grad=False)
    if model.config.position == "rotary":
        assert model.config.head_dim is not None
        with device:
            model.frequencies = inverse_frequencies(model.config.rotary, model.config.head_dim)


@contextmanager
def _opened(file: Path, config: ModelConfig) -> Iterator[tuple[set[str], Callable[[str], torch.Tensor]]]:
    """The names of the weights in a file, a checkpoint of shards or a folder of transformers, and what reads one."""
    from safetensors import SafetensorError, safe_open

    if checkpoints.is_checkpoint(file):
        from training.checkpoint.state import weights_in

        layout, read = weights_in(file, checkpoints.read_manifest(file))
        yield set(layout), read
        return
    if file.is_dir():
        from model.huggingface.shards import read_weights
        from model.huggingface.weights import from_theirs

        tensors = from_theirs(config, read_weights(file), str(file))
        yield set(tensors), tensors.pop
        return
    try:
        with safe_open(str(file), framework="pt") as opened:
            yield set(opened.keys()), opened.get_tensor
    except (OSError, SafetensorError) as error:
        why = " ".join(str(error).split())
        raise ValueError(
            f"{file} cannot be read as safetensors: {why}; name a run, a checkpoint or a model.safetensors"
        ) from error
