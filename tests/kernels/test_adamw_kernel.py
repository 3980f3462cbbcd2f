"""AdamW's kernel: torch's own, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from compile_process import compiled

from kernels.adamw_kernel import BLOCK, PER_LAUNCH, adamw
from kernels.flash_attention.portable import INTERPRETED
from training.optimizer import FusedAdamW

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
# The interpreter is NumPy, which warns of what lanes past the end compute.
ignored = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
pytestmark = pytest.mark.gpu if DEVICE == "cuda" else ignored
DECAYS = (0.9, 0.999)


class One:
    """A parameter with its moments, and float64 copies that torch updates."""

    def __init__(self, n: int, moments: torch.dtype = torch.float32) -> None:
        self.param = torch.randn(n, device=DEVICE)
        self.mean, self.square = (torch.zeros(n, dtype=moments, device=DEVICE) for _ in range(2))
        self.count = torch.zeros((), device=DEVICE)
        self.sizes = torch.logspace(-4, 1, n, device=DEVICE)
        self.plain = torch.nn.Parameter(self.param.double())
        self.adamw = torch.optim.AdamW([self.plain], betas=DECAYS, eps=1e-6, weight_decay=0.1)

    def step(self, rate: float, scale: float | None = None, decays: tuple[float, float] = DECAYS) -> None:
        grad = torch.randn_like(self.param) * self.sizes
        self.update(grad, rate, scale, True, decays)
        self.plain.grad = grad.double() * (1.0 if scale is None else scale)
        self.adamw.param_groups[0].update(lr=rate, betas=decays)
        self.adamw.step()

    def update(
        self, grad: Tensor, rate: float, scale: float | None, good: bool, decays: tuple[float, float] = DECAYS
    ) -> None:
        learning_rate = torch.full((), rate, device=DEVICE)
        factor = None if scale is None else torch.full((), scale, device=DEVICE)
        self.count += good
        adamw(
            [self.param], [grad], [self.mean], [self.square], [self.count], learning_rate, factor,
            torch.tensor(good, device=DEVICE), decays=decays, eps=1e-6, weight_decay=0.1,
        )  # fmt: skip

    @property
    def state(self) -> list[Tensor]:
        return [x.clone() for x in (self.param, self.mean, self.square)]


@pytest.mark.parametrize("n", [1, 37, BLOCK, BLOCK + 1, 3 * BLOCK - 16])
@pytest.mark.parametrize("scale", [None, 0.25])
def test_is_torchs_own(n: int, scale: float | None) -> None:
    torch.manual_seed(n)
    one = One(n)
    for rate in (1e-2, 3e-2, 1e-3):
        one.step(rate, scale)
    moments = one.adamw.state[one.plain]
    torch.testing.assert_close(one.param.double(), one.plain.detach(), rtol=1e-6, atol=1e-6)
    mean, square = moments["exp_avg"] / one.sizes, moments["exp_avg_sq"] / one.sizes**2
    torch.testing.assert_close(one.mean / one.sizes.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(one.square / one.sizes.double() ** 2, square, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decays", [(0.0, 0.95), (0.9, 0.0), (0.9, 0.999999)])
def test_any_decay(decays: tuple[float, float]) -> None:
    """With 0.999999 the bias correction is 1e-6, where float32 would have one digit."""
    torch.manual_seed(0)
    one = One(100)
    for _ in range(3):
        one.step(1e-2, decays=decays)
    torch.testing.assert_close(one.param.double(), one.plain.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.gpu  # the interpreter rounds to bf16 by cutting off
def test_bf16_moments_are_those_of_float32_rounded() -> None:
    torch.manual_seed(0)
    ours, theirs = One(300, torch.bfloat16), One(300)
    theirs.param.copy_(ours.param)
    for rate in (1e-2, 3e-2, 1e-3):
        grad = torch.randn_like(ours.param)
        ours.update(grad, rate, 0.5, True)
        theirs.update(grad, rate, 0.5, True)
        theirs.mean, theirs.square = (x.bfloat16().float() for x in (theirs.mean, theirs.square))
        assert torch.equal(ours.param, theirs.param)
        assert torch.equal(ours.mean.float(), theirs.mean)
        assert torch.equal(ours.square.float(), theirs.square)


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16], ids=str)
def test_a_bad_step_leaves_no_trace(moments: torch.dtype) -> None:
    torch.manual_seed(0)
    one = One(300, moments)
    one.step(1e-2)
    before = one.state
    one.update(torch.full_like(one.param, float("nan")), 1e-2, float("nan"), False)
    assert all(map(torch.equal, one.state, before))


def test_what_lies_past_the_end_stays() -> None:
    one = One(64)
    whole = one.param
    one.param, one.mean, one.square = whole[:50], one.mean[:50], one.square[:50]
    before = whole.clone()
    one.update(torch.ones(50, device=DEVICE), 1e-2, None, True)
    assert torch.equal(whole[50:], before[50:])
    assert not torch.equal(whole[:50], before[:50])


@pytest.mark.parametrize("many", [2, PER_LAUNCH, PER_LAUNCH + 1])
def test_several_of_one_size_are_updated_as_each_alone(many: int) -> None:
    """Each with its own moments and count."""
    torch.manual_seed(many)
    together, alone = [One(BLOCK + 5) for _ in range(many)], [One(BLOCK + 5) for _ in range(many)]
    grads = [torch.randn(BLOCK + 5, device=DEVICE) for _ in range(many)]
    for number, (one, other) in enumerate(zip(together, alone, strict=True)):
        other.param.copy_(one.param)
        one.count += number + 1
        other.count += number  # which its update adds 1 to
        other.update(grads[number], 1e-2, 0.5, True)
    adamw(
        [one.param for one in together], grads, [one.mean for one in together], [one.square for one in together],
        [one.count for one in together], torch.full((), 1e-2, device=DEVICE), torch.full((), 0.5, device=DEVICE),
        torch.tensor(True, device=DEVICE), decays=DECAYS, eps=1e-6, weight_decay=0.1,
    )  # fmt: skip
    for one, other in zip(together, alone, strict=True):
        assert all(map(torch.equal, one.state, other.state))


def test_the_optimizer_is_torchs_own() -> None:
    """Groups with decays of their own, counts that stay in a bad step, and moments by torch's names."""
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape, device=DEVICE)) for shape in ((3, 5), (7,), (5, 3), (7,))]
    theirs = [torch.nn.Parameter(parameter.detach().clone()) for parameter in ours]

    def groups(parameters: list[torch.nn.Parameter]) -> list[dict[str, object]]:
        return [
            {"params": parameters[::2], "weight_decay": 0.1},
            {"params": parameters[1::2], "weight_decay": 0.0},
        ]

    options = {"lr": 1e-2, "betas": DECAYS, "eps": 1e-6}
    optimizer, plain = FusedAdamW(groups(ours), options), torch.optim.AdamW(groups(theirs), **options)  # type: ignore[arg-type]
    for good in (True, False, True):
        for mine, their in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            their.grad = mine.grad * 0.5
        optimizer.step(torch.tensor(good, device=DEVICE), torch.tensor(0.5, device=DEVICE))
        if good:
            plain.step()
    for mine, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-5, atol=1e-6)
        assert optimizer.state[mine].keys() == plain.state[their].keys()
        assert optimizer.state[mine]["step"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_every_configuration_compiles_and_does_not_spill(architecture: str) -> None:
    found = compiled("adamw", architecture)
    assert len(found) == 4
    for row in found:
        assert not row.get("spilled"), row
        assert row["registers"] <= 128, row
