"""Datasets of the Hugging Face Hub, and folders that `datasets` can load. No code of a dataset is ever run."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from data.config import HubData, HubTokenizer
from data.files import text_of

ROWS = 4096
"""Rows of a part, so that preparation can resume at any of them."""
PATIENCE_S = 5.0

Part = Callable[[], Iterator[tuple[str, str]]]


def open_hub(config: HubData) -> tuple[str, list[Part]]:
    """Fingerprint and parts of a dataset.

    Raises:
        ValueError: it is not there, not allowed, or the Hub cannot be reached; within seconds.
    """
    import datasets

    # Bars and warnings of other people's would tear our lines apart.
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    dataset = _load(config)
    columns = dataset.column_names
    if columns and config.field not in columns:
        raise ValueError(
            f"data.path={config.path} has no column {config.field!r}: set data.field to one of "
            f"{', '.join(map(repr, columns))}"
        )
    settings = [config.path, config.subset, config.split, config.field, config.revision, config.max_bytes]
    if config.streaming:
        # What a stream will hold cannot be known before it is read: the commit is all there is to go by.
        identity = _commit(config)
        parts: list[Part] = [partial(_read_stream, dataset, config)]
    else:
        identity = str(dataset._fingerprint)
        rows = dataset.num_rows
        parts = [partial(_read_rows, dataset, config, first, min(first + ROWS, rows)) for first in range(0, rows, ROWS)]
        if config.max_bytes is not None:
            parts = [partial(_until, config.max_bytes, parts)]
    return hashlib.sha256(repr([*settings, identity]).encode()).hexdigest(), parts


def _load(config: HubData) -> Any:
    import datasets
    from datasets import DownloadConfig

    folder = Path(config.path).expanduser()
    if config.path.startswith(("/", "./", "../", "~")) and not folder.is_dir():
        raise ValueError(f"data.path={config.path} does not exist: name a folder, or a dataset of the Hugging Face Hub")
    is_local = folder.is_dir()
    if is_local and config.streaming:
        raise ValueError(f"data.path={config.path} is a folder, which is read in place: leave out data.streaming")
    try:
        if is_local and ((folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()):
            loaded = datasets.load_from_disk(str(folder))
            return loaded[config.split] if isinstance(loaded, datasets.DatasetDict) else loaded
        if not is_local:
            _check_reachable(config)
        return datasets.load_dataset(
            str(folder) if is_local else config.path,
            config.subset,
            split=config.split,
            streaming=config.streaming,
            **({} if is_local else {"revision": config.revision, "download_config": DownloadConfig(max_retries=1)}),
        )
    except ValueError as error:
        if str(error).startswith("data.path="):
            raise
        raise ValueError(_explain(config, error)) from error
    except Exception as error:  # datasets, its file systems and the Hub's client raise their own
        raise ValueError(_explain(config, error)) from error


def _commit(config: HubData) -> str:
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(config.path, revision=config.revision, timeout=PATIENCE_S).sha)
    except Exception as error:
        raise ValueError(_explain(config, error)) from error


def fetch_tokenizer(config: HubTokenizer) -> Any:
    """The tokenizer.json of a repository.

    Raises:
        ValueError: it is not there, not allowed, or the Hub cannot be reached; within seconds.
    """
    import tokenizers
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    file = try_to_load_from_cache(config.path, "tokenizer.json", revision=config.revision)
    try:
        if not isinstance(file, str):
            _check_reachable(config)
            file = hf_hub_download(config.path, "tokenizer.json", revision=config.revision, etag_timeout=PATIENCE_S)
        return tokenizers.Tokenizer.from_file(file)
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith("tokenizer.path="):
            raise
        raise ValueError(_explain(config, error)) from error


def _check_reachable(config: HubData | HubTokenizer) -> None:
    """The Hub's client tries again and again for a minute or more; a look at the door takes seconds."""
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        return  # it is in the cache, or the client says so at once
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return
    address = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname or "huggingface.co", port), timeout=PATIENCE_S).close()
    except OSError as error:
        raise ValueError(
            f"{_what(config)}: cannot reach {address.hostname} ({error}); use what is on this machine, or "
            f"HF_HUB_OFFLINE=1 if it has been fetched before"
        ) from error


def _what(config: HubData | HubTokenizer) -> str:
    return f"{'data' if isinstance(config, HubData) else 'tokenizer'}.path={config.path}"


def _explain(config: HubData | HubTokenizer, error: Exception) -> str:
    name, text = type(error).__name__, " ".join(str(error).split())
    what = _what(config)
    if "Gated" in name or "gated" in text:
        return f"{what} is gated: accept its terms on its page, then log in (hf auth login) or set HF_TOKEN"
    if "script" in text and ("no longer supported" in text or "trust_remote_code" in text):
        return (
            f"{what} is made by a script of its own, which is never run; use a dataset of parquet, json or text files"
        )
    if "NotFound" in name or "doesn't exist" in text or "does not exist" in text:
        return f"{what} is not on the Hub, or not for you to see: check the name, subset and split, or set HF_TOKEN"
    if "Offline" in name or "offline" in text.lower():
        return f"{what} is not in the cache, and HF_HUB_OFFLINE forbids to fetch it; unset HF_HUB_OFFLINE"
    return f"{what} cannot be loaded: {text[:300]}"


def _read_rows(dataset: Any, config: HubData, first: int, last: int) -> Iterator[tuple[str, str]]:
    try:
        texts = dataset.select_columns([config.field])[first:last][config.field]
    except Exception as error:
        raise ValueError(_explain(config, error)) from error
    for number, text in enumerate(texts, start=first):
        if text is not None:
            where = f"{config.path}:{number}"
            yield where, text_of({config.field: text}, config.field, where)


def _read_stream(dataset: Any, config: HubData) -> Iterator[tuple[str, str]]:
    rows = enumerate(dataset)
    taken = 0
    while config.max_bytes is None or taken < config.max_bytes:
        try:
            number, record = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise ValueError(_explain(config, error)) from error
        if record.get(config.field) is None and config.field in record:
            continue
        where = f"{config.path}:{number}"
        text = text_of(record, config.field, where)
        taken += len(text.encode())
        yield where, text


def _until(max_bytes: int, parts: list[Part]) -> Iterator[tuple[str, str]]:
    taken = 0
    for part in parts:
        for name, text in part():
            yield name, text
            taken += len(text.encode())
            if taken >= max_bytes:
                return
