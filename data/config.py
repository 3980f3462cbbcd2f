"""What a user may choose about the data. Hydra fills these in; each checks its own values."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.files import expand, find_root, listed
from data.recall import KEYS

PACKINGS = ("end_to_end", "best_fit")
BAD_RECORDS = ("stop", "skip")
TASKS = ("copy", "needle", "recall")


@dataclass
class TokenizerConfig:
    """`tokenizer=bpe`: byte-level byte-pair encoding, trained on the corpus itself."""

    name: str = "bpe"
    """A key of TOKENIZERS."""
    vocab_size: int | None = 4096
    """Number of token ids, the document separator included. A small text may yield fewer."""

    def __post_init__(self) -> None:
        if self.vocab_size is not None and self.vocab_size < 257:
            raise ValueError(
                f"tokenizer.vocab_size={self.vocab_size} is too small: 256 bytes and <|endoftext|> need at least 257 "
                f"(it follows model.vocab_size)"
            )

    def check(self) -> None:
        """Look for what it names on this machine, before anything slow begins.

        Raises:
            ValueError: something is not there.
        """


@dataclass
class BytesTokenizer(TokenizerConfig):
    """`tokenizer=bytes`: UTF-8 bytes and a separator, nothing learned."""

    name: str = "bytes"
    vocab_size: int | None = 257

    def __post_init__(self) -> None:
        if self.vocab_size != 257:
            raise ValueError(f"tokenizer.vocab_size={self.vocab_size} is not possible: tokenizer=bytes has 257 ids")


@dataclass
class FileTokenizer(TokenizerConfig):
    """`tokenizer=file`: a tokenizer.json of the `tokenizers` library."""

    name: str = "file"
    vocab_size: int | None = None
    path: str = ""
    """The file. Required."""
    separator: str | None = None
    """The token between documents; null: one of the usual ones that the file has."""

    def __post_init__(self) -> None:
        if not self.path.strip():
            raise ValueError(f"tokenizer.path is empty: tokenizer={self.name} needs tokenizer.path={self._example}")
        if self.vocab_size is not None:
            raise ValueError(f"tokenizer.vocab_size={self.vocab_size} is not possible: tokenizer.path has its own")

    def check(self) -> None:
        if not os.path.isfile(expand(self.path)):
            raise ValueError(f"tokenizer.path={self.path} is no file: name a tokenizer.json")

    @property
    def _example(self) -> str:
        return "tokenizer.json"


@dataclass
class HubTokenizer(FileTokenizer):
    """`tokenizer=hub`: the tokenizer.json of a repository on the Hugging Face Hub."""

    name: str = "hub"
    revision: str = "main"

    def check(self) -> None:
        """The network is asked when it is needed."""

    @property
    def _example(self) -> str:
        return "gpt2"


TOKENIZERS: dict[str, type[TokenizerConfig]] = {
    "bpe": TokenizerConfig,
    "bytes": BytesTokenizer,
    "file": FileTokenizer,
    "hub": HubTokenizer,
}


@dataclass
class DataConfig:
    """`configs/data`: what every source of text has in common."""

    name: str
    """The source: a key of SOURCES."""
    document_mask: bool = True
    """True: attention and positions stay within a document. False: rows are read as one continuous text."""
    packing: str = "end_to_end"
    """How documents fill rows: "end_to_end" cuts them wherever a row ends, "best_fit" as few as possible."""
    val_fraction: float = 0.05
    """Share of the text held out for validation, in whole documents where there are enough of them."""
    cache_dir: str = "~/.cache/flash-gpt"
    """Folder for trained tokenizers and token files; "~" is the home folder."""

    def __post_init__(self) -> None:
        if self.packing not in PACKINGS:
            raise ValueError(f"data.packing={self.packing} is unknown; use {' or '.join(PACKINGS)}")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"data.val_fraction={self.val_fraction} must lie between 0 and 1, for example 0.05")
        if not self.cache_dir:
            raise ValueError("data.cache_dir is empty: set it to a folder you can write")

    @property
    def is_recall(self) -> bool:
        """Whether only answers are targets, see `data.recall`."""
        return False

    def check_rows(self, seq_len: int, tokenizer: TokenizerConfig) -> None:
        """Raises ValueError where rows of this length, or of this tokenizer's tokens, cannot hold what it makes."""

    def check(self) -> None:
        """Look for what it names on this machine, before anything slow begins.

        Raises:
            ValueError: something is not there.
        """


@dataclass
class StdlibData(DataConfig):
    """`data=stdlib`: the sources of the running Python's standard library, about 10 MB, nothing to download."""

    name: str = "stdlib"


@dataclass
class TextData(DataConfig):
    """`data=text`: your own files."""

    name: str = "text"
    path: Any = ""
    """A file, a folder (searched recursively), a glob or a pipe, or a list of them; see `data.files`. Required."""
    val_path: Any = None
    """Where the text to validate on is, in the same words. null: data.val_fraction of data.path is held out."""
    field: str = "text"
    """The key of a record (.jsonl), or the column of a table (.parquet, .csv), that holds its text; "a.b" is b in a."""
    delimiter: str | None = None
    r"""What separates documents in files of text ("\n" is a line end); null: a file is one document."""
    include: Any = None
    """A pattern such as "*.log", or a list: only these files of a folder or glob are taken, whatever their suffix."""
    exclude: Any = None
    """A pattern, or a list: these files are not taken."""
    bad_records: str = "stop"
    """"stop": a line, row or text that cannot be read ends preparation. "skip": it is left out and counted."""
    max_bad_records: int = 1000
    """With "skip": more than these end preparation, too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_names(self, "path", "include", "exclude", "val_path")
        if not self.path:
            raise ValueError("data.path is empty: data=text needs data.path=FILE, FOLDER or GLOB")
        if not self.field:
            raise ValueError("data.field is empty: name the key of a .jsonl line that holds its text")
        if self.delimiter == "":
            raise ValueError("data.delimiter is empty: set it to what separates documents, or to null")
        if self.bad_records not in BAD_RECORDS:
            raise ValueError(f"data.bad_records={self.bad_records} is unknown; use {' or '.join(BAD_RECORDS)}")
        if self.max_bad_records < 1:
            raise ValueError(f"data.max_bad_records={self.max_bad_records} is not possible; use 1 or more")

    def check(self) -> None:
        for key in ("path", "val_path"):
            for path in listed(getattr(self, key) or []):
                find_root(path, f"data.{key}")


@dataclass
class TokensData(DataConfig):
    """`data=tokens`: shards of tokens that somebody else prepared, with the tokenizer that made them."""

    name: str = "tokens"
    path: Any = ""
    """Shards, a folder or glob of them, or a list: .npy, or .bin as nanoGPT (uint16) or llm.c and modded-nanogpt (with
    a header) write them. Required."""
    val_path: Any = None
    """Shards to validate on; null: the last data.val_fraction of all tokens is held out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_names(self, "path", "val_path")
        if not self.path:
            raise ValueError("data.path is empty: data=tokens needs data.path=SHARD, FOLDER or GLOB")

    check = TextData.check


def _check_names(config: DataConfig, *keys: str) -> None:
    """Each is one name or a list of names, that is not empty; kept as a list where it is one."""
    for key in keys:
        value = getattr(config, key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)  # a folder called 2026
        if value is None or value == "":
            continue
        names = [value] if isinstance(value, str) else list(value) if isinstance(value, Sequence) else None
        if not names or not all(isinstance(name, str) and name.strip() for name in names):
            if key == "path" and (names == [] or (names and all(isinstance(name, str) for name in names))):
                raise ValueError(f"data.path is empty: data={config.name} needs data.path=FILE, FOLDER or GLOB")
            raise ValueError(f"data.{key}={value} is not possible; use a name, or a list: data.{key}=[a,b]")
        setattr(config, key, value if isinstance(value, str) else names)


@dataclass
class HubData(DataConfig):
    """`data=hf`: a dataset of the Hugging Face Hub, or a folder that `datasets` can load."""

    name: str = "hf"
    path: str = ""
    """The dataset's name on the Hub, or a folder: of `save_to_disk`, or of parquet, json or text files. Required."""
    subset: str | None = None
    split: str = "train"
    val_split: str | None = None
    """The split to validate on, such as "validation"; null: data.val_fraction of data.split is held out."""
    field: str = "text"
    """The column that holds the text; "a.b" is b in a."""
    revision: str = "main"
    streaming: bool = False
    """True: read over the network while preparing, keeping no copy of the dataset itself."""
    prepare: bool = True
    """False: train on the stream as it comes, in its own order, and keep nothing. A run that goes on reads again all
    that came before."""
    max_bytes: int | None = None
    """Take documents until they have this many bytes; null: all of them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.path.strip():
            raise ValueError("data.path is empty: data=hf needs data.path=NAME of a dataset, or a folder")
        if self.val_split is not None and self.val_split == self.split:
            raise ValueError(
                f"data.val_split={self.val_split} is data.split, too: name another one, or null to hold out a part"
            )
        if not self.prepare and not self.streaming:
            raise ValueError("data.prepare=false is for streams: set data.streaming=true, too, or leave it out")
        if not self.prepare and self.packing != "end_to_end":
            raise ValueError(f"data.packing={self.packing} needs all documents at once: leave out data.prepare=false")
        if self.max_bytes is not None and self.max_bytes < 1:
            raise ValueError(f"data.max_bytes={self.max_bytes} is not possible; use 1 or more, or null for everything")


@dataclass
class SyntheticData(DataConfig):
    """`data=synthetic`: tasks that measure whether a model uses its context, of any length."""

    name: str = "synthetic"
    task: str = "needle"
    """"copy": random letters, then the same again. "needle": facts, filler, then questions about the facts. "recall":
    keys with their values in filler, then the keys again; only the values that follow are targets."""
    documents: int = 1000
    length: int = 4096
    """Characters of a document; with "recall" tokens of the longest, the separator among them."""
    pairs: int = 8
    """With "recall": the most keys with values in a document."""
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task not in TASKS:
            raise ValueError(f"data.task={self.task} is unknown; use {', '.join(TASKS)}")
        if self.documents < 2:
            raise ValueError(f"data.documents={self.documents} is too few: one to train on and one held out")
        if self.length < 256:
            raise ValueError(f"data.length={self.length} is too short for a task; use 256 or more")
        if not 1 <= self.pairs <= len(KEYS):
            raise ValueError(
                f"data.pairs={self.pairs} is not possible; use 1 to {len(KEYS)}, as many as there are keys"
            )

    @property
    def is_recall(self) -> bool:
        return self.task == "recall"

    def check_rows(self, seq_len: int, tokenizer: TokenizerConfig) -> None:
        if self.is_recall and tokenizer.name != "bytes":
            raise ValueError(f"data.task=recall asks for single bytes: set tokenizer=bytes, not {tokenizer.name}")
        if self.is_recall and seq_len % self.length:
            raise ValueError(
                f"data.length={self.length} does not divide seq_len={seq_len}: a row would ask for keys of another "
                f"one; set data.length={seq_len}"
            )


@dataclass
class MixData(DataConfig):
    """`data=mix`: several sources, each with its share of the tokens."""

    name: str = "mix"
    parts: Any = None
    """{name: {weight: …, name: …, the source's own settings}}; weights are relative. Required."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.parts, Mapping) or not self.parts:
            what = " is empty" if not self.parts else f"={self.parts} is not possible"
            raise ValueError(f"data.parts{what}: data=mix needs data.parts={{NAME: {{weight: 1, name: stdlib}}, …}}")
        self.sources()  # for what it refuses

    def check(self) -> None:
        for _, source in self.sources().values():
            source.check()

    def sources(self) -> dict[str, tuple[float, DataConfig]]:
        """Weight and checked configuration of each part; what all have in common is the mixture's."""
        shared: dict[Any, Any] = {f.name: getattr(self, f.name) for f in fields(DataConfig) if f.name != "name"}
        result = {}
        for key, part in self.parts.items():
            where = f"data.parts.{key}"
            if not isinstance(part, Mapping):
                raise ValueError(f"{where}={part} is not possible; write {{weight: 1, name: stdlib}}")
            settings = dict(part)
            weight, name = settings.pop("weight", 1), settings.pop("name", None)
            # Not to infinity: weights are added up.
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < 1e18:
                raise ValueError(f"{where}.weight={weight} is not possible; use a number above 0")
            if name not in SOURCES or name == "mix":
                known = ", ".join(source for source in SOURCES if source != "mix")
                raise ValueError(f"{where}.name={name} is unknown; use {known}")
            own = {f.name for f in fields(SOURCES[name])} - set(shared) - {"name"}
            if unknown := settings.keys() - own:
                known = ", ".join(sorted(own | {"name", "weight"}))
                raise ValueError(f"{where}.{min(unknown)} is not a setting; {name} has {known}")
            try:
                typed = OmegaConf.merge(OmegaConf.structured(SOURCES[name]), {**shared, **settings})
                source = OmegaConf.to_object(typed)
            except OmegaConfBaseException as error:
                raise ValueError(f"{where}.{error.full_key}: {str(error.msg or error).splitlines()[0]}") from error
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
            assert isinstance(source, DataConfig)
            if isinstance(source, HubData) and not source.prepare:
                raise ValueError(f"{where}.prepare=false is not possible in a mixture: leave it out")
            if source.is_recall:
                raise ValueError(f"{where}.task=recall is not possible in a mixture: its targets are answers only")
            result[key] = float(weight), source
        return result


SOURCES: dict[str, type[DataConfig]] = {
    "stdlib": StdlibData,
    "text": TextData,
    "hf": HubData,
    "mix": MixData,
    "synthetic": SyntheticData,
    "tokens": TokensData,
}
