"""attention=sdpa: PyTorch's own fused kernels, one of them chosen at construction and pinned.

`scaled_dot_product_attention` picks a kernel silently at every call. Here the choice is made once, from what PyTorch
says each kernel can run, so the start-up line tells the truth.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.reference import visible_pairs

from .base import AttentionBackend
from .config import AttentionConfig, SdpaConfig, takes_varlen
from .spec import AttentionSpec

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
VARLEN = "flash-varlen"  # FlashAttention-2 over cumulative document lengths: `torch.nn.attention.varlen`


class Choice(NamedTuple):
    """Which of PyTorch's kernels runs, and why, for the start-up line."""

    kernel: str
    reason: str


class SdpaAttention(AttentionBackend):
    """PyTorch's kernels, one of which is chosen at construction for the whole run."""

    name = "sdpa"
    decodes_with = "scaled_dot_product_attention"

    def __init__(self, spec: AttentionSpec, config: AttentionConfig) -> None:
        super().__init__(spec, config)
        self.kernel, self.reason = choose_kernel(spec, config)
        if self.kernel == VARLEN:
            self._varlen_options = _varlen_options(spec)

    def describe(self) -> str:
        return f"PyTorch's {self.kernel} kernel ({self.reason})"

    def prepare(self, starts_BS: Tensor | None, seq_len: int, num_keys: int | None = None) -> Tensor | None:
        spec = self.spec
        options: dict[str, Any] = {"causal": spec.causal, "window": spec.window, "starts": starts_BS}
        if num_keys is not None:
            # Without a mask, PyTorch's causal queries are the first of the keys' positions.
            return visible_pairs(seq_len, num_keys, device=spec.device, **options)[:, None]
        if self.kernel == VARLEN and starts_BS is not None:
            assert spec.max_documents is not None
            return cumulative_lengths(starts_BS, spec.max_documents)
        if self.kernel == VARLEN or (starts_BS is None and spec.window is None):
            return None
        return visible_pairs(seq_len, seq_len, device=spec.device, **options)[:, None]

    def __call__(self, q_BSHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, mask: Tensor | None) -> Tensor:
        spec, H, kernel = self.spec, q_BSHD.shape[2], self.kernel
        if k_BSGD.shape[1] > q_BSHD.shape[1] and spec.device == "cuda" and kernel != "math":
            kernel = "efficient"  # the one of PyTorch's fused kernels that takes the mask of fewer queries than keys
        if kernel == VARLEN:
            return self._varlen(q_BSHD, k_BSGD, v_BSGD, mask)
        if kernel not in ("flash", "math") and k_BSGD.shape[2] != H:
            # Only these two read grouped heads in place; the others get the same numbers, repeated.
            k_BSGD, v_BSGD = (x.repeat_interleave(H // x.shape[2], dim=2) for x in (k_BSGD, v_BSGD))
        with sdpa_kernel(KERNELS[kernel]):
            out_BHSD = F.scaled_dot_product_attention(
                q_BSHD.transpose(1, 2),
                k_BSGD.transpose(1, 2),
                v_BSGD.transpose(1, 2),
                attn_mask=mask,
                is_causal=spec.causal and mask is None,
                scale=spec.scale,
                enable_gqa=k_BSGD.shape[2] != H,
            )
        return out_BHSD.transpose(1, 2)

    def decode(self, q_BSHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor, mask: Tensor) -> Tensor:
        """The heads of a group become queries of one head: grouped keys and values are read where they are."""
        G = k_BKGD.shape[2]
        q_BGMD = q_BSHD.unflatten(2, (G, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        mask_B1MK = mask.repeat(1, q_BSHD.shape[2] // G, 1)[:, None]
        kernel = "efficient" if self.spec.device == "cuda" and self.kernel != "math" else self.kernel
        with sdpa_kernel(KERNELS[kernel]):
            out_BGMD = F.scaled_dot_product_attention(
                q_BGMD, k_BKGD.transpose(1, 2), v_BKGD.transpose(1, 2), attn_mask=mask_B1MK, scale=self.spec.scale
            )
        return out_BGMD.unflatten(2, (-1, q_BSHD.shape[1])).permute(0, 3, 1, 2, 4).flatten(2, 3)

    def _varlen(self, q_BSHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, lengths: Tensor | None) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        B, S = q_BSHD.shape[:2]
        if lengths is None:
            lengths = torch.arange(0, (B + 1) * S, S, dtype=torch.int32, device=q_BSHD.device)
        q, k, v = q_BSHD.flatten(0, 1), k_BSGD.flatten(0, 1), v_BSGD.flatten(0, 1)
        out = varlen_attn(q, k, v, lengths, lengths, S, S, **self._varlen_options)
        assert isinstance(out, Tensor)
        return out.unflatten(0, (B, S))


def _varlen_options(spec: AttentionSpec) -> dict[str, Any]:
    from torch.nn.attention.varlen import varlen_attn  # brings PyTorch's compiler: 1.5 s for those who use it

    left = -1 if spec.window is None else spec.window - 1
    options: dict[str, Any] = {"scale": spec.scale, "window_size": (left, 0)}
    if spec.n_kv_heads != spec.n_heads and "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = True  # torch 2.11 has no such switch: its kernel takes grouped heads as they are
    return options


def cumulative_lengths(starts_BS: Tensor, max_documents: int) -> Tensor:
    """Where each document begins in the flattened batch, and the end: int32 (B · max_documents + 1,).

    The shape depends on the bound alone, so nothing recompiles from batch to batch; unused places repeat the end and
    mean empty documents. Computed on the device, without a synchronisation.
    """
    B, S = starts_BS.shape
    index_S = torch.arange(S, device=starts_BS.device, dtype=torch.int32)
    index_N = torch.arange(B * S, device=starts_BS.device, dtype=torch.int32)
    is_first_N = (starts_BS == index_S).flatten()
    boundaries = torch.where(is_first_N, index_N, B * S).sort().values[: B * max_documents]
    end = torch.full((B * max_documents + 1 - boundaries.shape[0],), B * S, dtype=torch.int32, device=starts_BS.device)
    return torch.cat([boundaries, end])


def choose_kernel(spec: AttentionSpec, config: AttentionConfig) -> Choice:
    """The kernel that was asked for, or the fastest that honours the spec; `SdpaConfig.why_not` has accepted both.

    Raises:
        ValueError: PyTorch refuses the kernel that was asked for.
    """
    assert isinstance(config, SdpaConfig)
    asked = config.kernel
    if spec.device == "cpu":
        return Choice("flash", "fused CPU kernel") if asked == "auto" else Choice(asked, "asked for")
    if not spec.is_plain:
        if asked in ("auto", "flash") and takes_varlen(spec):
            return Choice(VARLEN, "FlashAttention-2 over cumulative document lengths; masked pairs cost nothing")
        kernel = "efficient" if asked == "auto" else asked
        return Choice(kernel, "a dense S × S mask: exact, but nothing is skipped")
    if asked != "auto":
        if not _can_use(spec, asked):
            raise ValueError(f"attention=sdpa: PyTorch's {asked} kernel refuses this shape; use attention.kernel=auto")
        return Choice(asked, "asked for")
    # cuDNN first on Hopper and newer, where it is 1.3 to 1.6 times the speed of the FlashAttention-2 kernel.
    is_hopper = spec.capability is not None and spec.capability >= (9, 0)
    order = ("cudnn", "flash", "efficient", "math") if is_hopper else ("flash", "efficient", "cudnn", "math")
    kernel = next(kernel for kernel in order if _can_use(spec, kernel))
    return Choice(kernel, f"first of {', '.join(order)} that takes head_dim {spec.head_dim}")


def _can_use(spec: AttentionSpec, kernel: str) -> bool:
    """What PyTorch itself answers for this shape, dtype and card."""
    cuda = torch.backends.cuda
    can_use = {
        "flash": cuda.can_use_flash_attention,
        "cudnn": cuda.can_use_cudnn_attention,
        "efficient": cuda.can_use_efficient_attention,
    }.get(kernel)
    if can_use is None:
        return True
    n_kv_heads = spec.n_kv_heads if kernel == "flash" else spec.n_heads  # the others get repeated heads

    def example(n_heads: int) -> Tensor:
        shape, dtype = (1, spec.seq_len, n_heads, spec.head_dim), getattr(torch, spec.dtype)
        x_BSHD = torch.empty(shape, dtype=dtype, device=spec.device)
        return x_BSHD.requires_grad_().transpose(1, 2)

    q, k = example(spec.n_heads), example(n_kv_heads)
    params = cuda.SDPAParams(q, k, k, None, 0.0, spec.causal, spec.n_heads != n_kv_heads)
    return bool(can_use(params))
