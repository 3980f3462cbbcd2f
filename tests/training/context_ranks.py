"""One of the ranks that `test_context.py` starts: what they compute on shards of rows equals what one computes on whole
rows.

    PYTHONPATH=. RANK=… WORLD_SIZE=4 … python tests/training/context_ranks.py PART…

Parts are functions below. What is wrong on a rank is an AssertionError there.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
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
from model.attention.context.all_gather import runs_of
from model.config import ModelConfig
from model.gpt import GPT
from model.layer_memory import Workload, exchange_bytes
from tests.model.held import Held
from training.parallel.context import SharedRows

LLAMA = ModelConfig(name="llama", n_layers=2, n_heads=4, n_kv_heads=2, dim=32, ffn_dim=48, vocab_size=67)
MODELS = {
    "llama": LLAMA,
    "three heads": replace(
        LLAMA, n_heads=3, n_kv_heads=3, head_dim=8, position="learned", n_positions=64, norm="layernorm", mlp="gelu"
    ),
    "window": replace(LLAMA, n_kv_heads=4, window=9, attention_softcap=4.0, qk_norm=True),
}
NAMES = ("out", "dq", "dk", "dv")
Groups = dict[int, dist.ProcessGroup]
"""Of this rank, by their size."""


@dataclass(frozen=True)
class Case:
    inner: str
    method: str
    B: int
    S: int
    H: int
    G: int
    documents: float | None
    """Probability that a token begins one."""
    window: int | None
    softcap: float
    dtype: str
    D: int = 16


def random_cases(seed: int, inner: str, count: int, dtype: str, longest: int = 128) -> Iterator[Case]:
    choose = random.Random(seed)
    for _ in range(count):
        G = choose.choice([1, 2, 3, 4])
        yield Case(
            inner,
            choose.choice(["auto", "all-gather"]),
            B=choose.choice([1, 1, 3]),
            S=min(longest, choose.choice([4, 29, 64, 90, 128])),
            H=G * choose.choice([1, 2, 4]),
            G=G,
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
    spec: AttentionSpec, group: dist.ProcessGroup, inner: str, asked: str, head_groups: int = 1
) -> ContextAttention:
    size = dist.get_world_size(group)
    method = context_method(asked, spec.n_heads, size, head_groups)
    backend = build_attention(ATTENTIONS[inner](name=inner), context_spec(spec, method, size))
    return ContextAttention(backend, spec, method, group)


# ---- attention


def check_attention(case: Case, group: dist.ProcessGroup) -> None:
    """out and gradients: equal to float64, or by the 2x rule in lower precision."""
    dtype = getattr(torch, case.dtype)
    shapes = [(case.B, case.S, heads, case.D) for heads in (case.H, case.G, case.G, case.H)]
    q, k, v, dout = (torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes)
    starts = random_starts(case.B, case.S, case.documents)
    options: dict[str, Any] = {"window": case.window, "softcap": case.softcap}
    most = None if starts is None else case.S
    spec = AttentionSpec(case.H, case.G, case.D, case.S, case.dtype, max_documents=most, **options)

    def on_whole_rows(wide: torch.dtype) -> dict[str, Tensor]:
        leaves = [x.to(wide).requires_grad_() for x in (q, k, v)]
        out = reference(*leaves, starts=starts, **options)
        assert isinstance(out, Tensor)
        return dict(zip(NAMES, (out, *torch.autograd.grad(out, leaves, dout.to(wide))), strict=True))

    attention = context_attention(spec, group, case.inner, case.method)
    rows = SharedRows(attention)
    tokens = torch.arange(case.S).expand(case.B, -1)
    shard = rows.shard(batch_of(tokens, tokens, starts))
    assert shard.split is not None
    own = torch.cat([torch.arange(run.begin, run.end) for rank, run in runs_of(shard.split) if rank == rows.rank])

    def cut(x: Tensor) -> Tensor:
        return torch.cat([x, x], 1)[:, own]  # tokens that fill up the row are numbers like all others

    leaves = [cut(x).requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, attention.prepare_shard(shard.starts_BS, shard.split))
    grads = torch.autograd.grad(out, leaves, cut(dout) * (own < case.S)[:, None, None])
    whole = [rows.whole(x.flatten(2), shard, case.S).unflatten(2, (-1, case.D)) for x in (out.detach(), *grads)]
    got, exact = dict(zip(NAMES, whole, strict=True)), on_whole_rows(torch.float64)
    if case.dtype == "float64":
        torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-10)
    else:
        assert_within_twice(got, on_whole_rows(dtype), exact)


def check_cases(groups: Groups, cases: list[Case]) -> None:
    for seed, (case, (size, group)) in enumerate(product(cases, groups.items())):
        torch.manual_seed(seed)
        try:
            check_attention(case, group)
        except AssertionError as error:
            raise AssertionError(f"{case} over {size} ranks: {error}") from error


def attention(groups: Groups, count: int = 14) -> None:
    check_cases(groups, [case for inner in ("math", "sdpa") for case in random_cases(0, inner, count, "float64")])
    check_cases(groups, list(random_cases(1, "math", 6 * count // 14, "bfloat16")))


def some_attention(groups: Groups) -> None:
    attention(groups, count=5)


def memory(groups: Groups) -> None:
    """What a backward pass holds at most beside its arguments, on the rank that holds most: what the plan says is
    exchanged, and this rank's own gradients once or twice."""
    B, n, D, group = 2, 32, 16, groups[4]
    for asked, (H, G), window in product(("ulysses", "all-gather"), ((4, 4), (8, 2), (4, 1)), (None, 24)):
        spec = AttentionSpec(H, G, D, 4 * n, "float32", window=window)
        attention = context_attention(spec, group, "math", asked)
        inner, exchange = attention.inner, attention.exchange
        inner.keeps_lse = True  # type: ignore[misc]
        inner.prepare = lambda *_: None  # type: ignore[method-assign]
        inner.backward = lambda dout, q, k, v, out, lse, mask: tuple(map(torch.zeros_like, (q, k, v)))  # type: ignore
        tokens = torch.arange(4 * n).expand(B, -1)
        shard = SharedRows(attention).shard(batch_of(tokens, tokens, None))
        q, k, v, dout, out = (torch.randn(B, n, heads, D) for heads in (H, G, G, H, H))
        lse = torch.zeros(exchange.lse_shape(q.shape))
        peaks = []
        for _ in range(5):  # gloo's thread may let go of a tensor a moment late
            with Held() as held:
                exchange.backward(inner, dout, q, k, v, out, lse, None, shard.split)
            peaks.append(held.peak)
        own = B * n * (H + 2 * G) * D * 4
        peak = torch.tensor(min(peaks))
        dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)
        model = replace(LLAMA, n_heads=H, n_kv_heads=G, head_dim=D, window=window)
        work = Workload(
            model=model,
            memory=MemoryConfig(),
            batch_size=B,
            seq_len=n,
            product_bytes=4,
            ranks=4,
            context=4,
            context_method=asked,
        )
        planned = exchange_bytes(work)
        least = 0.6 * planned if window else planned
        assert least <= peak <= planned + 2 * own, f"{asked}, {H}:{G} heads, {window}: {peak / planned:.2f}"


def flex_and_flash(groups: Groups) -> None:
    check_cases(groups, list(random_cases(0, "flex", 6, "float64")))
    for dtype in ("float32", "bfloat16"):
        check_cases(groups, list(random_cases(2, "flash", 4, dtype, longest=64)))


# ---- models


def lively(config: ModelConfig, attention: Any) -> GPT:
    torch.manual_seed(1)
    model = GPT(config, attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=parameter.shape[1] ** -0.5) if parameter.dim() == 2 else parameter.normal_(1, 0.2)
    return model


class Pair:
    """A model on whole rows, and the same on shards."""

    B, S = 2, 46

    def __init__(self, config: ModelConfig, group: dist.ProcessGroup, asked: str, policy: MemoryConfig) -> None:
        spec = AttentionSpec.of(config, seq_len=self.S, dtype="float32", max_documents=self.S)
        self.whole = lively(config, build_attention(ATTENTIONS["math"](name="math"), spec))
        attention = context_attention(spec, group, "math", asked, getattr(policy, "head_groups", 1))
        self.attended = 0
        forward = attention.exchange.forward

        def counted(*args: Any) -> tuple[Tensor, Tensor]:
            self.attended += 1
            return forward(*args)

        attention.exchange.forward = counted  # type: ignore[method-assign]
        self.model, self.group, self.rows = lively(config, attention), group, SharedRows(attention)
        activations.apply(self.model, policy)

    def compare(self, seed: int) -> None:
        """Loss, loss of each token, gradients."""
        torch.manual_seed(seed)
        starts = random_starts(self.B, self.S, 0.07)
        tokens, targets = torch.randint(67, (self.B, self.S)), torch.randint(67, (self.B, self.S))
        targets[:, 3] = IGNORE_INDEX
        batch = batch_of(tokens, targets, starts)
        shard = self.rows.shard(batch)
        whole_inputs, inputs = (
            (part.tokens_BS, part.targets_BS, part.starts_BS, part.positions_BS) for part in (batch, shard)
        )
        for model in (self.whole, self.model):
            model.zero_grad()
        expected, loss = self.whole(*whole_inputs), self.model(*inputs, split=shard.split)
        expected.backward()
        loss.backward()
        total = loss.detach().clone()
        dist.all_reduce(total, group=self.group)
        torch.testing.assert_close(total, expected.detach())
        for (name, parameter), whole in zip(self.model.named_parameters(), self.whole.parameters(), strict=True):
            grad, truth = parameter.grad, whole.grad
            assert grad is not None, name
            dist.all_reduce(grad, group=self.group)
            torch.testing.assert_close(grad, truth, rtol=2e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")
        with torch.no_grad():
            each = self.rows.whole(self.model(*inputs, split=shard.split, per_token=True), shard, self.S)
            truth = self.whole(*whole_inputs, per_token=True)
        torch.testing.assert_close(each, truth, rtol=1e-5, atol=1e-5)


def a_model(groups: Groups) -> None:
    models(groups, ("llama",))


def models(groups: Groups, names: Iterable[str] = tuple(MODELS)) -> None:
    """By what their blocks keep; attention is computed once where its result is kept."""
    policies = (
        (MemoryConfig(), 1),
        (SelectiveConfig(), 1),
        (FullConfig(tile=20), 1),
        (FullConfig(keep_attention=0, head_groups=2), 4),  # of two groups, forward and again
    )
    for config, asked in product([MODELS[name] for name in names], ("auto", "all-gather")):
        for policy, times in policies:
            if config.n_kv_heads % getattr(policy, "head_groups", 1):
                continue
            pair = Pair(config, groups[4], asked, policy)
            pair.compare(seed=2)
            evaluated = config.n_layers * getattr(policy, "head_groups", 1)
            assert pair.attended == times * config.n_layers + evaluated, (pair.attended, policy)


def compiled(groups: Groups) -> None:
    """Other documents compile nothing anew."""
    for asked, policy in (
        ("all-gather", MemoryConfig()),
        ("ulysses", SelectiveConfig()),
        ("all-gather", FullConfig(tile=20)),
    ):
        torch.compiler.reset()
        pair = Pair(LLAMA, groups[4], asked, policy)
        pair.model.compile("block" if isinstance(policy, FullConfig) else "model", backend="aot_eager")
        pair.compare(seed=2)
        with torch._dynamo.config.patch(error_on_recompile=True):
            pair.compare(seed=3)


def main(*words: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    assert dist.group.WORLD is not None
    groups: Groups = {2: pairs[dist.get_rank() // 2], 4: dist.group.WORLD}
    parts = (some_attention, attention, flex_and_flash, a_model, models, compiled, memory)
    for part in parts:
        if part.__name__ in words:
            part(groups)  # type: ignore[operator]
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
