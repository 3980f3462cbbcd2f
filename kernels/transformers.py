"""Flash attention inside Hugging Face transformers, for its causal models:

    from flash_gpt.transformers import register

    register()
    model = AutoModelForCausalLM.from_pretrained(…, attn_implementation="FlashGPT")

transformers describes a mask as a function of two positions. `starts_of` turns it into what the kernels read, the first
key that each query sees; a mask of another form is refused. Every model whose attention goes through transformers'
AttentionInterface can use it. Packed rows, padding, windows, chunks, soft caps and sinks are honoured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .flash_attention import flash_attention, starts_from_cu_seqlens

NAME = "FlashGPT"
"""Not "flash" in lower case: transformers would look for a kernel of that name on the Hub."""


def register(name: str = NAME) -> str:
    """Make transformers' `attn_implementation=name` this attention. Needs transformers 5.

    Args:
        name: without "flash" in lower case, "/" and "|", which transformers reads itself.
    Returns:
        name.
    Raises:
        ValueError: transformers would not use this name.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    if "flash" in name or "/" in name or "|" in name:
        raise ValueError(f'name={name!r}: transformers reads "flash", "/" and "|" in a name itself; use {NAME!r}')
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, starts_of)
    return name


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers' layers call.

    Args:
        query: (B, H, S, D). key, value: (B, H_kv, S_k, D). float16, bfloat16 or float32.
        attention_mask: what `starts_of` returned, int32 (B, S), or None.
        s_aux: (H,), the sinks.
    Returns:
        (B, S, H, D), and no weights.
    Raises:
        ValueError: these kernels do not compute what was asked for; or as `flash_attention`.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    S, S_k = query.shape[2], key.shape[2]
    for what, is_asked, remedy in (
        ("attention that is not causal", not causal, "use sdpa"),
        (f"dropout={dropout:g} of attention weights", dropout > 0, "set attention_dropout=0 in the configuration"),
        ("weights to return", others.get("output_attentions"), "leave output_attentions=True out, or use eager"),
        ("bias of positions", others.get("position_bias") is not None, "use sdpa"),
        ("paged cache", others.get("cache") is not None, "generate with model.generate"),
        ("mask of four dimensions", attention_mask is not None and attention_mask.dim() == 4, "pass (B, S), or none"),
    ):
        if is_asked:
            raise ValueError(f"{NAME} has no {what}; {remedy}")
    starts = attention_mask
    if (cu_seqlens := others.get("cu_seq_lens_q")) is not None:
        if len(query) > 1 or S_k != S:
            raise ValueError(f"cu_seq_lens_q with {len(query)} rows and {S} of {S_k} positions; pass one whole row")
        starts_1S = starts_from_cu_seqlens(cu_seqlens.int(), S)
        starts = starts_1S if starts is None else torch.maximum(starts, starts_1S)
    elif starts is None and S_k == S and getattr(module, "layer_idx", 0) == 0:
        _refuse_packed(others.get("position_ids"))
    out = flash_attention(
        *(x.transpose(1, 2) for x in (query, key, value)),
        window=sliding_window,
        starts=starts,
        softcap=softcap or 0.0,
        scale=scaling,
        sinks=s_aux,
    )
    assert isinstance(out, Tensor)
    return out, None


def starts_of(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **others: Any,
) -> Tensor | None:
    """The first key that each query sees, int32 (B, S), counted from the first key that is passed.

    Under a causal mask of documents, chunks or a window a query sees an interval of keys that ends at its own position.
    Bisection finds the first one: log₂ S steps over (B, S) elements; a mask would have S × S elements for each row.

    Args:
        q_offset, kv_offset: positions of the first query and of the first key.
        mask_function: whether (row, head, query, key) is visible, from tensors of positions.
        attention_mask: bool (B, positions), False at padding.
    Returns:
        None if every query sees all keys up to its own.
    Raises:
        ValueError: the mask has another form.
    """
    from transformers.masking_utils import causal_mask_function

    if use_vmap:
        raise ValueError(f"{NAME} has no mask of one's own functions (and_mask_function, or_mask_function); use sdpa")
    if isinstance(q_offset, Tensor) or q_offset + q_length != kv_offset + kv_length:
        raise ValueError(f"{NAME} reads no cache of fixed size: its keys end after the last query; use a dynamic cache")
    is_padded = attention_mask is not None and _is_padded(attention_mask)
    if mask_function in (None, causal_mask_function) and not is_padded:
        return None
    shape = batch_size, q_length
    starts_BS = torch.full(shape, kv_offset, device=device)
    if mask_function not in (None, causal_mask_function):
        starts_BS = _search(mask_function, starts_BS, q_offset, kv_offset + kv_length)
    if is_padded:
        assert attention_mask is not None
        first_B = attention_mask.to(torch.int32).argmax(1).to(device)
        starts_BS = torch.maximum(starts_BS, first_B[:, None])
    return (starts_BS - kv_offset).int()


def _search(mask_function: Callable[..., Any], starts_BS: Tensor, q_offset: int, end: int) -> Tensor:
    """The first position that each query sees, from `starts_BS` on; the one after its own where it sees none."""
    B, S = starts_BS.shape
    rows_BS = torch.arange(B, device=starts_BS.device)[:, None].expand(B, S)
    queries_BS = torch.arange(q_offset, q_offset + S, device=starts_BS.device).expand(B, S)
    head = torch.zeros((), dtype=torch.int64, device=starts_BS.device)

    def sees(keys_BS: Tensor) -> Tensor:
        seen: Tensor = mask_function(rows_BS, head, queries_BS, keys_BS)
        return seen.expand(B, S)

    if S > 1 and not torch.compiler.is_compiling() and sees((queries_BS + 1).clamp(max=end - 1))[:, :-1].any():
        raise ValueError(f"{NAME} has no mask in which a token sees a later one; use sdpa")
    low_BS, high_BS = starts_BS, queries_BS + 1
    for _ in range(end.bit_length()):
        middle_BS = (low_BS + high_BS) // 2
        is_seen_BS = sees(middle_BS.clamp(max=end - 1)) | (middle_BS > queries_BS)
        low_BS = torch.where(is_seen_BS, low_BS, middle_BS + 1).minimum(high_BS)
        high_BS = torch.where(is_seen_BS, middle_BS, high_BS)
    return high_BS


def _is_padded(attention_mask: Tensor) -> bool:
    """Raises ValueError where padding lies between tokens. It waits for the device, as transformers' own masks do."""
    if torch.compiler.is_compiling():
        return True
    begins_B = attention_mask[:, 0].int() + (attention_mask[:, 1:] & ~attention_mask[:, :-1]).sum(1)
    if (begins_B > 1).any():
        raise ValueError(f"{NAME} has no padding between tokens, as attention_mask has it; pad on the left to generate")
    return not bool(attention_mask.all())


def _refuse_packed(position_ids: Tensor | None) -> None:
    """transformers makes no mask of position_ids that begin anew where a cache is in use, as it is by default."""
    if isinstance(position_ids, Tensor) and position_ids.dim() == 2 and not torch.compiler.is_compiling():
        steps = position_ids[:, 1:] - position_ids[:, :-1]
        if bool((steps != 1).any()):
            raise ValueError("position_ids begin anew within a row, and a cache is in use; pass use_cache=False")
