from __future__ import annotations

import random
import re
import sysconfig

import pytest

from data.config import StdlibData, SyntheticData
from data.sources import Document, open_source, write_copy, write_needle
from data.split import choose_split


def documents(source):
    return [document for _, document in source.documents()]


def test_stdlib_reads_library_sources_and_no_tests(tmp_path, monkeypatch):
    for name in ("os.py", "json/decoder.py", "test/test_os.py", "json/tests/t.py", "site-packages/torch/a.py", "b.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1")
    (tmp_path / "latin.py").write_bytes(b"# \xe9")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    found = documents(open_source(StdlibData()))
    assert [document.name for document in found] == ["json/decoder.py", "os.py"]
    split = choose_split(open_source(StdlibData()), 0.5)
    (before,) = split(found[1])
    (after,) = split(Document("os.py", "x = 2", key="os.py"))  # another version of Python
    assert before[0] == after[0]


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
