"""The model's promises: what a token sees, what the loss is, how weights begin, compilation, sampling."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from model.config import ModelConfig, RotaryConfig
from model.generate import generate

S = 48
LLAMA = ModelConfig(name="llama", n_layers=2, n_heads=4, n_kv_heads=2, dim=64, ffn_dim=96, vocab_size=101)
GPT2 = ModelConfig(
    name="gpt2",
    n_layers=2,
    n_heads=4,
    dim=64,
    ffn_dim=128,
    vocab_size=101,
    position="learned",
    n_positions=S,
    norm="layernorm",
    mlp="gelu",
    bias=True,
    tie_head=True,
)
YARN = replace(LLAMA, qk_norm=True, rotary=RotaryConfig(scaling="yarn", factor=4.0, original_seq_len=16))
FAMILIES = pytest.mark.parametrize("config", [LLAMA, GPT2, YARN], ids=["rotary", "learned", "yarn-qk-norm"])
BACKENDS = pytest.mark.parametrize("backend", ["math", "sdpa"])


def random_tokens(batch: int = 2, length: int = S) -> Tensor:
    return torch.randint(101, (batch, length))


def starts_of(*rows: list[int]) -> Tensor:
    """(B, S) int32 from the lengths of each row's documents."""
    starts = []
    for lengths in rows:
        assert sum(lengths) == S
        begins = torch.tensor([0, *lengths[:-1]]).cumsum(0)
        starts.append(begins.repeat_interleave(torch.tensor(lengths)))
    return torch.stack(starts).int()


def influence(model, position: int, length: int = S) -> Tensor:
    """bool (length,): whose logits change when the token at `position` does."""
    tokens = random_tokens(1, length)
    changed = tokens.clone()
    changed[0, position] = (tokens[0, position] + 1) % 101
    with torch.no_grad():
        difference = (model(tokens) - model(changed)).abs().amax(-1)[0]
    return difference > 1e-4  # logits are of order 1 and float32: rounding is a hundredth of this


# What a token sees


@BACKENDS
@FAMILIES
@torch.no_grad()
def test_packed_documents_are_computed_as_if_each_were_alone(build_lively, config, backend):
    model = build_lively(config, backend, seq_len=S, documents=True)
    alone = build_lively(config, backend, seq_len=S)
    alone.load_state_dict(model.state_dict())
    tokens = random_tokens()
    rows = [13, 20, 15], [1, 46, 1]
    packed = model(tokens, starts_BS=starts_of(*rows))
    for row, lengths in enumerate(rows):
        documents = tokens[row].split(lengths)
        expected = torch.cat([alone(document[None])[0] for document in documents])
        torch.testing.assert_close(packed[row], expected, rtol=1e-4, atol=1e-4)
    assert (packed - alone(tokens)).abs().max() > 0.1


@BACKENDS
@FAMILIES
def test_a_token_changes_no_earlier_logits_and_all_later_ones(build_lively, config, backend):
    model = build_lively(config, backend, seq_len=S)
    assert influence(model, 20).tolist() == [False] * 20 + [True] * (S - 20)


@BACKENDS
def test_a_window_reaches_back_window_minus_1_tokens_per_layer(build_lively, backend):
    model = build_lively(replace(LLAMA, window=4, n_layers=3), backend, seq_len=S)
    reach = 3 * (4 - 1)
    assert influence(model, 10).nonzero().flatten().tolist() == list(range(10, 10 + reach + 1))


def test_another_backend_for_one_call_is_used_for_that_call(build_lively):
    model, narrow = build_lively(LLAMA), build_lively(replace(LLAMA, window=3))
    narrow.load_state_dict(model.state_dict())
    tokens = random_tokens()
    assert torch.equal(model(tokens, attention=narrow.attention), narrow(tokens))
    assert not torch.allclose(model(tokens), narrow(tokens))


def test_attention_scale_and_soft_cap_reach_the_scores(build_lively):
    plain = build_lively(LLAMA)
    tokens = random_tokens()
    for change in ({"attention_scale": 0.9}, {"attention_softcap": 1.0}):
        changed = build_lively(replace(LLAMA, **change))
        changed.load_state_dict(plain.state_dict())
        assert (plain(tokens) - changed(tokens)).abs().max() > 0.01


# The loss


@pytest.mark.parametrize(
    "config", [LLAMA, GPT2, replace(LLAMA, logit_softcap=1.5)], ids=["rotary", "learned", "soft-cap"]
)
def test_loss_is_the_summed_cross_entropy_without_ignored_targets(build_lively, config):
    model = build_lively(config)
    tokens, targets = random_tokens(), random_tokens()
    targets[0, 5:20] = -100
    targets[1, -1] = -100
    log_probs = model(tokens).detach().double().log_softmax(-1)
    expected = -sum(log_probs[b, s, targets[b, s]] for b in range(2) for s in range(S) if targets[b, s] != -100)
    loss = model(tokens, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("chunk_size", [1, 40, 96, 1000])
def test_loss_and_gradients_do_not_depend_on_the_chunk_size(build_lively, chunk_size, softcap):
    config = replace(LLAMA, tie_head=True, logit_softcap=softcap, loss_chunk_size=0)
    whole, chunked = build_lively(config), build_lively(replace(config, loss_chunk_size=chunk_size))
    chunked.load_state_dict(whole.state_dict())
    tokens, targets = random_tokens(), random_tokens()
    targets[0, 5:20] = -100
    losses = [model(tokens, targets) for model in (whole, chunked)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        (loss / 81).backward()
    for (name, expected), got in zip(whole.named_parameters(), chunked.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-4, atol=1e-5, msg=name)


@FAMILIES
@pytest.mark.parametrize("unit", [None, "model", "block"])
@torch.no_grad()
def test_the_losses_of_the_tokens_sum_to_the_loss(build_lively, config, unit):
    torch._dynamo.reset()
    model = build_lively(replace(config, loss_chunk_size=40), seq_len=S, documents=True)
    counter = CompileCounter()
    if unit:
        model.compile(unit, backend=counter, fullgraph=True)
    tokens, targets, starts = random_tokens(), random_tokens(), starts_of([13, 20, 15], [1, 46, 1])
    targets[0, 5:20] = -100
    losses = model(tokens, targets, starts, per_token=True)
    log_probs = model(tokens, None, starts, attention=model.attention).double().log_softmax(-1)
    expected = -log_probs.gather(2, targets.clamp_min(0)[..., None])[..., 0] * (targets != -100)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(losses.sum(), model(tokens, targets, starts))
    assert counter.frame_count == (3 if unit else 0), "one for the blocks, and one for each kind of loss"


@pytest.mark.parametrize("chunk_size", [0, 40])
def test_what_the_head_adds_in_training_is_not_in_the_losses_of_tokens(build_lively, chunk_size):
    model = build_lively(replace(LLAMA, loss_chunk_size=chunk_size))
    tokens, targets = random_tokens(), random_tokens()
    plain, losses = model(tokens, targets), model(tokens, targets, per_token=True)
    model.head.z_loss, model.head.label_smoothing = 0.1, 0.2
    assert torch.equal(model(tokens, targets, per_token=True), losses)
    logits = model(tokens).double()
    smoothed = 0.8 * plain.double() - 0.2 * logits.log_softmax(-1).mean(-1).sum()
    expected = smoothed + 0.1 * logits.logsumexp(-1).square().sum()
    torch.testing.assert_close(model(tokens, targets).double(), expected, rtol=1e-5, atol=0)


@FAMILIES
def test_hidden_states_loss_and_logits_are_steps_of_their_own_and_the_head_is_called_as_a_module(build_lively, config):
    """What shards a model hooks into the calls of its modules, and generation needs the steps one by one."""
    model = build_lively(config, seq_len=S, documents=True)
    tokens, targets, starts = random_tokens(), random_tokens(), starts_of([13, 20, 15], [1, 46, 1])
    calls = []
    model.head.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs)))
    positions = torch.arange(S)[None] - starts
    hidden = model.hidden(tokens, positions, model.attention, model.attention.prepare(starts, S))
    assert torch.equal(model.loss(hidden, targets), model(tokens, targets, starts))
    assert torch.equal(model.logits(hidden), model(tokens, None, starts))
    assert calls == [3, 3, 1, 1]


@FAMILIES
@torch.no_grad()
def test_positions_are_the_batchs_and_not_the_models(build_lively, config):
    """A shard of a row knows where it stands: here its second half, alone."""
    model = build_lively(config, seq_len=S)
    tokens, half = random_tokens(1, S // 2), torch.arange(S // 2)[None]
    assert torch.equal(model(tokens, positions_BS=half), model(tokens))
    shifted = model(tokens, positions_BS=half + S // 2)
    same = torch.allclose(shifted, model(tokens), rtol=1e-4, atol=1e-4)
    assert same == (config.position == "rotary"), "only a learned table tells a place from its distance to another"


def test_every_layer_attends_with_what_the_backend_gives_it(build_lively):
    """As a cache of keys and values does, around any backend."""
    model = build_lively(replace(LLAMA, n_layers=3))
    inner, layers = model.attention, []

    class Wrapper(type(inner)):
        def for_layer(self, layer):
            layers.append(layer)
            return super().for_layer(layer)

    tokens = random_tokens()
    assert torch.equal(model(tokens, attention=Wrapper(inner.spec, inner.config)), model(tokens))
    assert layers == [0, 1, 2]


@torch.no_grad()
def test_logit_soft_cap_bounds_the_logits(build_lively):
    plain, capped = build_lively(LLAMA), build_lively(replace(LLAMA, logit_softcap=1.5))
    capped.load_state_dict(plain.state_dict())
    tokens = random_tokens()
    assert plain(tokens).abs().max() > 2
    assert capped(tokens).abs().max() < 1.5
    torch.testing.assert_close(capped(tokens), 1.5 * torch.tanh(plain(tokens) / 1.5))


# How weights begin


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["rotary", "learned"])
def test_weights_begin_as_gpt2s(build, config):
    model = build(replace(config, dim=256, ffn_dim=512, head_dim=None, n_layers=8, tie_head=False, qk_norm=True))
    seen = set()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            residual = name.endswith(("out.weight", "down.weight"))
            expected = 0.02 / 4 if residual else 0.02  # √(2 · 8 layers) = 4
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
            assert parameter.mean().item() == pytest.approx(0, abs=0.02 * expected), name
            seen.add("residual" if residual else "matrix")
        else:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name
            seen.add("bias" if name.endswith("bias") else "norm")
    assert seen == {"residual", "matrix", "norm"} | ({"bias"} if config.bias else set())


def test_the_first_loss_is_that_of_guessing(build):
    tokens, targets = random_tokens(), random_tokens()
    loss = build(LLAMA)(tokens, targets).item() / targets.numel()
    assert loss == pytest.approx(torch.tensor(101.0).log().item(), abs=0.1)


def test_weights_are_the_seeds(build):
    def weights(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return [parameter.detach() for parameter in build(LLAMA).parameters()]

    assert all(torch.equal(a, b) for a, b in zip(weights(1), weights(1), strict=True))
    assert not torch.equal(weights(1)[0], weights(2)[0])


def test_a_tied_head_is_the_embedding(build):
    tied, untied = build(replace(LLAMA, tie_head=True)), build(LLAMA)
    assert tied.head.weight is tied.embedding.weight
    assert untied.head.weight.data_ptr() != untied.embedding.weight.data_ptr()
    # The embedding of a token that is only ever a target learns through the head.
    tied(torch.zeros(1, 4, dtype=torch.int64), torch.full((1, 4), 7)).backward()
    assert tied.embedding.weight.grad[7].abs().sum() > 0


def test_the_state_holds_weights_only(build):
    # Frequencies follow from the configuration: a checkpoint must not bring back those of another context length.
    assert set(build(LLAMA).state_dict()) == {name for name, _ in build(LLAMA).named_parameters()}


# Compilation


@pytest.mark.parametrize(
    ("config", "backend"), [(LLAMA, "math"), (YARN, "sdpa"), (GPT2, "sdpa")], ids=["math", "sdpa", "sdpa-learned"]
)
def test_compiled_equals_eager_in_one_graph_for_all_batches(build_lively, config, backend):
    torch._dynamo.reset()
    counter = CompileCounter()
    model = build_lively(config, backend, seq_len=S, documents=True)
    compiled = build_lively(config, backend, seq_len=S, documents=True)
    compiled.load_state_dict(model.state_dict())
    compiled.compile(backend=counter, fullgraph=True)
    for rows in (([S], [S]), ([13, 20, 15], [1, 46, 1]), ([1] * S, [40, 8])):
        tokens, targets, starts = random_tokens(), random_tokens(), starts_of(*rows)
        for each in (model, compiled):
            each.zero_grad()
            each(tokens, targets, starts).backward()
        torch.testing.assert_close(compiled(tokens, targets, starts), model(tokens, targets, starts))
        for expected, got in zip(model.parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(got.grad, expected.grad)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("config", "backend"), [(LLAMA, "math"), (YARN, "sdpa"), (GPT2, "sdpa")], ids=["math", "sdpa", "sdpa-learned"]
)
def test_compiled_by_blocks_one_graph_serves_every_layer_and_one_the_loss(build_lively, config, backend):
    torch._dynamo.reset()
    counter = CompileCounter()
    config = replace(config, n_layers=10)  # more than the compiler would compile one function for
    model = build_lively(config, backend, seq_len=S, documents=True)
    compiled = build_lively(config, backend, seq_len=S, documents=True)
    compiled.load_state_dict(model.state_dict())
    compiled.compile("block", backend=counter, fullgraph=True)
    for rows in (([S], [S]), ([13, 20, 15], [1, 46, 1]), ([1] * S, [40, 8])):
        tokens, targets, starts = random_tokens(), random_tokens(), starts_of(*rows)
        losses = []
        for each in (model, compiled):
            each.zero_grad()
            losses.append(each(tokens, targets, starts))
            losses[-1].backward()
        torch.testing.assert_close(*losses)
        for expected, got in zip(model.parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(got.grad, expected.grad)
    assert counter.frame_count == 2
    generate(compiled, [[1, 2, 3]], 2)
    assert counter.frame_count == 2, "generation is not compiled"


def test_rows_of_another_length_are_compiled_by_themselves(build_lively):
    """Validation rows can be shorter, and come first; the graph of training rows must not be one for any length."""
    torch._dynamo.reset()
    model = build_lively(LLAMA, seq_len=S)
    graphs = []

    def backend(graph, inputs):
        graphs.append(inputs)
        return graph.forward

    model.compile(backend=backend, fullgraph=True)
    for tokens in (random_tokens()[:, : S // 2], random_tokens(), random_tokens()):
        torch.testing.assert_close(model(tokens), model(tokens, attention=build_lively(LLAMA).attention))
    assert len(graphs) == 2
    assert all(isinstance(x, torch.Tensor) and all(type(n) is int for n in x.shape) for x in graphs[1])


def test_another_backend_for_one_call_compiles_nothing(build_lively):
    torch._dynamo.reset()
    counter = CompileCounter()
    model = build_lively(LLAMA)
    other = build_lively(LLAMA, "sdpa").attention
    model.compile(backend=counter)
    model(random_tokens(), attention=other)
    generate(model, [[1, 2, 3]], 2)
    assert counter.frame_count == 0
