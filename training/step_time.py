"""How long a training step will take on a card, from what its parts reached where they were measured. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from model.activations_config import FullConfig, OffloadConfig, SelectiveConfig
from model.arithmetic import causal_keys, parameter_count
from model.layer_memory import Workload, kept_bytes, matrix_sizes

from .cards import peak_tflops
from .machine import Gpu

PRODUCTS = 0.54
"""Fraction of the card's peak that a step reaches outside of attention: matrix products, with the elementwise work, the
loss and the update in their time. llama-1b and a GPT of 1.3 B in rows of 16k to 64k on an H200; 0.40 for GPT-2 124M."""
ATTENTION = {64: (0.59, 0.52), 128: (0.73, 0.63), 256: (0.85, 0.43)}
"""The same of attention forward and backward, by head dimension: our kernels in causal rows of 16k, on an H200 (256: on
an H100). Longer rows are a little faster."""
SLOWER = {"flash": (1.0, 1.0), "sdpa": (0.75, 0.8), "flex": (0.44, 0.55)}
"""Of those rates, what other backends reach in the same rows: cuDNN, and FlexAttention."""
SCORE_SECONDS = (3.0e-12, 6.2e-12)
"""Of one score of attention=math, forward and backward, on a card with PEAK: it is written and read several times.
llama-1b in rows of 4k and 16k, and GPT-2 124M in rows of 4k, on an H200."""
PEAK = 989e12
"""FLOP/s of an H200 in bf16. Other cards are taken to be slower with scores as they are with products."""
ELEMENTWISE = 0.03
"""What memory=selective computes again, as a fraction of the time outside of attention. An estimate, not measured."""
HOST_BYTES_PER_SECOND = 50e9
"""To pinned host memory or back, over PCIe 5. An assumption."""
ATTEND_AGAIN = ("math", "flex")
"""Backends whose result memory=full cannot keep: see docs/long-context.md."""
MEASURED_ON = ("H100", "H200")


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step."""

    products: float
    attention: float
    again: float
    """What layers compute a second time."""
    waiting: float
    """For the host's memory, beyond what computing hides."""
    sending: float = 0.0
    """To other GPUs, beyond what computing hides; see `training.traffic`."""

    @property
    def total(self) -> float:
        return self.products + self.attention + self.again + self.waiting + self.sending


def step_time(work: Workload, micro_batches: int, gpu: Gpu | None, factors: str) -> StepTime | None:
    """The time of a step of one rank alone, where attention sees whole rows; None without a card whose peak is known.

    Documents and windows take less: what they mask is not computed.

    Args:
        factors: of matrix products, as `cards.peak_tflops` takes them.
    """
    peak = peak_tflops(gpu.name, factors, gpu.capability) if gpu else None
    if peak is None:
        return None
    model, policy, tokens = work.model, work.memory, micro_batches * work.tokens
    assert model.head_dim is not None
    product_rate = peak * 1e12 * PRODUCTS
    products = 6 * parameter_count(model).matmul * tokens / product_rate
    forward, backward = _attention_seconds(work, micro_batches, peak * 1e12)
    attention = model.n_layers * (forward + backward)

    waiting = 0.0
    again = model.n_layers * forward if work.context > 1 and not work.keeps_lse else 0.0
    if isinstance(policy, FullConfig):
        layers = policy.of(model.n_layers)
        keeping = (policy.keeps_attention(layer, model.n_layers) for layer in range(layers))
        attending = layers - (0 if work.attention in ATTEND_AGAIN else sum(keeping))
        qkv, *computed_again, _ = matrix_sizes(model)  # all but the MLP's last product; qkv before attention, too
        weights = layers * (qkv + sum(computed_again)) + attending * qkv
        again += 2 * weights * tokens / product_rate + attending * forward
    elif isinstance(policy, SelectiveConfig):
        layers = policy.of(model.n_layers)
        again += ELEMENTWISE * products * layers / model.n_layers + work.writes_scores * layers * forward
    if isinstance(policy, OffloadConfig):
        host = sum(kept_bytes(work, layer) for layer in range(policy.on_host(model.n_layers)))
        hidden = (products / 3 + model.n_layers * forward) / micro_batches  # the shorter of the two passes
        waiting = 2 * micro_batches * max(0.0, host / HOST_BYTES_PER_SECOND - hidden)
    return StepTime(products, attention, again, waiting)


def _attention_seconds(work: Workload, micro_batches: int, peak: float) -> tuple[float, float]:
    """Of one layer, forward and backward."""
    model = work.model
    assert model.head_dim is not None
    if work.writes_scores:
        forward, backward = (micro_batches * work.scores * seconds * PEAK / peak for seconds in SCORE_SECONDS)
        return forward, backward
    pairs = model.n_heads * causal_keys(work.seq_len * work.context, model.window) * micro_batches * work.tokens
    # The fractions of the next larger head dimension that was measured; the largest beyond.
    measured = next((rates for known, rates in ATTENTION.items() if model.head_dim <= known), ATTENTION[256])
    rates = [peak * one * slower for one, slower in zip(measured, SLOWER[work.attention], strict=True)]
    return 4 * model.head_dim * pairs / rates[0], 10 * model.head_dim * pairs / rates[1]
