from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from data import corpus as corpus_module
from data import disk, hashes, packing, prepared
from data import prepare as prepare_module
from data.config import (
    BytesTokenizer,
    FileTokenizer,
    HubData,
    HubTokenizer,
    MixData,
    StdlibData,
    TextData,
    TokenizerConfig,
)
from data.corpus import load_corpus
from data.packing import PackedRows, training_rows
from data.prepared import damaged_files
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
    some = list(corpus_module.training_texts([corpus_module.Text(config, open_source(config))] * 2))
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
    assert disk.unsealed(content["manifest.json"].decode()) == manifest
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


DAMAGE = [
    "no manifest",
    "another count",
    "broken manifest",
    "another hash",
    "no hash",
    "missing file",
    "truncated file",
    *prepared.FILES,
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_named_and_made_anew(config, damage):
    tokens = np.array(load(config).parts[0].train.tokens)
    folder, whole = files(config)
    if damage == "no manifest":
        (folder / "manifest.json").unlink()
    elif damage == "broken manifest":
        (folder / "manifest.json").write_text("{")
    elif damage == "missing file":
        (folder / "val.bin").unlink()
    elif damage == "another count":
        (folder / "manifest.json").write_text(
            (folder / "manifest.json").read_text().replace('"documents": 4', '"documents": 5')
        )
    elif damage == "no hash":
        manifest = json.loads((folder / "manifest.json").read_text())
        del manifest["hash"]
        (folder / "manifest.json").write_text(json.dumps(manifest))
    elif damage == "another hash":
        (folder / "manifest.json").write_text((folder / "manifest.json").read_text().replace('"hash": "', '"hash": "0'))
    elif damage == "truncated file":
        (folder / "train.bin").write_bytes((folder / "train.bin").read_bytes()[:-2])
    else:
        flip_a_bit(folder / damage)
    lines: list[str] = []
    again = load_corpus(config, TOKENIZER, lines.append)
    np.testing.assert_array_equal(again.parts[0].train.tokens, tokens)
    assert files(config) == (folder, whole)  # and nothing else is left in the cache
    named = damage if damage in prepared.FILES else folder.name
    assert any(f"{named} is damaged" in line and "again" in line for line in lines)


def test_a_cache_is_that_of_a_tokenizer_however_it_is_named(config, tmp_path):
    load(config).tokenizer.save(tmp_path / "tokenizer.json")
    lines: list[str] = []
    load_corpus(config, FileTokenizer(path=str(tmp_path / "tokenizer.json")), lines.append)
    assert not any("again" in line for line in lines), lines


def flip_a_bit(path, place=0.5):
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 4
    path.write_bytes(content)


def test_what_was_prepared_is_read_whole_once_and_not_again(config, monkeypatch):
    load(config)
    monkeypatch.setattr(hashes, "REMEMBERED_BYTES", 1)
    later = time.time_ns() + 10**10
    monkeypatch.setattr(hashes.time, "time_ns", lambda: later)
    load(config)
    hashed = []
    hash_file = disk.sha256_file
    monkeypatch.setattr(disk, "sha256_file", lambda path: hashed.append(path.name) or hash_file(path))
    load(config)
    assert not {*hashed} & {*prepared.FILES}
    folder, _ = files(config)
    flip_a_bit(folder / "val.bin")
    lines: list[str] = []
    load_corpus(config, TOKENIZER, lines.append)
    assert any("val.bin is damaged (SHA-256)" in line for line in lines)


@pytest.mark.parametrize("name", prepared.TOKEN_FILES)
@pytest.mark.parametrize("place", [0.0, 0.9])
def test_a_half_prepared_folder_that_was_damaged_is_named_and_begun_anew(config, tmp_path, monkeypatch, name, place):
    whole = TextData(**{**vars(config), "cache_dir": str(tmp_path / "whole")})
    load(whole)
    stop_half_way(config, monkeypatch)
    folder = next(path for path in Path(config.cache_dir).iterdir() if path.is_dir())
    done = prepare_module.Progressed.load(folder / "progress.json")
    written = (folder / name).read_bytes()[: prepare_module._size(name, done, load(whole).tokenizer)]
    assert len(written) > 8
    (folder / name).write_bytes(written)
    flip_a_bit(folder / name, place)
    lines: list[str] = []
    load_corpus(config, TOKENIZER, lines.append)
    assert any(f"{name} is damaged: beginning anew" in line for line in lines)
    assert not any("going on after" in line for line in lines)
    assert files(config)[1] == files(whole)[1]


@pytest.mark.parametrize("place", [0.05, 0.3, 0.5, 0.7, 0.95])
def test_progress_that_was_damaged_is_none(config, tmp_path, monkeypatch, place):
    whole = TextData(**{**vars(config), "cache_dir": str(tmp_path / "whole")})
    load(whole)
    stop_half_way(config, monkeypatch)
    folder = next(path for path in Path(config.cache_dir).iterdir() if path.is_dir())
    flip_a_bit(folder / "progress.json", place)
    lines: list[str] = []
    load_corpus(config, TOKENIZER, lines.append)
    assert not any("going on after" in line for line in lines)
    assert any("progress.json is damaged: beginning anew" in line for line in lines)
    assert files(config)[1] == files(whole)[1]


def stop_half_way(config, monkeypatch):
    """Leave the folder of a preparation that was killed after some savings of its progress."""
    monkeypatch.setattr(prepare_module, "BATCH_CHARS", 4000)
    monkeypatch.setattr(prepare_module, "SAVE_CHARS", 8000)
    write, written = prepare_module.StreamWriter.write, []

    def write_or_die(self, texts):
        if len(written) == 22:
            raise Killed
        written.append(texts)
        write(self, texts)

    with monkeypatch.context() as patched:
        patched.setattr(prepare_module.StreamWriter, "write", write_or_die)
        with pytest.raises(Killed):
            load(config)


@pytest.mark.parametrize("reading", ["learning", "preparing"])
@pytest.mark.parametrize("change", ["written", "same size", "removed"])
def test_a_file_that_changes_while_it_is_prepared_is_named_and_nothing_is_kept(config, monkeypatch, reading, change):
    path = Path(config.path, "07.txt")
    content, write = path.read_text(), prepare_module.StreamWriter.write
    train = Tokenizer.train.__func__

    def disturb():
        if change == "removed":
            path.unlink(missing_ok=True)
        else:
            path.write_text(content.replace("word1", "word2") + ("" if change == "same size" else "more"))

    if reading == "learning":
        monkeypatch.setattr(Tokenizer, "train", classmethod(lambda *given: [train(*given), disturb()][0]))
    else:
        monkeypatch.setattr(prepare_module.StreamWriter, "write", lambda *given: [write(*given), disturb()][0])
    with pytest.raises(ValueError, match=r"07\.txt(: No such file| changed while it was read, and nothing was kept)"):
        load(config)
    kept = {path.suffix for path in Path(config.cache_dir).iterdir()}
    assert kept <= ({".lock"} if reading == "learning" else {".lock", ".json"})
    monkeypatch.undo()
    path.write_text(content)
    assert load(config).manifest["documents"] == 40


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped"])
def test_a_damaged_tokenizer_in_the_cache_is_named_and_learned_again(config, damage):
    first = load(config)
    (file,) = Path(config.cache_dir).glob("tokenizer-*.json")
    content = file.read_bytes()
    if damage == "flipped":
        flip_a_bit(file, 0.9)
    else:
        file.write_bytes(b"" if damage == "empty" else content[: len(content) // 2])
    lines: list[str] = []
    assert_same(load_corpus(config, TOKENIZER, lines.append), first)
    assert any(f"{file.name} is damaged (SHA-256): learning it again" in line for line in lines)
    assert file.read_bytes() == content


def test_a_share_that_is_not_what_was_asked_for_is_told_each_time(tmp_path, monkeypatch):
    (tmp_path / "lib").mkdir()
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "lib")})
    names = [f"{number}.py" for number in range(60)]
    held_out = [name for name in names if int(disk.sha256(name)[:12], 16) / 2**48 < 0.2]
    assert 3 < len(held_out) < 20
    for name in names:
        (tmp_path / "lib" / name).write_text("x = 1\n" * (1000 if name in held_out else 10))
    for _ in range(2):
        lines: list[str] = []
        config = StdlibData(val_fraction=0.2, cache_dir=str(tmp_path / "cache"))
        manifest = load_corpus(config, BytesTokenizer(), lines.append).manifest
        share = manifest["val"]["bytes"] / manifest["bytes"]
        assert share > 0.9
        told = f"           validation has {share:.1%} of the text, not data.val_fraction=20.0%: files are held out by"
        assert any(line.startswith(told) for line in lines)


def test_a_folder_of_an_older_version_is_taken_and_its_share_told(config):
    Path(config.path, "book.txt").write_text("a line of a book\n" * 20_000)
    manifest = dict(load(config).manifest)
    folder, content = files(config)
    # As it was written: without a seal, notes and the hash of the text, and split by hash alone.
    older = {name: value for name, value in manifest.items() if name not in ("notes", "text")} | {"note": None}
    sides = {split: dict(manifest[split]) for split in ("train", "val")}
    sides["val"]["bytes"] = manifest["bytes"] - 1000
    (folder / "manifest.json").write_text(json.dumps({**older, **sides}, indent=2))
    lines: list[str] = []
    load_corpus(config, TOKENIZER, lines.append)
    assert any(
        "of the text, not data.val_fraction=20.0%: an older version prepared it; remove" in line for line in lines
    )
    assert not any("tokenizing" in line or "damaged" in line for line in lines)
    flip_a_bit(folder / "train.bin")
    lines.clear()
    load_corpus(config, TOKENIZER, lines.append)
    assert any("train.bin is damaged (SHA-256)" in line for line in lines)
    assert files(config)[1] == content


def test_files_to_validate_on_are_named_and_never_trained_on(config, tmp_path):
    write_files(tmp_path / "held out", 3, seed=5)
    config.val_path = [str(tmp_path / "held out"), f"{config.path}/0[0-4].txt"]
    corpus = load(config)
    (part,) = corpus.parts
    held_out = [(tmp_path / "text" / f"{number:02d}.txt").read_text() for number in range(5)]
    assert {*texts(corpus, part.val)} == {*held_out, *(path.read_text() for path in (tmp_path / "held out").iterdir())}
    assert len(texts(corpus, part.train)) == 35
    assert not {*texts(corpus, part.train)} & {*held_out}
    (tmp_path / "blank.txt").write_text(" \n")
    config.val_path = str(tmp_path / "blank.txt")
    with pytest.raises(
        ValueError, match=r"too little text in .* to validate on in data\.val_path=.*blank\.txt: add some"
    ):
        load(config)
    config.val_path = config.path
    with pytest.raises(ValueError, match=r"data\.val_path holds out all of data\.path: name other files"):
        load(config)


def test_a_split_to_validate_on_is_named(tmp_path):
    import datasets

    own = {"train": [f"train {i}" for i in range(30)], "validation": [f"held out {i}" for i in range(4)]}
    saved = {name: datasets.Dataset.from_dict({"text": rows}) for name, rows in own.items()}
    datasets.DatasetDict(saved).save_to_disk(str(tmp_path / "d"))
    config = HubData(path=str(tmp_path / "d"), val_split="validation", cache_dir=str(tmp_path / "cache"))
    corpus = load(config, BytesTokenizer())
    assert texts(corpus, corpus.parts[0].train) == own["train"]
    assert texts(corpus, corpus.parts[0].val) == own["validation"]
    with pytest.raises(ValueError, match=r"has no split 'dev': set data\.split to one of"):
        load(HubData(**{**vars(config), "val_split": "dev"}), BytesTokenizer())


def test_a_tokenizer_that_loses_text_is_refused_with_the_share(config, tmp_path):
    backend = tokenizers.Tokenizer.from_str(Tokenizer.train(expected(config)[0], 300).to_json())
    backend.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Replace("o", ""), tokenizers.normalizers.Replace("7", "1")]
    )
    backend.save(str(tmp_path / "t.json"))
    with pytest.raises(
        ValueError, match=r"the tokenizer loses \d+\.\d% of the characters of this text, most often 'o'"
    ):
        load(config, FileTokenizer(path=str(tmp_path / "t.json")))
    assert not [path for path in Path(config.cache_dir).iterdir() if path.is_dir()]
    Path(config.path, "00.txt").write_text("rarely a capital O\n" * 2 + "x" * 500)
    backend.normalizer = tokenizers.normalizers.Replace("O", "o")
    backend.save(str(tmp_path / "t.json"))
    lines: list[str] = []
    load_corpus(config, FileTokenizer(path=str(tmp_path / "t.json")), lines.append)
    assert any("does not give back 0.00" in line and "most often 'O'" in line for line in lines)


def test_bad_records_are_counted_and_told_each_time(config, tmp_path):
    Path(config.path, "records.jsonl").write_text('{"text": "good"}\n{"text": 1}\nno JSON\n{"text": "good, too"}\n')
    Path(config.path, "binary.txt").write_bytes(b"a\0b")
    with pytest.raises(ValueError, match=r"binary\.txt is binary .* or set data\.bad_records=skip"):
        load(config)
    config.bad_records = "skip"
    for _ in range(2):
        lines: list[str] = []
        assert load_corpus(config, TOKENIZER, lines.append).manifest["documents"] == 42
        assert any("3 bad records are left out, the first: " in line for line in lines)
    config.max_bad_records, config.cache_dir = 2, str(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"more than data\.max_bad_records=2 records are bad, the last one: .*:3"):
        load(config)


def test_text_from_a_pipe_is_read_once_and_known_by_its_bytes(config, tmp_path):
    text = "".join(path.read_text() for path in sorted(Path(config.path).iterdir()))
    hashes = []
    for number in range(2):
        pipe = tmp_path / f"pipe{number}"
        os.mkfifo(pipe)
        writer = threading.Thread(target=pipe.write_text, args=(text,))
        writer.start()
        lines: list[str] = []
        piped = TextData(**{**vars(config), "path": str(pipe), "delimiter": "document "})
        corpus = load_corpus(piped, TOKENIZER, lines.append)
        writer.join()
        assert lines[0] == f"data       reading {pipe} to its end"
        assert corpus.manifest["documents"] == 40
        hashes.append(corpus.manifest["hash"])
    assert len(set(hashes)) == 1
    del corpus
    assert not list(Path(config.cache_dir).glob("pipe-*"))


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
            next(iter(self.files.values())).write(b"half a word")  # beyond what progress.json knows
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
    fill, filled = corpus_module.fill_from_text, []
    began = threading.Event()

    def slow_fill(*arguments):
        filled.append(arguments)
        began.set()
        return fill(*arguments)

    train, trained = Tokenizer.train.__func__, []
    monkeypatch.setattr(Tokenizer, "train", classmethod(lambda *given: trained.append(1) or train(*given)))
    monkeypatch.setattr(corpus_module, "fill_from_text", slow_fill)
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
    assert {path.suffix for path in Path(config.cache_dir).iterdir()} == {".lock", ".json"}  # of the tokenizer
    assert any("trained on as it comes, in its own order, whatever the seed" in line for line in lines)
    assert any("a resumed run reads everything again from the beginning" in line for line in lines)
    (part,) = corpus.parts
    assert texts(corpus, part.val) == expected(config)[1]
    assert corpus.manifest["prepared"] is False
    other = load(HubData(**{**vars(stream), "revision": "v2"}))
    assert other.manifest["hash"] != corpus.manifest["hash"]


def test_an_unprepared_stream_may_have_a_split_to_validate_on(config, stream, monkeypatch):
    import datasets

    texts_of = {"train": [f"train {number} " * 50 for number in range(30)], "dev": ["held out " * 99, "and more"]}
    rows = {
        name: datasets.IterableDataset.from_list([{"text": text} for text in own]) for name, own in texts_of.items()
    }
    monkeypatch.setattr("data.hub._load", lambda config: rows[config.split])
    corpus = load(HubData(**{**vars(stream), "val_split": "dev"}), BytesTokenizer())
    assert texts(corpus, corpus.parts[0].val) == texts_of["dev"]
    own = load(HubData(**{**vars(stream), "prepare": True, "val_split": "dev"}), BytesTokenizer())
    assert texts(own, own.parts[0].train) == texts_of["train"]
    streamed, prepared_rows = training_rows(corpus, 64, True), PackedRows(own.parts[0].train, 64, True)
    for position in range(len(prepared_rows) + 3):
        expected_row = prepared_rows[position % len(prepared_rows)]
        np.testing.assert_array_equal(streamed.at(0, position).tokens, expected_row.tokens)


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
