from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data import disk

ROOT = Path(__file__).parents[2]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_whole_and_keeps_the_rights_that_others_have(tmp_path):
    file = tmp_path / "a"
    disk.write_whole(file, "first")
    disk.write_whole(file, b"\xffsecond")
    assert file.read_bytes() == b"\xffsecond"
    assert names(tmp_path) == ["a"]
    plain = tmp_path / "plain"
    plain.write_text("")
    assert file.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("failing", ["fsync", "replace", "open", "write"])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing):
    file = tmp_path / "a"
    file.write_text("old")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        if failing == "write":
            patched.setattr(Path, "write_bytes", lambda path, data: (path.touch(), full()))
        else:
            patched.setattr(disk.os, failing, full)
        with pytest.raises(OSError, match="No space left"):
            disk.write_whole(file, "new")
    assert file.read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_a_file_is_on_the_disk_before_it_has_its_name_and_its_folder_after(tmp_path, monkeypatch):
    calls, sync, replace = [], disk.sync, os.replace
    monkeypatch.setattr(disk, "sync", lambda path: calls.append(("sync", path.name)) or sync(path))
    monkeypatch.setattr(disk.os, "replace", lambda a, b: calls.append(("replace", b.name)) or replace(a, b))
    disk.write_whole(tmp_path / "a", "text")
    part = disk.part_name(tmp_path / "a").name
    assert calls == [("sync", part), ("replace", "a"), ("sync", tmp_path.name)]


def test_a_folder_in_the_making_is_gone_afterwards(tmp_path):
    with disk.part_of(tmp_path / "a") as part:
        (part / "file").write_text("text")
        assert part.parent == tmp_path
        part.rename(tmp_path / "a")
    with pytest.raises(KeyError), disk.part_of(tmp_path / "b") as part:
        raise KeyError
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("size", [0, 1, disk.READ_BYTES, disk.READ_BYTES + 1])
def test_a_hash_is_of_every_byte(tmp_path, size):
    data = os.urandom(size)
    (tmp_path / "a").write_bytes(data)
    expected = hashlib.sha256(data).hexdigest()
    assert disk.sha256_file(tmp_path / "a") == disk.sha256_file(tmp_path / "a", from_disk=True) == expected
    assert disk.sha256(data) == expected
    assert disk.sha256("é") == hashlib.sha256("é".encode()).hexdigest()


def test_a_lock_is_one_process_s_and_goes_with_it(tmp_path):
    file = tmp_path / "lock"
    code = """
import sys
from data import disk
with open(sys.argv[1], "a") as file:
    print(disk.try_lock(file), flush=True)
    sys.stdin.read(1)
"""
    command = [sys.executable, "-c", code, str(file)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        with file.open("a") as here:
            assert not disk.try_lock(here)
            assert not disk.try_lock(here, shared=True)
        process.kill()
    with file.open("a") as here, file.open("a") as other:
        assert disk.try_lock(here, shared=True)
        assert disk.try_lock(other, shared=True)
        assert not disk.try_lock(other)


def test_who_makes_a_thing_second_is_told_and_waits(tmp_path):
    told = []

    def make():
        raise AssertionError("nobody else does")

    with disk.alone(tmp_path / "a", make):
        pass
    code = """
import sys
from data import disk
from pathlib import Path
with disk.alone(Path(sys.argv[1]), lambda: None):
    print("mine", flush=True)
    sys.stdin.read(1)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "a")]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with disk.alone(tmp_path / "a", lambda: (told.append(1), process.kill())):
            assert told == [1]


def test_a_seal_shows_any_change(tmp_path):
    body = {"a": 1, "b": [1.5, "é"], "c": {"d": None}}
    text = disk.sealed(body)
    assert disk.unsealed(text) == disk.unsealed(disk.sealed(body, indent=2)) == body
    content = text.encode()
    for place in range(len(content) - 1):
        changed = bytearray(content)
        changed[place] ^= 1
        try:
            assert disk.unsealed(changed.decode()) == body  # white space
        except ValueError:
            continue
        assert chr(content[place]).isspace()
    for wrong in ("", "[]", "7", "{}", '{"a": 1}', "[" * 100_000):
        with pytest.raises(ValueError, match=r"no JSON object|not what was written"):
            disk.unsealed(wrong)
    assert disk.unsealed('{"a": 1}', optional=True) == {"a": 1}
    with pytest.raises(ValueError, match="not what was written"):
        disk.unsealed('{"a": 1, "seal": "0"}', optional=True)
