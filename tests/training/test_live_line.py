"""What a terminal shows while a run goes on, in a pseudo-terminal of its own."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from processes import LIMIT_S

from data.progress import bar_line
from training.closing import closing_lines
from training.services.live import Live
from training.terminal import folded

ROOT = Path(__file__).resolve().parents[2]
PREAMBLE = """
import os, signal, sys, time
from training import interrupt, terminal
from data.live import LINE
from data.progress import bar, doing
terminal.secure()
"""


class Screen:
    """What a terminal of so many columns shows of what was sent to it."""

    def __init__(self, sent: str, columns: int) -> None:
        self.lines, self.wrapped, at = [""], 0, 0
        self.seen: list[str] = []
        """Each state of the last line."""
        for match in re.finditer(r"\x1b\[([?0-9;]*)([A-Za-z])|(.)", sent, re.DOTALL):
            argument, command, char = match.groups()
            if command == "K":
                self.lines[-1] = "" if argument == "2" else self.lines[-1][:at]
            elif char == "\r":
                self.seen.append(self.lines[-1])
                at = 0
            elif char == "\n":
                self.lines.append("")
                at = 0
            elif char:
                if at == columns:
                    self.wrapped += 1
                    self.lines.append("")
                    at = 0
                self.lines[-1] = self.lines[-1][:at].ljust(at) + char + self.lines[-1][at + 1 :]
                at += 1


def in_terminal(
    code: str, columns: int = 80, answer: Callable[[str, int, int], bool] | None = None, **environment: str
) -> tuple[int, str]:
    """Run Python in a pseudo-terminal: (exit code, all that it sent). `answer(sent, terminal, process)` may send a
    signal or type, until it returns True."""
    pid, terminal = pty.fork()
    if pid == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))  # before anything asks for it
        inherited = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
        variables = inherited | {"TERM": "xterm-256color", "PYTHONPATH": str(ROOT)} | environment
        os.execve(sys.executable, [sys.executable, "-c", PREAMBLE + code], variables)
    sent, answered, deadline = b"", answer is None, time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        try:
            if select.select([terminal], [], [], 1.0)[0]:
                sent += os.read(terminal, 65536)
        except OSError:  # the process has ended
            break
        if not answered and answer is not None:
            answered = answer(sent.decode("utf-8", "ignore"), terminal, pid)
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), sent.decode("utf-8")


def test_what_is_printed_scrolls_above_the_line_whichever_stream_it_takes() -> None:
    code = """
with bar("reading", 40, "rows") as advance:
    for row in range(4):
        advance(10)
        LINE.draw()
        print("row", row, file=(sys.stdout, sys.stderr)[row % 2])
print("done")
"""
    status, sent = in_terminal(code)
    screen = Screen(sent, 80)
    assert status == 0
    assert screen.lines == ["row 0", "row 1", "row 2", "row 3", "done", ""]
    assert any(re.fullmatch(r"reading  ━+─+  20/40 rows", line) for line in screen.seen), screen.seen


def test_a_line_that_is_not_ended_is_not_drawn_over() -> None:
    status, sent = in_terminal('doing("waiting")\nprint("typed: ", end="", flush=True)\nLINE.draw()\nprint("x")')
    assert (status, Screen(sent, 80).lines) == (0, ["typed: x", ""])


def test_it_says_for_how_long_without_being_asked() -> None:
    _, sent = in_terminal('doing("loading")\ntime.sleep(2.6)')
    seen = Screen(sent, 80).seen
    assert "loading …" in seen
    assert "loading … 2 s" in seen


@pytest.mark.parametrize("where", ["dumb terminal", "file"])
def test_nothing_is_drawn_where_there_is_no_terminal(tmp_path: Path, where: str) -> None:
    out = tmp_path / "out"
    code = "from data.live import LiveLine\n"
    if where == "file":
        code += f"os.dup2(os.open({str(out)!r}, os.O_WRONLY | os.O_CREAT), 1)\n"
    code += 'LINE = LiveLine()\nLINE.attach()\nLINE.doing("loading")\ntime.sleep(0.6)\nprint("done", file=sys.stderr)'
    _, sent = in_terminal(code, TERM="dumb" if where == "dumb terminal" else "xterm")
    assert sent.splitlines() == ["done"]
    assert where != "file" or out.read_text() == ""


@pytest.mark.parametrize(
    ("how", "code"),
    [("SIGTERM", 75), ("SIGHUP", 75), ("ctrl-c", 130), ("exception", 1), ("exit", 3), ("SIGKILL", -9)],
)
def test_however_it_ends_the_terminal_stays_whole(how: str, code: int) -> None:
    end = {"exception": "raise RuntimeError('lost')", "exit": "sys.exit(3)"}.get(how, f"time.sleep({LIMIT_S})")

    def answer(sent: str, terminal: int, process: int) -> bool:
        if "working" not in sent:
            return False
        if how == "ctrl-c":
            os.write(terminal, b"\x03")
        elif how.startswith("SIG"):
            os.kill(process, signal.Signals[how])
        return True

    status, sent = in_terminal(f'interrupt.listen(interrupt.leave)\ndoing("working")\n{end}', answer=answer)
    assert status == code
    assert "?25l" not in sent, "the cursor was hidden"
    if how != "SIGKILL":
        lines = Screen(sent, 80).lines
        assert not any("working …" in line for line in lines), lines
        assert lines[-1] == ""


@pytest.mark.slow
def test_a_forked_process_neither_draws_nor_waits() -> None:
    code = """
import threading
held = threading.Event()
def hold():  # as the thread that draws does now and then
    with LINE._lock:
        held.set()
        time.sleep(3)
doing("working")
threading.Thread(target=hold).start()
held.wait()
if not os.fork():
    signal.alarm(20)
    print("child")
    os._exit(0)
status = os.wait()[1]
os.write(1, f"status {status}\\n".encode())
"""
    status, sent = in_terminal(code)
    assert status == 0
    assert "child\r\n" in sent
    assert "status 0\r\n" in sent


# ---- a run's line


def live(metrics: dict[str, float], step: int, max_steps: int, seconds: float) -> Live:
    service = Live()
    service.run = SimpleNamespace(  # type: ignore[assignment]
        progress=SimpleNamespace(summary=metrics),
        plan=SimpleNamespace(max_steps=max_steps),
        runtime=SimpleNamespace(compile=True),
    )
    service.step, service.first = step, (1, time.monotonic() - seconds)
    service.began = time.monotonic() - seconds
    return service


METRICS = {
    "train/loss": 3.21456,
    "throughput/tokens_per_second": 98_304.0,
    "throughput/mfu": 0.4174,
    "memory/peak_allocated_gib": 61.53,
}


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (120, "501/2,000  loss 3.2146  98.3k tok/s  MFU 41.7%  61.5 GiB  0:05:00 left"),
        (79, "501/2,000  loss 3.2146  98.3k tok/s  MFU 41.7%  61.5 GiB  0:05:00 left"),
        (59, "501/2,000  loss 3.2146  98.3k tok/s  0:05:00 left"),
        (45, "501/2,000  loss 3.2146  0:05:00 left"),
        (12, "501/2,000"),
    ],
)
def test_the_least_important_columns_leave_a_narrow_terminal_first(columns: int, shown: str) -> None:
    line = live(METRICS, 501, 2000, 100.0).draw(columns).plain
    assert len(line) <= columns
    assert line.lstrip("━─ ") == shown
    assert line.startswith("━") == (columns > 12)


def test_before_the_first_step_is_done_the_line_says_so() -> None:
    service = live({}, 0, 2000, 42.0)
    service.first = None
    assert service.draw(79).plain.endswith("  0/2,000  the first step, which compiles … 42 s")


@pytest.mark.parametrize(("done", "full"), [(0.0, 0), (0.5, 15), (1.0, 30), (1.7, 30)])
def test_the_bar_is_as_full_as_the_work_is_done(done: float, full: int) -> None:
    assert bar_line(done, [], 79).plain == "━" * full + "─" * (30 - full)


# ---- lines beside it


def test_a_terminal_gets_long_lines_broken_between_words_and_paths_whole() -> None:
    text = "data       a text of many words that stands in a narrow terminal\nrun        " + "/x" * 30
    assert folded(text, 40).splitlines() == [
        "data       a text of many words that",
        "           stands in a narrow terminal",
        "run",
        "           " + "/x" * 30,
    ]


def test_the_summary_of_a_run_is_of_all_its_processes(tmp_path: Path) -> None:
    folder = tmp_path / "a run"
    folder.mkdir()
    speed, mfu, peak = "throughput/tokens_per_second", "throughput/mfu", "memory/peak_allocated_gib"
    records = [
        {"step": 0, "tokens": 0, "val/loss": 11.0},
        {"step": 10, "tokens": 1000, "train/loss": 4.0, speed: 100.0, mfu: 0.2, peak: 3.0},
        {"step": 10, "tokens": 1000, "val/loss": 3.25},
        {"step": 20, "tokens": 4000, "train/loss": 4.0, speed: 300.0, mfu: 0.4, peak: 2.0},
        {"step": 20, "tokens": 4000, "val/loss": "nan"},
        {"step": 30, "tokens": 4000, "val/loss": 3.5},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "model.safetensors").touch()
    assert closing_lines(folder) == [
        "best       validation loss 3.2500 at step 10",
        "speed      200 tokens/s on average, MFU 30.0%",
        "memory     3.0 GiB at most",
        f"next       python -m scripts.generate '{folder}' \"Once upon a time\"",
        f"           python -m scripts.report '{folder}'",
    ]


def test_a_command_that_is_longer_than_the_terminal_can_still_be_copied(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 40)
    folder.mkdir()
    (folder / "model.safetensors").touch()
    wide, narrow = ("\n".join(closing_lines(folder, columns)) for columns in (None, 50))
    assert "\\" not in wide
    commands = [" ".join(text.partition("next ")[2].replace("\\\n", " ").split()) for text in (wide, narrow)]
    assert commands[0] == commands[1]
    assert all(len(line) <= 50 or str(folder) in line for line in narrow.splitlines())


@pytest.mark.parametrize("record", [None, "", "no JSON\n"])
def test_a_summary_leaves_out_what_no_record_says(tmp_path: Path, record: str | None) -> None:
    if record is not None:
        (tmp_path / "metrics.jsonl").write_text(record)
    assert [line.split()[0] for line in closing_lines(tmp_path)] == ["memory", "next"]
    assert closing_lines(tmp_path)[1].startswith("next       python -m scripts.report "), "no model is there"


def train_in_terminal(folder: Path, *settings: str, columns: int) -> Screen:
    code = f"os.chdir({str(folder)!r}); sys.argv = {['train.py', 'run_dir=r', *settings]!r}\n"
    code += f"import runpy; runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')"
    status, sent = in_terminal(code, columns, OMP_NUM_THREADS="1")
    assert status == 0, sent
    return Screen(sent, columns)


@pytest.mark.slow
def test_a_run_in_a_narrow_terminal_shows_all_of_it_and_wraps_nothing(tmp_path: Path) -> None:
    settings = ["logger=none", "device=cpu", "max_steps=12", "seq_len=64", "batch_size=2", "eval_tokens=1024"]
    settings += ["log_every=4", "sample_tokens=0", "data=synthetic"]
    screen = train_in_terminal(tmp_path, *settings, columns=60)
    assert screen.wrapped == 0, screen.lines
    assert screen.lines[-2:] == ["r", ""]
    assert any("loading PyTorch …" in line for line in screen.seen)
    assert any(re.search(r"evaluating  ━*─*  \d/\d batches", line) for line in screen.seen), screen.seen
    assert any(re.search(r"━─* *\d+/12  loss", line) for line in screen.seen), screen.seen
    assert not any("TFLOP/s" in line for line in screen.lines)
    assert any(line.startswith("best       validation loss") for line in screen.lines)

    screen = train_in_terminal(tmp_path, columns=80)
    assert any(line.startswith("verifying step-00000012  ") for line in screen.seen), screen.seen
    assert "finished   12 of 12 steps: nothing is left to do" in screen.lines
    assert any(line.startswith("best       validation loss") for line in screen.lines)
