"""Datasets of the Hugging Face Hub, and folders that `datasets` can load. No code of a dataset is ever run."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

from data import disk
from data.config import HubData, HubTokenizer
from data.files import expand, files_below, relative_name
from data.hashes import Hashed, hash_tree
from data.readers import text_columns, text_of

ROWS = 4096
"""Rows of a part, so that preparation can resume at any of them."""
PATIENCE_S = 5.0

Part = Callable[[], Iterator[tuple[str, str]]]


class Opened(NamedTuple):
    """A dataset. check: raises ValueError where its files are no longer what the fingerprint is of."""

    fingerprint: str
    parts: list[Part]
    check: Callable[[], None]


def open_hub(config: HubData) -> Opened:
    """Look for a dataset.

    Raises:
        ValueError: it is not there, not allowed, or the Hub cannot be reached; within seconds.
    """
    _hush()
    settings = [config.subset, config.split, config.field, config.max_bytes]
    check: Callable[[], None] = lambda: None  # noqa: E731
    if os.path.isdir(folder := expand(config.path)):
        # What `datasets` says of a folder may stay the same while its files change, and depends on where it lies.
        hashed = _hash_folder(folder, expand(config.cache_dir))
        identity, check = hashed.sha256, hashed.check
        dataset = _load_folder(config, folder, identity)
        check()  # of what it made a copy now
    else:
        dataset = _load(config)
        # What a stream will hold cannot be known before it is read: the commit is all there is to go by.
        identity = _commit(config) if config.streaming else str(dataset._fingerprint)
        settings += [config.path, config.revision]
    columns = dataset.column_names
    if columns and config.field not in columns and config.field.split(".")[0] not in columns:
        raise ValueError(
            f"data.path={config.path} has no column {config.field!r}: set data.field to one of "
            f"{', '.join(map(repr, columns))}"
        )
    if config.streaming:
        parts: list[Part] = [partial(_read_stream, dataset, config)]
    else:
        rows = dataset.num_rows
        parts = [partial(_read_rows, dataset, config, first, min(first + ROWS, rows)) for first in range(0, rows, ROWS)]
        if config.max_bytes is not None:
            parts = [partial(_until, config.max_bytes, parts)]
    return Opened(disk.sha256(repr([*settings, identity])), parts, check)


def _hash_folder(folder: Path, cache: Path) -> Hashed:
    found = {relative_name(path, folder): path for path in files_below(folder, lambda name: name.startswith("."))}
    by_path = sorted(found.items(), key=lambda item: item[1])
    return hash_tree(dict(by_path), cache)


def _hush() -> None:
    """Bars and complaints of other people's would tear our lines apart: what matters of them is in the exceptions."""
    import datasets
    import huggingface_hub

    datasets.disable_progress_bars()
    for log in (datasets.logging, huggingface_hub.logging):
        log.set_verbosity(logging.CRITICAL)


def _load_folder(config: HubData, folder: Path, identity: str) -> Any:
    import datasets

    what = _what(config)
    if config.streaming:
        raise ValueError(f"{what} is a folder, which is read in place: leave out data.streaming")
    try:
        if not any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
            # It knows files by name and time; of these very bytes it has a copy under their hash, or makes one.
            cache = os.path.join(datasets.config.HF_DATASETS_CACHE, identity[:16])
            return datasets.load_dataset(str(folder), config.subset, split=config.split, cache_dir=cache)
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:  # datasets and its readers raise their own
        raise ValueError(_explain(config, error, is_local=True)) from error
    if not isinstance(saved, datasets.DatasetDict):
        if config.split != "train":
            raise ValueError(f"{what} was saved as one dataset, without splits: leave out data.split={config.split}")
        return saved
    if config.split not in saved:
        known = ", ".join(map(repr, saved))
        raise ValueError(f"{what} has no split {config.split!r}: set data.split to one of {known}")
    return saved[config.split]


def _load(config: HubData) -> Any:
    import datasets
    from datasets import DownloadConfig

    path = expand(config.path)
    if os.path.exists(path):
        raise ValueError(f"{_what(config)} is a file: name the folder it is in, or read it with data=text")
    if config.path.startswith(("/", "./", "../", "~", "$")):
        raise ValueError(f"{_what(config)} does not exist: name a folder, or a dataset of the Hugging Face Hub")
    _check_reachable(config)
    try:
        return datasets.load_dataset(
            config.path,
            config.subset,
            split=config.split,
            streaming=config.streaming,
            revision=config.revision,
            download_config=DownloadConfig(max_retries=1),
        )
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

    _hush()
    file = try_to_load_from_cache(config.path, "tokenizer.json", revision=config.revision)
    if not isinstance(file, str):
        _check_reachable(config)
    try:
        if not isinstance(file, str):
            file = hf_hub_download(config.path, "tokenizer.json", revision=config.revision, etag_timeout=PATIENCE_S)
        return tokenizers.Tokenizer.from_file(file)
    except Exception as error:
        raise ValueError(_explain(config, error)) from error


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON")


def _check_reachable(config: HubData | HubTokenizer) -> None:
    """The Hub's client tries again and again for a minute or more; one look at the door, through whatever proxy it goes
    through, takes seconds.

    Raises:
        ValueError: nobody answers.
    """
    from huggingface_hub import get_session

    if _offline():
        return  # it is in the cache, or the client says so at once
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        status = get_session().head(endpoint, timeout=PATIENCE_S).status_code
        trouble = f"it answers {status}" if status >= 500 else ""
    except Exception as error:  # of the client's library, whichever that is
        trouble = _cause(error) or type(error).__name__
    if trouble:
        raise ValueError(
            f"{_what(config)}: cannot reach {urlparse(endpoint).hostname} ({trouble}); use what is on this machine, or "
            f"HF_HUB_OFFLINE=1 if it has been fetched before"
        )


def _what(config: HubData | HubTokenizer) -> str:
    return f"{'data' if isinstance(config, HubData) else 'tokenizer'}.path={config.path}"


def _cause(error: BaseException) -> str:
    """What was wrong in the first place, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300]


def _explain(config: HubData | HubTokenizer, error: Exception, is_local: bool = False) -> str:
    name, text = type(error).__name__, str(error)
    what = _what(config)
    if "script" in text and ("no longer supported" in text or "trust_remote_code" in text):
        return (
            f"{what} is made by a script of its own, which is never run; use a dataset of parquet, json or text files"
        )
    if is_local:
        return f"{what} cannot be loaded: {_cause(error)}"
    if "Gated" in name or "is a gated" in text:  # of what is not there it is said that it may be "private or gated"
        return f"{what} is gated: accept its terms on its page, then log in (hf auth login) or set HF_TOKEN"
    if "Offline" in name + text or ("LocalEntryNotFound" in name + text and _offline()):
        return f"{what} is not in the cache, and HF_HUB_OFFLINE forbids to fetch it; unset HF_HUB_OFFLINE"
    if "EntryNotFound" in name and isinstance(config, HubTokenizer) and "LocalEntry" not in name:
        return f"{what} has no tokenizer.json: name another repository, or use tokenizer=file"
    if "LocalEntry" not in name and ("NotFound" in name or "doesn't exist" in text or "does not exist" in text):
        return f"{what} is not on the Hub, or not for you to see: check the name, subset and split, or set HF_TOKEN"
    return f"{what} cannot be loaded: {_cause(error)}"


def _read_rows(dataset: Any, config: HubData, first: int, last: int) -> Iterator[tuple[str, str]]:
    column = config.field if config.field in dataset.column_names else config.field.split(".")[0]
    try:
        values = dataset.select_columns([column])[first:last][column]
    except Exception as error:
        raise ValueError(_explain(config, error)) from error
    for number, value in enumerate(values, start=first):
        where = f"{config.path}:{number}"
        yield where, text_of({column: value}, config.field, where, text_columns(dataset.features.arrow_schema))


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
