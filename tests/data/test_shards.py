from __future__ import annotations

import os

import numpy as np
import pytest

from data.config import BytesTokenizer, FileTokenizer, MixData, TextData, TokenizerConfig, TokensData
from data.corpus import load_corpus
from data.shards import open_shard
from data.tokenizer import Tokenizer

BYTES = Tokenizer.of_bytes()
DOCUMENTS = [f"document {number}, and what it says\n" * (1 + number % 4) for number in range(60)]


def tokens_of(documents, separator="before"):
    """Token ids, uint16, with the separator before each document, as modded-nanogpt has it, or behind, as nanoGPT."""
    one = [BYTES.separator_id]
    both = (one + BYTES.encode(text) if separator == "before" else BYTES.encode(text) + one for text in documents)
    return np.array([token for document in both for token in document], np.uint16)


def write_with_header(path, tokens, magic=20240520, version=1, count=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + tokens.tobytes())


@pytest.fixture
def load(tmp_path):
    def load(lines=None, tokenizer=None, **fields):
        config = TokensData(**{"path": str(tmp_path / "shards"), "cache_dir": str(tmp_path / "cache"), **fields})
        notify = (lambda line: None) if lines is None else lines.append
        return load_corpus(config, tokenizer or BytesTokenizer(), notify)

    (tmp_path / "shards").mkdir()
    return load


def texts(stream):
    ends = [*stream.document_starts[1:], len(stream.tokens)]
    ids = [stream.tokens[a:b] for a, b in zip(stream.document_starts, ends, strict=True)]
    return [BYTES.decode(part[part != BYTES.separator_id]) for part in ids]


@pytest.mark.parametrize("separator", ["before", "behind"])
def test_shards_as_nanogpt_writes_them(tmp_path, load, separator):
    tokens_of(DOCUMENTS[:50], separator).tofile(tmp_path / "shards" / "train.bin")
    tokens_of(DOCUMENTS[50:], separator).tofile(tmp_path / "shards" / "val.bin")
    (tmp_path / "shards" / "meta.pkl").write_bytes(b"x")
    lines: list[str] = []
    (part,) = load(lines).parts
    assert [text for text in texts(part.train) if text] == DOCUMENTS[:50]
    assert [text for text in texts(part.val) if text] == DOCUMENTS[50:]
    assert "data       data.path: validated on val.bin, by name" in lines
    assert "data       data.path: left out 1 of 3 files: 1 .pkl" in lines
    assert part.train.tokens.dtype == np.uint16


def test_shards_with_a_header_in_their_order(tmp_path, load):
    for number in range(3):
        some = tokens_of(DOCUMENTS[20 * number : 20 * number + 20])
        write_with_header(tmp_path / "shards" / f"fineweb_train_{number:06d}.bin", some)
    write_with_header(tmp_path / "shards" / "fineweb_val_000000.bin", tokens_of(["held out"]))
    path, val_path = (f"{tmp_path}/shards/*{side}*.bin" for side in ("train", "val"))
    corpus = load(path=path, val_path=val_path)
    assert texts(corpus.parts[0].train) == DOCUMENTS
    assert texts(corpus.parts[0].val) == ["held out"]
    assert corpus.manifest["documents"] == 61
    assert corpus.manifest["bytes"] == sum(map(len, DOCUMENTS)) + len("held out")
    assert load(path=path, val_path=val_path).manifest == corpus.manifest
    write_with_header(tmp_path / "shards" / "fineweb_val_000000.bin", tokens_of(["held up"]))
    assert load(path=path, val_path=val_path).manifest["hash"] != corpus.manifest["hash"]


@pytest.mark.parametrize("fraction", [0.05, 0.2])
@pytest.mark.parametrize("shards", [1, 4])
def test_without_shards_to_validate_on_a_tail_is_held_out_that_begins_with_a_document(
    tmp_path, load, fraction, shards, monkeypatch
):
    monkeypatch.setattr("data.shards.CHUNK", 100)
    for number, some in enumerate(np.array_split(tokens_of(DOCUMENTS), shards)):
        np.save(tmp_path / "shards" / f"{number}.npy", some.astype(np.int64))
    (part,) = load(val_fraction=fraction).parts
    share = len(part.val.tokens) / (len(part.val.tokens) + len(part.train.tokens))
    assert fraction <= share <= 2 * fraction
    assert texts(part.train) + texts(part.val) == DOCUMENTS
    for stream in (part.train, part.val):
        np.testing.assert_array_equal(np.flatnonzero(stream.tokens == BYTES.separator_id), stream.document_starts)


def test_tokens_that_the_tokenizer_does_not_have_are_named(tmp_path, load):
    tokens = tokens_of(DOCUMENTS)
    tokens[777] = 257
    tokens.tofile(tmp_path / "shards" / "a.bin")
    with pytest.raises(ValueError, match=r"a\.bin has token 257 at place 777, and the tokenizer only 257 ids: set tok"):
        load()
    np.save(tmp_path / "shards" / "b.npy", -np.ones(9, np.int32))
    with pytest.raises(ValueError, match=r"b\.npy has token -1 at place 0"):
        load(path=str(tmp_path / "shards" / "b.npy"))
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    with pytest.raises(
        ValueError, match=r"tokenizer=bpe cannot be learned from data=tokens: name the one that made them"
    ):
        load(tokenizer=TokenizerConfig())


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(b"odd"), r"a\.bin has 3 bytes, which are no tokens of 2"),
        (lambda path: path.write_bytes(b""), r"a\.bin has 0 bytes, which are no tokens"),
        (lambda path: write_with_header(path, np.zeros(9, np.uint16), version=2), r"is of version 2, and version 1 is"),
        (
            lambda path: write_with_header(path, np.zeros(9, np.uint16), count=10),
            r"has 9 tokens .* says 10:",
        ),
        (
            lambda path: write_with_header(path, np.zeros(9, np.uint16), count=-1),
            r"has 9 tokens .* says -1:",
        ),
        (lambda path: write_with_header(path, np.zeros(0, np.uint16)), r"a\.bin holds no tokens"),
    ],
)
def test_a_damaged_shard_is_one_line(tmp_path, load, write, message):
    write(tmp_path / "shards" / "a.bin")
    with pytest.raises(ValueError, match=message) as error:
        load()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [np.zeros((3, 3), np.int64), np.zeros(9), np.array(["a"]), np.array([{}])])
def test_an_array_that_is_no_row_of_integers_is_refused(tmp_path, load, content):
    np.save(tmp_path / "shards" / "a.npy", content)
    with pytest.raises(ValueError, match=r"a\.npy (holds .* a shard is one row of integers|is no array)"):
        load()


@pytest.mark.parametrize("damage", ["cut", "header"])
def test_a_damaged_array_is_one_line(tmp_path, load, damage):
    np.save(tmp_path / "shards" / "a.npy", np.arange(99))
    if damage == "cut":
        os.truncate(tmp_path / "shards" / "a.npy", 500)
    else:
        content = (tmp_path / "shards" / "a.npy").read_bytes()
        (tmp_path / "shards" / "a.npy").write_bytes(content.replace(b"{", b"{\0"))
    with pytest.raises(ValueError, match=r"a\.npy is no array, or cut short") as error:
        load()
    assert "\n" not in str(error.value)


def test_shards_of_32_bits_are_read(tmp_path):
    write_with_header(tmp_path / "a.bin", np.array([1, 128_255], np.uint32), magic=20240801, version=7)
    assert open_shard(tmp_path / "a.bin").tolist() == [1, 128_255]


def test_no_shards_and_no_separators_are_told(tmp_path, load):
    with pytest.raises(ValueError, match=r"data\.path=.*shards matches no files: looked for \.bin \.npy"):
        load()
    np.ones(999, np.uint16).tofile(tmp_path / "shards" / "a.bin")
    lines: list[str] = []
    (part,) = load(lines).parts
    assert lines[-1] == "           no <|endoftext|> in the shards: all tokens are one document"
    assert (len(part.train.tokens), len(part.val.tokens)) == (949, 50)
    os.truncate(tmp_path / "shards" / "a.bin", 4)
    with pytest.raises(ValueError, match=r"too few tokens in data\.path=.* to hold out data\.val_fraction=0\.05"):
        load()


def test_a_mixture_may_have_shards(tmp_path, load):
    BYTES.save(tmp_path / "bytes.json")
    tokens_of(DOCUMENTS).tofile(tmp_path / "shards" / "a.bin")
    (tmp_path / "a.txt").write_text("".join(DOCUMENTS))
    parts = {
        "a": {"name": "tokens", "path": str(tmp_path / "shards")},
        "b": {"name": "text", "path": str(tmp_path / "a.txt")},
    }
    mix = MixData(parts=parts, cache_dir=str(tmp_path / "cache"))
    corpus = load_corpus(mix, FileTokenizer(path=str(tmp_path / "bytes.json")), lambda line: None)
    assert [part.name for part in corpus.parts] == ["a", "b"]
    assert isinstance(mix.sources()["b"][1], TextData)
