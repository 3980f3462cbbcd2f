"""The learning rate of every step, against numbers worked out by hand."""

from __future__ import annotations

import re

import pytest

from training.schedule import ScheduleConfig, WSDConfig, learning_rate


def rates(config: ScheduleConfig, max_steps: int, tokens_per_step: int = 1, peak: float = 1.0) -> list[float]:
    return [learning_rate(config, step, max_steps, tokens_per_step, peak) for step in range(1, max_steps + 1)]


def test_cosine_by_hand() -> None:
    # cos 45° = 0.70711: the quarters of the way down are at (1 ± 0.70711) / 2.
    expected = [1.0, 2.0, 0.2 + 1.8 * 0.853553, 1.1, 0.2 + 1.8 * 0.146447, 0.2]
    assert rates(ScheduleConfig(warmup_steps=2, min_ratio=0.1), 6, peak=2.0) == pytest.approx(expected, abs=1e-5)


def test_wsd_by_hand() -> None:
    # 10 steps after the warm-up, of which the last 0.4 fall: 8/12 of the way there is nothing but the peak.
    expected = [0.5, 1.0, *[1.0] * 6, 0.75, 0.5, 0.25, 0.0]
    assert rates(WSDConfig(warmup_steps=2, decay_fraction=0.4), 12) == pytest.approx(expected)


def test_wsd_falls_to_its_min_ratio() -> None:
    expected = [1.0, 1.0, 0.75, 0.5]
    schedule = WSDConfig(warmup_steps=0, decay_fraction=0.5, min_ratio=0.5)
    assert rates(schedule, 4) == pytest.approx(expected)


def test_warm_up_is_linear_and_reaches_the_peak_at_its_last_step() -> None:
    assert rates(ScheduleConfig(warmup_steps=4), 10, peak=8.0)[:4] == pytest.approx([2, 4, 6, 8])


def test_warm_up_in_tokens_counts_whole_steps() -> None:
    in_tokens = ScheduleConfig(warmup_tokens=1000)
    assert in_tokens.warmup(tokens_per_step=256) == 4, "3.9 steps"
    assert in_tokens.warmup(tokens_per_step=250) == 4
    assert rates(in_tokens, 10, tokens_per_step=256) == rates(ScheduleConfig(warmup_steps=4), 10)
    assert ScheduleConfig(warmup_tokens=0).warmup(256) == 0


def test_two_lengths_of_one_warm_up_are_refused() -> None:
    with pytest.raises(ValueError, match=r"schedule\.warmup_steps=7 and schedule\.warmup_tokens=1000 .* to null"):
        ScheduleConfig(warmup_steps=7, warmup_tokens=1000)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (ScheduleConfig(warmup_steps=11), "schedule.warmup_steps=11 is a warm-up of 11 steps in a run of 10"),
        (ScheduleConfig(warmup_tokens=1100), "schedule.warmup_tokens=1100 is a warm-up of 11 steps in a run of 10"),
    ],
)
def test_a_warm_up_longer_than_the_run_is_refused_where_it_was_asked_for(config: ScheduleConfig, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        config.check_length(10, 100)
    config.check_length(11, 100)
    ScheduleConfig().check_length(1, 100)
    assert rates(ScheduleConfig(), 4) == rates(ScheduleConfig(warmup_steps=20), 4), "nobody asked for twenty"


def test_without_warm_up_the_first_step_is_already_on_the_way_down() -> None:
    assert rates(ScheduleConfig(warmup_steps=0, min_ratio=0.0), 2) == pytest.approx([0.5, 0.0])


@pytest.mark.parametrize("config", [ScheduleConfig(warmup_steps=100), WSDConfig(warmup_steps=100)])
def test_a_run_shorter_than_its_warm_up_reaches_the_peak_at_its_end(config: ScheduleConfig) -> None:
    assert rates(config, 4) == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates(config, 1) == [1.0]


@pytest.mark.parametrize("min_ratio", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("warmup_steps", [0, 1, 20])
@pytest.mark.parametrize("max_steps", [21, 22, 100])
@pytest.mark.parametrize("kind", [ScheduleConfig, WSDConfig])
def test_the_rate_rises_to_the_peak_then_never_rises_again_and_ends_at_min_ratio(
    kind: type[ScheduleConfig], max_steps: int, warmup_steps: int, min_ratio: float
) -> None:
    found = rates(kind(warmup_steps=warmup_steps, min_ratio=min_ratio), max_steps)
    rising, falling = found[:warmup_steps], found[max(warmup_steps - 1, 0) :]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert found[-1] == pytest.approx(min_ratio)
    assert max(found) <= 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"warmup_steps": -1}, r"schedule\.warmup_steps=-1"),
        ({"warmup_tokens": -5}, r"schedule\.warmup_tokens=-5"),
        ({"min_ratio": 1.5}, r"schedule\.min_ratio=1\.5"),
        ({"min_ratio": -0.1}, r"schedule\.min_ratio=-0\.1"),
        ({"min_ratio": float("nan")}, r"schedule\.min_ratio=nan"),
        ({"decay_fraction": 0.0}, r"schedule\.decay_fraction=0\.0"),
        ({"decay_fraction": 1.1}, r"schedule\.decay_fraction=1\.1"),
    ],
)
def test_impossible_schedules_are_refused_by_name(options: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        WSDConfig(**options)  # type: ignore[arg-type]
