"""What layers keep is what a compiler's partition, or autograd, really holds; the rest is counted by hand."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import activations, float8
from model.activations_config import FullConfig, MemoryConfig, SelectiveConfig
from model.config import ModelConfig
from model.float8 import Factor
from model.gpt import GPT
from model.layer_memory import Workload, kept_bytes, matrix_sizes
from model.linear import keep_working_copies, refresh
from model.memory import moments
from model.precision_config import Float8Config

Build = Callable[..., GPT]
B, S = 2, 48
# Widths in the proportions of real models, which decide what a partition keeps.
LLAMA = ModelConfig("llama", 2, 4, 64, 256, 101, n_kv_heads=1, loss_chunk_size=0)
GPT2 = replace(LLAMA, n_kv_heads=4, position="learned", n_positions=S, norm="layernorm", mlp="gelu", bias=True)


def kept_by_a_compiled(model: GPT) -> int:
    """Bytes that a compiled training graph gives its backward pass, without what it was given."""
    graphs = []

    def compiler(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    backend = aot_autograd(
        fw_compiler=compiler,
        bw_compiler=compiler,
        decompositions=select_decomp_table(),
        partition_fn=min_cut_rematerialization_partition,
    )
    model.compile("model", backend=backend, fullgraph=True)
    tokens = torch.randint(101, (B, S))
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens, tokens)
    (results,) = next(node for node in graphs[0].graph.nodes if node.op == "output").args
    tensors = [node.meta["val"] for node in results[1:] if node.op != "placeholder"]
    storages = {
        x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors if isinstance(x, torch.Tensor)
    }
    return sum(storages.values())


SLOW = pytest.mark.slow


@pytest.mark.parametrize("residual", [torch.bfloat16, pytest.param(None, marks=SLOW)], ids=["bf16-residual", "bf16"])
@pytest.mark.parametrize("policy", [MemoryConfig(), pytest.param(SelectiveConfig(), marks=SLOW)], ids=lambda p: p.name)
@pytest.mark.parametrize("config", [LLAMA, pytest.param(GPT2, marks=SLOW)], ids=lambda config: config.norm)
def test_a_layer_keeps_what_the_partition_of_a_compiled_model_does(
    build: Build, config: ModelConfig, policy: MemoryConfig, residual: torch.dtype | None
) -> None:
    kept = []
    for n_layers in (3, 2):
        model = build(replace(config, n_layers=n_layers), "sdpa", seq_len=S).train()
        model.residual_dtype = residual
        activations.apply(model, policy)
        kept.append(kept_by_a_compiled(model))
    work = Workload(config, policy, B, S, residual_bytes=(residual or torch.float32).itemsize)
    weights = 0 if isinstance(policy, SelectiveConfig) else 2 * sum(matrix_sizes(config))  # cast to bf16
    assert kept[0] - kept[1] == kept_bytes(work, 0) + weights


@pytest.mark.slow
@pytest.mark.parametrize("policy", [MemoryConfig(), SelectiveConfig()], ids=lambda p: p.name)
def test_a_layer_in_fp8_keeps_what_the_partition_of_a_compiled_model_does(
    build: Build, policy: MemoryConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_a_gpu(a: Factor, b: Factor, dtype: torch.dtype, *, fast: bool = False, bias: Any = None) -> Tensor:
        transposed = b.values_RK.t()
        return torch._scaled_mm(a.values_RK, transposed, a.scale, b.scale.t(), bias, None, dtype, fast)

    monkeypatch.setattr(float8, "product", on_a_gpu)
    kept = []
    for n_layers in (3, 2):
        model = build(replace(LLAMA, n_layers=n_layers), "sdpa", seq_len=S).train()
        float8.convert(model, Float8Config(), compile=False)
        activations.apply(model, policy)
        refresh(model)
        kept.append(kept_by_a_compiled(model))
    work = Workload(LLAMA, policy, B, S, in_fp8=True, input_bytes=1)
    scales = 0 if isinstance(policy, SelectiveConfig) else 4 * 4
    assert kept[0] - kept[1] == kept_bytes(work, 0) + scales


class Peak(TorchDispatchMode):
    """The most bytes at any time of what is computed since it began."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.peak, self._seen = 0, 0, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(result):
            storage = x.untyped_storage() if isinstance(x, Tensor) else None
            if storage is not None and storage._cdata not in given | self._seen:
                self.bytes += storage.nbytes()
                self._seen.add(storage._cdata)
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.bytes)
        return result

    def _freed(self, storage: int, nbytes: int) -> None:
        self.bytes -= nbytes
        self._seen.discard(storage)


@pytest.mark.parametrize(
    ("policy", "residual"),
    [
        (SelectiveConfig(), torch.float32),
        pytest.param(FullConfig(tile=64), torch.bfloat16, marks=SLOW),
        pytest.param(FullConfig(tile=64, keep_attention=0.0), torch.bfloat16, marks=SLOW),
        (FullConfig(tile=64, keep_attention=0.5, head_groups=2), torch.float32),
    ],
    ids=["selective", "full", "attention again", "half of attention again, in groups"],
)
def test_the_peak_of_an_uncompiled_models_layers_is_as_predicted(
    build: Build, policy: SelectiveConfig, residual: torch.dtype
) -> None:
    tokens, config = 2048, replace(GPT2, n_layers=4, dim=128, ffn_dim=512, n_positions=2048, head_dim=16, n_heads=8)
    config = replace(config, n_kv_heads=8)
    model = build(config, "sdpa", seq_len=tokens).train()
    model.residual_dtype = residual
    keep_working_copies(model, torch.bfloat16)
    activations.apply(model, policy)
    refresh(model)
    gradient = torch.zeros(1, tokens, 128, dtype=residual)
    ids, places = torch.randint(101, (1, tokens)), torch.arange(tokens)[None]
    with Peak() as counter:
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.hidden(ids, places, model.attention, model.attention.prepare(None, tokens))
        hidden.backward(gradient)
    work = Workload(
        config, policy, 1, tokens, residual_bytes=residual.itemsize, compiled=False, sums_queries=False
    )  # fmt: skip
    backward = [plan for plan in moments(work) if "the backward pass" in plan.moment]
    head = 4 * config.vocab_size * config.dim
    predicted = max(plan.kept + plan.layer + plan.gradients - head for plan in backward)
    # `hidden` is held here, and its gradient was made before: one for the other.
    assert counter.peak == pytest.approx(predicted, rel=0.05)
