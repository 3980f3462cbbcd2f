"""Where the documents of a packed row begin: from cumulative lengths or separator tokens to `starts`.

`starts[b, t]` is the position of the first token of t's document, so causal attention sees keys [starts[b, t], t].
Everything is computed on the tensors' device in shapes that depend on the row's length alone: nothing waits for the
GPU, and torch.compile has nothing to recompile.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def starts_from_cu_seqlens(cu_seqlens: Tensor, seq_len: int) -> Tensor:
    """Starts of one row of packed sequences, from where each begins, for causal attention.

    Args:
        cu_seqlens: int32 (N + 1,), nondecreasing: sequence i holds the tokens [cu_seqlens[i], cu_seqlens[i+1]). Equal
            neighbours are an empty sequence. Tokens before the first and after the last sequence see nothing.
        seq_len: S, the row's length.
    Returns:
        int32 (1, S): a batch of one row.
    Raises:
        ValueError: cu_seqlens is not a vector of int32.
    """
    positions_S, sequence_S = _sequences("cu_seqlens", cu_seqlens, seq_len)
    starts_S = cu_seqlens[sequence_S]  # before the first sequence: its start, which is yet to come
    return torch.where(positions_S < cu_seqlens[-1], starts_S, seq_len).int()[None]


def intervals_from_cu_seqlens(
    cu_seqlens: Tensor, seq_len: int, cu_seqlens_k: Tensor | None = None, *, causal: bool, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """Which keys the queries of packed sequences see: [starts, ends) of each.

    Args:
        cu_seqlens: int32 (N + 1,), nondecreasing: sequence i has the queries [cu_seqlens[i], cu_seqlens[i+1]).
        seq_len: S, the number of queries.
        cu_seqlens_k: the same for its keys. None for self-attention: the kernels then apply `causal` and `window`,
            since a query has the position of its key.
        causal, window: as in `flash_attention`; the queries of a sequence are the last of its keys' positions.
    Returns:
        starts, ends: int32 (1, S), nondecreasing. Queries of no sequence see nothing.
    Raises:
        ValueError: cu_seqlens or cu_seqlens_k is not a vector of int32, or they have different lengths.
    """
    positions_S, sequence_S = _sequences("cu_seqlens", cu_seqlens, seq_len)
    if cu_seqlens_k is None:
        starts_1S = starts_from_cu_seqlens(cu_seqlens, seq_len)
        ends_S = torch.where(positions_S < cu_seqlens[0], cu_seqlens[0], cu_seqlens[sequence_S + 1])
        return starts_1S, ends_S[None]
    _sequences("cu_seqlens_k", cu_seqlens_k, 0)
    if cu_seqlens_k.shape != cu_seqlens.shape:
        raise ValueError(
            f"cu_seqlens_k {tuple(cu_seqlens_k.shape)} must be {tuple(cu_seqlens.shape)}, as cu_seqlens: "
            "the queries of sequence i see keys of sequence i"
        )
    first_S, end_S = cu_seqlens_k[sequence_S].long(), cu_seqlens_k[sequence_S + 1].long()
    at_S = end_S - (cu_seqlens[sequence_S + 1] - positions_S)  # among the keys
    starts_S, ends_S = first_S, end_S
    if window is not None:
        starts_S = torch.maximum(starts_S, at_S - window + 1)
        ends_S = torch.minimum(ends_S, at_S + window)
    if causal:
        ends_S = torch.minimum(ends_S, at_S + 1)
    # A sequence with more queries than keys: its first queries stand before its first key, and see nothing.
    ends_S = torch.maximum(ends_S, first_S)
    for padding_S, where in ((positions_S < cu_seqlens[0], 0), (positions_S >= cu_seqlens[-1], -1)):
        starts_S = torch.where(padding_S, cu_seqlens_k[where], starts_S)
        ends_S = torch.where(padding_S, cu_seqlens_k[where], ends_S)
    return starts_S.int()[None], ends_S.int()[None]


def _sequences(name: str, cu_seqlens: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
    """Positions 0 to seq_len − 1, and the sequence of each; outside of all sequences the first or the last one."""
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype != torch.int32:
        raise ValueError(
            f"{name} {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}: "
            "pass int32 (N + 1,), where each of N sequences begins and, last, where the last one ends"
        )
    positions_S = torch.arange(seq_len, dtype=torch.int32, device=cu_seqlens.device)
    sequence_S = torch.searchsorted(cu_seqlens, positions_S, right=True) - 1
    return positions_S, sequence_S.clamp(0, cu_seqlens.shape[0] - 2)


def starts_from_separators(tokens_BS: Tensor, separator: int, *, separator_begins: bool = False) -> Tensor:
    """Starts of packed rows, from the token that stands between documents.

    Args:
        tokens_BS: integers (B, S).
        separator: the token between documents. It belongs to the document that it ends (GPT-2's <|endoftext|>).
        separator_begins: it belongs to the document that it begins (a BOS token; the rows of this project's `data`).
    Returns:
        int32 (B, S), nondecreasing along S. A row's first document starts at 0, even if it began in an earlier row.
    Raises:
        ValueError: tokens_BS is not (B, S).
    """
    if tokens_BS.dim() != 2:
        raise ValueError(f"tokens {tuple(tokens_BS.shape)}: pass (batch, sequence); tokens[None] is a batch of one row")
    positions_S = torch.arange(tokens_BS.shape[1], dtype=torch.int32, device=tokens_BS.device)
    begins_S = positions_S if separator_begins else positions_S + 1
    starts_BS = torch.where(tokens_BS == separator, begins_S, 0).cummax(1).values
    return starts_BS if separator_begins else F.pad(starts_BS[:, :-1], (1, 0))
