"""What is measured beside what: every implementation of attention behind the same call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from itertools import accumulate
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import flash_attention
from kernels.flash_attention.op import choose_implementation
from model.attention import AttentionConfig, AttentionSpec, build_attention
from model.attention.config import FlexConfig, SdpaConfig

from .cases import MILLION, Case

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Implementation(NamedTuple):
    attend: Attend
    has_backward: bool = True


Build = Callable[[Case, Tensor | None, torch.device], Implementation]


class LeftOut(Exception):
    """An implementation is not measured here, and this is why; no failure of its own."""


def ours(implementation: str) -> Build:
    """This project's kernels; raises LeftOut for the portable ones where `auto` chooses them anyway."""

    def build(case: Case, starts: Tensor | None, device: torch.device) -> Implementation:
        if choose_implementation("auto", device, getattr(torch, case.dtype)) == implementation:
            raise LeftOut(f"is what {OURS} runs on this GPU")
        options: dict[str, Any] = {"causal": case.causal, "window": case.window, "starts": starts}
        options |= {"softcap": case.softcap, "deterministic": case.deterministic, "implementation": implementation}
        return Implementation(partial(flash_attention, **options))  # type: ignore[arg-type]  # no LSE asked for

    return build


def backend(config: AttentionConfig) -> Build:
    """One of the trainer's backends from PyTorch; raises ValueError with the reason where it cannot."""

    def build(case: Case, starts: Tensor | None, device: torch.device) -> Implementation:
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
            softcap=case.softcap,
            max_documents=len(case.documents) or None,
        )
        attention = build_attention(config, spec)
        return Implementation(partial(attention, mask=attention.prepare(starts, case.seq_len)))

    return build


def package(*modules: str) -> Build:
    """The first of these modules that is installed, all with the functions of the flash-attn packages; raises LeftOut
    where none is."""

    def build(case: Case, starts: Tensor | None, device: torch.device) -> Implementation:
        name, functions = first_of(modules)
        options: dict[str, Any] = {"causal": case.causal}
        if case.window:
            options["window_size"] = (case.window - 1, 0)
        if case.deterministic:
            options["deterministic"] = True
        if case.softcap:
            options["softcap"] = case.softcap

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return out_of(functions.flash_attn_func(q, k, v, **options))

        def attend_documents(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.flatten(0, 1) for x in (q, k, v))
            out = out_of(functions.flash_attn_varlen_func(q, k, v, **options))
            return out.unflatten(0, (case.batch, case.seq_len))

        if case.documents:
            offsets = torch.tensor([0, *accumulate(case.documents * case.batch)], dtype=torch.int32, device=device)
            longest = max(case.documents)
            options |= {"cu_seqlens_q": offsets, "max_seqlen_q": longest}
            options |= {"cu_seqlens_k": offsets, "max_seqlen_k": longest}
        return Implementation(attend_documents if case.documents else attend, name not in FORWARD_ONLY)

    def first_of(names: Sequence[str]) -> tuple[str, ModuleType]:
        reasons = []
        for name in names:
            try:
                return name, import_module(name)
            except ImportError as error:
                reasons.append(str(error))
        raise LeftOut(f"not installed ({'; '.join(reasons)})")

    def out_of(result: Any) -> Tensor:
        return result[0] if isinstance(result, tuple) else result

    return build


OURS, PORTABLE = "flash", "flash-triton"
PEERS: dict[str, Build] = {
    OURS: ours("auto"),
    PORTABLE: ours("triton"),
    "sdpa-flash": backend(SdpaConfig(kernel="flash")),
    "sdpa-cudnn": backend(SdpaConfig(kernel="cudnn")),
    "sdpa-efficient": backend(SdpaConfig(kernel="efficient")),
    "sdpa-math": backend(SdpaConfig(kernel="math")),
    "flex": backend(FlexConfig()),
    # FlashAttention's hopper/ folder (PyTorch's wheels flash-attn-3), or PyPI's fa3-fwd: the same without its backward
    "fa3": package("flash_attn_interface", "fa3_fwd_interface"),
    "fa4": package("flash_attn.cute"),  # PyPI's flash-attn-4
}
FORWARD_ONLY = ("fa3_fwd_interface",)
PACKAGES = ("flash-attn-3", "fa3-fwd", "flash-attn-4", "nvidia-cutlass-dsl")


def why_left_out(peer: str, case: Case) -> str | None:
    """Measurements that would take seconds or more memory than there is, and tell nothing new."""
    if peer != OURS and case in MILLION:
        return "the rows that show memory are ours alone"
    if peer == "sdpa-math" and case.batch * case.heads * case.seq_len**2 > 2**31:
        return "S × S float32 scores of more than 8 GiB, several times over"
    if peer in ("sdpa-math", "sdpa-efficient") and (case.window or case.documents):
        return "reads an S × S mask and skips nothing"
    if peer == "sdpa-efficient" and case.seq_len > 16384:
        return "takes seconds, at the speed of S 16,384"
    return None


def build(peer: str, case: Case, starts: Tensor | None, device: torch.device) -> Implementation:
    """The implementation, ready to be called.

    Raises:
        LeftOut: it is not measured here. Whatever else a peer raises is its own answer.
    """
    reason = why_left_out(peer, case)
    if reason is not None:
        raise LeftOut(reason)
    return PEERS[peer](case, starts, device)
