"""Optimizers: which parameters decay, which optimizer takes which, and the guard that keeps a bad step out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .config import MuonConfig, OptimizerConfig
from .optimizer_config import ROUNDED_AT_ONCE
from .parts import check_tensors

MOMENTS = (torch.float32, torch.bfloat16)


class Optimizer:
    """PyTorch's optimizers stepped as one, skipped whole where a step is bad, without the host waiting to know.

    A part: moments and counts, by the name of their parameter ("blocks.0.mlp.down.weight/exp_avg").
    """

    name = "optimizer"

    def __init__(
        self, model: nn.Module, config: OptimizerConfig, device: torch.device, moments: str = "float32"
    ) -> None:
        self.parameters = parameters = dict(model.named_parameters())
        hidden = [p for name, p in parameters.items() if name.startswith("blocks.") and p.dim() == 2]
        by_muon = {id(p) for p in hidden} if isinstance(config, MuonConfig) else set()
        others = [p for p in parameters.values() if id(p) not in by_muon]
        self.moments: torch.dtype = getattr(torch, moments)
        beta1, beta2 = config.betas
        self.adamws = [
            torch.optim.AdamW(
                [
                    {"params": [p for p in some if p.dim() >= 2], "weight_decay": config.weight_decay},
                    {"params": [p for p in some if p.dim() < 2], "weight_decay": 0.0},
                ],
                lr=0.0,
                betas=(beta1, beta2),
                eps=config.eps,
                fused=True,
            )
            for some in ([others] if self.moments == torch.float32 else _in_runs(others, ROUNDED_AT_ONCE))
        ]
        self.muons: list[torch.optim.Optimizer] = []
        if isinstance(config, MuonConfig):
            # One for each matrix, so that `_step_where` keeps one at a time, and `_in_float32` casts one.
            self.muons = [
                torch.optim.Muon(
                    [matrix],
                    lr=0.0,
                    momentum=config.momentum,
                    weight_decay=config.weight_decay,
                    adjust_lr_fn="match_rms_adamw",
                )
                for matrix in hidden
            ]
        if self.moments != torch.float32:  # which PyTorch makes itself, in the first step
            zeros = {name: torch.zeros_like(like, device=device) for name, like in self._layout(self.moments).items()}
            self.load(zeros, {})

    @property
    def all(self) -> list[torch.optim.Optimizer]:
        return [*self.adamws, *self.muons]

    def make_capturable(self) -> None:
        """Let CUDA graphs record `step`, whose learning rate is then a float32 scalar on the device."""
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["capturable"] = True
            # PyTorch would warn that it also runs outside of a graph, which the first steps do.
            optimizer._warned_capturable_if_run_uncaptured = True

    def step(self, learning_rate: float | Tensor, good: Tensor) -> None:
        """Update the parameters and clear the gradients.

        Args:
            learning_rate: of this step.
            good: bool scalar on the device. Where it is False nothing changes: no parameter, no moment.
        """
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
        found_inf = (~good).float()
        for adamw in self.adamws:
            # The fused kernel reads this flag itself, as it does for GradScaler: no host synchronisation.
            adamw.found_inf = found_inf  # type: ignore[attr-defined]
            with _in_float32(adamw):
                adamw.step()
        for muon in self.muons:
            with _in_float32(muon):
                _step_where(good, muon)
        for optimizer in self.all:
            optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.parameters.items()}
        return {
            f"{names[parameter]}/{key}": value
            for inner in self.all
            for parameter, entries in inner.state.items()
            for key, value in entries.items()
        }

    def values(self) -> dict[str, Any]:
        return {}

    def validate(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """No tensors at all are those of a run that has not taken a step. Moments may all be of the other dtype."""
        if not tensors:
            return
        dtypes = (tensor.dtype for name, tensor in tensors.items() if _is_moment(name))
        check_tensors(tensors, self._layout(next((dtype for dtype in dtypes if dtype in MOMENTS), self.moments)))
        for name, tensor in tensors.items():
            if name.endswith("/exp_avg_sq") and (tensor < 0).any():
                raise ValueError(f"{name} is negative somewhere")
            if name.endswith("/step") and (tensor < 0 or tensor != tensor.round()):
                raise ValueError(f"{name} is {tensor.item()}, no count")

    def _layout(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """What `tensors` returns after the first step, on the meta device, with moments in `dtype`."""
        by_muon = {id(p) for muon in self.muons for group in muon.param_groups for p in group["params"]}
        layout: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            moment = torch.empty_like(parameter, device="meta", dtype=dtype, requires_grad=False)
            if id(parameter) in by_muon:
                layout[f"{name}/momentum_buffer"] = moment
            else:
                count = torch.empty((), dtype=torch.float32, device="meta")
                layout |= {f"{name}/step": count, f"{name}/exp_avg": moment, f"{name}/exp_avg_sq": moment}
        return layout

    def load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        owners = {p: inner for inner in self.all for group in inner.param_groups for p in group["params"]}
        for name, value in tensors.items():
            parameter_name, _, key = name.rpartition("/")
            parameter = self.parameters[parameter_name]
            dtype = self.moments if _is_moment(name) else value.dtype
            owners[parameter].state[parameter][key] = value.to(parameter.device, dtype)


def _is_moment(name: str) -> bool:
    return not name.endswith("/step")


def _in_runs(parameters: Iterable[nn.Parameter], most: int) -> list[list[nn.Parameter]]:
    """The parameters in their order, in lists of `most` numbers or of one parameter."""
    runs: list[list[nn.Parameter]] = []
    room = 0
    for parameter in parameters:
        if parameter.numel() > room:
            runs.append([])
            room = most
        runs[-1].append(parameter)
        room -= parameter.numel()
    return runs


@contextmanager
def _in_float32(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Give `optimizer` float32 copies of its bf16 moments while it steps, then round them to the nearest bf16 number.

    Fused AdamW of PyTorch 2.11, and of a later one on a CPU, refuses moments of another dtype than the parameter's.
    """
    lent = [
        (state, key, moment, torch.empty_like(moment, dtype=torch.float32))
        for state in optimizer.state.values()
        for key, moment in state.items()
        if moment.dtype == torch.bfloat16
    ]
    if not lent:
        yield
        return
    moments, copies = [moment for _, _, moment, _ in lent], [copy for _, _, _, copy in lent]
    torch._foreach_copy_(copies, moments)
    for state, key, _, copy in lent:
        state[key] = copy
    yield
    torch._foreach_copy_(moments, copies)
    for state, key, moment, _ in lent:
        state[key] = moment


@torch.no_grad()
def _step_where(good: Tensor, muon: torch.optim.Optimizer) -> None:
    """Step a Muon of one matrix where `good`. It has no flag like AdamW's."""
    (matrix,) = muon.param_groups[0]["params"]
    before = matrix.detach().clone()
    momentum = muon.state[matrix].get("momentum_buffer", 0.0)  # before its first step it is 0
    # The momentum moves towards the gradient: towards itself it stays, to the last bit.
    matrix.grad = torch.where(good, matrix.grad, momentum)
    muon.step()
    matrix.copy_(torch.where(good, matrix, before))
