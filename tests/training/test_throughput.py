"""Every figure of a window, counted by hand on a clock that only moves when told to."""

from __future__ import annotations

import pytest

from model.arithmetic import train_flops_per_token
from model.config import ModelConfig
from training.throughput import Throughput

MODEL = ModelConfig(name="m", n_layers=2, n_heads=2, dim=8, ffn_dim=16, vocab_size=32)
# N = 2 layers · (8·24 + 8·8 + 8·32 + 16·8) + 32·8 = 1536; attention 12 · 2 · 8 = 192 FLOPs per key.
MATMUL_FLOPS, KEY_FLOPS = 6 * 1536, 192
S = 16
ALL_PAIRS = S * (S + 1) // 2


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def throughput(clock: Clock, peak_flops: float | None = 1e6, warmup_steps: int = 0) -> Throughput:
    peak = None if peak_flops is None else lambda keys: peak_flops
    return Throughput(MODEL, S, peak, warmup_steps=warmup_steps, clock=clock)


def steps(meter: Throughput, clock: Clock, number: int, seconds: float, pairs: int = ALL_PAIRS) -> None:
    for _ in range(number):
        clock.passes(seconds)
        meter.count_step(S, pairs)


def test_flops_per_token_are_those_counted_above() -> None:
    assert train_flops_per_token(MODEL, 10) == MATMUL_FLOPS + 10 * KEY_FLOPS


def test_every_figure_by_hand(clock: Clock) -> None:
    meter = throughput(clock)
    steps(meter, clock, 3, seconds=2.0)
    steps(meter, clock, 1, seconds=2.0, pairs=ALL_PAIRS - 68)  # the four rows lose 1/8 of their pairs
    assert meter.report() == pytest.approx(
        {
            "throughput/tokens_per_second": 8.0,
            "throughput/tflops": 8 * (MATMUL_FLOPS + 8 * KEY_FLOPS) / 1e12,
            "throughput/attended_fraction": 1 - 68 / (4 * 136),
            "time/step_ms": 2000.0,
            "time/data_wait_fraction": 0.0,
            "throughput/mfu": 8 * (MATMUL_FLOPS + 8 * KEY_FLOPS) / 1e6,
            "throughput/mfu_palm": 8 * (MATMUL_FLOPS + 16 * KEY_FLOPS) / 1e6,
            "throughput/mfu_attended": 8 * (MATMUL_FLOPS + (4 * 136 - 68) / 64 * KEY_FLOPS) / 1e6,
        }
    )


def test_a_step_in_a_pause_is_in_no_figure_and_is_no_warm_up(clock: Clock) -> None:
    meter = throughput(clock, warmup_steps=1)
    for _ in range(2):  # before the warm-up, and in a window
        with meter.paused():
            with meter.waiting_for_data():
                clock.passes(500)
            steps(meter, clock, 2, seconds=500)
        steps(meter, clock, 2, seconds=4.0)
    report = meter.report()
    assert report["throughput/tokens_per_second"] == pytest.approx(S / 4.0)
    assert report["time/data_wait_fraction"] == 0
    assert meter.total_tokens == 3 * S


def test_warm_up_steps_are_in_no_figure(clock: Clock) -> None:
    meter = throughput(clock, warmup_steps=3)
    with meter.waiting_for_data():
        clock.passes(1000)
    steps(meter, clock, 3, seconds=500)
    steps(meter, clock, 2, seconds=4.0)
    report = meter.report()
    assert report["time/step_ms"] == 4000
    assert report["throughput/tokens_per_second"] == 4.0
    assert report["time/data_wait_fraction"] == 0.0
    assert (meter.total_tokens, meter.total_seconds) == (2 * S, 8.0)


def test_a_report_inside_the_warm_up_is_empty_and_changes_nothing(clock: Clock) -> None:
    meter = throughput(clock, warmup_steps=2)
    steps(meter, clock, 1, seconds=50)
    assert meter.report() == {}
    steps(meter, clock, 1, seconds=50)
    assert meter.report() == {}
    steps(meter, clock, 1, seconds=1.0)
    assert meter.report()["time/step_ms"] == 1000


def test_the_warm_ups_queued_work_is_not_in_the_first_window(clock: Clock) -> None:
    queued = 0.0

    def device_finishes() -> None:
        nonlocal queued
        clock.passes(queued)
        queued = 0.0

    meter = Throughput(MODEL, S, None, warmup_steps=1, synchronize=device_finishes, clock=clock)
    queued += 100.0
    steps(meter, clock, 1, seconds=1.0)
    queued += 7.0
    steps(meter, clock, 1, seconds=1.0)
    assert meter.report()["time/step_ms"] == 8000, "and the step's own queued work is"


def test_paused_time_is_in_no_window(clock: Clock) -> None:
    meter = throughput(clock, warmup_steps=1)
    steps(meter, clock, 1, seconds=1.0)
    for _ in range(2):
        steps(meter, clock, 1, seconds=3.0)
        with meter.paused():
            clock.passes(60)
    assert meter.report()["time/step_ms"] == 3000


def test_the_pause_after_a_report_is_not_in_the_next_window(clock: Clock) -> None:
    meter = throughput(clock)
    steps(meter, clock, 1, seconds=3.0)
    meter.report()
    with meter.paused():
        clock.passes(60)
    steps(meter, clock, 1, seconds=3.0)
    assert meter.report()["time/step_ms"] == 3000


def test_work_queued_before_a_pause_belongs_to_the_window(clock: Clock) -> None:
    waits = iter([2.0, 5.0, 0.0])
    meter = Throughput(MODEL, S, None, warmup_steps=0, synchronize=lambda: clock.passes(next(waits)), clock=clock)
    steps(meter, clock, 1, seconds=1.0)
    with meter.paused():  # 2 s of the step's own work, then 10 + 5 s of evaluation
        clock.passes(10)
    assert meter.report()["time/step_ms"] == 3000


def test_data_wait_is_its_share_of_the_window(clock: Clock) -> None:
    meter = throughput(clock)
    for seconds in (1.0, 0.5):
        with meter.waiting_for_data():
            clock.passes(seconds)
        steps(meter, clock, 1, seconds=2.25)
    assert meter.report()["time/data_wait_fraction"] == 0.25


def test_windows_do_not_leak_into_each_other(clock: Clock) -> None:
    meter = throughput(clock)
    with meter.waiting_for_data():
        clock.passes(5)
    steps(meter, clock, 5, seconds=9.0, pairs=1)
    with meter.paused():
        clock.passes(5)
    meter.report()
    steps(meter, clock, 2, seconds=1.0)
    second = meter.report()
    assert second["throughput/tokens_per_second"] == S
    assert second["throughput/attended_fraction"] == 1
    assert second["time/step_ms"] == 1000
    assert second["time/data_wait_fraction"] == 0
    assert (meter.total_tokens, meter.total_seconds) == (7 * S, 50 + 2)


def test_an_unknown_card_has_no_mfu(clock: Clock) -> None:
    meter = throughput(clock, peak_flops=None)
    steps(meter, clock, 1, seconds=1.0)
    report = meter.report()
    assert report["throughput/tflops"] > 0
    assert not [name for name in report if "mfu" in name]
