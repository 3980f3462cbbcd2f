"""Who is measured: each implementation of attention behind the same call."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from kernels import flash_attention
from kernels.flash_attention.op import why_not_hopper
from model.attention import AttentionConfig, AttentionSpec, build_attention
from model.attention.config import FlexConfig, SdpaConfig

from .cases import MILLION, Case

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Build = Callable[[Case, Tensor | None, torch.device], Attend]


class LeftOut(Exception):
    """An implementation is not measured here, and this is why; no failure of its own."""


def ours(implementation: str) -> Build:
    """One of this project's kernels."""

    def build(case: Case, starts: Tensor | None, device: torch.device) -> Attend:
        reason = why_not_hopper(device, getattr(torch, case.dtype)) if implementation == "hopper" else None
        if reason is not None:
            raise LeftOut(reason)
        options: dict[str, Any] = {"causal": case.causal, "window": case.window, "starts": starts}
        options |= {"deterministic": case.deterministic, "implementation": implementation}
        return partial(flash_attention, **options)  # type: ignore[return-value]  # no LSE asked for: out alone

    return build


def backend(config: AttentionConfig) -> Build:
    """One of the trainer's backends from PyTorch; raises ValueError with the reason where it cannot."""

    def build(case: Case, starts: Tensor | None, device: torch.device) -> Attend:
        if case.deterministic:
            raise LeftOut("only kernels with a switch for it are asked to be deterministic")
        spec = AttentionSpec(
            n_heads=case.heads,
            n_kv_heads=case.kv_heads,
            head_dim=case.head_dim,
            seq_len=case.seq_len,
            dtype=case.dtype,
            capability=torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
            causal=case.causal,
            window=case.window,
            max_documents=len(case.documents) or None,
        )
        attention = build_attention(config, spec)
        return partial(attention, mask=attention.prepare(starts, case.seq_len))

    return build


def package(module: str) -> Build:
    """A module with the functions of the flash-attn packages, which FlashAttention-3 and -4 share."""

    def build(case: Case, starts: Tensor | None, device: torch.device) -> Attend:
        try:
            functions = import_module(module)
        except ImportError as error:
            raise LeftOut(f"not installed ({error})") from error
        options: dict[str, Any] = {"causal": case.causal}
        if case.window:
            options["window_size"] = (case.window - 1, 0)
        if case.deterministic:
            options["deterministic"] = True

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return first(functions.flash_attn_func(q, k, v, **options))

        def attend_documents(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.flatten(0, 1) for x in (q, k, v))
            return first(functions.flash_attn_varlen_func(q, k, v, **options)).unflatten(0, (case.batch, case.seq_len))

        if not case.documents:
            return attend
        offsets = torch.tensor([0, *accumulate(case.documents * case.batch)], dtype=torch.int32, device=device)
        longest = max(case.documents)
        options |= {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "max_seqlen_q": longest, "max_seqlen_k": longest}
        return attend_documents

    def first(result: Any) -> Tensor:
        return result[0] if isinstance(result, tuple) else result

    return build


OURS = ("hopper", "triton")
"""In the order in which `implementation="auto"` prefers them."""
PEERS: dict[str, Build] = {
    "hopper": ours("hopper"),
    "triton": ours("triton"),
    "sdpa-flash": backend(SdpaConfig(kernel="flash")),
    "sdpa-cudnn": backend(SdpaConfig(kernel="cudnn")),
    "sdpa-efficient": backend(SdpaConfig(kernel="efficient")),
    "sdpa-math": backend(SdpaConfig(kernel="math")),
    "flex": backend(FlexConfig()),
    "fa3": package("flash_attn_interface"),  # FlashAttention's hopper/ folder, and PyTorch's wheels flash-attn-3
    "fa3-fwd": package("fa3_fwd_interface"),  # PyPI's fa3-fwd: the same without its backward
    "fa4": package("flash_attn.cute"),  # PyPI's flash-attn-4
}
FORWARD_ONLY = ("fa3-fwd",)
PACKAGES = ("flash-attn-3", "fa3-fwd", "flash-attn-4", "nvidia-cutlass-dsl")


def why_left_out(peer: str, case: Case) -> str | None:
    """Measurements that would take seconds or more memory than there is, and tell nothing new."""
    if peer not in OURS and case in MILLION:
        return "the rows that show memory are ours alone"
    if peer == "sdpa-math" and case.batch * case.heads * case.seq_len**2 > 2**31:
        return "S × S float32 scores of more than 8 GiB, several times over"
    if peer in ("sdpa-math", "sdpa-efficient") and (case.window or case.documents):
        return "reads an S × S mask and skips nothing"
    if peer == "sdpa-efficient" and case.seq_len > 16384:
        return "takes seconds, at the speed of S 16,384"
    return None


def build(peer: str, case: Case, starts: Tensor | None, device: torch.device) -> Attend:
    """The implementation, ready to be called.

    Raises:
        LeftOut: it is not measured here. Whatever else a peer raises is its own answer.
    """
    reason = why_left_out(peer, case)
    if reason is not None:
        raise LeftOut(reason)
    return PEERS[peer](case, starts, device)
