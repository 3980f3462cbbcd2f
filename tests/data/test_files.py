from __future__ import annotations

import bz2
import errno
import gzip
import json
import lzma
import os
import random
import shutil
import socket
import subprocess
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import files, hashes, readers, zstd
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
        ("a.jsonl", b'{"body": "x", "id": 1}', r"a\.jsonl:1 has no field 'text': set data\.field to 'body'"),
        (
            "a.jsonl",
            b'{"text": 5, "body": "x"}',
            r"a\.jsonl:1 field 'text' is int, not text: set data\.field to 'body'",
        ),
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
    with pytest.raises(ValueError, match=r"d\.parquet has no column 'text': set data\.field to 'body'"):
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
        with pytest.raises(ValueError, match=r"no text files.*: looked for \.txt \.md"):
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
    monkeypatch.setattr(hashes, "REMEMBERED_BYTES", 4)
    path, cache = tmp_path / "a.txt", tmp_path / "cache"
    path.write_text("abcd")
    later = time.time_ns() + 10**10
    monkeypatch.setattr(hashes.time, "time_ns", lambda: later)
    (first,), stamps = hashes.hash_files([path], cache)
    assert stamps[path].size == 4
    with monkeypatch.context() as patched:
        patched.setattr(hashes.disk, "sha256_file", lambda *_: pytest.fail("hashed again"))
        assert hashes.hash_files([path], cache)[0] == [first]
    before = path.stat()
    path.write_text("abce")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as tools do that keep the times of what they copy
    (second,), _ = hashes.hash_files([path], cache)
    assert second != first
    monkeypatch.undo()
    monkeypatch.setattr(hashes, "REMEMBERED_BYTES", 4)
    path.write_text("abcf")  # just now: within a tick of the clock it could change once more
    hashes.hash_files([path], tmp_path / "new")
    assert not (tmp_path / "new").exists()


# ----------------------------------------------------------------------------- what counts as input, and what does not


@pytest.fixture
def told(tmp_path):
    """The names of what is read, and the line about what is not."""

    def look(path, **fields):
        lines: list[str] = []
        source = open_source(TextData(path=str(path), cache_dir=str(tmp_path.parent / "cache"), **fields), lines.append)
        return [document.name for document in documents(source)], "".join(lines)

    return look


def test_outputs_of_runs_are_never_input(tmp_path, told):
    for run in ("runs/one", "sweep/0", "sweep/1"):
        (tmp_path / run / "checkpoints").mkdir(parents=True)
        for name in ("run.lock", "config.yaml", "samples.md", "metrics.jsonl"):
            (tmp_path / run / name).write_text("what a model wrote")
    (tmp_path / "sweep" / "multirun.yaml").write_text("")
    (tmp_path / "sweep" / "table.md").write_text("a table")
    (tmp_path / "own.md").write_text("text")
    (tmp_path / "runs" / "notes.md").write_text("text beside runs")
    for path in (tmp_path, f"{tmp_path}/**/*.md", f"{tmp_path}/**/*"):
        names, line = told(path)
        assert names == ["own.md", "runs/notes.md"]
        assert "in folders of runs" in line
    with pytest.raises(ValueError, match=r"matches no text files \(left out 4 of 4 files: 4 in folders of runs"):
        told(tmp_path / "runs" / "one")
    assert told(tmp_path / "runs" / "one" / "samples.md")[0] == ["samples.md"]  # it is named


def test_what_is_left_out_is_counted_and_told_in_one_line(tmp_path, told):
    for name in ("a.txt", "b.log", "c.log", "Makefile", ".secret.txt", "._a.txt", ".#a.txt", "sub/.hidden/x.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    names, line = told(tmp_path)
    assert names == ["a.txt"]
    assert line == (
        "data       data.path: left out 8 of 9 files: 3 hidden, 2 .log, 2 pipes or devices, 1 without a suffix, "
        "and 1 hidden folders"
    )
    assert told(f"{tmp_path}/a.*") == (["a.txt"], "")
    names, line = told(f"{tmp_path}/*")
    assert names == ["a.txt"]
    assert "left out 5 of 6 files: 2 .log, 2 pipes or devices, 1 without a suffix" in line


@pytest.mark.timeout(60)
def test_devices_are_refused_and_nothing_waits_for_them(tmp_path, told, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("socket")
        for path in ("/dev/zero", "/dev/null", "socket"):
            with pytest.raises(ValueError, match=rf"data\.path={path} is a device or a terminal: name a file, or pipe"):
                TextData(path=path).check()
            with pytest.raises(ValueError, match="is a device or a terminal"):
                told(path)


def test_patterns_include_and_exclude(tmp_path, told):
    for name in ("a.txt", "b.log", "sub/c.log", "sub/d.txt", "vendor/e.txt", "vendor/f.log"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    assert told(tmp_path, exclude="vendor/*")[0] == ["a.txt", "sub/d.txt"]
    assert told(tmp_path, exclude=["d.txt", "vendor/*"])[0] == ["a.txt"]
    names, line = told(tmp_path, include="*.log", exclude="vendor/*")
    assert names == ["b.log", "sub/c.log"]
    assert line.endswith("left out 4 of 6 files: 2 not included, 2 excluded")
    assert told(f"{tmp_path}/**/*.log")[0] == ["b.log", "sub/c.log", "vendor/f.log"]  # its suffix is named


def test_several_paths_are_one_text(tmp_path, told):
    for name in ("one/a.txt", "two/a.txt", "three.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    paths = [f"{tmp_path}/two", f"{tmp_path}/one/*", f"{tmp_path}/three.txt", f"{tmp_path}/two/a.txt"]
    several = TextData(path=paths, cache_dir=str(tmp_path.parent / "cache"))
    assert [(document.name, document.text) for document in documents(open_source(several))] == [
        ("0/a.txt", "two/a.txt"),
        ("1/a.txt", "one/a.txt"),
        ("2/three.txt", "three.txt"),
    ]
    several.check()
    with pytest.raises(ValueError, match=r"data\.path=.*nowhere does not exist"):
        TextData(path=[str(tmp_path), f"{tmp_path}/nowhere"]).check()


def test_home_and_variables_are_expanded_where_a_path_is_used(tmp_path, told, monkeypatch):
    (tmp_path / "a.txt").write_text("text")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CORPUS", str(tmp_path))
    for path in ("~/a.txt", "$CORPUS/a.txt", "${CORPUS}/*.txt", "~"):
        assert told(path)[0] == ["a.txt"]
    with pytest.raises(ValueError, match=r"data\.path=\$NOWHERE/a\.txt does not exist"):
        told("$NOWHERE/a.txt")


def test_records_of_other_kinds(tmp_path, read):
    records = [{"id": 1, "text": 'one, "quoted"\nand more'}, {"id": 2, "text": "zwei é"}]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "a.ndjson").write_text(lines)
    (tmp_path / "c4-train.00000-of-01024.json.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "array.json").write_text(json.dumps(records, indent=1))
    (tmp_path / "lines.json").write_text("\n" + lines)
    (tmp_path / "object.json").write_text(json.dumps(records[0], indent=1))
    (tmp_path / "t.csv").write_text('\ufeffid,text\r\n1,"one, ""quoted""\nand more"\r\n2,zwei é\r\n', encoding="utf-8")
    (tmp_path / "t.tsv.gz").write_bytes(gzip.compress('text\tid\n"one, ""quoted""\nand more"\t1\nzwei é\t2\n'.encode()))
    texts = [record["text"] for record in records]
    for name in ("a.ndjson", "c4*.json.gz", "array.json", "lines.json", "t.csv", "*.tsv.gz", "*.csv"):
        assert [document.text for document in read(tmp_path / name)] == texts
    assert [document.text for document in read(tmp_path / "object.json")] == texts[:1]
    # In a folder, tables and plain .json are seldom text: package.json, results.csv.
    assert {document.name.split(":")[0] for document in read(tmp_path)} == {
        "a.ndjson",
        "c4-train.00000-of-01024.json.gz",
    }


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "id,body\n1,x\n", r"a\.csv has no column 'text': set data\.field to one of 'id', 'body'"),
        ("a.csv", "id,text\n1,x\n2\n", r"a\.csv:3 has 1 columns, not 2: repair the row"),
        ("a.csv", 'id,text\n1,"x\n', r"a\.csv:\d+ is no row of a table \(unexpected end of data\)"),
        ("a.csv", b"id,text\n1,\xff\n", r"a\.csv is not UTF-8 \(after line \d\)"),
        ("a.json", "[1, 2]", r"a\.json:1 is a JSON int: each line must be one JSON object"),
        ("a.json", "[oops", r"a\.json is not valid JSON .*lines of objects, or one array"),
        ("a.jsonl", "{}", r"a\.jsonl:1 has no field 'text': it is empty: leave it out"),
        ("a.jsonl", '{"text": ["x"], "n": 1}', r"field 'text' is a list, not text: set data\.field to 'text\.0'"),
        ("a.jsonl", '{"text": [1], "n": 1}', r"field 'text' is a list, not text: none of its fields is text: leave it"),
        (
            "a.jsonl",
            '{"text": {"en": "x"}, "b": "y"}',
            r"is an object, not text: set .* one of 'text\.en', 'b'",
        ),
        ("a.jsonl", '\n{"text": "x", "n": ' + "9" * 5000 + "}", r"a\.jsonl:2 is not valid JSON \(Exceeds the limit"),
    ],
)
def test_a_bad_record_is_one_line_with_a_remedy_that_is_not_what_was_typed(tmp_path, read, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)


def test_fields_within_fields(tmp_path, read):
    record = {"message": {"text": "inside", "parts": [{"a": "first"}]}, "message.id": "whole", "none": None}
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n")
    pq.write_table(pa.Table.from_pylist([record]), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        for field, text in {"message.text": "inside", "message.parts.0.a": "first", "message.id": "whole"}.items():
            assert [document.text for document in read(tmp_path / name, field=field)] == [text]
        with pytest.raises(ValueError, match=r"has no field 'message\.body'"):
            read(tmp_path / name, field="message.body")


@pytest.mark.parametrize("chunk", [1, 7, 2**20])
def test_a_delimiter_separates_documents_in_a_file_of_text(tmp_path, read, monkeypatch, chunk):
    monkeypatch.setattr(readers, "READ_BYTES", chunk)
    (tmp_path / "a.txt").write_text("one é<|endoftext|>two\n<|endoftext|>\n<|endoftext|><<|endoftext|>five")
    found = read(tmp_path / "a.txt", delimiter="<|endoftext|>")
    assert [(document.name, document.text) for document in found] == [
        ("a.txt:00000001", "one é"),
        ("a.txt:00000002", "two\n"),
        ("a.txt:00000004", "<"),
        ("a.txt:00000005", "five"),
    ]
    (tmp_path / "b.txt").write_text("one\n\n\ntwo\n")
    assert [document.text for document in read(tmp_path / "b.txt", delimiter=r"\n\n\n")] == ["one", "two\n"]


def test_bad_records_are_left_out_where_that_is_asked_for_up_to_a_cap(tmp_path, open_text):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{oops\n{"text": 1}\n[]\n{"text": "y"}\n')
    (tmp_path / "b.txt").write_bytes(b"\xff")
    table = pa.table({"text": pa.array([b"good", b"bad \xff"], pa.binary()).view(pa.string())})
    pq.write_table(table, tmp_path / "c.parquet")
    source = open_text(tmp_path, bad_records="skip")
    for _ in range(2):  # a text is read several times, and a record counted once
        assert [document.text for document in documents(source)] == ["x", "y", "good"]
        assert source.bad.told() == f"5 bad records are left out, the first: {next(iter(source.bad.messages))}"
    with pytest.raises(ValueError, match=r"more than data\.max_bad_records=4 records are bad, .*c\.parquet:1"):
        documents(open_text(tmp_path, bad_records="skip", max_bad_records=4))
    assert open_text(tmp_path, bad_records="skip").fingerprint != open_text(tmp_path).fingerprint


@pytest.mark.skipif(shutil.which("zstd") is None, reason="needs the zstd command, to pack with a long window")
def test_zstd_with_a_long_window_is_read_and_damage_in_it_is_named(tmp_path, read):
    lines = "".join(json.dumps({"text": random.Random(i % 50).randbytes(99).hex()}) + "\n" for i in range(3000))
    packed = subprocess.run(["zstd", "-q", "--long=31"], input=lines.encode(), capture_output=True, check=True).stdout
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(packed)
    assert zstd.window_of(path) > zstd.PYARROWS_WINDOW
    assert len(read(path)) == 3000
    path.write_bytes(packed + packed)
    assert len(read(path)) == 6000
    for damaged in (packed[:-9], packed[:999], packed[:999] + bytes(20) + packed[1019:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"cannot unpack .*a\.jsonl\.zst .*damaged or cut short"):
            read(path)


def test_the_window_of_a_zstd_frame_is_known(tmp_path):
    path = tmp_path / "a.zst"
    for content, window in {
        bytes.fromhex("28b52ffd04a89c1f0084"): 2**31,
        bytes.fromhex("28b52ffd2003" + "00" * 9): 3,  # one segment of 3 bytes
        bytes.fromhex("28b52ffd6003ff" + "00" * 9): 0xFF03,
        b"not zstd": 0,
        b"": 0,
    }.items():
        path.write_bytes(content)
        assert zstd.window_of(path) == window


def test_a_file_that_is_written_while_it_is_hashed_is_hashed_again_or_refused(tmp_path, monkeypatch):
    path, hash_file, writes = tmp_path / "a.txt", hashes.disk.sha256_file, []

    def disturbed(file):
        digest = hash_file(file)
        if len(writes) < limit:
            writes.append(1)
            file.write_text("x" * (2 + len(writes)))
        return digest

    monkeypatch.setattr(hashes.disk, "sha256_file", disturbed)
    for limit in (2, 9):
        path.write_text("x")
        writes.clear()
        if limit == 2:
            (digest,), stamps = hashes.hash_files([path], tmp_path / "cache")
            assert digest == hash_file(path)
            assert stamps[path].size == 4
        else:
            with pytest.raises(ValueError, match=r"a\.txt is being written: start again when it is complete"):
                hashes.hash_files([path], tmp_path / "cache")
