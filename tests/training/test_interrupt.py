"""Signals, sent to real processes. tests/test_command_line.py sends them to whole runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from processes import LIMIT_S

from training.interrupt import Interrupt

ROOT = Path(__file__).resolve().parents[2]
WAITING = """
import subprocess, sys, threading, time
from pathlib import Path
from training.interrupt import Interrupt

early = threading.Thread(target=time.sleep, args=(3600,), daemon=True)  # as a library's, from before
early.start()
with Interrupt(Path(sys.argv[1]), None) as interrupt:
    child = subprocess.Popen([sys.executable, "-c", "import time; print('up', flush=True); time.sleep(3600)"])
    while not interrupt.reason():
        time.sleep(0.01)
    time.sleep(0.5)
    print(interrupt.reason(), child.poll(), flush=True)
    {then}
    child.kill()
print("left", flush=True)
time.sleep(3600)
"""


def begin(folder: Path, then: str = "pass") -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING.format(then=then), str(folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # type: ignore[arg-type, return-value]
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    """And all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT"])
def test_a_signal_to_the_whole_group_is_noted_and_ends_nothing_that_the_run_has_started(tmp_path, name):
    process = begin(tmp_path)
    assert process.stdout is not None
    try:
        os.killpg(process.pid, getattr(signal, name))
        assert process.stdout.readline() == f"{name} None\n"
        assert process.stdout.readline() == "left\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT_S) == -signal.SIGTERM, "what it does afterwards is as before"
    finally:
        end(process)


def test_a_second_ctrl_c_ends_a_process_whatever_its_main_thread_is_at(tmp_path):
    process = begin(tmp_path, then="threading.Event().wait()")
    assert process.stdout is not None
    try:
        os.killpg(process.pid, signal.SIGINT)
        assert process.stdout.readline() == "SIGINT None\n"
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(LIMIT_S) == 130
    finally:
        end(process)


def test_a_stop_file_that_cannot_be_removed_stops_all_the_same(tmp_path):
    (tmp_path / "STOP").mkdir()
    interrupt = Interrupt(tmp_path, None)
    assert interrupt.reason() == "the STOP file"
    assert (interrupt.end(tmp_path).code, str(interrupt.end(tmp_path))) == (
        75,
        f"interrupted by the STOP file; saved {tmp_path}",
    )


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 75), ("SIGHUP", 75), ("SIGINT", 130)])
def test_before_there_is_anything_to_save_a_signal_ends_a_process_whose_output_nobody_reads(name, code):
    program = "from training.interrupt import *; listen(leave); print('up', flush=True); time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # type: ignore[arg-type, return-value]
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == b"up\n"
    process.stdout.close()
    process.stderr.close()
    process.send_signal(getattr(signal, name))
    assert process.wait(60) == code
