from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path

import numpy as np
import pytest

from data import corpus as corpus_module
from data.config import TextData, TokenizerConfig
from data.corpus import load_corpus
from data.sources import read_documents, train_val_split
from data.tokenizer import Tokenizer


@pytest.fixture
def config(tmp_path):
    """Forty generated files, a few hundred words each."""
    rng = np.random.default_rng(0)
    words = [f"word{i}" for i in range(200)]
    for number in range(40):
        lines = (" ".join(rng.choice(words, 8)) + "\n" for _ in range(30))
        path = tmp_path / "text" / f"{number:02d}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"document {number}\n" + "".join(lines))
    return TextData(path=str(tmp_path / "text"), val_fraction=0.2, cache_dir=str(tmp_path / "cache"))


TOKENIZER = TokenizerConfig(vocab_size=400)


def load(config, tokenizer=TOKENIZER):
    return load_corpus(config, tokenizer, notify=lambda line: None)


def texts(corpus, stream):
    ends = [*stream.document_starts[1:], len(stream.tokens)]
    return [
        corpus.tokenizer.decode(stream.tokens[a + 1 : b]) for a, b in zip(stream.document_starts, ends, strict=True)
    ]


def files(config):
    (folder,) = Path(config.cache_dir).iterdir()
    return folder, {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same(a, b):
    for left, right in ((a.train, b.train), (a.val, b.val)):
        np.testing.assert_array_equal(left.tokens, right.tokens)
        np.testing.assert_array_equal(left.document_starts, right.document_starts)
    assert a.manifest == b.manifest


def test_streams_hold_every_document_once_each_behind_a_separator(config):
    corpus = load(config)
    train, val, _ = train_val_split(read_documents(config), config.val_fraction)
    assert texts(corpus, corpus.train) == [document.text for document in train]
    assert texts(corpus, corpus.val) == [document.text for document in val]
    for stream in (corpus.train, corpus.val):
        separators = np.flatnonzero(stream.tokens == corpus.tokenizer.separator_id)
        np.testing.assert_array_equal(separators, stream.document_starts)
        assert stream.tokens.dtype == np.uint16
        assert stream.document_starts.dtype == np.int64
        assert isinstance(stream.tokens, np.memmap)


def test_the_tokenizer_is_trained_on_train_documents_only(config, monkeypatch):
    seen = []
    train = Tokenizer.train.__func__
    monkeypatch.setattr(
        Tokenizer, "train", classmethod(lambda cls, texts, size: train(cls, seen.extend(texts) or seen, size))
    )
    corpus = load(config)
    assert seen == texts(corpus, corpus.train)
    assert not set(seen) & set(texts(corpus, corpus.val))


def test_manifest_counts(config):
    manifest = load(config).manifest
    documents = read_documents(config)
    folder, content = files(config)
    assert manifest["source"] == "text"
    assert len(manifest["hash"]) == 64
    assert manifest["documents"] == 40 == manifest["train"]["documents"] + manifest["val"]["documents"]
    assert manifest["bytes"] == sum(len(document.text.encode()) for document in documents)
    corpus = load(config)
    assert manifest["tokens"] == len(corpus.train.tokens) + len(corpus.val.tokens)
    assert manifest["long_documents"] == 0
    assert json.loads(content["manifest.json"]) == manifest
    assert folder.name == f"text-{manifest['hash'][:16]}"
    assert manifest["tokenizer"]["sha256"] == hashlib.sha256(content["tokenizer.json"]).hexdigest()


def test_long_documents_are_counted(config, monkeypatch):
    monkeypatch.setattr(corpus_module, "LONG_DOCUMENT_TOKENS", 10)
    assert load(config).manifest["long_documents"] == 40


def test_a_second_load_takes_the_cache_and_trains_nothing(config, monkeypatch):
    first = load(config)

    def never(*_):
        raise AssertionError("the cache was not used")

    monkeypatch.setattr(Tokenizer, "train", never)
    monkeypatch.setattr(Tokenizer, "encode_batch", never)
    assert_same(load(config), first)


def test_building_twice_gives_the_same_bytes(config, tmp_path):
    load(config)
    config_again = TextData(**{**vars(config), "cache_dir": str(tmp_path / "elsewhere")})
    load(config_again)
    assert files(config)[1] == files(config_again)[1]


@pytest.mark.parametrize("change", ["text", "name", "val_fraction", "vocab_size"])
def test_every_input_of_the_tokens_changes_the_hash(config, tmp_path, change):
    before = load(config).manifest["hash"]
    tokenizer = TOKENIZER
    if change == "text":
        (tmp_path / "text" / "00.txt").write_text("another text\n")
    elif change == "name":
        (tmp_path / "text" / "39.txt").rename(tmp_path / "text" / "39b.txt")  # the order stays
    elif change == "val_fraction":
        config.val_fraction = 0.3
    else:
        tokenizer = TokenizerConfig(vocab_size=401)
    assert load(config, tokenizer).manifest["hash"] != before


def test_the_mask_and_the_place_of_the_files_do_not_change_the_hash(config, tmp_path):
    before = load(config).manifest["hash"]
    (tmp_path / "text").rename(tmp_path / "moved")
    config.path, config.document_mask = str(tmp_path / "moved"), False
    assert load(config).manifest["hash"] == before


@pytest.mark.parametrize("damage", ["no manifest", "broken manifest", "missing file", "truncated file"])
def test_a_damaged_cache_is_made_anew(config, damage):
    first = load(config)
    tokens = np.array(first.train.tokens)
    folder, _ = files(config)
    if damage == "no manifest":
        (folder / "manifest.json").unlink()
    elif damage == "broken manifest":
        (folder / "manifest.json").write_text("{")
    elif damage == "missing file":
        (folder / "val.npy").unlink()
    else:
        (folder / "train.npy").write_bytes((folder / "train.npy").read_bytes()[:-2])
    again = load(config)
    np.testing.assert_array_equal(again.train.tokens, tokens)
    assert files(config)[0] == folder  # and nothing else is left in the cache


def test_a_writer_that_dies_leaves_nothing_that_is_read(config, monkeypatch):
    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(corpus_module, "_publish", die)
        patched.setattr(corpus_module.shutil, "rmtree", lambda *_, **__: None)  # as if killed
        with pytest.raises(KeyboardInterrupt):
            load(config)
    (part,) = Path(config.cache_dir).iterdir()
    assert part.name.endswith(".part")
    (part / "train.npy").write_bytes(b"half")
    assert len(load(config).train.tokens) > 1000


def test_two_writers_at_once_both_succeed(config, monkeypatch):
    both_built = threading.Barrier(2, timeout=30)
    publish = corpus_module._publish
    published = []

    def publish_together(part, folder):
        both_built.wait()
        published.append(part)
        publish(part, folder)

    monkeypatch.setattr(corpus_module, "_publish", publish_together)
    loaded = []
    threads = [threading.Thread(target=lambda: loaded.append(load(config))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(published)) == 2
    assert_same(*loaded)
    files(config)  # exactly one folder remains


def test_an_unwritable_cache_names_the_key(config, tmp_path):
    (tmp_path / "a file").write_text("")
    config.cache_dir = str(tmp_path / "a file" / "cache")
    with pytest.raises(ValueError, match=r"data\.cache_dir=.*a file.*cannot be written.*set data\.cache_dir") as error:
        load(config)
    assert "\n" not in str(error.value)


def test_notes_tell_what_happened(config, tmp_path):
    (tmp_path / "one.txt").write_text("one line of text\n" * 100)
    config.path = str(tmp_path / "one.txt")
    lines: list[str] = []
    load_corpus(config, TokenizerConfig(vocab_size=4096), lines.append)
    assert any("validation is the last 20.0%" in line for line in lines)
    assert any("of 4,096 tokens" in line for line in lines)
    again: list[str] = []
    load_corpus(config, TokenizerConfig(vocab_size=4096), again.append)
    assert again == lines[1:]
