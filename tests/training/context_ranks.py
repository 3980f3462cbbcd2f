"""One of the ranks that `test_context_parallel.py` starts: attention and whole models on shards of rows equal those on
whole rows. All comparisons of one launch; an AssertionError on any rank ends it."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data.loader import IGNORE_INDEX, Batch
from kernels.flash_attention.testing import assert_within_twice
from kernels.reference import attention as reference
from model import activations
from model.activations_config import FullConfig, MemoryConfig, SelectiveConfig
from model.attention import ATTENTIONS, AttentionSpec, build_attention
from model.attention.config import context_method, context_spec
from model.attention.context import ContextAttention
from model.config import ModelConfig
from model.gpt import GPT
from training.parallel.context import SharedRows

LLAMA = ModelConfig(name="llama", n_layers=2, n_heads=4, n_kv_heads=2, dim=32, ffn_dim=48, vocab_size=67)
GPT2 = replace(LLAMA, n_heads=3, n_kv_heads=3, head_dim=8, position="learned", n_positions=64, norm="layernorm",
               mlp="gelu", bias=True)  # fmt: skip
MODELS = {"llama": LLAMA, "gpt2": GPT2, "window": replace(LLAMA, window=9, attention_softcap=4.0, qk_norm=True)}


@dataclass(frozen=True)
class Case:
    inner: str
    asked: str
    B: int
    S: int
    H: int
    G: int
    D: int
    documents: float | None = None
    """Probability that a token begins one."""
    window: int | None = None
    softcap: float = 0.0
    dtype: str = "float64"


def random_cases(seed: int, inner: str, count: int, dtype: str) -> Iterator[Case]:
    choose = random.Random(seed)
    for _ in range(count):
        G = choose.choice([1, 2, 3, 4])
        yield Case(
            inner,
            choose.choice(["auto", "all-gather"]),
            B=choose.choice([1, 1, 3]),
            S=choose.choice([4, 29, 64, 90, 128]),
            H=G * choose.choice([1, 2, 4]),
            G=G,
            D=16,
            documents=choose.choice([None, 0.02, 0.1, 0.7]),
            window=choose.choice([None, None, 1, 20, 300]),
            softcap=0.0 if inner == "sdpa" else choose.choice([0.0, 0.0, 2.0]),
            dtype=dtype,
        )


def random_starts(B: int, S: int, probability: float | None) -> Tensor | None:
    if probability is None:
        return None
    begins = torch.rand(B, S) < probability
    return torch.where(begins, torch.arange(S), 0).cummax(1).values.int()


def batch_of(tokens: Tensor, targets: Tensor, starts: Tensor | None) -> Batch:
    positions = torch.arange(tokens.shape[1])[None] - (0 if starts is None else starts)
    return Batch(tokens, targets, starts, positions, visible_pairs=0, num_tokens=0, num_targets=0)


def context_attention(
    spec: AttentionSpec, group: dist.ProcessGroup, inner: str, asked: str = "auto", head_groups: int = 1
) -> ContextAttention:
    size = dist.get_world_size(group)
    method = context_method(asked, spec.n_heads, size, head_groups)
    backend = build_attention(ATTENTIONS[inner](name=inner), context_spec(spec, method, size))
    return ContextAttention(backend, spec, method, group)


def cut(x: Tensor, own: Tensor) -> Tensor:
    """Of (B, S, H, D) a rank's tokens, by their places in the row; places beyond it are 0."""
    length = max(int(own.max()) + 1, x.shape[1])
    return torch.nn.functional.pad(x, (0, 0, 0, 0, 0, length - x.shape[1]))[:, own]


def attention_results(case: Case, group: dist.ProcessGroup) -> tuple[dict[str, Tensor], ...]:
    """out and gradients on whole rows in float64, the same in the case's dtype, and this rank's by places `own`."""
    dtype = getattr(torch, case.dtype)
    shapes = [(case.B, case.S, heads, case.D) for heads in (case.H, case.G, case.G, case.H)]
    q, k, v, dout = (torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes)
    starts = random_starts(case.B, case.S, case.documents)
    spec = AttentionSpec(
        case.H, case.G, case.D, case.S, case.dtype, window=case.window, softcap=case.softcap,
        max_documents=None if starts is None else case.S,
    )  # fmt: skip
    attention = context_attention(spec, group, case.inner, case.asked)
    rows = SharedRows(attention)
    tokens = torch.arange(case.S).expand(case.B, -1)
    shard = rows.shard(batch_of(tokens, tokens, starts))
    assert shard.split is not None

    def computed(wide: torch.dtype) -> dict[str, Tensor]:
        leaves = [x.to(wide).requires_grad_() for x in (q, k, v)]
        out = reference(*leaves, starts=starts, window=case.window, softcap=case.softcap)
        assert isinstance(out, Tensor)
        return dict(
            zip(("out", "dq", "dk", "dv"), (out, *torch.autograd.grad(out, leaves, dout.to(wide))), strict=True)
        )

    own = torch.cat(
        [
            torch.arange(b, e)
            for rank, b, e, _ in sorted(shard.split.tolist(), key=lambda row: row[1])
            if rank == rows.rank
        ]
    )
    leaves = [cut(x, own).requires_grad_() for x in (q, k, v)]
    mask = attention.prepare_shard(shard.starts_BS, shard.split)
    out = attention(*leaves, mask)
    grads = torch.autograd.grad(out, leaves, cut(dout, own))
    got = [rows.whole(x.flatten(2), shard, case.S).unflatten(2, (-1, case.D)) for x in (out.detach(), *grads)]
    return computed(torch.float64), computed(dtype), dict(zip(("out", "dq", "dk", "dv"), got, strict=True))


def check_attention(groups: dict[int, dist.ProcessGroup], cases: list[Case]) -> None:
    for seed, (case, (size, group)) in enumerate(product(cases, groups.items())):
        torch.manual_seed(seed)
        exact, standard, got = attention_results(case, group)
        for name, truth in exact.items():
            if case.dtype == "float64":
                torch.testing.assert_close(
                    got[name], truth, rtol=1e-9, atol=1e-10, msg=lambda m: f"{name} {case} {size}: {m}"
                )
        if case.dtype != "float64":
            assert_within_twice(got, standard, exact)


def lively(config: ModelConfig, attention: Any) -> GPT:
    torch.manual_seed(1)
    model = GPT(config, attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=parameter.shape[1] ** -0.5) if parameter.dim() == 2 else parameter.normal_(1, 0.2)
    return model


def check_models(groups: dict[int, dist.ProcessGroup]) -> None:
    """Loss, loss of each token and gradients of whole models, by what their blocks keep."""
    policies = (MemoryConfig(), SelectiveConfig(), FullConfig(tile=20), FullConfig(keep_attention=0, head_groups=2))
    for (name, config), (size, group), asked in product(MODELS.items(), groups.items(), ("auto", "all-gather")):
        for policy in policies:
            if isinstance(policy, FullConfig) and config.n_kv_heads % policy.head_groups:
                continue
            check_model(config, group, asked, policy)


def check_model(
    config: ModelConfig, group: dist.ProcessGroup, asked: str, policy: MemoryConfig, is_compiled: bool = False
) -> None:
    B, S = 2, 46
    torch.manual_seed(2)
    starts = random_starts(B, S, 0.07)
    tokens, targets = torch.randint(67, (B, S)), torch.randint(67, (B, S))
    targets[:, 3] = IGNORE_INDEX
    batch = batch_of(tokens, targets, starts)
    spec = AttentionSpec.of(config, seq_len=S, dtype="float32", max_documents=S)
    whole = lively(config, build_attention(ATTENTIONS["math"](name="math"), spec))
    head_groups = getattr(policy, "head_groups", 1)
    attention = context_attention(spec, group, "math", asked, head_groups)
    model = lively(config, attention)
    activations.apply(model, policy)
    if is_compiled:
        torch.compiler.reset()
        model.compile("block" if isinstance(policy, FullConfig) else "model", backend="aot_eager")

    loss = whole(batch.tokens_BS, batch.targets_BS, batch.starts_BS, batch.positions_BS)
    loss.backward()
    rows = SharedRows(attention)
    shard = rows.shard(batch)
    inputs = (shard.tokens_BS, shard.targets_BS, shard.starts_BS, shard.positions_BS)
    local = model(*inputs, split=shard.split)
    local.backward()
    total = local.detach().clone()
    dist.all_reduce(total, group=group)
    torch.testing.assert_close(total, loss.detach())
    for (name, parameter), expected in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert parameter.grad is not None and expected.grad is not None, name
        dist.all_reduce(parameter.grad, group=group)
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=2e-4, atol=2e-5, msg=lambda m: f"{name}: {m}")
    with torch.no_grad():
        expected = whole(batch.tokens_BS, batch.targets_BS, batch.starts_BS, batch.positions_BS, per_token=True)
        losses = rows.whole(model(*inputs, split=shard.split, per_token=True), shard, S)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)


def main() -> None:
    torch.set_num_threads(1)
    import faulthandler

    faulthandler.dump_traceback_later(400, exit=True)
    dist.init_process_group("gloo")
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    groups = {2: pairs[dist.get_rank() // 2], 4: dist.group.WORLD}
    assert groups[4] is not None
    part = sys.argv[1]
    if part == "attention":
        import time

        for inner in ("math", "sdpa", "flex"):
            t = time.time()
            check_attention(groups, list(random_cases(0, inner, int(sys.argv[2]), "float64")))
            print(inner, time.time() - t, flush=True)
        check_attention(groups, list(random_cases(1, "math", 20, "bfloat16")))
    if part == "flash":
        small = [replace(case, S=min(case.S, 64)) for case in random_cases(2, "flash", 6, "float32")]
        check_attention(groups, [*small, *(replace(case, dtype="bfloat16") for case in small[:3])])
    if part == "models":
        check_models(groups)
    if part == "compiled":
        import time

        for args in (
            ("all-gather", MemoryConfig()),
            ("ulysses", SelectiveConfig()),
            ("all-gather", FullConfig(tile=20)),
        ):
            t = time.time()
            check_model(LLAMA, groups[4], *args, is_compiled=True)
            print(args, time.time() - t, flush=True)
    dist.destroy_process_group()
    print("equal")


if __name__ == "__main__":
    main()
