from __future__ import annotations

import bz2
import errno
import gzip
import json
import lzma
import os
import random
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import files
from data.config import TextData
from data.sources import Document, open_source


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


def test_links_are_followed_and_lead_to_each_file_once(tmp_path, read):
    for name in ("corpus/a.txt", "corpus/sub/b.txt", "elsewhere/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "corpus" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "corpus" / "sub" / "up").symlink_to("..")  # round and round
    (tmp_path / "corpus" / "z.txt").symlink_to("a.txt")
    for path in ("corpus", "corpus/**/*.txt"):
        assert [document.name for document in read(tmp_path / path)] == ["a.txt", "link/c.txt", "sub/b.txt"]
    (tmp_path / "corpus" / "gone.txt").symlink_to("nowhere")
    for path in ("corpus", "corpus/*"):
        with pytest.raises(ValueError, match=r"cannot read .*gone\.txt: No such file"):
            read(tmp_path / path)


def test_a_folder_that_cannot_be_read_is_not_left_out(tmp_path, read, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("text")
    scandir = os.scandir

    def refuse(folder):  # no folder refuses root
        if os.path.basename(folder) == "sub":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        return scandir(folder)

    monkeypatch.setattr(files.os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"cannot read .*sub: Permission denied"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_a_path_that_no_file_can_have_is_one_line(tmp_path, read, name):
    with pytest.raises(ValueError, match=r"data\.path=.* (does not exist|cannot be read: File name too long)") as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_glob_names_documents_from_its_fixed_part(tmp_path, read):
    for name in ("a/x.txt", "b/deep/y.txt", "b/deep/z.log"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [document.name for document in read(f"{tmp_path}/**/*")] == ["a/x.txt", "b/deep/y.txt"]


def test_a_file_named_outright_is_read_whatever_its_suffix(tmp_path, read):
    (tmp_path / "book [1]").write_text("text")
    assert read(tmp_path / "book [1]") == [Document("book [1]", "text")]


def test_a_jsonl_line_is_a_document(tmp_path, read):
    lines = [{"text": "one\u2028still one"}, {"text": "two", "id": 2}, {"text": "  "}, {"text": None}]
    content = "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n"
    (tmp_path / "d.jsonl").write_text(content, encoding="utf-8")
    assert read(tmp_path / "d.jsonl") == [
        Document("d.jsonl:00000001", "one\u2028still one"),
        Document("d.jsonl:00000003", "two"),
    ]


def test_a_byte_order_mark_is_no_text_and_capitals_change_no_suffix(tmp_path, read):
    (tmp_path / "A.TXT").write_bytes("\ufeffprose".encode())
    (tmp_path / "B.JSONL.GZ").write_bytes(gzip.compress(b'\xef\xbb\xbf{"text": "one"}\n{"text": "two"}\n'))
    assert [document.text for document in read(tmp_path)] == ["prose", "one", "two"]


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
        table = pa.BufferOutputStream()
        pq.write_table(pa.table({"text": ["row"]}), table)
        (tmp_path / f"table.parquet.{suffix}").write_bytes(pack(table.getvalue().to_pybytes()))
    texts = [document.text for document in read(tmp_path)]
    assert sorted(texts) == sorted(["gz é", "bz2 é", "xz é", "zst é"] + ["a", "b", "row"] * 4)
    for suffix, pack in packers.items():
        path = tmp_path / f"cut.txt.{suffix}"
        path.write_bytes(pack(os.urandom(9999))[:-9])
        with pytest.raises(ValueError, match=rf"cannot unpack .*cut\.txt\.{suffix} .*damaged or cut short"):
            read(path)


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
    binary = pa.array([b"good", b"bad \xff"], pa.binary())
    pq.write_table(pa.table({"text": binary.view(pa.string())}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet:1 is not UTF-8 \(byte 4\): repair the row"):
        read(tmp_path / "b.parquet")
    content = bytearray((tmp_path / "d.parquet").read_bytes())
    content[len(content) // 2 : -len(content) // 4] = bytes(len(content))[len(content) // 2 : -len(content) // 4]
    (tmp_path / "d.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"d\.parquet is damaged at row \d+"):
        read(tmp_path / "d.parquet", field="body")


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
    later = time.time_ns() + 10**10
    monkeypatch.setattr(files.time, "time_ns", lambda: later)
    (first,), size = files.hash_files([path], cache)
    assert size == 4
    with monkeypatch.context() as patched:
        patched.setattr(files.hashlib, "file_digest", lambda *_: pytest.fail("hashed again"))
        assert files.hash_files([path], cache) == ([first], 4)
    before = path.stat()
    path.write_text("abce")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as tools do that keep the times of what they copy
    (second,), _ = files.hash_files([path], cache)
    assert second != first
    monkeypatch.undo()
    monkeypatch.setattr(files, "REMEMBERED_BYTES", 4)
    path.write_text("abcf")  # just now: within a tick of the clock it could change once more
    files.hash_files([path], str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()
