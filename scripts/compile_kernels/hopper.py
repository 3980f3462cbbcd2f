"""The Hopper attention kernels, with the descriptors that the host makes for them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from kernels.flash_attention.hopper import backward_pass, backward_split, config, forward_pass, host, scheduler
from kernels.flash_attention.hopper.config import QUERIES, Kind
from kernels.flash_attention.hopper.preprocess import preprocess_kernel

from .configuration import Configuration, target_of

ARCHITECTURES = ("sm_90",)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MASKS = {
    "causal": (True, False, False),
    "full": (False, False, False),
    "window": (True, True, False),
    "documents": (True, False, True),
    "everything": (False, True, True),
}


def configurations(architecture: str) -> Iterator[Configuration]:
    """Everything that the Hopper kernels can be asked for, as far as the compiler can tell; with every mask in bf16."""
    for head_dim, mask, softcap in product((64, 128, 256), MASKS, (False, True)):
        if softcap and mask in ("full", "window", "documents"):
            continue
        row = {"head_dim": head_dim, "mask": mask, "softcap": softcap, "dtype": "bf16", "group": 4}
        yield from attention(row)
    for head_dim, mask in product((64, 128), ("causal", "full")):
        yield from attention({"head_dim": head_dim, "mask": mask, "softcap": False, "dtype": "bf16", "group": 1})
    for head_dim in (40, 64, 96, 128, 192):
        row = {"head_dim": head_dim, "mask": "causal", "softcap": False, "dtype": "fp16", "group": 1}
        yield from attention(row, sinks=True)
        yield preprocess(head_dim, "fp16")
    for head_dim in (64, 128, 256):
        row = {"head_dim": head_dim, "mask": "documents", "softcap": False, "dtype": "bf16", "group": 1}
        yield from attention(row, packed=True)
        yield preprocess(head_dim, "bf16", packed=True)
    for mask in ("causal", "documents"):
        row = {"head_dim": 192, "head_dim_v": 128, "mask": mask, "softcap": False, "dtype": "bf16", "group": 1}
        yield from attention(row)
    yield sort()


def attention(row: dict[str, Any], sinks: bool | None = None, packed: bool = False) -> Iterator[Configuration]:
    """The forward and backward kernels for a head_dim, mask and dtype."""
    head_dim, mask, softcap = row["head_dim"], row["mask"], row["softcap"]
    causal, window, starts = MASKS[mask]
    kind = Kind(8, row["group"], causal, window, starts, softcap)
    sinks = softcap if sinks is None else sinks
    row = row | {"packed": packed}
    for seq_len in (1024, 4096) if head_dim == 64 else (4096,):
        yield forward(row, kind, seq_len, sinks)
    if head_dim == 64 and mask == "window":
        yield forward(row, kind, 4096, sinks, window=1024)
    if head_dim > 128:
        yield backward(row, kind, backward_split.dkdv_kernel)
        yield backward(row, kind, backward_split.dq_kernel)
    else:
        yield backward(row, kind, backward_pass.backward_kernel)
        yield backward(row, kind, backward_pass.backward_kernel, deterministic=True)


def configuration(row: dict[str, Any], kernel: Any, constants: dict[str, Any], types: dict[str, str]) -> Configuration:
    signature = {p.name: "constexpr" if p.name in constants else types[p.name] for p in kernel.params}
    pointers = [(i,) for i, p in enumerate(kernel.params) if signature[p.name].startswith("*")]
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(
        kernel, signature, constexprs=constants, attrs={i: [["tt.divisibility", 16]] for i in pointers}
    )
    return Configuration(row, source, target_of(*ARCHITECTURES), {"num_warps": 4})


def type_of(template: host.Template) -> str:
    """The type of a descriptor as the host makes it, in Triton's words."""
    descriptor = template.of(template.checked.base)
    layout = f",{descriptor.layout!r}" if hasattr(descriptor, "layout") else ""
    return f"tensordesc<{NAMES[descriptor.base.dtype]}{descriptor.block_shape}{layout}>"


def rows(n_rows: int, head_dim: int, dtype: str, *, n_columns: int | None = None, gluon: bool = True) -> str:
    x = torch.empty(1, n_rows, 1, head_dim, dtype=DTYPES[dtype])
    tensor = x.shape, x.stride(), x.dtype
    return type_of(host.rows(*tensor, n_rows, n_columns) if gluon else host.plain_rows(*tensor, n_rows))


def forward(row: dict[str, Any], kind: Kind, seq_len: int, sinks: bool, window: int | None = None) -> Configuration:
    head_dim, dtype = row["head_dim"], row["dtype"]
    head_dim_v = row.get("head_dim_v", head_dim)
    constants = config.forward_config(kind, head_dim, head_dim_v, seq_len, window)
    types = dict.fromkeys(("n_work_tiles", "n_tiles", "log_interleaved", "S", "S_k", "window"), "i32")
    types |= {"tanh_scale": "fp32", "scale_log2": "fp32"}
    types |= {"lse_ptr": "*fp32", "sinks_ptr": "*fp32"}
    types |= dict.fromkeys(("starts_ptr", "sequence_ends_ptr", "taken_ptr"), "*i32")
    shapes = {"q_desc": (QUERIES, head_dim), "out_desc": (QUERIES, head_dim_v)}
    shapes |= {"k_desc": (constants.n, head_dim), "v_desc": (constants.n, head_dim_v)}
    types |= {name: rows(*shape, dtype, n_columns=constants.panel) for name, shape in shapes.items()}
    absent: dict[str, Any] = {} if kind.starts else {"starts_ptr": None}
    if not sinks:
        absent["sinks_ptr"] = None
    if not row["packed"]:
        absent["sequence_ends_ptr"] = None
    row = {"kernel": "forward"} | row | {"seq_len": seq_len, "window": window, "sinks": sinks}
    return configuration(row, forward_pass.forward_kernel, {"CONFIG": constants} | absent, types)


def backward(row: dict[str, Any], kind: Kind, kernel: Any, *, deterministic: bool = False) -> Configuration:
    head_dim, dtype = row["head_dim"], row["dtype"]
    head_dim_v = row.get("head_dim_v", head_dim)
    split = kernel is not backward_pass.backward_kernel
    constants: config.Backward | config.Split = config.backward_config(kind, head_dim, deterministic)
    if split:
        constants = config.split_config(kind, head_dim, head_dim_v)
    m, n = QUERIES, constants.n
    scalars = dict.fromkeys(("tanh_scale", "scale_log2", "scale"), "fp32")
    types = (
        dict.fromkeys(("count", "lag", "n_work_tiles", "n_tiles", "log_interleaved", "S", "S_k", "window"), "i32")
        | scalars
    )
    types |= dict.fromkeys(("starts_ptr", "sequence_ends_ptr", "query_ends_ptr", "sorted_ptr", "taken_ptr"), "*i32")
    types |= dict.fromkeys(("added_ptr", "cleared_ptr", "semaphore_ptr"), "*i32")
    panel = constants.panel if isinstance(constants, config.Split) else None
    types |= {name: rows(m, head_dim, dtype, n_columns=panel) for name in ("q_desc", "dq_desc")}
    types |= {name: rows(n, head_dim, dtype, n_columns=panel) for name in ("k_desc", "dk_desc")}
    types |= {name: rows(n, head_dim_v, dtype, n_columns=panel) for name in ("v_desc", "dv_desc")}
    types["dout_desc"] = rows(m, head_dim_v, dtype, n_columns=panel)
    types |= {"stat_ptr": "*fp32", "accum_ptr": "*fp32"}
    if isinstance(constants, config.Backward):
        for i, columns in enumerate(constants.dq_columns):
            types[f"accum{i}_desc"] = type_of(host.floats(m * columns, m * columns // 32, 32))
        types["chunk_desc"] = type_of(host.floats(1024, 32, 32))
        types["dq_desc"] = rows(m, head_dim, dtype, n_columns=16)
    absent = {} if kind.starts else {"starts_ptr" if kernel is backward_split.dq_kernel else "query_ends_ptr": None}
    if not row["packed"]:
        absent |= {"starts_ptr": None} if kernel is not backward_split.dq_kernel else {}
        absent["sequence_ends_ptr"] = None
    if kernel is backward_pass.backward_kernel:
        if not deterministic:
            absent["semaphore_ptr"] = None
        if deterministic or not kind.starts:
            absent["sorted_ptr"] = None
    types["stat_desc"] = type_of(host.floats(constants.row_stats, constants.row_stats))
    row = {"kernel": kernel.__name__.removesuffix("_kernel")} | row | {"deterministic": deterministic}
    return configuration(row, kernel, {"CONFIG": constants} | absent, types)


def preprocess(head_dim: int, dtype: str, packed: bool = False) -> Configuration:
    row = {"kernel": "preprocess", "head_dim": head_dim, "dtype": dtype, "packed": packed}
    m, width = QUERIES, config.padded(head_dim)
    constants: dict[str, Any] = {"H": 8, "M": m, "N": 128, "D": width, "SUMMED": width, "ROW_STATS": 4 * m}
    constants |= {} if packed else {"sequence_ends_ptr": None}
    types = dict.fromkeys(("lse_ptr", "dlse_ptr", "stat_ptr", "accum_ptr"), "*fp32")
    types |= dict.fromkeys(("starts_ptr", "sequence_ends_ptr", "query_ends_ptr"), "*i32")
    types |= dict.fromkeys(("added_ptr", "cleared_ptr", "semaphore_ptr"), "*i32")
    types |= dict.fromkeys(("out_desc", "dout_desc"), rows(m, head_dim, dtype, gluon=False))
    types |= dict.fromkeys(("S", "S_k", "n_tiles", "n_accumulators", "n_heads"), "i32")
    return configuration(row, preprocess_kernel, constants, types)


def sort() -> Configuration:
    types = {"query_ends_ptr": "*i32", "sorted_ptr": "*i32", "shift": "i32", "n_tiles": "i32"}
    return configuration(
        {"kernel": "sort"}, scheduler.sort_kernel, {"N": 128, "CHUNK": scheduler.SORT_CHUNK, "CAUSAL": True}, types
    )
