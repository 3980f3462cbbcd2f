"""What a user may choose about the data. Hydra fills these in; each checks its own values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TokenizerConfig:
    """`configs/tokenizer`: how text becomes token ids."""

    name: str = "bpe"
    """"bpe": byte-level byte-pair encoding, trained on the corpus itself."""
    vocab_size: int = 4096
    """Number of token ids, the document separator included. A small text may yield fewer."""

    def __post_init__(self) -> None:
        if self.name != "bpe":
            raise ValueError(f"tokenizer.name={self.name} is unknown: use tokenizer=bpe")
        if self.vocab_size < 257:
            raise ValueError(
                f"tokenizer.vocab_size={self.vocab_size} is too small: 256 bytes and <|endoftext|> need at least 257"
            )


@dataclass
class DataConfig:
    """`configs/data`: what every source of text has in common."""

    name: str
    """The source: a key of SOURCES."""
    document_mask: bool = True
    """True: attention and positions stay within a document. False: rows are read as one continuous text."""
    val_fraction: float = 0.05
    """Share of the text held out for validation, in whole documents where there are enough of them."""
    cache_dir: str = "~/.cache/flash-gpt"
    """Folder for trained tokenizers and token files; "~" is the home folder."""

    def __post_init__(self) -> None:
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"data.val_fraction={self.val_fraction} must lie between 0 and 1, for example 0.05")
        if not self.cache_dir:
            raise ValueError("data.cache_dir is empty: set it to a folder you can write")


@dataclass
class StdlibData(DataConfig):
    """`data=stdlib`: the sources of the running Python's standard library, about 10 MB, nothing to download."""

    name: str = "stdlib"


@dataclass
class TextData(DataConfig):
    """`data=text`: your own files."""

    name: str = "text"
    path: str = ""
    """A file, a folder (searched recursively) or a glob. Suffixes: .txt .py .md .jsonl. Required."""
    field: str = "text"
    """The key of a .jsonl line that holds its text."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.path.strip():
            raise ValueError("data.path is empty: data=text needs data.path=FILE, FOLDER or GLOB")
        if not self.field:
            raise ValueError("data.field is empty: name the key of a .jsonl line that holds its text")


SOURCES: dict[str, type[DataConfig]] = {"stdlib": StdlibData, "text": TextData}
