"""Train six small runs and hash their weights: the same bits before and after a change to the code.

    python -m scripts.same_bits e18cd2b --out same-bits.json   # that commit and the files here, on this machine
    python -m scripts.same_bits same-bits.json                 # later, on the same machine: the files here alone

Each run is `python train.py …`, 50 steps of a tiny model on a CPU, with one thread. Floating-point sums depend on the
processor (its vector units choose the order) and on the version of PyTorch, so hashes are compared on one machine only:
a commit is trained here, from `git archive`; a record of another machine is refused.

Exit codes: 0 all equal, 1 some differ, 2 the comparison cannot be made.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import safe_open

from scripts.parser import Parser, parser_of

ROOT = Path(__file__).resolve().parent.parent

SMALL = ["seq_len=64", "batch_size=4", "max_steps=50", "eval_every=25", "eval_tokens=512", "sample_every=25"]
SMALL += ["sample_tokens=4", "schedule.warmup_steps=5", "device=cpu", "logger=none", "data=text", "seed=1"]
TINY = ["model=tiny", "model.vocab_size=300", "model.dim=64", "model.ffn_dim=128", "model.n_layers=2"]
GPT2 = ["model=gpt2-124m", "model.vocab_size=300", "model.dim=64", "model.ffn_dim=128", "model.n_layers=2"]
GPT2 += ["model.n_heads=4"]
DOCUMENTS, ROWS = ["data.document_mask=true"], ["data.document_mask=false"]
ACCUMULATED = ["tokens_per_step=512", "model.loss_chunk_size=100"]
RUNS: dict[str, list[str]] = {
    "math, AdamW, documents": ["attention=math", "optimizer=adamw", *TINY, *DOCUMENTS],
    "sdpa, Muon, documents": ["attention=sdpa", "optimizer=muon", *TINY, *DOCUMENTS],
    "flex, AdamW, documents, accumulated": ["attention=flex", "optimizer=adamw", *TINY, *DOCUMENTS, *ACCUMULATED],
    "math, Muon, whole rows, accumulated": ["attention=math", "optimizer=muon", *TINY, *ROWS, *ACCUMULATED],
    "sdpa, AdamW, whole rows, GPT-2": ["attention=sdpa", "optimizer=adamw", *GPT2, *ROWS],
    "flex, Muon, whole rows, GPT-2": ["attention=flex", "optimizer=muon", *GPT2, *ROWS],
}


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("same_bits", __doc__)
    parser.add_argument("reference", help="a commit to train beside the files here, or a record that --out wrote")
    parser.add_argument("--out", type=Path, help="write the reference's hashes to this JSON file")
    options = parser.parse_args(arguments)
    if Path(options.reference).is_file():
        record = json.loads(Path(options.reference).read_text())
        if record["machine"] != (here := machine()):
            parser.refuse(f"{options.reference} is of another machine ({record['machine']}, not {here}); name a commit")
    else:
        record = reference(parser, options.reference)
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n")

    differing = 0
    for name, settings in RUNS.items():
        found, expected = weights_after(ROOT, settings), record["weights"][name]
        differing += found != expected
        verdict = "equal" if found == expected else f"DIFFERENT, {record['commit'][:7]} has {expected[:16]}"
        print(f"{name:<40} {found[:16]}   {verdict}", flush=True)
    return 1 if differing else 0


def reference(parser: Parser, commit: str) -> dict[str, Any]:
    """Train every run with the files of a commit: their hashes, the full name of the commit, and the machine."""
    git = ["git", "-C", str(ROOT)]
    named = subprocess.run([*git, "rev-parse", "--verify", f"{commit}^{{commit}}"], capture_output=True, text=True)
    if named.returncode:
        parser.refuse(f"{commit} is neither a record nor a commit of {ROOT}; name one, such as e18cd2b")
    archive = subprocess.run([*git, "archive", named.stdout.strip()], capture_output=True, check=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(folder, filter="data")
        weights = {name: weights_after(Path(folder), settings) for name, settings in RUNS.items()}
    return {"commit": named.stdout.strip(), "machine": machine(), "weights": weights}


def machine() -> dict[str, str]:
    """What the bits of a CPU's sums depend on, beside the code."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = (line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line)
        cpu = next(models, cpu)
    return {"cpu": cpu, "torch": version("torch"), "threads": "1"}


def weights_after(tree: Path, settings: list[str]) -> str:
    """Train with the files of `tree`; returns the SHA-256 of the weights.

    Raises:
        SystemExit: the run failed; its last lines are the message.
    """
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text"
        text.mkdir()
        for number in range(12):
            lines = [f"{place} green bottles of {number} on wall {place * number % 7}" for place in range(30)]
            (text / f"{number}.txt").write_text("\n".join(lines))
        data = [f"data.path={text}", f"data.cache_dir={folder}/cache", "data.val_fraction=0.3"]
        command = [sys.executable, "train.py", *SMALL, *settings, *data, f"run_dir={folder}/run"]
        one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        environment = {**os.environ, **one_thread, "PYTHONPATH": str(tree)}
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
        return hash_of(Path(folder) / "run" / "model.safetensors")


def hash_of(file: Path) -> str:
    """SHA-256 over the names, types, shapes and bytes of a safetensors file's tensors, in the order of their names."""
    digest = hashlib.sha256()
    with safe_open(str(file), framework="numpy") as opened:
        for name in sorted(opened.keys()):
            tensor = opened.get_tensor(name)
            digest.update(f"{name} {tensor.dtype} {tensor.shape} ".encode() + tensor.tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
