from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from data import corpus as corpus_module
from data import packing
from data import prepare as prepare_module
from data.config import BytesTokenizer, FileTokenizer, HubData, HubTokenizer, MixData, TextData, TokenizerConfig
from data.corpus import load_corpus
from data.packing import PackedRows, training_rows
from data.prepare import damaged_files
from data.sources import open_source
from data.split import choose_split
from data.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]


def write_files(folder, count, seed=0):
    """Generated files, a few hundred words each."""
    rng = np.random.default_rng(seed)
    words = [f"word{i}" for i in range(200)]
    folder.mkdir(exist_ok=True)
    for number in range(count):
        lines = (" ".join(rng.choice(words, 8)) + "\n" for _ in range(30))
        (folder / f"{number:02d}.txt").write_text(f"document {number}\n" + "".join(lines))


@pytest.fixture
def config(tmp_path):
    write_files(tmp_path / "text", 40)
    return TextData(path=str(tmp_path / "text"), val_fraction=0.2, cache_dir=str(tmp_path / "cache"))


TOKENIZER = TokenizerConfig(vocab_size=400)


def load(config, tokenizer=TOKENIZER):
    return load_corpus(config, tokenizer, notify=lambda line: None)


def texts(corpus, stream):
    ends = [*stream.document_starts[1:], len(stream.tokens)]
    return [
        corpus.tokenizer.decode(stream.tokens[a + 1 : b]) for a, b in zip(stream.document_starts, ends, strict=True)
    ]


def expected(config):
    """The texts of each side, straight from the source."""
    source = open_source(config)
    split = choose_split(source, config.val_fraction)
    pairs = [pair for _, document in source.documents() for pair in split(document)]
    return [text for side, text in pairs if side == "train"], [text for side, text in pairs if side == "val"]


def files(config):
    """The one folder that the cache holds, and what is in it."""
    (folder,) = (path for path in Path(config.cache_dir).iterdir() if path.is_dir())
    return folder, {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same(a, b):
    for left, right in zip(a.parts, b.parts, strict=True):
        for split in ("train", "val"):
            np.testing.assert_array_equal(getattr(left, split).tokens, getattr(right, split).tokens)
            np.testing.assert_array_equal(getattr(left, split).document_starts, getattr(right, split).document_starts)
    assert a.manifest == b.manifest


def test_streams_hold_every_document_once_each_behind_a_separator(config):
    corpus = load(config)
    (part,) = corpus.parts
    assert (texts(corpus, part.train), texts(corpus, part.val)) == expected(config)
    for stream in (part.train, part.val):
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
    load(config)
    assert seen == expected(config)[0]


def test_the_tokenizer_reads_no_more_than_it_needs(config, monkeypatch):
    monkeypatch.setattr(corpus_module, "TRAINING_BYTES", 5000)
    some = list(corpus_module.training_texts([open_source(config)] * 2, 0.2))
    assert 5000 < sum(map(len, some)) < 9000


def test_manifest_counts(config):
    corpus = load(config)
    manifest = corpus.manifest
    train, val = expected(config)
    folder, content = files(config)
    assert manifest["source"] == "text"
    assert len(manifest["hash"]) == 64
    assert manifest["documents"] == 40 == manifest["train"]["documents"] + manifest["val"]["documents"]
    assert manifest["val"]["documents"] == len(val)
    assert manifest["bytes"] == sum(len(text.encode()) for text in train + val)
    assert manifest["tokens"] == len(corpus.parts[0].train.tokens) + len(corpus.parts[0].val.tokens)
    assert manifest["long_documents"] == 0
    assert json.loads(content["manifest.json"]) == manifest
    assert folder.name == f"text-{manifest['hash'][:16]}"
    assert manifest["tokenizer"]["sha256"] == corpus.tokenizer.sha256
    assert manifest["sha256"]["train.bin"] == hashlib.sha256(content["train.bin"]).hexdigest()
    assert damaged_files(folder) == []
    (folder / "val.bin").write_bytes(content["val.bin"][:-1] + b"\xff")
    assert damaged_files(folder) == ["val.bin"]


def test_long_documents_are_counted(config, monkeypatch):
    monkeypatch.setattr(prepare_module, "LONG_DOCUMENT_TOKENS", 10)
    assert load(config).manifest["long_documents"] == 40


def test_a_second_load_takes_the_cache_and_trains_nothing(config, monkeypatch):
    first = load(config)

    def never(*_):
        raise AssertionError("the cache was not used")

    monkeypatch.setattr(Tokenizer, "train", never)
    monkeypatch.setattr(Tokenizer, "encode_batch", never)
    assert_same(load(config), first)


def test_building_twice_gives_the_same_bytes_in_batches_of_any_size(config, tmp_path, monkeypatch):
    load(config)
    config_again = TextData(**{**vars(config), "cache_dir": str(tmp_path / "elsewhere")})
    monkeypatch.setattr(prepare_module, "BATCH_CHARS", 1)
    load(config_again)
    assert files(config)[1] == files(config_again)[1]


@pytest.mark.parametrize("change", ["text", "name", "val_fraction", "vocab_size"])
def test_every_input_of_the_tokens_changes_the_hash(config, tmp_path, change):
    # Bytes: that one tokenizer follows from the text, too.
    tokenizer = TOKENIZER if change == "vocab_size" else BytesTokenizer()
    before = load(config, tokenizer).manifest["hash"]
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
    tokens = np.array(load(config).parts[0].train.tokens)
    folder, _ = files(config)
    if damage == "no manifest":
        (folder / "manifest.json").unlink()
    elif damage == "broken manifest":
        (folder / "manifest.json").write_text("{")
    elif damage == "missing file":
        (folder / "val.bin").unlink()
    else:
        (folder / "train.bin").write_bytes((folder / "train.bin").read_bytes()[:-2])
    again = load(config)
    np.testing.assert_array_equal(again.parts[0].train.tokens, tokens)
    assert files(config)[0] == folder  # and nothing else is left in the cache


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


@pytest.mark.parametrize("after", [0, 1, 5, 11])
def test_a_preparation_that_was_killed_goes_on_where_it_was(config, tmp_path, monkeypatch, after):
    whole = TextData(**{**vars(config), "cache_dir": str(tmp_path / "whole")})
    load(whole)
    monkeypatch.setattr(prepare_module, "BATCH_CHARS", 4000)
    monkeypatch.setattr(prepare_module, "SAVE_CHARS", 8000)
    write, written = prepare_module.StreamWriter.write, []

    def write_or_die(self, texts):
        if len(written) == 2 * after:
            self.files[0].write(b"half a word")  # beyond what progress.json knows
            raise Killed
        written.append(texts)
        write(self, texts)

    with monkeypatch.context() as patched:
        patched.setattr(prepare_module.StreamWriter, "write", write_or_die)
        with pytest.raises(Killed):
            load(config)
    part, _ = files(config)
    assert part.suffix == ".part"
    again = []
    monkeypatch.setattr(
        prepare_module.StreamWriter, "write", lambda self, texts: again.append(texts) or write(self, texts)
    )
    lines: list[str] = []
    load_corpus(config, TOKENIZER, lines.append)
    assert any("going on after" in line for line in lines) == (after >= 5)
    assert files(config)[1] == files(whole)[1]
    if after == 11:
        assert sum(map(len, again)) < 30


def test_a_real_kill_leaves_nothing_that_is_read(tmp_path):
    write_files(tmp_path / "text", 99)
    whole = TextData(path=str(tmp_path / "text"), cache_dir=str(tmp_path / "whole"))
    load(whole, BytesTokenizer())
    code = """
import sys, data.prepare as prepare
from data.config import BytesTokenizer, TextData
from data.corpus import load_corpus
prepare.BATCH_CHARS = prepare.SAVE_CHARS = 1
save = prepare.Progressed.save
def slow(self, file):
    save(self, file)
    print(self.documents, flush=True)
    sys.stdin.read(1)
prepare.Progressed.save = slow
load_corpus(TextData(path=sys.argv[1], cache_dir=sys.argv[2]), BytesTokenizer(), lambda line: None)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "text"), str(tmp_path / "cache")]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"x" * 30)
        process.stdin.flush()
        for _ in range(20):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    config = TextData(path=str(tmp_path / "text"), cache_dir=str(tmp_path / "cache"))
    assert files(config)[0].suffix == ".part"
    load(config, BytesTokenizer())
    assert files(config)[1] == files(whole)[1]


@pytest.mark.parametrize("fault", ["disk full", "bad bytes"])
def test_a_fault_is_one_line_and_nothing_half_written_is_left(config, tmp_path, monkeypatch, fault):
    if fault == "disk full":

        def full(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(prepare_module.os, "fsync", full)
        message = r"data\.cache_dir=.* cannot be written \(No space left on device\)"
    else:
        (tmp_path / "text" / "39.txt").write_bytes(b"\xff")
        message = r"39\.txt is not UTF-8"
    with pytest.raises(ValueError, match=message) as error:
        load(config)
    assert "\n" not in str(error.value)
    assert [path for path in Path(config.cache_dir).iterdir() if path.is_dir()] == []


def test_too_little_text_to_hold_any_out_is_an_error(config, tmp_path):
    (tmp_path / "a.txt").write_text("x")
    config.path = str(tmp_path / "a.txt")
    with pytest.raises(ValueError, match=r"too little text in data\.path=.*a\.txt to hold out data\.val_fraction=0\.2"):
        load(config)


def test_processes_that_ask_at_once_build_once(config, monkeypatch):
    fill, filled = prepare_module._fill, []
    began = threading.Event()

    def slow_fill(*arguments):
        filled.append(arguments)
        began.set()
        fill(*arguments)

    train, trained = Tokenizer.train.__func__, []
    monkeypatch.setattr(Tokenizer, "train", classmethod(lambda *given: trained.append(1) or train(*given)))
    monkeypatch.setattr(prepare_module, "_fill", slow_fill)
    loaded = []
    threads = [threading.Thread(target=lambda: loaded.append(load(config))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert began.is_set()
    assert len(filled) == len(trained) == 1
    assert_same(loaded[0], loaded[1])
    assert_same(loaded[0], loaded[2])
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
    assert again == lines[2:]  # without what was done once


# ------------------------------------------------------------------------------------------------ tokenizers


def test_bytes_need_no_training(config):
    corpus = load(config, BytesTokenizer())
    assert texts(corpus, corpus.parts[0].train) == expected(config)[0]
    assert corpus.parts[0].train.tokens.max() <= 256


def test_a_tokenizer_file_is_used_as_it_is(config, tmp_path):
    trained = Tokenizer.train(expected(config)[0], 300)
    trained.save(tmp_path / "t.json")
    corpus = load(config, FileTokenizer(path=str(tmp_path / "t.json")))
    assert corpus.tokenizer.vocab_size == 300
    assert texts(corpus, corpus.parts[0].val) == expected(config)[1]
    Tokenizer.train(expected(config)[1], 300).save(tmp_path / "t.json")  # as large, but another
    other = load(config, FileTokenizer(path=str(tmp_path / "t.json")))
    assert other.manifest["hash"] != corpus.manifest["hash"]


def test_a_vocabulary_larger_than_the_models_is_refused_before_anything_is_read(config, tmp_path, monkeypatch):
    Tokenizer.train(expected(config)[0], 300).save(tmp_path / "t.json")
    tokenizer = FileTokenizer(path=str(tmp_path / "t.json"))
    with monkeypatch.context() as patched:
        patched.setattr(corpus_module, "open_source", lambda _: pytest.fail("read"))
        with pytest.raises(ValueError, match=r"tokenizer\.path=.*t\.json has 300 ids, more than model\.vocab_size=299"):
            load_corpus(config, tokenizer, model_vocab_size=299)
    assert not Path(config.cache_dir).exists()
    load_corpus(config, tokenizer, lambda line: None, model_vocab_size=300)


def test_a_tokenizer_of_the_hub_comes_from_its_cache_or_in_one_line(config, tmp_path, monkeypatch):
    import huggingface_hub

    Tokenizer.train(["some text " * 99], 264).save(tmp_path / "t.json")
    with monkeypatch.context() as patched:
        patched.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: str(tmp_path / "t.json"))
        assert load(config, HubTokenizer(path="gpt2")).tokenizer.vocab_size == 264
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"tokenizer\.path=no/such: cannot reach 127\.0\.0\.1"):
        load(config, HubTokenizer(path="no/such"))


def test_a_tokenizer_without_a_separator_asks_for_one(config, tmp_path):
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "<x>": 2}, []))
    backend.save(str(tmp_path / "t.json"))
    with pytest.raises(ValueError, match=r"t\.json has none of .*: name its end of text, tokenizer\.separator="):
        load(config, FileTokenizer(path=str(tmp_path / "t.json")))
    with pytest.raises(ValueError, match=r"t\.json has no token 'c': set tokenizer\.separator"):
        load(config, FileTokenizer(path=str(tmp_path / "t.json"), separator="c"))
    with pytest.raises(
        ValueError, match=r"t\.json makes 'b' of text that says so: set tokenizer\.separator to another"
    ):
        load(config, FileTokenizer(path=str(tmp_path / "t.json"), separator="b"))
    assert Tokenizer.load(tmp_path / "t.json", "<x>").separator_id == 2


# ------------------------------------------------------------------------------- streams that are not prepared


@pytest.fixture
def stream(config, monkeypatch):
    """The configuration of a stream with the documents of `config`, which is in `config`'s order."""
    import datasets

    train = [document.text for _, document in open_source(config).documents()]
    rows = datasets.IterableDataset.from_generator(lambda: ({"text": text} for text in train))
    monkeypatch.setattr("data.hub._load", lambda config: rows)
    monkeypatch.setattr("data.hub._commit", lambda config: config.revision)
    return HubData(path="a/b", streaming=True, prepare=False, val_fraction=0.2, cache_dir=config.cache_dir)


@pytest.mark.parametrize("characters", [1, 5000, 10**9])
@pytest.mark.parametrize(("seq_len", "mask"), [(700, True), (700, False), (5000, True)])  # a document has about 2000
def test_an_unprepared_stream_gives_the_rows_of_the_prepared_one_in_its_own_order(
    config, stream, monkeypatch, characters, seq_len, mask
):
    monkeypatch.setattr(packing, "STREAMED_CHARS", characters)
    prepared = PackedRows(load(config, BytesTokenizer()).parts[0].train, seq_len, mask)
    rows = training_rows(load(stream, BytesTokenizer()), seq_len, mask)

    def assert_row(position):
        for one, other in zip(rows.at(0, position), prepared[position % len(prepared)], strict=True):
            np.testing.assert_array_equal(one, other)

    for position in [*range(2 * len(prepared)), 3, 4, 9, 0, len(prepared) + 1]:  # two epochs; back, on, and back
        assert_row(position)
    with pytest.raises(ValueError, match=r"seq_len=9999999 needs at least 10000000 tokens and data\.path=a/b has only"):
        training_rows(load(stream, BytesTokenizer()), 9_999_999, mask).at(0, 0)


def test_an_unprepared_stream_says_what_it_cannot_promise_and_writes_no_tokens(config, stream):
    lines: list[str] = []
    corpus = load_corpus(stream, TOKENIZER, lines.append)
    assert [path.suffix for path in Path(config.cache_dir).iterdir()] == [".lock", ".json"]  # of the tokenizer
    assert any("trained on as it comes, in its own order, whatever the seed" in line for line in lines)
    assert any("a run that goes on reads again, from the beginning, all it was trained on" in line for line in lines)
    (part,) = corpus.parts
    assert texts(corpus, part.val) == expected(config)[1]
    assert corpus.manifest["prepared"] is False
    other = load(HubData(**{**vars(stream), "revision": "v2"}))
    assert other.manifest["hash"] != corpus.manifest["hash"]


def test_an_unprepared_stream_whose_beginning_holds_nothing_out_says_so(stream, monkeypatch):
    monkeypatch.setattr(corpus_module, "VALIDATION_BYTES", 1)  # one document, and that is trained on
    with pytest.raises(ValueError, match=r"data\.val_fraction=0\.2 holds out nothing of the first .*: raise it"):
        load(stream, BytesTokenizer())


# ------------------------------------------------------------------------------------------------------- mix


def test_a_mixture_has_its_parts_tokens_and_one_tokenizer(config, tmp_path):
    write_files(tmp_path / "more", 20, seed=1)
    parts = {
        "a": {"weight": 3, "name": "text", "path": config.path},
        "b": {"name": "text", "path": str(tmp_path / "more")},
    }
    mix = MixData(parts=parts, val_fraction=0.2, cache_dir=config.cache_dir)
    corpus = load(mix)
    for part, (weight, source) in zip(corpus.parts, mix.sources().values(), strict=True):
        assert part.weight == weight
        assert (texts(corpus, part.train), texts(corpus, part.val)) == expected(source)
    assert corpus.manifest["documents"] == 60
    assert corpus.manifest["shares"] == {"a": 0.75, "b": 0.25}
    assert load(mix).manifest == corpus.manifest
    heavier = MixData(**{**vars(mix), "parts": {**parts, "b": {**parts["b"], "weight": 2}}})
    assert load(heavier).manifest["hash"] != corpus.manifest["hash"]
