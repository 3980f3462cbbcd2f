"""Kernels compiled for a GPU that is not here: what is read from each is kept, and compiled again if anything changes.

A few hundred bytes a kernel in ~/.cache/flash-gpt/compiled, or where FLASH_GPT_COMPILED says; remove it at any time.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import triton
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.cache import get_cache_key

FOLDER = Path(os.environ.get("FLASH_GPT_COMPILED", "~/.cache/flash-gpt/compiled")).expanduser()


Reader = Callable[[Any, str], dict[str, Any]]


def read_compiled(read: Reader, source: Any, target: GPUTarget, options: dict[str, Any]) -> dict[str, Any]:
    """`read` of the kernel as `triton.compile(source, target, options)` makes it, or as it was read once before.

    Args:
        read: from a compiled kernel and what the assembler said of it to what JSON can hold; a function of some module,
            which is part of the key.
        source: an ASTSource, or Gluon's.
    """
    with settings():  # part of the key
        file = FOLDER / f"{key(read, source, target, options)}.json"
    try:
        return json.loads(file.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        pass
    result = read(*compile_anew(source, target, options))
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=FOLDER, suffix=".part", delete=False) as part:
        json.dump(result, part)
    os.replace(part.name, file)  # whole or not at all, and two writers write the same
    return result


def compile_anew(source: Any, target: GPUTarget, options: dict[str, Any]) -> tuple[Any, str]:
    """The compiled kernel, and what ptxas -v said of it."""
    log = io.StringIO()
    with tempfile.TemporaryDirectory() as scratch, redirect_stdout(log), settings():
        triton.knobs.cache.dir = scratch  # else Triton keeps every stage: half a MB a kernel
        return triton.compile(source, target=target, options=options), log.getvalue()


@contextmanager
def settings() -> Iterator[None]:
    knobs = triton.knobs
    with knobs.nvidia.scope(), knobs.compilation.scope(), knobs.cache.scope():
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.disable_line_info = True  # else ptxas may number registers by the source's lines
        yield


def key(read: Reader, source: Any, target: GPUTarget, options: dict[str, Any]) -> str:
    """The hash of all that the result depends on: Triton's own key, which has the text of the kernel and of every
    function that it calls, constants, types, options, Triton and its assembler; and the module that reads."""
    backend = make_backend(target)
    parsed = backend.parse_options(options | source.parse_options())
    compiled = get_cache_key(source, backend, parsed, get_cache_invalidating_env_vars())
    reader = inspect.getsource(inspect.getmodule(read))  # type: ignore[arg-type]
    return hashlib.sha256("\0".join((compiled, read.__name__, reader)).encode()).hexdigest()
