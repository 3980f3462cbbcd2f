from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import random
import re
import sysconfig

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import files, hub
from data.config import HubData, StdlibData, SyntheticData, TextData
from data.sources import Document, Source, open_source, write_copy, write_needle
from data.split import choose_split, cuts_tails


@pytest.fixture
def open_text(tmp_path):
    """The source of data=text; its cache is in a folder of the test."""
    return lambda path, **fields: open_source(
        TextData(path=str(path), cache_dir=str(tmp_path.parent / "cache"), **fields)
    )


@pytest.fixture
def read(open_text):
    return lambda path, **fields: documents(open_text(path, **fields))


def documents(source):
    return [document for _, document in source.documents()]


# ------------------------------------------------------------------------------------------------ text files


def test_a_folder_is_read_recursively_sorted_and_named_by_relative_path(tmp_path, read):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b" / "two.md").write_text("two")
    (tmp_path / "one.txt").write_bytes(b"one\r\n")
    (tmp_path / "c.rs").write_text("// é", encoding="utf-8")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0")
    (tmp_path / ".git" / "notes.txt").write_text("hidden")
    (tmp_path / "blank.txt").write_text(" \n\t")
    (tmp_path / "empty.txt").write_text("")
    assert read(tmp_path) == [Document("b/two.md", "two"), Document("c.rs", "// é"), Document("one.txt", "one\r\n")]


def test_a_glob_names_documents_from_its_fixed_part(tmp_path, read):
    for name in ("a/x.txt", "b/deep/y.txt", "b/deep/z.log"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [document.name for document in read(f"{tmp_path}/**/*")] == ["a/x.txt", "b/deep/y.txt"]


def test_a_file_named_outright_is_read_whatever_its_suffix(tmp_path, read):
    (tmp_path / "book [1]").write_text("text")
    assert read(tmp_path / "book [1]") == [Document("book [1]", "text")]


def test_a_jsonl_line_is_a_document(tmp_path, read):
    lines = [{"text": "one\u2028still one"}, {"text": "two", "id": 2}, {"text": "  "}]
    content = "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n"
    (tmp_path / "d.jsonl").write_text(content, encoding="utf-8")
    assert read(tmp_path / "d.jsonl") == [
        Document("d.jsonl:00000001", "one\u2028still one"),
        Document("d.jsonl:00000003", "two"),
    ]


def test_a_parquet_row_is_a_document(tmp_path, read):
    pq.write_table(
        pa.table({"id": range(600), "body": [f"row {i}" for i in range(599)] + [None]}), tmp_path / "d.parquet"
    )
    found = read(tmp_path, field="body")
    assert [document.text for document in found] == [f"row {i}" for i in range(599)]
    assert found[-1].name == "d.parquet:00000598"


def test_compressed_files_hold_what_their_inner_suffix_says(tmp_path, read):
    def zstd(content):
        stream = pa.BufferOutputStream()
        with pa.CompressedOutputStream(stream, "zstd") as packed:
            packed.write(content)
        return stream.getvalue().to_pybytes()

    packers = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}
    for suffix, pack in packers.items():
        (tmp_path / f"prose.txt.{suffix}").write_bytes(pack(f"{suffix} é".encode()))
        (tmp_path / f"records.jsonl.{suffix}").write_bytes(pack(b'{"text": "a"}\n{"text": "b"}\n'))
        (tmp_path / f"picture.png.{suffix}").write_bytes(pack(b"\0"))
    texts = [document.text for document in read(tmp_path)]
    assert sorted(texts) == sorted(["gz é", "bz2 é", "xz é", "zst é"] + ["a", "b"] * 4)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"abc\0def", r"a\.txt is binary.*byte 3"),
        ("a.txt", b"abc\xff", r"a\.txt is not UTF-8 \(byte 3\)"),
        ("a.jsonl", b'{"text": "x"}\n{oops\n', r"a\.jsonl:2 is not valid JSON"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1 is not valid JSON"),
        ("a.jsonl", b'\n["x"]', r"a\.jsonl:2 is a JSON list"),
        ("a.jsonl", b'{"text": "\xff"}', r"a\.jsonl:1 is not UTF-8"),
        ("a.jsonl", b'{"body": "x", "id": 1}', r"a\.jsonl:1 has no field 'text'.*'body', 'id'"),
        ("a.jsonl", b'{"text": 5, "body": "x"}', r"a\.jsonl:1 field 'text' is int.*'text', 'body'"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"a\.jsonl:1 .*surrogate"),
        ("a.parquet", b"PAR1 and nothing more", r"a\.parquet is no parquet file, or cut short"),
        ("a.txt.gz", gzip.compress(b"text" * 9999)[:-9], r"cannot unpack .*a\.txt\.gz .*damaged or cut short"),
        ("a.txt.xz", lzma.compress(os.urandom(999))[:-50], r"cannot unpack .*a\.txt\.xz .*damaged or cut short"),
        ("a.jsonl.gz", b"not packed", r"cannot unpack .*a\.jsonl\.gz"),
    ],
)
def test_a_bad_file_is_one_line_naming_file_and_place(tmp_path, read, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_parquet_file_without_the_column_or_cut_short_is_named(tmp_path, read):
    table = pa.table({"body": [random.Random(i).randbytes(500).hex() for i in range(2000)]})
    pq.write_table(table, tmp_path / "d.parquet", compression="gzip", row_group_size=500)
    with pytest.raises(ValueError, match=r"d\.parquet has no column 'text': set data\.field to one of 'body'"):
        read(tmp_path)
    content = bytearray((tmp_path / "d.parquet").read_bytes())
    content[len(content) // 2 : -len(content) // 4] = bytes(len(content))[len(content) // 2 : -len(content) // 4]
    (tmp_path / "d.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"d\.parquet is damaged at row \d+"):
        read(tmp_path, field="body")


def test_missing_path_and_no_match_are_told_apart(tmp_path, read):
    with pytest.raises(ValueError, match=r"data\.path=.*nowhere does not exist"):
        read(tmp_path / "nowhere")
    (tmp_path / "a.csv").write_text("1,2")
    for path in (tmp_path, tmp_path / "*"):
        with pytest.raises(ValueError, match=r"no text files: looked for \.txt \.md"):
            read(path)


def test_a_file_that_goes_away_is_named(tmp_path, open_text):
    (tmp_path / "a.txt").write_text("x")
    source = open_text(tmp_path)
    (tmp_path / "a.txt").unlink()
    with pytest.raises(ValueError, match=r"cannot read .*a\.txt: No such file"):
        documents(source)


def test_the_fingerprint_is_of_names_contents_and_field(tmp_path, open_text):
    (tmp_path / "a.txt").write_text("one")
    first = open_text(tmp_path).fingerprint
    assert open_text(tmp_path).fingerprint == first
    assert open_text(tmp_path, field="body").fingerprint != first
    (tmp_path / "a.txt").write_text("two")
    second = open_text(tmp_path).fingerprint
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    assert len({first, second, open_text(tmp_path).fingerprint}) == 3


def test_hashes_of_large_files_are_remembered_until_they_change(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "REMEMBERED_BYTES", 4)
    path, cache = tmp_path / "a.txt", str(tmp_path / "cache")
    path.write_text("abcd")
    os.utime(path, (1, 1))
    (first,), size = files.hash_files([path], cache)
    assert size == 4
    with monkeypatch.context() as patched:
        patched.setattr(files.hashlib, "file_digest", lambda *_: pytest.fail("hashed again"))
        assert files.hash_files([path], cache) == ([first], 4)
    path.write_text("abce")  # just now: within a tick of the clock it could change once more
    (second,), _ = files.hash_files([path], cache)
    assert second != first
    before = path.stat()
    path.write_text("abcf")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert files.hash_files([path], cache)[0] != [second]


# ---------------------------------------------------------------------------------------------------- stdlib


def test_stdlib_reads_library_sources_and_no_tests(tmp_path, monkeypatch):
    for name in ("os.py", "json/decoder.py", "test/test_os.py", "json/tests/t.py", "site-packages/torch/a.py", "b.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1")
    (tmp_path / "latin.py").write_bytes(b"# \xe9")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert [document.name for document in documents(open_source(StdlibData()))] == ["json/decoder.py", "os.py"]


def test_the_standard_library_of_this_python_is_a_corpus_with_long_documents():
    source = open_source(StdlibData())
    found = documents(source)
    names = [document.name for document in found]
    assert names == sorted(set(names))
    assert {"os.py", "json/decoder.py"} < set(names)
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(name.split("/"))]
    assert 5e6 < sum(len(document.text) for document in found) < 20e6
    assert sum(len(document.text) > 60_000 for document in found) > 20
    sides = [side for document in found for side, _ in choose_split(source, 0.05)(document)]
    assert min(sides.count("train"), sides.count("val")) > 5


def test_a_zipped_stdlib_says_what_to_use_instead(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "python311.zip")})
    with pytest.raises(ValueError, match=r"no Python sources in .*python311\.zip.*data=text data\.path="):
        open_source(StdlibData())


# ------------------------------------------------------------------------------------------------------- hub

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


# ------------------------------------------------------------------------------------------------- synthetic


@pytest.mark.parametrize("task", ["copy", "needle"])
@pytest.mark.parametrize("length", [256, 1000, 40_000])
def test_synthetic_documents_have_the_length_and_are_the_same_every_time(task, length):
    config = SyntheticData(task=task, documents=3, length=length)
    first, second = documents(open_source(config)), documents(open_source(config))
    assert first == second
    assert len({document.text for document in first}) == 3
    assert all(len(document.text) in (length - 1, length) for document in first)
    assert documents(open_source(SyntheticData(task=task, documents=3, length=length, seed=1))) != first


def test_the_second_half_of_a_copy_is_the_first():
    first, second, end = write_copy(random.Random(0), 1000).split("\n")
    assert first == second
    assert len(first) == 499
    assert end == ""


def test_every_question_about_a_needle_has_its_answer_in_the_text_before():
    text = write_needle(random.Random(0), 20_000)
    questions = re.findall(r"What is the code of (\d+)\? The code of \1 is (\d+)\.\n", text)
    assert len(questions) == 9
    filler = text[: text.index("What is")]
    assert all(f"The code of {key} is {code}.\n" in filler for key, code in questions)


# ----------------------------------------------------------------------------------------------------- split


def source_of(*texts):
    return Source("a test", "", [lambda: (Document(str(i), text) for i, text in enumerate(texts))])


def sides(texts, fraction):
    split = choose_split(source_of(*texts), fraction)
    found = [pair for text in texts for pair in split(Document("", text))]
    return [text for side, text in found if side == "train"], [text for side, text in found if side == "val"]


def test_split_holds_out_whole_documents_and_loses_none():
    texts = [f"text of {i}\n" for i in range(1000)]
    train, val = sides(texts, 0.1)
    assert not set(train) & set(val)
    assert sorted(train + val) == sorted(texts)
    assert 60 < len(val) < 140
    assert not cuts_tails(choose_split(source_of(*texts), 0.1))


def test_split_of_a_document_does_not_depend_on_the_others():
    texts = [f"text of {i}\n" for i in range(1000)]
    assert sides(texts[::-1], 0.1)[1] == sides(texts, 0.1)[1][::-1]
    assert set(sides(texts[:500], 0.1)[1]) < set(sides(texts, 0.1)[1])


def test_copies_of_a_text_are_on_one_side():
    train, val = sides([f"text of {i % 400}\n" for i in range(800)], 0.3)
    assert not set(train) & set(val)
    assert len(train) + len(val) == 800


def test_a_single_document_is_cut_at_a_line_end():
    text = "".join(f"line {i}\n" for i in range(100))
    (train,), (val,) = sides([text], 0.1)
    assert train + val == text
    assert train.endswith("\n")
    assert 0.1 <= len(val) / len(text) <= 0.2
    assert cuts_tails(choose_split(source_of(text), 0.1))


def test_a_text_without_line_ends_is_cut_at_the_fraction():
    (train,), (val,) = sides(["ab\n" + "x" * 997], 0.1)
    assert (len(train), len(val)) == (900, 100)


def test_no_text_at_all_is_an_error():
    with pytest.raises(ValueError, match="no text in a test: every document is empty"):
        choose_split(source_of(" \n", ""), 0.05)
