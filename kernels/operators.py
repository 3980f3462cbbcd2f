"""How PyTorch gets to know this package's operators, `torch.ops.flash_gpt.NAME`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

Function = Callable[..., Any]

_library = torch.library.Library("flash_gpt", "FRAGMENT")


def define(
    name: str,
    schema: str,
    function: Function,
    fake: Function,
    *,
    derivative: Function | None = None,
    vmap: Function | None = None,
    flops: Function | None = None,
) -> None:
    """Define an operator, unless it is there: of the package imported as kernels and as flash_gpt, the first one's
    serve.

    Args:
        schema: its arguments and results, as in "(Tensor x) -> Tensor".
        fake: makes results of the right shapes and dtypes, without data.
        derivative: called instead of `function` where a gradient is wanted; None: it has none.
        vmap, flops: as `torch.library.register_vmap` and `register_flop_formula` take them.
    """
    if hasattr(torch.ops.flash_gpt, name):
        return
    _library.define(name + schema, tags=[torch.Tag.pt2_compliant_tag])
    _library.impl(name, function, "CompositeExplicitAutograd")
    if derivative is not None:
        _library.impl(name, derivative, "Autograd")
    torch.library.register_fake(f"flash_gpt::{name}", fake, lib=_library)
    if vmap is not None:
        torch.library.register_vmap(f"flash_gpt::{name}", vmap, lib=_library)
    if flops is not None:
        register_flop_formula(getattr(torch.ops.flash_gpt, name))(flops)
