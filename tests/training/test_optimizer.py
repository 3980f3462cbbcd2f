"""Which parameters decay, which optimizer takes which, and that a bad step leaves no trace."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from training import optimizer as optimizer_module
from training.config import MuonConfig, OptimizerConfig
from training.optimizer import Optimizer

CPU = torch.device("cpu")
FINITE, NOT_FINITE = torch.tensor(True), torch.tensor(False)
ON_EACH_DEVICE = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


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
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.device)


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


@ON_EACH_DEVICE
def test_adamw_is_torchs_own_step_by_step(device: str) -> None:
    config = OptimizerConfig(betas=[0.8, 0.95], eps=1e-6, weight_decay=0.2)
    ours, theirs = Model().to(device), Model().to(device)
    theirs.load_state_dict(ours.state_dict())
    optimizer = Optimizer(ours, config, torch.device(device))
    groups = [
        {"params": [p for p in theirs.parameters() if p.dim() == 2], "weight_decay": 0.2},
        {"params": [p for p in theirs.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    plain = torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-6, foreach=False, fused=False)
    for step, rate in enumerate([1e-2, 3e-2, 1e-3], start=1):
        for model in (ours, theirs):
            set_gradients(model, seed=step)
        scale = torch.tensor(0.25, device=device) if step > 1 else None
        optimizer.step(rate, FINITE.to(device), scale)
        for group in plain.param_groups:
            group["lr"] = rate
        for parameter in theirs.parameters():
            assert parameter.grad is not None
            parameter.grad *= 1.0 if scale is None else scale
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


@ON_EACH_DEVICE
@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize(
    ("config", "dtype"),
    [(kind(), dtype) for kind in (OptimizerConfig, MuonConfig) for dtype in ("float32", "bfloat16")],
)
def test_a_step_that_is_not_finite_leaves_no_trace(
    config: OptimizerConfig, dtype: str, steps_before: int, device: str
) -> None:
    model = Model().to(device)
    optimizer = Optimizer(model, config, torch.device(device), dtype)
    for step in range(steps_before):
        set_gradients(model, seed=step)
        optimizer.step(1e-2, FINITE.to(device))
    twin = copy.deepcopy(model)
    twin_optimizer = Optimizer(twin, config, torch.device(device), dtype)
    twin_optimizer.load({name: tensor.clone() for name, tensor in optimizer.tensors().items()}, {})
    before, state_before = values(model), moments(optimizer)

    set_gradients(model, seed=99)
    next(model.blocks.parameters()).grad.fill_(math.nan)  # type: ignore[union-attr]
    model.norm.weight.grad.fill_(math.inf)  # type: ignore[union-attr]
    optimizer.step(1e-2, NOT_FINITE.to(device), torch.tensor(math.nan, device=device))
    for name, value in values(model).items():
        assert torch.equal(value, before[name]), name
    if steps_before:
        assert all(map(torch.equal, moments(optimizer), state_before))

    # The next good step is the one a run without the bad step would have taken.
    for each in (model, twin):
        set_gradients(each, seed=100)
    optimizer.step(1e-2, FINITE.to(device))
    twin_optimizer.step(1e-2, FINITE.to(device))
    for name, value in values(model).items():
        assert torch.equal(value, values(twin)[name]), name
        assert not torch.equal(value, before[name]), name


@ON_EACH_DEVICE
@pytest.mark.parametrize("at_once", [2**26, 40])
@pytest.mark.parametrize("kind", [OptimizerConfig, MuonConfig])
def test_bf16_moments_are_those_of_float32_rounded_after_each_step(
    kind: type[OptimizerConfig], at_once: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizer_module, "ROUNDED_AT_ONCE", at_once)
    ours, theirs = Model().to(device), Model().to(device)
    theirs.load_state_dict(ours.state_dict())
    optimizer = Optimizer(ours, kind(), torch.device(device), "bfloat16")
    plain = Optimizer(theirs, kind(), torch.device(device))
    assert (len(optimizer.adamws) > 1) == (at_once == 40 and device == "cpu")  # on a GPU the kernel rounds
    for step, rate in enumerate([1e-2, 3e-2, 1e-3], start=1):
        for model in (ours, theirs):
            set_gradients(model, seed=step)
        optimizer.step(rate, FINITE.to(device))
        plain.step(rate, FINITE.to(device))
        rounded = {
            name: tensor if name.endswith("/step") else tensor.bfloat16() for name, tensor in plain.tensors().items()
        }
        plain.load(rounded, {})
        for name, tensor in optimizer.tensors().items():
            assert tensor.dtype == rounded[name].dtype, name
            assert torch.equal(tensor, rounded[name]), name
        for name, value in values(theirs).items():
            assert torch.equal(values(ours)[name], value), name


@pytest.mark.parametrize("kind", [OptimizerConfig, MuonConfig])
@pytest.mark.parametrize(("before", "after"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_moments_of_the_other_dtype_are_converted(kind: type[OptimizerConfig], before: str, after: str) -> None:
    model = Model()
    first, second = Optimizer(model, kind(), CPU, before), Optimizer(model, kind(), CPU, after)
    set_gradients(model, seed=0)
    first.step(1e-2, FINITE)
    saved = {name: tensor.clone() for name, tensor in first.tensors().items()}
    second.validate(saved, {})
    second.load(saved, {})
    for name, tensor in second.tensors().items():
        expected = torch.float32 if name.endswith("/step") else getattr(torch, after)
        assert tensor.dtype is expected, name
        assert torch.equal(tensor, saved[name].to(expected)), name
    name = "norm.weight/exp_avg_sq"
    with pytest.raises(ValueError, match=rf"{name} is torch.float16, not torch.{before}"):
        second.validate({**saved, name: saved[name].half()}, {})


def test_a_bf16_moment_falls_as_it_would_in_float32_when_gradients_vanish() -> None:
    """300 steps: (1 − β₂) v is above half a unit in the last place of v, so no step is lost."""
    ends = []
    for moments in ("float32", "bfloat16"):
        model = Model()
        optimizer = Optimizer(model, OptimizerConfig(), CPU, moments)
        set_gradients(model, seed=0)
        optimizer.step(1e-3, FINITE)
        for _ in range(300):
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step(1e-3, FINITE)
        tensors = [tensor for name, tensor in sorted(optimizer.tensors().items()) if name.endswith("exp_avg_sq")]
        ends.append(torch.cat([tensor.flatten().float() for tensor in tensors]))
    ratio = ends[1] / ends[0]
    assert ratio.min() > 0.9
    assert ratio.max() < 1.1


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
    (adamw,) = optimizer.adamws
    taken = [id(p) for group in adamw.param_groups for p in group["params"]]
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


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (OptimizerConfig(betas=[0.9, 0.999]), r"optimizer\.betas=\[0\.9, 0\.999\]"),
        (MuonConfig(betas=[0.99, 0.95]), r"optimizer\.betas=\[0\.99, 0\.95\]"),
        (MuonConfig(momentum=0.99), r"optimizer\.momentum=0\.99"),
    ],
)
def test_moments_that_rounding_would_hold_still_are_refused(config: OptimizerConfig, named: str) -> None:
    with pytest.raises(ValueError, match=rf"moments=bfloat16 rounds away .* with {named}; use .*moments=float32"):
        config.check_rounding("bfloat16")
    config.check_rounding("float32")


@pytest.mark.parametrize("momentum", [-0.1, 1.0, math.nan])
def test_impossible_momentum_is_refused_by_name(momentum: float) -> None:
    with pytest.raises(ValueError, match=rf"optimizer\.momentum={momentum}"):
        MuonConfig(momentum=momentum)
