from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import hub
from data.config import HubData
from data.sources import open_source

ROOT = Path(__file__).parents[2]


def documents(source):
    return [document for _, document in source.documents()]


TEXTS = [f"document {i}\n" * (i + 1) for i in range(40)]


@pytest.fixture(params=["parquet folder", "save_to_disk", "DatasetDict"])
def dataset_folder(request, tmp_path):
    """Real datasets on disk, as `datasets` writes them."""
    dataset = datasets.Dataset.from_dict({"id": range(40), "body": TEXTS})
    if request.param == "parquet folder":
        (tmp_path / "d").mkdir()
        dataset.to_parquet(str(tmp_path / "d" / "train-00000-of-00001.parquet"))
    elif request.param == "save_to_disk":
        dataset.save_to_disk(str(tmp_path / "d"))
    else:
        datasets.DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(str(tmp_path / "d"))
    return str(tmp_path / "d")


def test_a_dataset_on_disk_is_read_in_order_and_in_parts(dataset_folder, monkeypatch):
    monkeypatch.setattr(hub, "ROWS", 16)
    source = open_source(HubData(path=dataset_folder, field="body"))
    assert len(source.parts) == 3
    assert [document.text for document in documents(source)] == TEXTS
    assert next((part, document.name[-2:]) for part, document in source.documents(2)) == (2, "32")
    assert open_source(HubData(path=dataset_folder, field="body")).fingerprint == source.fingerprint


def test_max_bytes_takes_the_first_documents(dataset_folder):
    source = open_source(HubData(path=dataset_folder, field="body", max_bytes=30))
    assert [document.text for document in documents(source)] == TEXTS[:2]
    assert source.size == 30


def test_a_dataset_is_known_by_its_bytes_wherever_it_lies(dataset_folder, tmp_path):
    before = open_source(HubData(path=dataset_folder, field="body")).fingerprint
    shutil.move(dataset_folder, tmp_path / "moved")
    moved = HubData(path=str(tmp_path / "moved"), field="body")
    assert open_source(moved).fingerprint == before
    # Other bytes, with the same name, size and time, and the same facts beside them.
    data = [path for path in (tmp_path / "moved").rglob("*") if path.suffix in (".arrow", ".parquet")]
    changed = max(data, key=lambda path: path.stat().st_size)  # the train split
    times = changed.stat().st_atime_ns, changed.stat().st_mtime_ns
    if changed.suffix == ".arrow":
        changed.write_bytes(changed.read_bytes().replace(b"document 7", b"document X"))
    else:
        pq.write_table(pa.table({"body": [text.replace("7", "X") for text in TEXTS]}), changed)
    os.utime(changed, ns=times)
    source = open_source(moved)
    assert source.fingerprint != before
    assert documents(source)[7].text.startswith("document X")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"field": "text"}, r"has no column 'text': set data\.field to one of 'id', 'body'"),
        ({"field": "id"}, r":0 field 'id' is int, not text"),
        ({"field": "body", "split": "nowhere"}, r"data\.path=.* cannot be loaded: Unknown split .nowhere"),
        ({"field": "body", "streaming": True}, r"is a folder, which is read in place: leave out data\.streaming"),
    ],
)
def test_what_a_dataset_does_not_have_is_one_line(tmp_path, settings, message):
    (tmp_path / "d").mkdir()
    pq.write_table(pa.table({"id": range(40), "body": TEXTS}), tmp_path / "d" / "train.parquet")
    with pytest.raises(ValueError, match=message) as error:
        documents(open_source(HubData(path=str(tmp_path / "d"), **settings)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "state.json").write_text("{"), r"cannot be loaded: "),
        (lambda folder: next(folder.glob("*.arrow")).unlink(), r"cannot be loaded: .*No such file.*\.arrow"),
        (lambda folder: os.truncate(next(folder.glob("*.arrow")), 2000), r"cannot be loaded: Expected to .*read"),
    ],
)
def test_a_damaged_dataset_is_one_line(tmp_path, break_it, message):
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(tmp_path / "d"))
    break_it(tmp_path / "d")
    with pytest.raises(ValueError, match=rf"data\.path=.*d {message}") as error:
        documents(open_source(HubData(path=str(tmp_path / "d"))))
    assert "\n" not in str(error.value)


def test_a_file_that_datasets_cannot_load_says_why(tmp_path):
    for name, content, message in (
        ("train.parquet", b"PAR1 and no more", "Parquet magic bytes not found"),
        ("train.jsonl", b'{"text": "x"}\n{oops', "JSON parse error"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"data\.path=.* cannot be loaded: {message}"):
            open_source(HubData(path=str(folder)))


def test_splits_of_a_saved_dataset_are_those_it_has(tmp_path):
    dataset = datasets.Dataset.from_dict({"text": TEXTS})
    dataset.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": dataset, "test": dataset}).save_to_disk(str(tmp_path / "two"))
    with pytest.raises(ValueError, match=r"one was saved as one dataset, without splits: leave out data\.split=test"):
        open_source(HubData(path=str(tmp_path / "one"), split="test"))
    with pytest.raises(ValueError, match=r"two has no split 'val': set data\.split to one of 'train', 'test'"):
        open_source(HubData(path=str(tmp_path / "two"), split="val"))


def test_a_file_is_no_dataset(tmp_path):
    (tmp_path / "d.parquet").write_text("")
    with pytest.raises(ValueError, match=r"d\.parquet is a file: name the folder it is in, or read it with data=text"):
        open_source(HubData(path=str(tmp_path / "d.parquet")))


def test_a_folder_that_is_not_there_is_no_dataset_of_the_hub(tmp_path):
    with pytest.raises(ValueError, match=r"data\.path=.*nowhere does not exist: name a folder, or a dataset"):
        open_source(HubData(path=str(tmp_path / "nowhere")))


ANSWERS = {"missing": (404, "RepoNotFound"), "private": (401, "RepoNotFound"), "gated": (403, "GatedRepo")}
DOORS = {"/": (200, ""), "/busy": (503, ""), "/hangs": (200, "")}


class FakeHub(BaseHTTPRequestHandler):
    """Answers as the Hub does; what it has to say is in the name of the repository."""

    asked = 0
    end = Event()

    def do_HEAD(self):
        type(self).asked += 1
        if self.path == "/hangs":
            type(self).end.wait()
        name = next((name for name in ANSWERS if f"{name}/x" in self.path), None)
        status, code = ANSWERS[name] if name else DOORS.get(self.path, (404, "EntryNotFound"))
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST = do_HEAD

    def log_message(self, *_):
        pass


ASK = """
import os, sys, time
from data import hub
from data.config import HubData, HubTokenizer
waited = []
time.sleep = waited.append  # between two attempts
for path in sys.argv[1:]:
    hub.PATIENCE_S = 1 if "/hangs" in path else 900
    if "://" in path:
        os.environ["HF_ENDPOINT"], path = path.split()  # another door; the client would go on to the one it knows
    for ask in (
        lambda: hub.open_hub(HubData(path=path)),
        lambda: hub.open_hub(HubData(path=path, streaming=True)),
        lambda: hub.fetch_tokenizer(HubTokenizer(path=path)),
    ):
        try:
            ask()
        except ValueError as error:
            print(error)
print(sum(waited))
"""


@pytest.fixture
def ask(tmp_path):
    """What the Hub's own client, in a process of its own, says to `data=hf`, to streaming and to `tokenizer=hub`."""

    def ask(*paths, **environment):
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
        done = subprocess.run(
            [sys.executable, "-c", ASK, *paths],
            cwd=ROOT,
            env=kept | {"HF_HOME": str(tmp_path)} | environment,
            capture_output=True,
            text=True,
        )
        assert done.stderr == ""
        *lines, waited = done.stdout.splitlines()
        assert waited == "0"  # left alone, the client tries again for half a minute each
        return lines

    return ask


@pytest.mark.slow
def test_what_the_hub_does_not_give_is_one_line(ask):
    with ThreadingHTTPServer(("127.0.0.1", 0), FakeHub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        door = f"http://127.0.0.1:{server.server_port}"
        lines = ask(
            *("missing/x", "private/x", "gated/x", "plain/x"),
            *(f"{door}/busy a/b", f"{door}/hangs a/b", "http://127.0.0.1:9 a/b"),
            HF_ENDPOINT=door,
        )
        FakeHub.end.set()
        server.shutdown()
    assert len(lines) == 21
    not_there = r"path=(missing|private)/x is not on the Hub, or not for you to see: check the name"
    expected = [*[not_there] * 6, *[r"path=gated/x is gated: accept its terms on its page"] * 3]
    expected += [r"data\.path=plain/x is not on the Hub"] * 2 + [r"tokenizer\.path=plain/x has no tokenizer\.json"]
    expected += [r"path=a/b: cannot reach 127\.0\.0\.1 \(it answers 503\)"] * 3
    expected += [r"path=a/b: cannot reach 127\.0\.0\.1 \(timed out\)"] * 3
    expected += [r"path=a/b: cannot reach 127\.0\.0\.1 \(.*refused\).*HF_HUB_OFFLINE=1"] * 3
    for line, message in zip(lines, expected, strict=True):
        assert re.search(message, line), line
    assert FakeHub.asked < 50


def test_a_proxy_that_does_not_answer_is_one_line(ask):
    lines = ask("a/b", HTTPS_PROXY="http://127.0.0.1:9")
    assert len(lines) == 3
    assert all(re.search(r"path=a/b: cannot reach huggingface\.co \(.*refused\)", line) for line in lines)


def test_offline_what_is_not_in_the_cache_is_one_line(ask):
    lines = ask("a/b", HF_HUB_OFFLINE="1")
    assert len(lines) == 3
    assert all("path=a/b is not in the cache, and HF_HUB_OFFLINE forbids to fetch it" in line for line in lines)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            RuntimeError("Dataset scripts are no longer supported, but found b.py"),
            "script of its own, which is never run",
        ),
        (ValueError("Bad split: x.\nAvailable: ['train']"), r"be loaded: Bad split: x\. Available: \['train'\]"),
    ],
)
def test_what_datasets_refuses_is_one_line(monkeypatch, error, message):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(hub, "_check_reachable", lambda config: None)
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ValueError, match=rf"data\.path=a/b .*{message}") as told:
        open_source(HubData(path="a/b"))
    assert "\n" not in str(told.value)


def test_a_stream_is_read_up_to_max_bytes_and_known_by_its_commit(monkeypatch):
    read = []

    def rows():
        for number in range(10):
            read.append(number)
            yield {"text": f"row {number}"} if number != 1 else {"text": None}

    stream = datasets.IterableDataset.from_generator(rows)
    monkeypatch.setattr(hub, "_load", lambda config: stream)
    monkeypatch.setattr(hub, "_commit", lambda config: config.revision)
    source = open_source(HubData(path="a/b", streaming=True, max_bytes=10))
    assert [document.text for document in documents(source)] == ["row 0", "row 2"]
    assert max(read) < 4
    other = open_source(HubData(path="a/b", streaming=True, max_bytes=10, revision="v2"))
    assert other.fingerprint != source.fingerprint


@pytest.mark.parametrize("when", ["loading", "reading"])
def test_a_folder_that_changes_while_it_is_read_is_named(tmp_path, monkeypatch, when):
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(tmp_path / "d"))
    (file,) = (tmp_path / "d").glob("*.arrow")
    load = hub._load_folder

    def disturb():
        file.write_bytes(file.read_bytes().replace(b"document 7", b"document X"))

    if when == "loading":
        monkeypatch.setattr(hub, "_load_folder", lambda *given: [load(*given), disturb()][0])
        with pytest.raises(ValueError, match=r"\.arrow changed while it was read, and nothing was kept"):
            open_source(HubData(path=str(tmp_path / "d")))
    else:
        source = open_source(HubData(path=str(tmp_path / "d")))
        disturb()
        with pytest.raises(ValueError, match=r"\.arrow changed while it was read, and nothing was kept"):
            source.check()
