"""Optimizers: which parameters decay, which optimizer takes which, and the guard that keeps a bad step out."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .config import MuonConfig, OptimizerConfig


class Optimizer:
    """One or two PyTorch optimizers stepped as one, skipped whole when the gradients are not finite."""

    def __init__(self, model: nn.Module, config: OptimizerConfig, device: torch.device) -> None:
        parameters = dict(model.named_parameters())
        hidden = [p for name, p in parameters.items() if name.startswith("blocks.") and p.dim() == 2]
        by_muon = {id(p) for p in hidden} if isinstance(config, MuonConfig) else set()
        others = [p for p in parameters.values() if id(p) not in by_muon]
        groups = [
            {"params": [p for p in others if p.dim() >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
        ]
        beta1, beta2 = config.betas
        self.adamw = torch.optim.AdamW(groups, lr=0.0, betas=(beta1, beta2), eps=config.eps, fused=True)
        self.muon: torch.optim.Optimizer | None = None
        if isinstance(config, MuonConfig):
            self.muon = torch.optim.Muon(
                hidden,
                lr=0.0,
                momentum=config.momentum,
                weight_decay=config.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )

    @property
    def all(self) -> Iterable[torch.optim.Optimizer]:
        return [self.adamw] if self.muon is None else [self.adamw, self.muon]

    def step(self, learning_rate: float, finite: Tensor) -> None:
        """Update the parameters and clear the gradients.

        Args:
            learning_rate: of this step.
            finite: bool scalar on the device. Where it is False nothing changes: no parameter, no moment.
        """
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
        # The fused kernel reads this flag itself, as it does for GradScaler: no host synchronisation.
        self.adamw.found_inf = (~finite).float()  # type: ignore[attr-defined]
        self.adamw.step()
        if self.muon is not None and bool(finite):  # Muon has no such flag: the host must look
            self.muon.step()
        for optimizer in self.all:
            optimizer.zero_grad(set_to_none=True)
