"""Optimizers: which parameters decay, which optimizer takes which, and the guard that keeps a bad step out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .config import MuonConfig, OptimizerConfig
from .parallel.gradients import gradient_of
from .parallel.sharding import is_sharded, local, local_part, sharded_as, whole
from .parts import Part, check_tensors

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

MOMENTS = (torch.float32, torch.bfloat16)
ROUNDED_AT_ONCE = 2**26
"""On a CPU: numbers whose bf16 moments the update has in float32 at a time, 8 bytes each."""
MUON: dict[str, Any] = {"lr": 0.0, "adjust_lr_fn": "match_rms_adamw"}


class Optimizer(Part):
    """PyTorch's optimizers stepped as one, skipped whole where a step is bad, without the host waiting to know.

    A part: moments and counts, by the name of their parameter ("blocks.0.mlp.down.weight/exp_avg"); moments are sharded
    as their parameters are.
    """

    name = "optimizer"

    def __init__(
        self, model: nn.Module, config: OptimizerConfig, device: torch.device, moments: str = "float32"
    ) -> None:
        self.parameters, self.device = dict(model.named_parameters()), device
        # Of a sharded parameter this rank's part is updated, as a parameter of its own that lies in the same memory.
        self.parts = {name: nn.Parameter(local(p)) if is_sharded(p) else p for name, p in self.parameters.items()}
        hidden = [name for name, p in self.parts.items() if name.startswith("blocks.") and p.dim() == 2]
        by_muon = set(hidden) if isinstance(config, MuonConfig) else set()
        self.moments: torch.dtype = getattr(torch, moments)
        beta1, beta2 = config.betas
        self.adamws: list[torch.optim.Optimizer] = []
        for others in _alike((p for name, p in self.parts.items() if name not in by_muon), lambda p: p.device):
            on_gpu = others[0].is_cuda
            rounds_in_copies = self.moments != torch.float32 and not on_gpu
            for some in _in_runs(others, ROUNDED_AT_ONCE) if rounds_in_copies else [others]:
                groups = [
                    {"params": [p for p in some if p.dim() >= 2], "weight_decay": config.weight_decay},
                    {"params": [p for p in some if p.dim() < 2], "weight_decay": 0.0},
                ]
                options: dict[str, Any] = {"lr": 0.0, "betas": (beta1, beta2), "eps": config.eps}
                adamw = FusedAdamW(groups, options) if on_gpu else torch.optim.AdamW(groups, fused=True, **options)
                self.adamws.append(adamw)
        self.muons: list[torch.optim.Optimizer] = []
        if isinstance(config, MuonConfig):
            # One for each matrix, so that `_step_where` keeps one at a time, and `_in_float32` casts one. Of sharded
            # ones, one for as many as there are shards.
            first = self.parameters[hidden[0]]
            shards = first.device_mesh["shard"].size() if is_sharded(first) else 1
            self.muons = [self._muon(hidden[at : at + shards], config) for at in range(0, len(hidden), shards)]
        if self.moments != torch.float32:  # which PyTorch makes itself, in the first step
            owners = self._owners()
            for name, like in self.expected().items():
                part, key = self._part(name)
                shape = part.shape if _is_moment(name) else like.shape
                owners[part].state[part][key] = torch.zeros(shape, dtype=like.dtype, device=part.device)

    def _muon(self, names: list[str], config: MuonConfig) -> torch.optim.Optimizer:
        parts, matrices = [self.parts[name] for name in names], [self.parameters[name] for name in names]
        if sharded := [matrix for matrix in matrices if is_sharded(matrix)]:
            return ShardedMuon(parts, sharded, config, self.device)
        return torch.optim.Muon(parts, momentum=config.momentum, weight_decay=config.weight_decay, **MUON)

    @property
    def all(self) -> list[torch.optim.Optimizer]:
        return [*self.adamws, *self.muons]

    def step(self, learning_rate: float | Tensor, good: Tensor, scale: Tensor | None = None) -> None:
        """Update the parameters and clear the gradients.

        Args:
            learning_rate: of this step.
            good: bool scalar on the device. Where it is False nothing changes: no parameter, no moment.
            scale: float32 scalar on the device, by which gradients are multiplied; None: 1.
        """
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
        for name, part in self.parts.items():
            if part is not (parameter := self.parameters[name]):
                part.grad, parameter.grad = None if parameter.grad is None else local(parameter.grad), None
        for optimizer in self.all:
            if isinstance(optimizer, FusedAdamW):
                optimizer.step(good, scale)
                continue
            if scale is not None:
                torch._foreach_mul_([gradient_of(p) for p in _parameters(optimizer)], scale.to(_device(optimizer)))
            with _in_float32(optimizer):
                _step_where(good.to(_device(optimizer)), optimizer)
        for optimizer in self.all:
            optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        names: dict[Tensor, str] = {part: name for name, part in self.parts.items()}
        return {
            f"{names[part]}/{key}": sharded_as(value, self.parameters[names[part]]) if value.dim() else value
            for inner in self.all
            for part, entries in inner.state.items()
            for key, value in entries.items()
        }

    def validate(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """No tensors at all are those of a run that has not taken a step. Moments may all be of the other dtype."""
        if not tensors:
            return
        dtypes = (tensor.dtype for name, tensor in tensors.items() if _is_moment(name))
        check_tensors(tensors, self.expected(next((dtype for dtype in dtypes if dtype in MOMENTS), self.moments)))
        for name, tensor in tensors.items():
            if name.endswith("/exp_avg_sq") and (local(tensor) < 0).any():
                raise ValueError(f"{name} is negative somewhere")
            if name.endswith("/step") and (tensor < 0 or tensor != tensor.round()):
                raise ValueError(f"{name} is {tensor.item()}, no count")

    def expected(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """What `tensors` returns after the first step, on the meta device, with moments in `dtype` where given."""
        by_muon = {id(part) for muon in self.muons for part in _parameters(muon)}
        layout: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            moment = torch.empty_like(parameter, device="meta", dtype=dtype or self.moments, requires_grad=False)
            if id(self.parts[name]) in by_muon:
                layout[f"{name}/momentum_buffer"] = moment
            else:
                count = torch.empty((), dtype=torch.float32, device="meta")
                layout |= {f"{name}/step": count, f"{name}/exp_avg": moment, f"{name}/exp_avg_sq": moment}
        return layout

    def load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Takes sharded moments, or whole ones."""
        owners = self._owners()
        for name, value in tensors.items():
            part, key = self._part(name)
            if not _is_moment(name):
                owners[part].state[part][key] = value.to(part.device)
                continue
            parameter = self.parameters[name.rpartition("/")[0]]
            value = value if part is parameter else local_part(value, parameter).clone()  # not a view of the whole
            owners[part].state[part][key] = value.to(part.device, self.moments)

    def _part(self, name: str) -> tuple[nn.Parameter, str]:
        """What of this rank "blocks.0.mlp.down.weight/exp_avg" is of, and "exp_avg"."""
        parameter, _, key = name.rpartition("/")
        return self.parts[parameter], key

    def _owners(self) -> dict[nn.Parameter, torch.optim.Optimizer]:
        return {part: inner for inner in self.all for part in _parameters(inner)}


class FusedAdamW(torch.optim.Optimizer):
    """AdamW on a GPU: a kernel for parameters of one size, which scales gradients and reads and writes bf16 moments."""

    @torch.no_grad()
    def step(self, good: Tensor, scale: Tensor | None) -> None:  # type: ignore[override]
        """`Optimizer.step` of its parameters."""
        from kernels.adamw_kernel import adamw

        for parameter in _parameters(self):
            if not self.state[parameter]:
                moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
                self.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
        counts, device = [self.state[parameter]["step"] for parameter in _parameters(self)], _device(self)
        torch._foreach_add_(counts, [good.float()] * len(counts))  # one tensor for all would be read by the host
        for group in self.param_groups:
            rate = group["lr"]
            learning_rate = rate if isinstance(rate, Tensor) else torch.full((), rate, device=device)
            for some in _alike(group["params"], torch.Tensor.numel):
                means, squares, counts = (
                    [self.state[parameter][key] for parameter in some] for key in ("exp_avg", "exp_avg_sq", "step")
                )
                adamw(
                    some, [gradient_of(parameter) for parameter in some], means, squares, counts,
                    learning_rate, scale, good,
                    decays=group["betas"], eps=group["eps"], weight_decay=group["weight_decay"],
                )  # fmt: skip


class ShardedMuon(torch.optim.Optimizer):
    """Muon of matrices of which this rank holds some rows: at most as many as ranks hold them together.

    Momentum is sharded, too. What is orthogonalised must be whole: each rank gathers that of one matrix, in bf16, in
    which Muon iterates anyway, computes its update, and sends it to the others, which take their rows of it.

    Args:
        parts: this rank's rows. matrices: the DTensors that they are of. device: that computes.
    """

    def __init__(
        self, parts: Sequence[nn.Parameter], matrices: Sequence[DTensor], config: MuonConfig, device: torch.device
    ) -> None:
        super().__init__(parts, {"lr": 0.0})
        self.matrices, self.config, self.device = matrices, config, device

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        lr, parts = self.param_groups[0]["lr"], _parameters(self)
        group = self.matrices[0].device_mesh.get_group("shard")
        towards: Tensor | None = None  # of this rank's matrix
        for owner, (part, matrix) in enumerate(zip(parts, self.matrices, strict=True)):
            gathered = whole(sharded_as(self._towards(part).to(self.device, torch.bfloat16), matrix))
            if owner == group.rank():
                towards = gathered
        mine = None if towards is None else self._update(towards, lr)
        for owner, (part, matrix) in enumerate(zip(parts, self.matrices, strict=True)):
            update = torch.empty(matrix.shape, device=self.device) if mine is None or owner != group.rank() else mine
            dist.broadcast(update, group=group, group_src=owner)
            part.mul_(1 - lr * self.config.weight_decay)
            part.add_(local_part(update, matrix).to(part.device))

    def _towards(self, part: nn.Parameter) -> Tensor:
        """Nesterov's momentum of this rank's rows."""
        assert part.grad is not None
        if "momentum_buffer" not in (state := self.state[part]):
            state["momentum_buffer"] = torch.zeros_like(part.grad)
        mean: Tensor = state["momentum_buffer"]
        mean.lerp_(part.grad, 1 - self.config.momentum)
        return part.grad.lerp(mean, self.config.momentum)

    def _update(self, towards: Tensor, lr: float) -> Tensor:
        """What is added to a matrix: PyTorch's step of zeros, without momentum and decay."""
        update = nn.Parameter(torch.zeros(towards.shape, device=self.device))
        update.grad = towards.float()
        muon = torch.optim.Muon([update], momentum=0.0, weight_decay=0.0, nesterov=False, **MUON)
        muon.param_groups[0]["lr"] = lr
        muon.step()
        return update.detach()


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _device(optimizer: torch.optim.Optimizer) -> torch.device:
    return _parameters(optimizer)[0].device


def _alike(parameters: Iterable[nn.Parameter], key: Callable[[nn.Parameter], Any]) -> list[list[nn.Parameter]]:
    """The parameters in their order, a list for each value of `key`."""
    lists: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        lists.setdefault(key(parameter), []).append(parameter)
    return list(lists.values())


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
def _step_where(good: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Step PyTorch's AdamW or a Muon where `good`."""
    if isinstance(optimizer, torch.optim.AdamW):
        # The fused kernel reads this flag itself, as it does for GradScaler: the host need not know it.
        optimizer.found_inf = (~good).float()  # type: ignore[attr-defined]
        optimizer.step()
        return
    matrices = _parameters(optimizer)
    originals = [matrix.detach().clone() for matrix in matrices]
    for matrix in matrices:
        momentum = optimizer.state[matrix].get("momentum_buffer", 0.0)  # before its first step it is 0
        # The momentum moves towards the gradient: towards itself it stays, to the last bit.
        matrix.grad = torch.where(good, gradient_of(matrix), momentum)
    optimizer.step()
    for matrix, before in zip(matrices, originals, strict=True):
        matrix.copy_(torch.where(good, matrix, before))
