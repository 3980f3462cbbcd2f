"""Services are called at three points, in order, whatever ends the run."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from training.config import TrainConfig
from training.errors import Interrupted
from training.run import Run
from training.services.base import Service
from training.services.garbage import Garbage
from training.trainer import Trainer

MakeConfig = Callable[..., TrainConfig]


class Spy(Service):
    """Notes its calls; raises at one of them."""

    def __init__(self, label: str, calls: list[str], error: BaseException | None = None, at: str = "") -> None:
        self.label, self.calls, self.error, self.at = label, calls, error, at

    def note(self, point: str, told: str) -> None:
        self.calls.append(f"{self.label} {told}")
        if self.error and point == self.at:
            raise self.error

    def begin(self, run: Run) -> None:
        self.note("begin", "begin")

    def after_step(self, run: Run) -> None:
        self.note("after_step", f"step {run.progress.step}")

    def end(self, run: Run, status: str) -> None:
        self.note("end", status)


def train(config: TrainConfig, *spies: Service) -> Trainer:
    trainer = Trainer(config, lambda line: None)
    trainer.services.extend(spies)
    trainer.fit()
    return trainer


def test_services_begin_and_step_in_order_and_end_in_reverse(config: MakeConfig) -> None:
    calls: list[str] = []
    train(config("max_steps=2"), Spy("a", calls), Spy("b", calls))
    steps = ["a step 1", "b step 1", "a step 2", "b step 2"]
    assert calls == ["a begin", "b begin", *steps, "b finished", "a finished"]


@pytest.mark.parametrize(
    ("at", "error", "status"),
    [
        ("begin", ValueError("no"), "failed"),
        ("after_step", OSError("no"), "failed"),
        ("after_step", KeyboardInterrupt(), "interrupted"),
        ("after_step", Interrupted("by a test"), "interrupted"),
        ("end", OSError("no"), "failed"),
    ],
)
def test_a_service_that_raises_ends_the_run_and_the_others_end_with_its_status(
    config: MakeConfig, at: str, error: BaseException, status: str
) -> None:
    calls: list[str] = []
    spies = Spy("a", calls), Spy("b", calls, error, at), Spy("c", calls)
    with pytest.raises(type(error)):
        train(config("max_steps=2"), *spies)
    assert calls[-1] == f"a {status}"
    ended = {call for call in calls if call.split()[1] in ("finished", "failed", "interrupted")}
    assert (
        ended
        == {
            "begin": {"a failed", "b failed"},  # c never began
            "after_step": {f"{label} {status}" for label in "abc"},
            "end": {"c finished", "b finished", "a failed"},
        }[at]
    )


def test_the_first_step_says_where_the_time_went(config: MakeConfig, tmp_path: Path) -> None:
    lines: list[str] = []
    Trainer(config("max_steps=2"), lines.append).fit()
    (line,) = (line for line in lines if line.startswith("first step"))
    assert "s after the command" in line
    stages = filter(None, line.partition("command")[2].removeprefix(": ").split(", "))  # none that took no time
    seconds = {stage.rpartition(" ")[0]: float(stage.rpartition(" ")[2]) for stage in stages}
    assert set(seconds) <= {"imports", "data", "model", "loggers", "evaluation", "first step"}
    assert sum(seconds.values()) == pytest.approx(float(line.split()[2]), abs=0.4), "nothing is left out"


@pytest.fixture
def _collecting() -> Iterator[None]:
    """As in any process; tests otherwise run without it (tests/conftest.py)."""
    was_on = gc.isenabled()
    gc.unfreeze()
    gc.enable()
    yield
    if not was_on:
        gc.freeze()
        gc.disable()


@pytest.mark.usefixtures("_collecting")
@pytest.mark.parametrize("fails", [False, True])
def test_garbage_is_collected_at_log_lines_and_by_python_itself_after_the_run(config: MakeConfig, fails: bool) -> None:
    class Cycle:
        pass

    left: list[weakref.ref[Cycle]] = []
    found: list[tuple[int, bool, int]] = []

    class Littering(Service):
        def before_step(self, run: Run) -> None:
            if run.progress.step > 1:
                cycle = Cycle()
                cycle.itself = cycle  # type: ignore[attr-defined]
                left.append(weakref.ref(cycle))

        def after_step(self, run: Run) -> None:
            found.append((run.progress.step, gc.isenabled(), sum(ref() is not None for ref in left)))
            if fails and run.progress.step == 6:
                raise ZeroDivisionError

    trainer = Trainer(config("max_steps=6", "log_every=3"), lambda line: None)
    trainer.services = [Garbage(), Littering()]
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError) if fails else nullcontext():
        trainer.fit()
    assert found == [(1, False, 0), (2, False, 1), (3, False, 0), (4, False, 1), (5, False, 2), (6, False, 0)]
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
