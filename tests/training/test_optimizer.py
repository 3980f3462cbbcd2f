"""Which parameters decay, which optimizer takes which, and that a bad step leaves no trace."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from training.config import MuonConfig, OptimizerConfig
from training.optimizer import Optimizer

CPU = torch.device("cpu")
FINITE, NOT_FINITE = torch.tensor(True), torch.tensor(False)


class Model(nn.Module):
    """The names and shapes that matter: a table, blocks with matrices and vectors, a norm, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.RMSNorm(8), nn.Linear(8, 4)) for _ in range(2))
        self.norm = nn.RMSNorm(4)
        self.head = nn.Linear(4, 7, bias=False)


def set_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def moments(optimizer: Optimizer) -> list[Tensor]:
    """Every tensor of state, the step counts included."""
    return [
        entry.clone()
        for inner in optimizer.all
        for group in inner.param_groups
        for parameter in group["params"]
        for _, entry in sorted(inner.state[parameter].items())
        if isinstance(entry, Tensor)
    ]


@pytest.mark.parametrize("config", [OptimizerConfig(weight_decay=0.5), MuonConfig(weight_decay=0.5)])
def test_only_matrices_decay(config: OptimizerConfig) -> None:
    model = Model()
    before = values(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    Optimizer(model, config, CPU).step(0.1, FINITE)
    for name, parameter in model.named_parameters():
        shrunk = before[name] * (1 - 0.1 * 0.5) if parameter.dim() == 2 else before[name]
        torch.testing.assert_close(parameter.detach(), shrunk)


def test_adamw_is_torchs_own_step_by_step() -> None:
    config = OptimizerConfig(betas=[0.8, 0.95], eps=1e-6, weight_decay=0.2)
    ours, theirs = Model(), Model()
    theirs.load_state_dict(ours.state_dict())
    optimizer = Optimizer(ours, config, CPU)
    groups = [
        {"params": [p for p in theirs.parameters() if p.dim() == 2], "weight_decay": 0.2},
        {"params": [p for p in theirs.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    plain = torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-6, foreach=False, fused=False)
    for step, rate in enumerate([1e-2, 3e-2, 1e-3], start=1):
        for model in (ours, theirs):
            set_gradients(model, seed=step)
        optimizer.step(rate, FINITE)
        for group in plain.param_groups:
            group["lr"] = rate
        plain.step()
        for name, value in values(theirs).items():
            torch.testing.assert_close(values(ours)[name], value, rtol=1e-5, atol=1e-7)


def test_muon_is_torchs_own_bit_for_bit() -> None:
    config = MuonConfig(momentum=0.9, weight_decay=0.2)
    ours, theirs = Model(), Model()
    theirs.load_state_dict(ours.state_dict())
    optimizer = Optimizer(ours, config, CPU)
    matrices = {name: p for name, p in theirs.named_parameters() if name.startswith("blocks.") and p.dim() == 2}
    plain = torch.optim.Muon(matrices.values(), momentum=0.9, weight_decay=0.2, adjust_lr_fn="match_rms_adamw")
    for step, rate in enumerate([1e-2, 3e-2, 1e-3], start=1):
        for model in (ours, theirs):
            set_gradients(model, seed=step)
        optimizer.step(rate, FINITE)
        plain.param_groups[0]["lr"] = rate
        plain.step()
        for name, matrix in matrices.items():
            assert torch.equal(values(ours)[name], matrix.detach()), name


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("config", [OptimizerConfig(), MuonConfig()])
def test_a_step_that_is_not_finite_leaves_no_trace(config: OptimizerConfig, steps_before: int) -> None:
    model = Model()
    optimizer = Optimizer(model, config, CPU)
    for step in range(steps_before):
        set_gradients(model, seed=step)
        optimizer.step(1e-2, FINITE)
    twin = copy.deepcopy(model)
    twin_optimizer = Optimizer(twin, config, CPU)
    for inner, other in zip(optimizer.all, twin_optimizer.all, strict=True):
        other.load_state_dict(copy.deepcopy(inner.state_dict()))
    before, state_before = values(model), moments(optimizer)

    set_gradients(model, seed=99)
    next(model.blocks.parameters()).grad.fill_(math.nan)  # type: ignore[union-attr]
    model.norm.weight.grad.fill_(math.inf)  # type: ignore[union-attr]
    optimizer.step(1e-2, NOT_FINITE)
    for name, value in values(model).items():
        assert torch.equal(value, before[name]), name
    if steps_before:
        assert all(map(torch.equal, moments(optimizer), state_before))

    # The next good step is the one a run without the bad step would have taken.
    for each in (model, twin):
        set_gradients(each, seed=100)
    optimizer.step(1e-2, FINITE)
    twin_optimizer.step(1e-2, FINITE)
    for name, value in values(model).items():
        assert torch.equal(value, values(twin)[name]), name
        assert not torch.equal(value, before[name]), name


def test_muon_takes_exactly_the_matrices_of_the_blocks() -> None:
    model = Model()
    optimizer = Optimizer(model, MuonConfig(), CPU)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    by_adamw, *by_muons = (
        {names[id(p)] for group in inner.param_groups for p in group["params"]} for inner in optimizer.all
    )
    assert all(len(taken) == 1 for taken in by_muons)
    by_muon = set().union(*by_muons)
    assert by_muon == {f"blocks.{block}.{layer}.weight" for block in (0, 1) for layer in (0, 2)}
    assert by_adamw == set(names.values()) - by_muon


def test_adamw_takes_every_parameter_once() -> None:
    model = Model()
    optimizer = Optimizer(model, OptimizerConfig(), CPU)
    assert not optimizer.muons
    taken = [id(p) for group in optimizer.adamw.param_groups for p in group["params"]]
    assert sorted(taken) == sorted(map(id, model.parameters()))


@pytest.mark.parametrize("finite", [FINITE, NOT_FINITE])
@pytest.mark.parametrize("config", [OptimizerConfig(), MuonConfig()])
def test_gradients_are_cleared_whether_or_not_the_step_was_taken(config: OptimizerConfig, finite: Tensor) -> None:
    model = Model()
    set_gradients(model, seed=0)
    Optimizer(model, config, CPU).step(1e-3, finite)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("kind", [OptimizerConfig, MuonConfig])
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"betas": [0.9]}, r"optimizer\.betas=\[0\.9\]"),
        ({"betas": [0.9, 1.0]}, r"optimizer\.betas=\[0\.9, 1\.0\]"),
        ({"betas": [-0.1, 0.9]}, r"optimizer\.betas"),
        ({"weight_decay": -0.1}, r"optimizer\.weight_decay=-0\.1"),
        ({"weight_decay": math.nan}, r"optimizer\.weight_decay=nan"),
        ({"eps": -1e-8}, r"optimizer\.eps=-1e-08"),
        ({"eps": math.nan}, r"optimizer\.eps=nan"),
    ],
)
def test_impossible_options_are_refused_by_name(
    kind: type[OptimizerConfig], options: dict[str, object], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        kind(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("momentum", [-0.1, 1.0, math.nan])
def test_impossible_momentum_is_refused_by_name(momentum: float) -> None:
    with pytest.raises(ValueError, match=rf"optimizer\.momentum={momentum}"):
        MuonConfig(momentum=momentum)
