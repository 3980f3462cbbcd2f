"""The files of a folder that transformers' from_pretrained reads, but for the weights. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(file: Path) -> dict[str, Any]:
    """An object; an empty one where there is no file.

    Raises:
        ValueError: it cannot be read, or holds something else.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read as JSON ({error}); save the model again") from error
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}; make it readable") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds no JSON object; save the model again")
    return values


def is_huggingface(folder: Path) -> bool:
    """Whether a folder is one that transformers reads."""
    try:
        return isinstance(read_json(folder / "config.json").get("model_type"), str)
    except ValueError:
        return False


def read_settings(folder: Path) -> dict[str, Any]:
    """Raises ValueError where there is no config.json of a model, or one that cannot be read."""
    file = folder / "config.json"
    if not file.exists():
        raise ValueError(f"{folder} has no config.json: name a folder that transformers' save_pretrained wrote")
    return read_json(file)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files with the weights: one, or those that an index names.

    Raises:
        ValueError: one is not there, or the index names none.
    """
    index = read_json(folder / INDEX)
    places = index.get("weight_map") if index else {"all": WEIGHTS}
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{folder / INDEX} does not name the file of each tensor; save the model again")
    files = [folder / name for name in sorted(set(places.values()))]
    for file in files:
        if not file.is_file():
            raise ValueError(f"{folder} has no {file.name}: weights are read as safetensors only")
    return files


def read_separator(folder: Path) -> str | None:
    """The tokenizer's end of text; None where the folder does not say."""
    token = read_json(folder / "tokenizer_config.json").get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def write_tokenizer(folder: Path, tokenizer_json: str, separator: str, separator_id: int, seq_len: int) -> None:
    """tokenizer.json, tokenizer_config.json and generation_config.json: what `AutoTokenizer` and `generate` read.

    The separator begins a document and so ends the one before it. No text gets it added: whoever begins a document
    writes it.
    """
    (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": separator,
            "eos_token": separator,
            "model_max_length": seq_len,
            "clean_up_tokenization_spaces": False,
        },
    )
    write_json(folder / "generation_config.json", {"bos_token_id": separator_id, "eos_token_id": separator_id})
