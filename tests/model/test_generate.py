"""Generation over a cache: the same tokens as without one, however prompts, windows and backends are."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from kernels.flash_attention.op import why_not_on
from kernels.reference import attention as definition
from model import gpt, linear
from model.attention import ATTENTIONS, build_attention
from model.attention.cache import MOST_QUERIES, CachedAttention
from model.config import ModelConfig, RotaryConfig
from model.generate import Generator, choose, generate, largest
from model.generate_config import SamplingConfig
from model.gpt import GPT

LLAMA = ModelConfig(name="llama", n_layers=2, n_heads=4, n_kv_heads=2, dim=64, ffn_dim=96, vocab_size=101)
GPT2 = ModelConfig(
    name="gpt2", n_layers=2, n_heads=4, dim=64, ffn_dim=96, vocab_size=101, position="learned", n_positions=64,
    norm="layernorm", mlp="gelu", bias=True, tie_head=True,
)  # fmt: skip
MODELS = {
    "grouped": LLAMA,
    "window": replace(LLAMA, window=9),
    "soft cap": replace(LLAMA, attention_softcap=2.0, window=20),
    "yarn": replace(LLAMA, qk_norm=True, rotary=RotaryConfig(scaling="yarn", factor=4, original_seq_len=16)),
    "gpt2": GPT2,
}
PROMPTS = [[1, 2, 3], list(range(5, 45)), [7]]
GREEDY = SamplingConfig(temperature=0)
interpreted = pytest.mark.skipif(why_not_on(torch.device("cpu")) is not None, reason="needs TRITON_INTERPRET=1")


def pair(build_lively, config: ModelConfig, backend: str) -> tuple[GPT, GPT]:
    """Two models of one set of weights: by the definition, and with a backend."""
    truth, model = build_lively(config), build_lively(config, backend)
    model.load_state_dict(truth.state_dict())
    return truth, model


@torch.no_grad()
def read_again(model: GPT, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """The most probable continuation, without a cache: the whole row is read for each token."""
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(int(model(torch.tensor([ids], device=model.embedding.weight.device))[0, -1].argmax()))
    return ids[len(prompt) :]


# No SDPA kernel caps scores.
PAIRS = {(backend, name) for name in MODELS for backend in ("math", "sdpa", "flex")} - {("sdpa", "soft cap")}


@pytest.mark.parametrize(("backend", "name"), sorted(PAIRS))
def test_tokens_with_a_cache_are_those_without(build_lively, backend, name):
    truth, model = pair(build_lively, MODELS[name], backend)
    expected = [read_again(truth, prompt, 12) for prompt in PROMPTS]
    for chunk in (8192, 7):
        assert generate(model, PROMPTS, 12, GREEDY, chunk=chunk) == expected


@interpreted
@pytest.mark.filterwarnings("ignore:divide by zero encountered in log2")
@pytest.mark.parametrize("name", ["soft cap", "gpt2"])
def test_tokens_with_our_kernels_and_a_cache_are_those_without(build_lively, name):
    truth, model = pair(build_lively, replace(MODELS[name], n_layers=1), "flash")
    expected = [read_again(truth, prompt, 5) for prompt in PROMPTS]
    assert generate(model, PROMPTS, 5, GREEDY, chunk=30) == expected


@pytest.mark.parametrize(("name", "products"), [("yarn", 4), ("gpt2", 4)])
def test_tokens_by_products_of_one_row_are_those_of_linear_layers(build_lively, monkeypatch, name, products):
    """As on a GPU, here by the operator's plain twin. A row of 40 tokens is read by linear layers."""
    truth, model = pair(build_lively, MODELS[name], "math")
    expected = [read_again(truth, PROMPTS[0], 6)]
    calls = []
    for module in (linear, gpt):
        monkeypatch.setattr(module, "is_one_row", lambda x: x.numel() == x.shape[-1])
    matvec = linear.matvec
    monkeypatch.setattr(linear, "matvec", lambda *args, **options: calls.append(options) or matvec(*args, **options))
    assert generate(model, PROMPTS[:1], 6, GREEDY) == expected
    assert len(calls) == 1 + 5 * (2 * products + 1)  # a head for the prompt, then steps of two layers and a head
    fused = sum(options["norm"] is not None for options in calls)
    assert fused == (5 * 4 if name == "yarn" else 0)


@pytest.mark.parametrize("window", [None, 130])
@pytest.mark.parametrize("backend", ["math", "sdpa", "flex", pytest.param("flash", marks=interpreted)])
@torch.no_grad()
def test_the_queries_are_the_last_positions_of_more_keys(build, backend, window):
    """Rows of several blocks and tiles, at lengths that are multiples of none."""
    attention = build(replace(LLAMA, window=window), backend).attention
    q, k, v = torch.randn(2, 170, 4, 16), *torch.randn(2, 2, 433, 2, 16)
    expected = definition(q, k, v, window=window)
    torch.testing.assert_close(attention(q, k, v, attention.prepare(None, 170, 433)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("backend", ["math", "sdpa", pytest.param("flash", marks=interpreted)])
@torch.no_grad()
def test_several_tokens_a_step_are_read_as_one_by_one(build_lively, backend, window):
    """As a draft that is checked, or a prompt's end."""
    truth, model = pair(build_lively, replace(LLAMA, n_layers=1, window=window), backend)
    tokens = torch.randint(101, (2, 40))
    expected = truth(tokens)
    cache = CachedAttention(model.attention, n_layers=1, batch_size=2, capacity=40)
    positions, mask = cache.chunk(0, 10, torch.tensor([10, 10]))
    model.hidden(tokens[:, :10], positions, cache, mask)
    cache.lengths_B.fill_(10)
    for begin, end in ((10, 26), (26, 27), (27, 40)):
        cache.advance(end - begin)
        positions, mask = cache.step(end - begin)
        logits = model.logits(model.hidden(tokens[:, begin:end], positions, cache, mask))
        torch.testing.assert_close(logits, expected[:, begin:end], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_cache_is_a_backend(build_lively):
    model = build_lively(LLAMA)
    tokens = torch.randint(101, (3, 20))
    cache = CachedAttention(model.attention, LLAMA.n_layers, batch_size=3, capacity=20)
    torch.testing.assert_close(model(tokens, attention=cache), model(tokens))


def test_a_cache_holds_grouped_heads_once_and_no_more_than_the_window(build):
    config = replace(LLAMA, window=100)
    one, other = (
        CachedAttention(build(c).attention, n_layers=2, batch_size=3, capacity=10_000) for c in (LLAMA, config)
    )
    assert one.num_bytes == 2 * 4 * (2 * 3 * 10_000 * 2 * 16)  # keys and values · bytes · (layers · B · C · G · D)
    assert other.slots == 99 + MOST_QUERIES


def test_a_model_that_sees_later_tokens_has_no_cache(build):
    attention = build(LLAMA).attention
    attention.spec = replace(attention.spec, causal=False)
    with pytest.raises(ValueError, match="causal"):
        CachedAttention(attention, 1, 1, 1)


def test_a_model_trained_on_packed_documents_reads_a_prompt_as_one(build_lively):
    for backend in ("math", "sdpa", "flex"):
        packed, plain = build_lively(LLAMA, backend, documents=True), build_lively(LLAMA)
        plain.load_state_dict(packed.state_dict())
        assert generate(packed, PROMPTS, 5) == generate(plain, PROMPTS, 5)


def test_another_backend_can_read_the_prompts(build_lively):
    model = build_lively(LLAMA)
    other = build_attention(ATTENTIONS["sdpa"](name="sdpa"), model.attention.spec)
    assert generate(model, PROMPTS, 6, GREEDY, attention=other) == generate(model, PROMPTS, 6, GREEDY)


@pytest.mark.parametrize("backend", ["math", "sdpa"])
def test_a_step_is_one_graph_that_serves_every_length(build_lively, backend):
    torch.compiler.reset()
    generator = Generator(build_lively(replace(LLAMA, window=9), backend), 2, 40, GREEDY)
    expected = list(generator.stream([[1, 2, 3], [4]], 20))
    counter = CompileCounter()
    generator.run_step = torch.compile(generator._step, backend=counter, fullgraph=True, dynamic=False)
    for _ in range(2):
        assert list(generator.stream([[1, 2, 3], [4]], 20)) == expected
    assert counter.frame_count == 1


# Rows


def test_a_generator_serves_one_batch_after_the_other(build_lively):
    model = build_lively(replace(LLAMA, window=9))
    generator = Generator(model, batch_size=3, capacity=60, sampling=SamplingConfig())
    first = list(generator.stream(PROMPTS, 10, seed=3))
    list(generator.stream([[9] * 50, [8], [4, 4]], 10, seed=4))
    assert list(generator.stream(PROMPTS, 10, seed=3)) == first
    fewer = list(generator.stream(PROMPTS[:1], 10, seed=3))
    assert [tokens[0] for tokens in fewer] == [tokens[0] for tokens in first]


def test_tokens_come_one_by_one(build_lively):
    model = build_lively(LLAMA)
    generator = Generator(model, 1, 20, GREEDY)
    steps = []
    run_step = generator.run_step
    generator.run_step = lambda: (steps.append(1), run_step())
    stream = generator.stream([[5]], 10)
    for count in range(3):
        next(stream)
        assert len(steps) == count


def test_a_row_ends_before_a_stop_token(build_lively):
    model = build_lively(LLAMA)
    whole = generate(model, PROMPTS, 10, GREEDY)
    stop = whole[1][4]
    assert generate(model, PROMPTS, 10, GREEDY, stop_ids=[stop]) == [
        row[: row.index(stop)] if stop in row else row for row in whole
    ]


@pytest.mark.parametrize(
    ("prompts", "num_tokens", "said"),
    [([[1], []], 3, "a prompt is empty"), ([[1] * 60], 5, "65 tokens are beyond the model's 64 learned positions")],
)
def test_what_cannot_be_continued_is_refused(build_lively, prompts, num_tokens, said):
    with pytest.raises(ValueError, match=said):
        generate(build_lively(GPT2), prompts, num_tokens)


def test_a_row_that_does_not_fit_is_refused(build_lively):
    generator = Generator(build_lively(LLAMA), 2, 20, GREEDY)
    for prompts in ([[1] * 16], [[1]] * 3):
        with pytest.raises(ValueError, match="do not fit into a cache for 2 rows of 20"):
            next(generator.stream(prompts, 5))


# Sampling


def draw(probabilities: list[float], config: SamplingConfig, count: int = 4000) -> set[int]:
    """Tokens that come often enough to be no accident."""
    logits = torch.tensor(probabilities).log().expand(count, -1)
    candidates = min(config.top_k or len(probabilities), len(probabilities))
    found = Counter(choose(logits, config, torch.empty(count, candidates).exponential_()).tolist())
    return set(found)


PROBABILITIES = [0.05, 0.4, 0.1, 0.25, 0.2]
EVERYTHING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {0, 1, 2, 3, 4}),
        ({"temperature": 0}, {1}),
        ({"top_k": 1}, {1}),
        ({"top_k": 3}, {1, 3, 4}),
        ({"top_p": 0.3}, {1}),
        ({"top_p": 0.64}, {1, 3}),
        ({"top_p": 0.66}, {1, 3, 4}),
        ({"top_p": 1e-9}, {1}),
        ({"min_p": 1.0}, {1}),
        ({"min_p": 0.6}, {1, 3}),
        ({"min_p": 0.2}, {1, 2, 3, 4}),
        ({"top_k": 3, "top_p": 0.45}, {1}),  # 0.4 of 0.85 is 0.47
        ({"temperature": 3.0, "top_p": 0.3}, {1, 3}),  # the flatter distribution is what top_p is of
    ],
)
def test_only_the_candidates_that_the_filters_leave_are_drawn(options, expected):
    assert draw(PROBABILITIES, SamplingConfig(**{**EVERYTHING, **options})) == expected


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.9999}])
def test_tokens_are_drawn_as_often_as_they_are_probable(options):
    logits = torch.tensor(PROBABILITIES).log().expand(20_000, -1)
    tokens = choose(logits, SamplingConfig(**{**EVERYTHING, **options}), torch.empty(20_000, 5).exponential_())
    shares = tokens.bincount(minlength=5) / 20_000
    for share, probability in zip(shares.tolist(), PROBABILITIES, strict=True):
        assert abs(share - probability) < 5 * math.sqrt(probability * (1 - probability) / 20_000)


@pytest.mark.parametrize("V", [300, 307])
def test_the_largest_of_parts_are_the_largest_of_all(V):
    logits = torch.randn(3, V)
    for found, expected in zip(largest(logits, 7, parts=8), logits.topk(7), strict=True):
        assert torch.equal(found, expected)


def test_equal_logits_are_no_more_candidates_than_top_k():
    """As logits in bf16 often are."""
    tokens = choose(torch.zeros(1000, 50), SamplingConfig(1.0, top_k=3), torch.empty(1000, 3).exponential_())
    assert len(tokens.unique()) <= 3


def test_temperature_makes_samples_more_or_less_alike(build_lively):
    model = build_lively(LLAMA)

    def kinds(temperature: float) -> int:
        return len({row[0] for row in generate(model, [[5, 6, 7]] * 40, 1, SamplingConfig(temperature))})

    assert kinds(0.05) < 5 < 15 < kinds(100.0)


def test_a_sample_is_its_seeds(build_lively):
    model = build_lively(LLAMA)
    samples = [generate(model, PROMPTS, 12, seed=seed) for seed in (0, 0, 1)]
    assert samples[0] == samples[1]
    assert samples[0] != samples[2]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    generate(model, PROMPTS, 3)
    assert torch.equal(torch.get_rng_state(), before), "nobody else's random numbers are drawn"


@pytest.mark.parametrize(
    "options",
    [{"temperature": -1}, {"temperature": math.inf}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}, {"min_p": 2}],
)
def test_numbers_that_cannot_be_are_refused(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}="):
        SamplingConfig(**options)


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["math", "sdpa", "flash"])
@pytest.mark.parametrize("name", ["grouped", "window", "gpt2"])
@torch.no_grad()
def test_a_cuda_graph_gives_the_tokens_of_separate_kernels(build_lively, backend, name):
    truth = build_lively(MODELS[name])
    spec = replace(truth.attention.spec, capability=torch.cuda.get_device_capability())
    truth = truth.cuda()
    truth.attention = build_attention(ATTENTIONS["math"](name="math"), spec)
    attention = build_attention(ATTENTIONS[backend](name=backend), spec)
    expected = [read_again(truth, prompt, 20) for prompt in PROMPTS]
    for cuda_graph in (False, True):
        options = {"attention": attention, "chunk": 16, "cuda_graph": cuda_graph}
        assert generate(truth, PROMPTS, 20, GREEDY, **options) == expected
    if name == "window":
        generator = Generator(truth, 3, 60, GREEDY, attention=attention, compile=True, cuda_graph=True)
        assert list(map(list, zip(*generator.stream(PROMPTS, 20), strict=True))) == expected
    sampled = [generate(truth, PROMPTS, 20, seed=5, attention=attention, cuda_graph=graph) for graph in (False, True)]
    assert sampled[0] == sampled[1]
