"""Convert a trained model to Hugging Face transformers, or one from there.

python -m scripts.convert to-hf RUN OUT [--dtype bfloat16] [--shard-size 5]    RUN: a run folder, or a checkpoint
python -m scripts.convert from-hf DIR RUN                                      DIR: what save_pretrained wrote
"""

from __future__ import annotations

import math
import os
import re
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from data import disk
from data.tokenizer import Tokenizer
from model.config import ModelConfig
from model.huggingface.folder import is_huggingface, read_separator, read_settings, write_json, write_tokenizer
from model.huggingface.settings import describe, understand
from scripts.parser import parser_of
from training.checkpoint.fits import flat
from training.config.paths import in_quotes
from training.terminal import secure
from training.trained import find, read_state

CONFIGS = Path(__file__).parents[1] / "configs" / "model"
DTYPES = ("float32", "bfloat16", "float16")


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0; 2 where the command cannot work; 130 after Ctrl-C."""
    parser = parser_of("convert", __doc__)
    directions = parser.add_subparsers(dest="direction", required=True)
    there = directions.add_parser("to-hf", help="write a folder that AutoModelForCausalLM and AutoTokenizer read")
    there.add_argument("source", type=Path, metavar="RUN", help="a run folder, or a checkpoint")
    there.add_argument("target", type=Path, metavar="OUT", help="a folder that is not there yet")
    there.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default float32)")
    there.add_argument("--shard-size", type=float, default=5.0, metavar="GB", help="of a file at most (default 5)")
    back = directions.add_parser("from-hf", help="write a folder that init_from= reads")
    back.add_argument("source", type=Path, metavar="DIR", help="a folder of transformers")
    back.add_argument("target", type=Path, metavar="RUN", help="a folder that is not there yet")
    options = parser.parse_args(arguments)
    try:
        if options.target.exists():
            raise ValueError(f"{options.target} is there already; name another folder")
        if not options.source.is_dir():
            raise ValueError(f"{options.source} is no folder; name a run, a checkpoint or a folder of transformers")
        options.target.parent.mkdir(parents=True, exist_ok=True)
        if options.direction == "to-hf":
            if not 0 < options.shard_size * 1e9 < math.inf:
                raise ValueError(
                    f"--shard-size {options.shard_size:g} is not possible; use gigabytes, such as 5 or 0.5"
                )
            to_huggingface(options.source, options.target, options.dtype, int(options.shard_size * 1e9))
        else:
            from_huggingface(options.source, options.target)
    except ValueError as error:
        parser.refuse(str(error))
    except OSError as error:
        parser.refuse(f"{error.filename or options.target} cannot be written: {error.strerror}; name another folder")
    except KeyboardInterrupt:
        return 130
    return 0


def to_huggingface(run: Path, target: Path, dtype: str = "float32", shard_bytes: int = 5 * 10**9) -> None:
    """Write the model and the tokenizer of a run as transformers reads them; the folder appears whole or not at all.

    Raises:
        ValueError: there is no model, or transformers has none like it.
    """
    import torch  # here, for it takes seconds: Ctrl-C meanwhile is answered as any other

    from model.huggingface.shards import write_weights
    from model.huggingface.weights import to_theirs

    found = find(str(run), print)
    if is_huggingface(run):
        raise ValueError(f"{run} is a folder of transformers already; name a run folder or a checkpoint")
    config, seq_len = found.model, found.settings["seq_len"]
    tokenizer = Tokenizer.load(found.tokenizer, found.settings.get("tokenizer", {}).get("separator"))
    described = describe(config, seq_len, dtype, tokenizer.separator_id)
    with disk.part_of(target) as part:
        write_json(part / "config.json", described)
        parameters = write_weights(part, to_theirs(config, read_state(found)), getattr(torch, dtype), shard_bytes)
        most = config.n_positions if config.position == "learned" else seq_len
        write_tokenizer(part, tokenizer.to_json(), tokenizer.separator, tokenizer.separator_id, most)
        os.replace(part, target)
    print(f"{described['architectures'][0]}, {parameters / 1e6:.1f} M parameters in {dtype}")
    print(target)


def from_huggingface(source: Path, target: Path) -> None:
    """Write a folder with model.safetensors, config.yaml and tokenizer.json, whole or not at all.

    Raises:
        ValueError: the model cannot be expressed, or something is missing.
    """
    from model.huggingface.shards import read_weights, save
    from model.huggingface.weights import from_theirs

    described = read_settings(source)
    config = understand(described, str(source / "config.json"), name=target.name)
    if not (source / "tokenizer.json").is_file():
        raise ValueError(
            f"{source} has no tokenizer.json: AutoTokenizer.from_pretrained(…) of it and save_pretrained write one"
        )
    tokenizer = Tokenizer.load(source / "tokenizer.json", read_separator(source))
    state = from_theirs(config, read_weights(source), str(source))
    seq_len = config.n_positions if config.position == "learned" else described["max_position_embeddings"]
    path = str(target.absolute() / "tokenizer.json")
    settings = {
        "model": asdict(config),
        "tokenizer": {"name": "file", "path": path, "separator": tokenizer.separator, "vocab_size": None},
        "seq_len": seq_len,
    }
    with disk.part_of(target) as part:
        save(state, part / "model.safetensors")
        (part / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        tokenizer.save(part / "tokenizer.json")
        os.replace(part, target)
    print(f"{described['model_type']}, {sum(tensor.numel() for tensor in state.values()) / 1e6:.1f} M parameters")
    print("train it with:")
    words = [setting("init_from", target), *overrides(config, tokenizer, target)]
    print(shlex.join(["python", "train.py", *words]))


def overrides(config: ModelConfig, tokenizer: Tokenizer, run: Path) -> list[str]:
    """What to type for a model of these settings: an option of `model=`, and what is different there."""
    option, family = ("gpt2-124m", "gpt2") if config.position == "learned" else ("tiny", "llama")
    base = OmegaConf.merge(
        OmegaConf.load(CONFIGS / "family" / f"{family}.yaml"), OmegaConf.load(CONFIGS / f"{option}.yaml")
    )
    usual: Any = OmegaConf.to_container(base)
    known = dict(flat(usual))
    different = [
        setting(f"model.{key}", "null" if value is None else value)
        for key, value in flat(asdict(config))
        if key in known and known[key] != value
    ]
    return [
        f"model={option}",
        *different,
        "tokenizer=file",
        setting("tokenizer.path", run / "tokenizer.json"),
        f'tokenizer.separator="{tokenizer.separator}"',
    ]


def setting(key: str, value: object) -> str:
    """As train.py reads it, in quotes only where it must be."""
    plain = re.fullmatch(r"[\w./+:@%-]*", str(value))
    return f"{key}={value if plain else in_quotes(str(value))}"


if __name__ == "__main__":
    secure()
    raise SystemExit(main())
