from __future__ import annotations

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import hub
from data.config import HubData
from data.sources import open_source


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


def test_a_folder_that_is_not_there_is_no_dataset_of_the_hub(tmp_path):
    with pytest.raises(ValueError, match=r"data\.path=.*nowhere does not exist: name a folder, or a dataset"):
        open_source(HubData(path=str(tmp_path / "nowhere")))


def test_a_hub_that_cannot_be_reached_is_one_line_within_seconds(monkeypatch):
    for name in ("HTTPS_PROXY", "https_proxy", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"data\.path=a/b: cannot reach 127\.0\.0\.1 .*HF_HUB_OFFLINE=1") as error:
        open_source(HubData(path="a/b"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            type("DatasetNotFoundError", (Exception,), {})("Dataset 'a/b' is a gated dataset on the Hub."),
            "gated: .*HF_TOKEN",
        ),
        (type("DatasetNotFoundError", (Exception,), {})("Dataset 'a/b' doesn't exist"), "not on the Hub"),
        (
            RuntimeError("Dataset scripts are no longer supported, but found b.py"),
            "script of its own, which is never run",
        ),
        (ConnectionError("Couldn't reach 'a/b' on the Hub (OfflineModeIsEnabled)"), "HF_HUB_OFFLINE forbids"),
        (ValueError("Bad split: x.\nAvailable: ['train']"), r"be loaded: Bad split: x\. Available: \['train'\]"),
    ],
)
def test_what_a_hub_cannot_deliver_is_one_line(monkeypatch, error, message):
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
