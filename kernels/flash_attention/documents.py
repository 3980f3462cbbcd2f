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
    """Starts of one row of packed sequences, from where each begins.

    Args:
        cu_seqlens: int32 (N + 1,), nondecreasing from 0: sequence i holds the tokens [cu_seqlens[i], cu_seqlens[i+1]).
            Equal neighbours are an empty sequence.
        seq_len: S, the row's length. Tokens from cu_seqlens[N] on are padding: one more document, seen by no sequence.
    Returns:
        int32 (1, S): a batch of one row.
    Raises:
        ValueError: cu_seqlens is not a vector of int32.
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype != torch.int32:
        raise ValueError(
            f"cu_seqlens {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}: "
            "pass int32 (N + 1,), where each of N sequences begins and, last, where the last one ends"
        )
    positions_S = torch.arange(seq_len, dtype=torch.int32, device=cu_seqlens.device)
    sequence_S = torch.searchsorted(cu_seqlens, positions_S, right=True) - 1
    return cu_seqlens[sequence_S][None]


def starts_from_separators(tokens_BS: Tensor, separator: int, *, separator_begins: bool = False) -> Tensor:
    """Starts of packed rows, from the token that stands between documents.

    Args:
        tokens_BS: integers (B, S).
        separator: the token between documents. It belongs to the document that it ends (GPT-2's <|endoftext|>).
        separator_begins: it belongs to the document that it begins (a BOS token; the rows of this project's `data`).
    Returns:
        int32 (B, S), nondecreasing along S. A row's first document starts at 0, wherever it really began.
    Raises:
        ValueError: tokens_BS is not (B, S).
    """
    if tokens_BS.dim() != 2:
        raise ValueError(f"tokens {tuple(tokens_BS.shape)}: pass (batch, sequence); tokens[None] is a batch of one row")
    positions_S = torch.arange(tokens_BS.shape[1], dtype=torch.int32, device=tokens_BS.device)
    begins_S = positions_S if separator_begins else positions_S + 1
    starts_BS = torch.where(tokens_BS == separator, begins_S, 0).cummax(1).values
    return starts_BS if separator_begins else F.pad(starts_BS[:, :-1], (1, 0))
