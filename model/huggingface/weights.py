"""A model's tensors ↔ those of transformers: one table of names, read in both directions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from model.config import ModelConfig

from .settings import family_of

# Our name of a module inside a block, and theirs. Several: our one fused matrix holds theirs one below the other.
GPT2_LAYER = {
    "attention_norm": ["ln_1"],
    "attention.qkv": ["attn.c_attn"],
    "attention.out": ["attn.c_proj"],
    "mlp_norm": ["ln_2"],
    "mlp.up": ["mlp.c_fc"],
    "mlp.down": ["mlp.c_proj"],
}
LLAMA_LAYER = {
    "attention_norm": ["input_layernorm"],
    "attention.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention.q_norm": ["self_attn.q_norm"],
    "attention.k_norm": ["self_attn.k_norm"],
    "attention.out": ["self_attn.o_proj"],
    "mlp_norm": ["post_attention_layernorm"],
    "mlp.gate_up": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.down": ["mlp.down_proj"],
}
GPT2_ENDS = {"embedding": "transformer.wte", "positions": "transformer.wpe", "norm": "transformer.ln_f"}
LLAMA_ENDS = {"embedding": "model.embed_tokens", "norm": "model.norm"}

# What older files hold beside the weights: masks, and the angles of the rotary embedding.
NO_WEIGHTS = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")


class Entry(NamedTuple):
    """One of our tensors, and theirs: `rows` of each, one below the other; transposed where they are (in, out)."""

    ours: str
    theirs: list[str]
    rows: list[int]
    transposed: bool = False


def table(config: ModelConfig) -> Iterator[Entry]:
    """Every tensor of a model. GPT-2's modules always have biases: those that ours lacks are zeros.

    Raises:
        ValueError: transformers has no such model.
    """
    is_gpt2 = family_of(config) == "gpt2"
    layer, ends = (GPT2_LAYER, GPT2_ENDS) if is_gpt2 else (LLAMA_LAYER, LLAMA_ENDS)
    layers = "transformer.h" if is_gpt2 else "model.layers"
    D, E, F, heads, kv_heads = config.head_dim, config.dim, config.ffn_dim, config.n_heads, config.n_kv_heads
    assert D is not None
    assert kv_heads is not None
    qkv = [heads * D, kv_heads * D, kv_heads * D]
    rows = {
        "attention.qkv": [sum(qkv)] if is_gpt2 else qkv,
        "attention.q_norm": [D],
        "attention.k_norm": [D],
        "mlp.gate_up": [F, F],
        "mlp.up": [F],
        "embedding": [config.vocab_size],
        "positions": [config.n_positions],
    }
    for ours, name in ends.items():
        yield Entry(f"{ours}.weight", [f"{name}.weight"], rows.get(ours, [E]))
    if is_gpt2:
        yield Entry("norm.bias", ["transformer.ln_f.bias"], [E])
    for i in range(config.n_layers):
        for ours, theirs in layer.items():
            if ours.endswith(("q_norm", "k_norm")) and not config.qk_norm:
                continue
            has_bias = is_gpt2 or ("norm" not in ours and config.bias) or (ours == "attention.qkv" and config.qkv_bias)
            for part in ("weight", "bias") if has_bias else ("weight",):
                names = [f"{layers}.{i}.{name}.{part}" for name in theirs]
                # Their linear layers of GPT-2 are Conv1D, whose weights are (in, out).
                transposed = is_gpt2 and part == "weight" and "norm" not in ours
                yield Entry(f"blocks.{i}.{ours}.{part}", names, rows.get(ours, [E]), transposed)
    if not config.tie_head:
        yield Entry("head.weight", ["lm_head.weight"], [config.vocab_size])


def to_theirs(config: ModelConfig, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of each of transformers' weights, contiguous, in the dtype and on the device it has.

    A tied head is left out, as transformers does. They share memory with the model where they can.
    """
    for entry in table(config):
        tensor = state.get(entry.ours)
        if tensor is None:  # a bias of GPT-2's
            tensor = state["embedding.weight"].new_zeros(sum(entry.rows))
        for name, piece in zip(entry.theirs, tensor.split(entry.rows), strict=True):
            yield name, (piece.t() if entry.transposed else piece).contiguous()


def from_theirs(config: ModelConfig, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Our weights, by the names of `GPT.named_parameters`.

    Args:
        where: how a message names the folder.
    Raises:
        ValueError: names the tensor that is not there, of another shape, or one too many.
    """
    # GPT-2's own files have no prefix.
    bare = config.position == "learned" and not any(name.startswith("transformer.") for name in tensors)
    left = {f"transformer.{name}" if bare and name != "lm_head.weight" else name: tensors[name] for name in tensors}
    state = {}
    for entry in table(config):
        pieces = []
        for name, rows in zip(entry.theirs, entry.rows, strict=True):
            if name not in left:
                raise ValueError(f"{where} has no tensor {name}, which its config.json asks for")
            tensor = left.pop(name)
            piece = tensor.t() if entry.transposed else tensor
            if piece.shape[0] != rows:
                raise ValueError(f"{where}: {name} is {tuple(tensor.shape)}, and its config.json asks for {rows} rows")
            pieces.append(piece)
        state[entry.ours] = pieces[0].contiguous() if len(pieces) == 1 else torch.cat(pieces)
    for name in left:
        is_tied_head = name == "lm_head.weight" and config.tie_head
        if not is_tied_head and not name.endswith(NO_WEIGHTS):
            raise ValueError(f"{where} has a tensor {name}, which this model has no place for")
    return state
