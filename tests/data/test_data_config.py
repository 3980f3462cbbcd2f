from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from data.config import SOURCES, StdlibData, TextData, TokenizerConfig

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("source", SOURCES)
def test_yaml_lists_every_field_with_its_default(source):
    given = OmegaConf.to_container(OmegaConf.load(CONFIGS / "data" / f"{source}.yaml"))
    defaults = asdict(SOURCES[source](**({"path": "x"} if source == "text" else {}))) | (
        {"path": ""} if source == "text" else {}
    )
    assert given == defaults


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
        (lambda: TokenizerConfig(name="wordpiece"), r"tokenizer\.name=wordpiece.*tokenizer=bpe"),
        (lambda: TokenizerConfig(vocab_size=256), r"tokenizer\.vocab_size=256.*257"),
        (lambda: StdlibData(val_fraction=0.0), r"data\.val_fraction=0\.0"),
        (lambda: StdlibData(val_fraction=1.0), r"data\.val_fraction=1\.0"),
        (lambda: StdlibData(val_fraction=float("nan")), r"data\.val_fraction=nan"),
        (lambda: StdlibData(cache_dir=""), r"data\.cache_dir is empty"),
        (lambda: TextData(path=" "), r"data\.path is empty"),
        (lambda: TextData(path="x", field=""), r"data\.field is empty"),
    ],
)
def test_a_bad_value_is_one_line_naming_the_key(build, message):
    with pytest.raises(ValueError, match=message) as error:
        build()
    assert "\n" not in str(error.value)


def test_smallest_vocabulary_is_accepted():
    assert TokenizerConfig(vocab_size=257).vocab_size == 257
