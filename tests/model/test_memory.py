"""What layers keep is what a compiler's partition, or autograd, really holds; the rest is counted by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

from model.activations_config import FullConfig, MemoryConfig, OffloadConfig, SelectiveConfig
from model.config import ModelConfig
from model.gpt import GPT
from model.memory import IN_FLIGHT, Workload, kept_bytes, layer_bytes, moments, predict, state_bytes

Build = Callable[..., GPT]
B, S = 2, 48
# Widths in the proportions of real models, which decide what a partition keeps.
LLAMA = ModelConfig("llama", 2, 4, 64, 256, 101, n_kv_heads=1, loss_chunk_size=0)
GPT2 = replace(LLAMA, n_kv_heads=4, position="learned", n_positions=S, norm="layernorm", mlp="gelu", bias=True)
MODELS = pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])


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
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors if isinstance(x, torch.Tensor)}
    return sum(storages.values())


@MODELS
def test_without_a_policy_a_layer_keeps_what_the_partition_of_a_compiled_model_does(
    build: Build, config: ModelConfig
) -> None:
    deep, shallow = (
        kept_by_a_compiled(build(replace(config, n_layers=n), "sdpa", seq_len=S).train()) for n in (3, 2)
    )
    work = Workload(config, MemoryConfig(), B, S)
    E, F, W = config.dim, config.ffn_dim, (config.n_heads + 2 * config.n_kv_heads) * config.head_dim
    matrices = E * W + E * E + E * F * (3 if config.mlp == "swiglu" else 2)
    assert deep - shallow == (kept_bytes(work, 0) + 2 * matrices)  # and the weights in bf16
