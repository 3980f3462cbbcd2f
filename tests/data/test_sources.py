from __future__ import annotations

import json
import sysconfig

import pytest

from data.config import StdlibData, TextData
from data.sources import Document, read_documents, train_val_split


def read(path, **fields):
    return read_documents(TextData(path=str(path), **fields))


# ------------------------------------------------------------------------------------------------ text files


def test_a_folder_is_read_recursively_sorted_and_named_by_relative_path(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b" / "two.md").write_text("two")
    (tmp_path / "one.txt").write_bytes(b"one\r\n")
    (tmp_path / "c.py").write_text("# é", encoding="utf-8")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0")
    (tmp_path / ".git" / "notes.txt").write_text("hidden")
    (tmp_path / "blank.txt").write_text(" \n\t")
    assert read(tmp_path) == [Document("b/two.md", "two"), Document("c.py", "# é"), Document("one.txt", "one\r\n")]


def test_a_glob_names_documents_from_its_fixed_part(tmp_path):
    for name in ("a/x.txt", "b/deep/y.txt", "b/deep/z.log"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [document.name for document in read(f"{tmp_path}/**/*")] == ["a/x.txt", "b/deep/y.txt"]


def test_a_file_named_outright_is_read_whatever_its_suffix(tmp_path):
    (tmp_path / "book [1]").write_text("text")
    assert read(tmp_path / "book [1]") == [Document("book [1]", "text")]


def test_a_jsonl_line_is_a_document(tmp_path):
    lines = [{"text": "one\u2028still one"}, {"text": "two", "id": 2}, {"text": "  "}]
    content = "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n"
    (tmp_path / "d.jsonl").write_text(content, encoding="utf-8")
    documents = read(tmp_path / "d.jsonl")
    assert documents == [Document("d.jsonl:00000001", "one\u2028still one"), Document("d.jsonl:00000003", "two")]


def test_jsonl_field_can_be_chosen(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"body": "hello"}')
    assert read(tmp_path, field="body")[0].text == "hello"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"abc\0def", r"a\.txt is binary.*byte 3"),
        ("a.txt", b"abc\xff", r"a\.txt is not UTF-8 \(byte 3\)"),
        ("a.txt", b" \n ", r"no text in .*a\.txt"),
        ("a.txt", b"", r"no text in .*a\.txt"),
        ("a.jsonl", b'{"text": "x"}\n{oops\n', r"a\.jsonl:2 is not valid JSON"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1 is not valid JSON"),
        ("a.jsonl", b'\n["x"]', r"a\.jsonl:2 is a JSON list"),
        ("a.jsonl", b'{"body": "x", "id": 1}', r"a\.jsonl:1 has no field 'text'.*'body', 'id'"),
        ("a.jsonl", b'{"text": 5, "body": "x"}', r"a\.jsonl:1 field 'text' is int.*'text', 'body'"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"a\.jsonl:1 .*surrogate"),
    ],
)
def test_a_bad_file_is_one_line_naming_file_and_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)


def test_missing_path_and_no_match_are_told_apart(tmp_path):
    with pytest.raises(ValueError, match=r"data\.path=.*nowhere does not exist"):
        read(tmp_path / "nowhere")
    (tmp_path / "a.csv").write_text("1,2")
    for path in (tmp_path, tmp_path / "*"):
        with pytest.raises(ValueError, match=r"no text files: looked for \.txt \.py \.md \.jsonl"):
            read(path)


def test_an_unreadable_file_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x")

    def denied(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_bytes", denied)
    with pytest.raises(ValueError, match=r"cannot read .*a\.txt: Permission denied"):
        read(tmp_path)


# ---------------------------------------------------------------------------------------------------- stdlib


def test_stdlib_reads_library_sources_and_no_tests(tmp_path, monkeypatch):
    for name in ("os.py", "json/decoder.py", "test/test_os.py", "json/tests/t.py", "site-packages/torch/a.py", "b.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1")
    (tmp_path / "latin.py").write_bytes(b"# \xe9")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert [document.name for document in read_documents(StdlibData())] == ["json/decoder.py", "os.py"]


def test_the_standard_library_of_this_python_is_a_corpus_with_long_documents():
    documents = read_documents(StdlibData())
    names = [document.name for document in documents]
    assert names == sorted(set(names))
    assert {"os.py", "json/decoder.py"} < set(names)
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(name.split("/"))]
    assert 5e6 < sum(len(document.text) for document in documents) < 20e6
    assert sum(len(document.text) > 60_000 for document in documents) > 20
    train, val, note = train_val_split(documents, 0.05)
    assert note is None
    assert min(len(train), len(val)) > 5


def test_a_zipped_stdlib_says_what_to_use_instead(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "python311.zip")})
    with pytest.raises(ValueError, match=r"no Python sources in .*python311\.zip.*data=text data\.path="):
        read_documents(StdlibData())


# ----------------------------------------------------------------------------------------------------- split


def named(count, text="text of {}\n"):
    return [Document(f"{i}.txt", text.format(i)) for i in range(count)]


def test_split_holds_out_whole_documents_and_loses_none():
    documents = named(1000)
    train, val, note = train_val_split(documents, 0.1)
    assert note is None
    assert not set(train) & set(val)
    assert set(train) | set(val) == set(documents)
    assert len(train) + len(val) == 1000
    assert 60 < len(val) < 140


def test_split_of_a_document_does_not_depend_on_the_others():
    _, val, _ = train_val_split(named(1000), 0.1)
    _, val_of_half, _ = train_val_split(named(500), 0.1)
    assert val_of_half == [document for document in val if int(document.name[:-4]) < 500]


def test_copies_of_a_text_are_on_one_side():
    train, val, _ = train_val_split(named(400) + [Document(f"copy/{i}.txt", f"text of {i}\n") for i in range(400)], 0.3)
    assert not {document.text for document in train} & {document.text for document in val}
    assert len(train) + len(val) == 800


def test_a_single_document_is_cut_at_a_line_end_and_a_note_says_so():
    text = "".join(f"line {i}\n" for i in range(100))
    train, val, note = train_val_split([Document("a.txt", text)], 0.1)
    assert train[0].text + val[0].text == text
    assert train[0].text.endswith("\n")
    assert 0.1 <= len(val[0].text) / len(text) <= 0.2
    assert note is not None
    assert "last 10.0%" in note


def test_a_text_without_line_ends_is_cut_at_the_fraction():
    train, val, _ = train_val_split([Document("a.txt", "ab\n" + "x" * 997)], 0.1)
    assert (len(train[0].text), len(val[0].text)) == (900, 100)


def test_too_little_text_to_split_is_an_error():
    with pytest.raises(ValueError, match=r"too little text.*data\.val_fraction=0\.05"):
        train_val_split([Document("a.txt", "x")], 0.05)
