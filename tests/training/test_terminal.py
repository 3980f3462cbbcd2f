"""What is printed, on streams that take less than UTF-8, or nothing any more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from training.terminal import plain

ROOT = Path(__file__).resolve().parents[2]
SAYS = """
from training import terminal
terminal.use_utf8()
terminal.secure()
for _ in range(int(sys.argv[2])):
    terminal.say(sys.argv[1])
terminal.say_error(sys.argv[1])
print(open("settings.yaml").read())
sys.exit(75)
"""


def program(text: str, times: int = 1, redirect: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{SAYS}"
    command = ["sh", "-c", f'"$@" {redirect}', "sh", sys.executable, "-c", code, text, str(times)]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHON"))}
    return subprocess.run(command, env=inherited | environment, capture_output=True, timeout=60)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "settings.yaml").write_text("S × S", "utf-8")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("environment", "printed"),
    [
        ({"PYTHONIOENCODING": "ascii"}, b"4 x 8, ?"),
        ({"PYTHONIOENCODING": "latin-1"}, "4 × 8, ?".encode("latin-1")),
        ({"PYTHONIOENCODING": "cp1252"}, "4 × 8, ?".encode("cp1252")),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, b"4 x 8, ?"),
        ({"LC_ALL": "C.UTF-8"}, "4 × 8, 日".encode()),
    ],
)
def test_output_in_any_encoding_ends_no_run_and_files_are_utf8(environment: dict[str, str], printed: bytes) -> None:
    done = program("4 × 8, 日", **environment)
    assert done.returncode == 75, done.stderr
    assert done.stdout.splitlines()[0] == printed
    assert done.stderr.splitlines() == [b"error: " + printed]
    assert len(done.stdout.splitlines()) == 2, "a file in UTF-8 was read"


@pytest.mark.parametrize("redirect", [">&-", "2>&-", ">&- 2>&-", "> /dev/full", "> /dev/full 2>&1"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_goes_nowhere_changes_no_exit_code(redirect: str, unbuffered: str) -> None:
    done = program("4 × 8", redirect=redirect, PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 75
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr


def test_a_reader_that_went_away_changes_no_exit_code() -> None:
    ends = "echo $? >&3; } 3>code 2>&1 | head -1; "  # of both streams
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{SAYS}"
    command = ["sh", "-c", '{ "$@"; ' + ends, "sh", sys.executable, "-c", code, "a line", "20000"]
    subprocess.run(command, capture_output=True, timeout=60)
    assert Path("code").read_text().strip() == "75"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred", r"\x1b[31mred"),
        ("a\rb\x07\x9b", r"a\rb\x07\x9b"),
        ("\u202eabc", r"\u202eabc"),
        ("two\nlines\tand × 日本 é", "two\nlines\tand × 日本 é"),
    ],
)
def test_what_a_terminal_would_obey_is_shown_instead(text: str, shown: str) -> None:
    assert plain(text) == shown
