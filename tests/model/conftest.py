"""Shared by the tests of the model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from model.attention import ATTENTIONS, AttentionSpec, build_attention
from model.config import ModelConfig
from model.gpt import GPT


def _build(config: ModelConfig, backend: str = "math", seq_len: int = 64, documents: bool = False) -> GPT:
    max_documents = seq_len if documents else None
    spec = AttentionSpec.of(config, seq_len=seq_len, dtype="float32", max_documents=max_documents)
    return GPT(config, build_attention(ATTENTIONS[backend](name=backend), spec))


@torch.no_grad()
def _build_lively(*args, **kwargs) -> GPT:
    """As initialised, every logit is nearly 0 and every attention nearly uniform, and most mistakes drown in that.
    Here each layer keeps variance: scores, hidden states and logits are of order 1, and no vector is 0 or 1."""
    model = _build(*args, **kwargs)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            parameter.normal_(std=parameter.shape[1] ** -0.5)
        else:
            parameter.normal_(mean=0.0 if name.endswith("bias") else 1.0, std=0.2)
    return model.eval()


@pytest.fixture
def build() -> Callable[..., GPT]:
    """(config, backend="math", seq_len=64, documents=False) -> GPT as training initialises it."""
    return _build


@pytest.fixture(scope="session")
def build_lively() -> Callable[..., GPT]:
    """The same arguments -> GPT with weights that make logits of order 1."""
    return _build_lively
