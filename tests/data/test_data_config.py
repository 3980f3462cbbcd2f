from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from data.config import (
    SOURCES,
    TOKENIZERS,
    BytesTokenizer,
    FileTokenizer,
    HubData,
    HubTokenizer,
    MixData,
    StdlibData,
    SyntheticData,
    TextData,
    TokenizerConfig,
    TokensData,
)

CONFIGS = Path(__file__).parents[2] / "configs"


REQUIRED = {name: {"path": "x"} for name in ("text", "hf", "tokens")} | {"mix": {"parts": {"a": {"name": "stdlib"}}}}
PRESETS = ["codeparrot", "fineweb_edu", "pg19", "tiny_shakespeare", "wikitext"]


def composed(group, option):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return OmegaConf.to_container(compose(f"{group}/{option}")[group])


@pytest.mark.parametrize("source", SOURCES)
def test_yaml_lists_every_field_with_its_default(source):
    required = REQUIRED.get(source, {})
    defaults = asdict(SOURCES[source](**required)) | dict.fromkeys(required, None if source == "mix" else "")
    assert composed("data", source) == defaults


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_name_a_dataset_of_the_hub(preset):
    config = HubData(**composed("data", preset))
    assert config.name == "hf"
    assert "/" in config.path
    assert config.streaming == (config.max_bytes is not None)


@pytest.mark.parametrize("name", ["bytes", "file", "hub"])
def test_tokenizer_yaml_lists_every_field_with_its_default(name):
    required = {} if name == "bytes" else {"path": "x"}
    defaults = asdict(TOKENIZERS[name](**required)) | dict.fromkeys(required, "")
    assert composed("tokenizer", name) == defaults


def test_tokenizer_yaml_takes_the_vocabulary_of_the_model():
    tokenizer = OmegaConf.load(CONFIGS / "tokenizer" / "bpe.yaml")
    config = OmegaConf.create({"model": {"vocab_size": 1234}, "tokenizer": tokenizer})
    assert OmegaConf.to_container(config.tokenizer, resolve=True) == asdict(TokenizerConfig(vocab_size=1234))


def test_configs_work_as_structured_configs_and_validate_when_built():
    merged = OmegaConf.merge(OmegaConf.structured(TextData), {"path": "a.txt", "val_fraction": 0.2})
    assert OmegaConf.to_object(merged) == TextData(path="a.txt", val_fraction=0.2)
    with pytest.raises(ValueError, match=r"data\.path is empty: data=text needs data\.path=FILE, FOLDER or GLOB"):
        OmegaConf.to_object(OmegaConf.structured(TextData))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TokenizerConfig(vocab_size=256), r"tokenizer\.vocab_size=256.*257"),
        (lambda: StdlibData(val_fraction=0.0), r"data\.val_fraction=0\.0"),
        (lambda: StdlibData(val_fraction=1.0), r"data\.val_fraction=1\.0"),
        (lambda: StdlibData(val_fraction=float("nan")), r"data\.val_fraction=nan"),
        (lambda: StdlibData(cache_dir=""), r"data\.cache_dir is empty"),
        (lambda: TextData(path=" "), r"data\.path is empty"),
        (lambda: TextData(path="x", field=""), r"data\.field is empty"),
        (lambda: StdlibData(packing="tight"), r"data\.packing=tight is unknown; use end_to_end or best_fit"),
        (lambda: HubData(path=""), r"data\.path is empty: data=hf needs"),
        (lambda: HubData(path="x", prepare=False), r"data\.prepare=false is for streams: set data\.streaming=true"),
        (
            lambda: HubData(path="x", prepare=False, streaming=True, packing="best_fit"),
            r"data\.packing=best_fit needs all documents at once",
        ),
        (
            lambda: MixData(parts={"a": {"name": "hf", "path": "x", "streaming": True, "prepare": False}}),
            r"data\.parts\.a\.prepare=false is not possible in a mixture",
        ),
        (lambda: HubData(path="x", max_bytes=0), r"data\.max_bytes=0 is not possible"),
        (lambda: SyntheticData(task="sort"), r"data\.task=sort is unknown; use copy, needle, recall"),
        (lambda: SyntheticData(task="recall", pairs=0), r"data\.pairs=0 is not possible; use 1 to 52"),
        (lambda: SyntheticData(task="recall", pairs=53), r"data\.pairs=53 is not possible; use 1 to 52"),
        (
            lambda: MixData(parts={"a": {"name": "synthetic", "task": "recall"}}),
            r"data\.parts\.a\.task=recall is not possible in a mixture",
        ),
        (lambda: SyntheticData(documents=1), r"data\.documents=1 is too few"),
        (lambda: SyntheticData(length=9), r"data\.length=9 is too short"),
        (lambda: BytesTokenizer(vocab_size=300), r"tokenizer\.vocab_size=300 is not possible"),
        (lambda: FileTokenizer(), r"tokenizer\.path is empty: tokenizer=file needs tokenizer\.path=tokenizer\.json"),
        (lambda: HubTokenizer(), r"tokenizer\.path is empty: tokenizer=hub needs tokenizer\.path=gpt2"),
        (lambda: FileTokenizer(path="x", vocab_size=9), r"tokenizer\.vocab_size=9 is not possible"),
        (lambda: MixData(), r"data\.parts is empty: data=mix needs"),
        (
            lambda: MixData(parts=["stdlib"]),
            r"data\.parts=\['stdlib'\] is not possible: data=mix needs data\.parts=\{NAME:",
        ),
        (lambda: TextData(path=[]), r"data\.path is empty: data=text needs data\.path=FILE"),
        (lambda: TextData(path=["a", " "]), r"data\.path is empty: data=text needs"),
        (
            lambda: TextData(path={"a": 1}),
            r"data\.path=\{'a': 1\} is not possible; use a name, or a list: data\.path=\[a,b\]",
        ),
        (lambda: TextData(path="x", exclude=[1]), r"data\.exclude=\[1\] is not possible; use a name, or a list"),
        (lambda: TextData(path="x", delimiter=""), r"data\.delimiter is empty"),
        (lambda: TextData(path="x", bad_records="keep"), r"data\.bad_records=keep is unknown; use stop or skip"),
        (lambda: TextData(path="x", max_bad_records=0), r"data\.max_bad_records=0 is not possible"),
        (lambda: HubData(path="x", val_split="train"), r"data\.val_split=train is data\.split, too"),
        (lambda: TokensData(), r"data\.path is empty: data=tokens needs"),
        (lambda: MixData(parts={"a": 3}), r"data\.parts\.a=3 is not possible"),
        (lambda: MixData(parts={"a": {"name": "x"}}), r"data\.parts\.a\.name=x is unknown; use stdlib, text, hf"),
        (lambda: MixData(parts={"a": {"name": "mix"}}), r"data\.parts\.a\.name=mix is unknown"),
        (lambda: MixData(parts={"a": {"name": "stdlib", "weight": 0}}), r"data\.parts\.a\.weight=0 is not possible"),
        (
            lambda: MixData(parts={"a": {"name": "stdlib", "seed": 0}}),
            r"data\.parts\.a\.seed is not a setting; stdlib has",
        ),
        (
            lambda: MixData(parts={"a": {"name": "stdlib", "cache_dir": "x"}}),
            r"data\.parts\.a\.cache_dir is not a setting",
        ),
        (lambda: MixData(parts={"a": {"name": "text"}}), r"data\.parts\.a: data\.path is empty"),
        (lambda: MixData(parts={"a": {"name": "stdlib", "weight": 1e308}}), r"data\.parts\.a\.weight=1e\+308 is not"),
        (
            lambda: MixData(parts={"a": {"name": "synthetic", "documents": 10.5}}),
            r"data\.parts\.a\.documents: Value '10\.5' .* Integer",
        ),
        (lambda: MixData(parts={"a": {"name": "hf", "path": "x", "max_bytes": "all"}}), r"\.a\.max_bytes: Value 'all'"),
    ],
)
def test_a_bad_value_is_one_line_naming_the_key(build, message):
    with pytest.raises(ValueError, match=message) as error:
        build()
    assert "\n" not in str(error.value)


def test_what_is_not_on_this_machine_is_told_without_reading(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a[1].txt").write_text("a name that is a pattern, too")
    mixed = {"a": {"name": "stdlib"}, "b": {"name": "text", "path": "nowhere"}}
    for missing in (TextData(path="nowhere"), TextData(path="*.md"), MixData(parts=mixed), FileTokenizer(path=".")):
        with pytest.raises(ValueError, match=r"path=(nowhere|\*\.md) does not exist|path=\. is no file"):
            missing.check()
    for there in (TextData(path="a[1].txt"), TextData(path="*.txt"), FileTokenizer(path="a[1].txt")):
        there.check()
    for elsewhere in (StdlibData(), HubData(path="nobody/knows"), HubTokenizer(path="nobody/knows")):
        elsewhere.check()


def test_smallest_vocabulary_is_accepted():
    assert TokenizerConfig(vocab_size=257).vocab_size == 257
