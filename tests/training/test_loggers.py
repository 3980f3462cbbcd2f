"""The record, the console, TensorBoard and the fan-out. W&B has its own file."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from training.loggers import LoggerConfig, Loggers, RunInfo, WandbConfig, build_loggers, read_metrics
from training.loggers.base import Logger
from training.loggers.console import Console, short
from training.loggers.jsonl import JsonlLogger

CONFIGS = Path(__file__).parents[2] / "configs"


def run_info(folder: Path) -> RunInfo:
    return RunInfo("tiny", folder, {"model": {"width": 64}}, {"parameters": 7})


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not strict JSON")


# ---- metrics.jsonl and samples.md


def test_jsonl_holds_every_event_as_strict_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 1_700_000_000.1234)
    logger = JsonlLogger()
    logger.start(run_info(tmp_path))
    logger.log(1, 100, {"train/loss": 3.5, "train/learning_rate": 1e-3})
    logger.log(2, 200, {"train/loss": math.nan, "a": math.inf, "b": -math.inf})

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # before finish: a crash must not lose them
    assert [json.loads(line, parse_constant=refuse) for line in lines] == [
        {"step": 1, "tokens": 100, "time": 1_700_000_000.123, "train/loss": 3.5, "train/learning_rate": 1e-3},
        {"step": 2, "tokens": 200, "time": 1_700_000_000.123, "train/loss": "nan", "a": "inf", "b": "-inf"},
    ]
    logger.finish("finished")
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert first["train/loss"] == 3.5
    assert math.isnan(second["train/loss"])
    assert (second["a"], second["b"]) == (math.inf, -math.inf)


def test_jsonl_of_a_resumed_run_appends_and_drops_the_half_line_of_a_killed_one(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": 10}\n{"step": 2, "tok')
    logger = JsonlLogger()
    logger.start(run_info(tmp_path))
    logger.log(2, 20, {})
    logger.finish("finished")
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_what_a_full_disk_does_not_take_is_written_when_it_does_with_each_line_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = 150

    class SmallDisk(io.FileIO):
        """As a file system that has `room` bytes left: it takes what fits, then refuses."""

        def write(self, data: Any) -> int:
            nonlocal room
            if not room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            count = super().write(data[:room])
            room -= count
            return count

    said: list[str] = []
    logger = JsonlLogger(said.append)
    logger.start(run_info(tmp_path))
    monkeypatch.setattr("builtins.open", lambda path, mode, buffering: SmallDisk(path, mode.replace("b", "")))
    for step in range(1, 9):
        logger.log(step, 10 * step, {"train/loss": 1.0})
        logger.sample(step, 10 * step, "once")
        if step == 6:
            assert (tmp_path / "metrics.jsonl").stat().st_size + (tmp_path / "samples.md").stat().st_size == 150
            room = 10_000
    logger.finish("finished")
    monkeypatch.undo()
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert (tmp_path / "samples.md").read_text().count("## step") == 8
    assert [line.partition(" waits in memory")[0] for line in said] == [
        f"record     {tmp_path / name}" for name in ("metrics.jsonl", "samples.md")
    ]
    assert all("No space left on device; free some space" in line for line in said)


def test_samples_are_fenced_so_that_no_text_can_close_the_fence(tmp_path: Path) -> None:
    logger = JsonlLogger()
    logger.start(run_info(tmp_path))
    logger.sample(5, 1234, "once\n```\nupon")
    logger.finish("finished")
    assert (tmp_path / "samples.md").read_text() == "## step 5 (1,234 tokens)\n\n````text\nonce\n```\nupon\n````\n\n"


# ---- the fan-out


class Recorder(Logger):
    def __init__(self, name: str, fails_in: str = "") -> None:
        self.name, self.fails_in, self.calls = name, fails_in, []  # type: ignore[var-annotated]

    def _call(self, method: str) -> None:
        self.calls.append(method)
        if method == self.fails_in:
            raise OSError("disk\nfull")

    def start(self, run):
        self._call("start")

    def log(self, step, tokens, metrics):
        self._call("log")

    def sample(self, step, tokens, text):
        self._call("sample")

    def finish(self, status):
        self._call(f"finish {status}")


EVENTS = ["start", "log", "sample", "log", "finish interrupted"]


@pytest.mark.parametrize("method", ["start", "log", "sample", "finish interrupted"])
def test_a_failing_logger_is_dropped_with_one_line_and_the_others_get_everything(method: str, tmp_path: Path) -> None:
    lines: list[str] = []
    before, bad, after = Recorder("before"), Recorder("bad", fails_in=method), Recorder("after")
    loggers = Loggers([before, bad, after], lines.append)
    loggers.start(run_info(tmp_path))
    loggers.log(1, 10, {})
    loggers.sample(1, 10, "text")
    loggers.log(2, 20, {})
    loggers.finish("interrupted")

    assert before.calls == after.calls == EVENTS
    assert bad.calls == EVENTS[: EVENTS.index(method) + 1]
    assert lines == ["logger bad is dropped, training goes on without it: OSError: disk full"]


def test_ctrl_c_inside_a_logger_is_not_swallowed(tmp_path: Path) -> None:
    class Interrupted(Recorder):
        def log(self, step, tokens, metrics):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Loggers([Interrupted("x")], print).log(1, 1, {})


# ---- the console


def test_console_off_a_terminal_is_aligned_plain_lines_with_the_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    stream = io.StringIO()
    console = Console(2000, stream)
    console.start(run_info(tmp_path))
    metrics = {
        "train/loss": 10.98765,
        "train/learning_rate": 3e-4,
        "train/grad_norm": 1.234,
        "throughput/tokens_per_second": 98_304.0,
        "throughput/tflops": 412.34,
        "throughput/mfu": 0.417,
        "memory/peak_allocated_gib": 61.53,
    }
    console.log(100, 1_638_400, metrics)
    now = 40.0
    console.log(1100, 18_022_400, {**metrics, "train/loss": 3.21, "val/loss": 3.101, "val/bits_per_byte": 1.2345})
    console.sample(1100, 18_022_400, "a\x1b[31mb\n\nc")
    console.finish("finished")

    text = stream.getvalue()
    assert "\x1b" not in text
    _, first, second, validation, *sample, last = text.splitlines()
    assert first == (
        "step    100/2000   tokens   1.6M   loss 10.9877   lr 3.00e-04   grad   1.23   tok/s  98.3k"
        "   TFLOP/s  412.3   MFU 41.7%   peak  61.5 GiB"
    )
    assert second.startswith("step   1100/2000   tokens  18.0M   loss  3.2100   lr")
    assert second.endswith("   ETA 0:00:36")  # 1000 steps in 40 s, 900 to go
    assert first.index("MFU") == second.index("MFU")
    assert validation == "step   1100/2000   validation   loss  3.1010   bits/byte  1.2345"
    assert sample == ["sample after step 1,100 (18.0M tokens):", "    a�[31mb", "    ", "    c"]
    assert last == "run finished"


def test_console_leaves_out_what_it_was_not_given() -> None:
    stream = io.StringIO()
    Console(10, stream).log(1, 512, {"train/loss": math.nan})
    assert stream.getvalue() == "step      1/10   tokens    512   loss     nan\n"


def test_console_on_a_terminal_has_colour_and_a_panel_and_no_escape_of_the_models_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Tty(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Tty()
    console = Console(10, stream)
    console.log(1, 512, {"train/loss": 2.0})
    console.sample(1, 512, "[bold]kept[/bold] \x1b]0;title\x07")
    text = stream.getvalue()
    assert "\x1b[" in text
    assert "╭" in text
    assert "[bold]kept[/bold]" in text
    assert "\x1b]0" not in text


def test_console_survives_a_stream_that_knows_only_ascii() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    Console(10, stream).sample(1, 1, "é")
    assert b"    ?\n" in raw.getvalue()


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (950, "950"), (999.6, "1000"), (1e3, "1.0k"), (12_345, "12.3k"), (999_960, "1.0M"), (2.1e9, "2.1B")],
)
def test_short_counts(number: float, text: str) -> None:
    assert short(number) == text


# ---- TensorBoard


def test_tensorboard_events_hold_the_same_names(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from training.loggers.tensorboard import TensorBoardLogger

    logger = TensorBoardLogger()
    logger.start(run_info(tmp_path))
    logger.log(1, 100, {"train/loss": 3.5})
    logger.log(2, 200, {"train/loss": 3.25})
    logger.sample(2, 200, "once upon")
    logger.finish("finished")

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 3.5), (2, 3.25)]
    assert [event.value for event in events.Scalars("tokens")] == [100, 200]
    assert "once upon" in str(events.Tensors("sample/text_summary")[0].tensor_proto.string_val)
    assert '"width": 64' in str(events.Tensors("config/text_summary")[0].tensor_proto.string_val[0], "utf-8")


@pytest.mark.parametrize("status", ["finished", "interrupted"])
def test_tensorboards_table_of_settings_has_a_finished_run_once_with_its_last_metrics(
    tmp_path: Path, status: str
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.metadata import parse_session_start_info_plugin_data

    from training.loggers.tensorboard import TensorBoardLogger

    logger = TensorBoardLogger()
    config = {"learning_rate": 1e-3, "compile": True, "init_from": None, "model": {"name": "tiny", "dims": [1, 2]}}
    logger.start(RunInfo("tiny", tmp_path, config, {}))
    logger.log(10, 100, {"val/loss": 4.0, "train/loss": 4.0})
    logger.log(20, 200, {"val/loss": 3.0, "val/bits_per_byte": math.nan})
    logger.finish(status)
    again = TensorBoardLogger()  # of a run that has nothing left to do
    again.start(RunInfo("tiny", tmp_path, config, {}, step=20, events=2))
    again.finish("finished")

    assert not [path for path in (tmp_path / "tensorboard").iterdir() if path.is_dir()], "a run of its own"
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("val/loss")] == [4.0, 3.0]
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("final/")]
    if status == "interrupted":
        assert not tags
        return
    assert tags == ["final/val/loss", "final/train/loss"]
    assert [(event.step, event.value) for event in events.Scalars("final/val/loss")] == [(20, 3.0)]
    session = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert {
        name: getattr(value, value.WhichOneof("kind"))
        for name, value in parse_session_start_info_plugin_data(session).hparams.items()
    } == {"learning_rate": 1e-3, "compile": True, "init_from": "null", "model.name": "tiny", "model.dims": "[1, 2]"}


def test_tensorboard_missing_is_said_at_construction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.loggers.tensorboard.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs tensorboard: pip install tensorboard, or logger.tensorboard=false"):
        build_loggers(LoggerConfig(tensorboard=True), max_steps=1, notify=print)


# ---- configuration


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("wandb", ["jsonl", "console", "wandb"]),
        ("tensorboard", ["jsonl", "console", "tensorboard"]),
        ("all", ["jsonl", "console", "tensorboard", "wandb"]),
        ("none", ["jsonl", "console"]),
    ],
)
def test_each_yaml_composes_into_the_dataclasses(choice: str, names: list[str]) -> None:
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        composed = compose(overrides=[f"+logger={choice}"]).logger
    assert set(composed) == {"wandb", "tensorboard"}
    assert set(composed.wandb) == set(WandbConfig.__dataclass_fields__), "a field is missing in the YAML"
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(LoggerConfig), composed))
    assert isinstance(config, LoggerConfig)
    if choice == "wandb":
        assert config == LoggerConfig(), "the default YAML and the dataclass disagree"
    if "tensorboard" in names:
        pytest.importorskip("tensorboard")
    assert [logger.name for logger in build_loggers(config, max_steps=1, notify=print).loggers] == names


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"mode": "on-line"}, "logger.wandb.mode=on-line is unknown: choose one of auto, online, offline, disabled"),
        ({"init_timeout": 0.0}, "logger.wandb.init_timeout=0.0 must be a positive number of seconds"),
    ],
)
def test_a_wrong_wandb_field_is_one_clear_line(bad: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        WandbConfig(**bad)
    assert str(error.value) == message


def test_building_the_loggers_imports_neither_wandb_nor_tensorboard(tmp_path: Path) -> None:
    import subprocess

    code = (
        "import sys; from training.loggers import *; build_loggers(LoggerConfig(), max_steps=1, notify=print);"
        "print([name for name in ('wandb', 'tensorboard', 'torch', 'hydra', 'omegaconf') if name in sys.modules])"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_folder_with_escape_codes_in_its_name_sends_none_to_the_terminal() -> None:
    stream = io.StringIO()
    Console(10, stream).start(RunInfo("x", Path("runs/\x1b[31mred"), {}, {}))
    assert stream.getvalue() == "run        runs/\\x1b[31mred\n"
