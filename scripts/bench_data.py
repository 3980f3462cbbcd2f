"""How fast text becomes tokens, and tokens become batches.

    python -m scripts.bench_data --out docs/benchmarks/data

Prepares the sources of the standard library and of every installed package, in a process of its own whose peak memory
is read afterwards; prepares them again with a kill in the middle, and compares the files; then takes batches from a
loader as training does.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from data.config import PACKINGS, FileTokenizer, TextData, TokenizerConfig
from data.corpus import load_corpus
from data.hashes import hash_files
from data.loader import Loader
from data.packing import pack
from data.prepare import Progressed
from data.prepared import FILES
from scripts.parser import parser_of, positive
from scripts.record import collect_facts, heading, write, write_json

BATCHES = [(1, 16384), (1, 131072), (16, 1024)]
SECONDS = 3.0

PREPARE = """
import sys
from data.config import FileTokenizer, TextData
from data.corpus import load_corpus
path, cache, tokenizer = sys.argv[1:]
load_corpus(TextData(path=path, cache_dir=cache), FileTokenizer(path=tokenizer))
"""


def gather(folder: Path, megabytes: int) -> int:
    """Copy Python sources of this installation into a folder, up to a size; returns the bytes."""
    total = 0
    paths = sysconfig.get_paths()
    files = sorted({*Path(paths["stdlib"]).rglob("*.py"), *Path(paths["purelib"]).rglob("*.py")})
    for number, file in enumerate(files):
        try:
            text = file.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if "\0" in text:
            continue
        (folder / f"{number:06d}.py").write_text(text, encoding="utf-8")
        total += len(text.encode())
        if total >= megabytes * 1_000_000:
            break
    return total


def prepare(path: Path, cache: Path, tokenizer: Path, kill_after_s: float | None = None) -> dict[str, Any]:
    """Prepare in a process of its own; its seconds, by the clock and of the processor, and its peak memory."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", PREPARE, str(path), str(cache), str(tokenizer)])
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        process.send_signal(signal.SIGKILL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if kill_after_s is None and process.returncode:
        raise SystemExit(f"error: preparation failed with {process.returncode}")
    return {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_gib": usage.ru_maxrss / 2**20,
    }


def token_files(cache: Path) -> dict[str, bytes]:
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def measure_preparation(folder: Path, megabytes: int) -> dict[str, Any]:
    text = folder / "text"
    text.mkdir()
    size = gather(text, megabytes)
    began = time.perf_counter()
    load_corpus(TextData(path=str(text), cache_dir=str(folder / "whole")), TokenizerConfig(vocab_size=32768))
    with_training = time.perf_counter() - began
    (tokenizer,) = (folder / "whole").glob("tokenizer-*.json")
    shutil.copy(tokenizer, folder / "tokenizer.json")
    whole = prepare(text, folder / "again", folder / "tokenizer.json")
    prepare(text, folder / "killed", folder / "tokenizer.json", kill_after_s=0.6 * whole["seconds"])
    (part,) = (path for path in (folder / "killed").iterdir() if path.is_dir())
    saved = Progressed.load(part / "progress.json")
    resumed = prepare(text, folder / "killed", folder / "tokenizer.json")
    assert token_files(folder / "killed") == token_files(folder / "again"), "a killed preparation gave other files"
    cores = len(os.sched_getaffinity(0))
    return {
        "bytes": size,
        "files": len(list(text.iterdir())),
        "cores": cores,
        "seconds_with_a_new_tokenizer": with_training,
        **whole,
        "mb_per_cpu_second": size / 1e6 / whole["cpu_seconds"],
        "killed_after_bytes": saved.train.bytes + saved.val.bytes,
        "resumed_seconds": resumed["seconds"],
    }


def measure_opening(folder: Path) -> dict[str, Any]:
    """How long it takes to see that prepared files are what was written, and the same from memory."""
    (prepared,) = (path for path in (folder / "again").iterdir() if path.is_dir())
    files = [prepared / name for name in FILES]
    seconds = []
    for _ in range(2):
        time.sleep(2.5)  # what is younger is not remembered
        began = time.perf_counter()
        hash_files(files, folder / "again")
        seconds.append(time.perf_counter() - began)
    return {"token_bytes": sum(path.stat().st_size for path in files), "checked_s": seconds[0], "again_s": seconds[1]}


def measure_loader(folder: Path) -> list[dict[str, Any]]:
    config = TextData(path=str(folder / "text"), cache_dir=str(folder / "again"))
    corpus = load_corpus(config, FileTokenizer(path=str(folder / "tokenizer.json")), lambda line: None)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for packing in PACKINGS:
        for batch_size, seq_len in BATCHES:
            began = time.perf_counter()
            packed = pack(corpus, "train", seq_len, True, packing)
            packing_s = time.perf_counter() - began
            loader = Loader(packed, batch_size, seed=0, device=device)
            for _ in range(10):
                next(loader)
            began, tokens = time.perf_counter(), 0
            while time.perf_counter() - began < SECONDS:
                tokens += next(loader).num_tokens
            if device == "cuda":
                torch.cuda.synchronize()
            speed = tokens / (time.perf_counter() - began)
            loader.close()
            rows.append(
                {"packing": packing, "batch_size": batch_size, "seq_len": seq_len, "tokens_per_second": speed}
                | {"packing_seconds": packing_s, "cut_fraction": getattr(packed, "cut_fraction", None)}
            )
    return rows


def markdown(facts: dict[str, Any], made: dict[str, Any], opened: dict[str, Any], batches: list[dict[str, Any]]) -> str:
    lines = heading("Preparing and reading data", facts)
    lines += [
        f"Preparation of {made['files']:,} Python files, {made['bytes'] / 1e6:.0f} MB, with 32,768 token ids:",
        "",
        f"- {made['seconds']:.1f} s on {made['cores']} cores, {made['cpu_seconds']:.1f} s of them busy:",
        f"  {made['mb_per_cpu_second']:.1f} MB for each busy second of a core; peak memory {made['peak_gib']:.2f} GiB",
        f"- {made['seconds_with_a_new_tokenizer']:.1f} s where the tokenizer is learned from them first",
        f"- killed (SIGKILL) after {made['killed_after_bytes'] / 1e6:.0f} MB, it went on and ended after "
        f"{made['resumed_seconds']:.1f} s more, with the same bytes in every file",
        f"- before training, {opened['token_bytes'] / 1e6:.0f} MB of tokens are checked (SHA-256) in "
        f"{opened['checked_s']:.2f} s, and in {opened['again_s']:.2f} s where that was done before; afterwards the",
        "  loader checks nothing",
        "",
        "Batches from a loader, one process, reading, packing and moving to the device included:",
        "",
        "| packing | batch | tokens/s | packing at start | cut off |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in batches:
        lines.append(
            f"| {row['packing']} | {row['batch_size']} × {row['seq_len']:,} | {row['tokens_per_second'] / 1e6:.0f} M "
            f"| {row['packing_seconds'] * 1000:.0f} ms | {row['cut_fraction']:.2%} |"
        )
    lines += [
        "",
        "*Cut off*: of the tokens in documents that would fit into a row, those in another row than their beginning.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = parser_of("bench_data", __doc__)
    parser.add_argument("--megabytes", type=positive, default=150, help="of text at most (default 150)")
    parser.add_argument("--out", type=Path, help="write OUT.md and OUT.json")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = collect_facts("bench_data", sys.argv[1:], device, ("pyarrow", "datasets"))
    with tempfile.TemporaryDirectory() as folder:
        made = measure_preparation(Path(folder), args.megabytes)
        opened = measure_opening(Path(folder))
        batches = measure_loader(Path(folder))
    text = markdown(facts, made, opened, batches)
    print(text)
    if args.out:
        write_json(args.out, facts, [made, opened, *batches])
        write(args.out.with_name(args.out.name + ".md"), text)


if __name__ == "__main__":
    main()
