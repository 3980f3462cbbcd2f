"""Kill a training run with SIGKILL, again and again, and compare the end with that of an uninterrupted run.

    python -m scripts.kill_test --kills 200 --out runs/kill-test
    python -m scripts.kill_test --ranks 4 --kills 20 --out runs/kill-test

A process is started on the same run folder until the run has finished; every process but the last is killed: half of
them while a save is under way (a temporary checkpoint folder exists), where it does not end first, the others at a
random instant. The final weights, optimizer state, random numbers and record must equal those of the uninterrupted run,
byte for byte. Of several ranks, which share the parameters, one is killed at random, and the others must end by
themselves within a minute.
`--device cuda` does it on GPUs, one for each rank, with deterministic algorithms.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from scripts.parser import parser_of, positive, whole
from scripts.record import ROOT, collect_facts
from training.checkpoint import folder as checkpoints
from training.loggers.jsonl import read_metrics
from training.parallel.launch import local_launch

SMALL = ["model=tiny", "model.n_layers=1", "model.n_heads=2", "model.n_kv_heads=1", "model.dim=32", "model.ffn_dim=64"]
SMALL += ["model.vocab_size=300", "seq_len=32", "eval_tokens=128", "eval_every=50", "sample_tokens=0"]
SMALL += ["logger=none", "data=text", "data.val_fraction=0.3", "log_every=1", "checkpoint.every=2"]
ON_GPUS = ["deterministic=true", "compile=false"]
STEPS_PER_KILL = 120  # a process advances some 40 steps before it is killed, more on a machine that gets faster
STEPS_PER_KILL_OF_RANKS = 30  # which wait for each other
SECONDS_OF_TRAINING = 1.0
MOST_SECONDS_ALONE = 60.0  # for the ranks that are left
MEASURED_BY_CLOCK = ("throughput/", "time", "checkpoint/", "memory/")


def write_small_text(folder: Path) -> None:
    """Twelve documents, which a small model trains on in a moment."""
    folder.mkdir(parents=True)
    for number in range(12):
        lines = [f"{place} green bottles of {number} standing on the wall" for place in range(30)]
        (folder / f"{number}.txt").write_text("\n".join(lines))


def main() -> None:
    parser = parser_of("kill_test", __doc__)
    parser.add_argument("--kills", type=positive, default=200, help="how often (default 200)")
    parser.add_argument("--ranks", type=positive, default=1, help="processes of a run (default 1)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="default cpu")
    parser.add_argument("--seed", type=whole, default=0, help="of the moments at which it is killed (default 0)")
    parser.add_argument("--out", type=Path, required=True, help="a new folder, for both runs and record.json")
    options = parser.parse_args()
    if options.out.exists():
        parser.refuse(f"--out {options.out} exists; name a new folder")
    text = options.out / "text"
    write_small_text(text)

    steps = (STEPS_PER_KILL if options.ranks == 1 else STEPS_PER_KILL_OF_RANKS) * (options.kills + 1)
    settings = [*SMALL, f"data.path={text}", f"data.cache_dir={options.out / 'cache'}", f"max_steps={steps}"]
    settings += [f"device={options.device}", *(ON_GPUS if options.device == "cuda" else ())]
    if options.ranks > 1:
        settings += ["parallel=fsdp", "batch_size=2", f"tokens_per_step={64 * options.ranks}"]
    peaceful, killed = options.out / "peaceful", options.out / "killed"
    began = time.monotonic()
    ranks = start(peaceful, settings, options.ranks)
    while ranks[0].poll() is None and not (peaceful / "metrics.jsonl").exists():
        time.sleep(0.01)
    startup = time.monotonic() - began
    if any(rank.wait() for rank in ranks):
        raise SystemExit("the undisturbed run failed")

    chance = random.Random(options.seed)
    kills = inside = reached = 0
    alone = 0.0
    while kills < options.kills:
        before = set(half_written(killed))
        ranks = start(killed, settings, options.ranks)
        victim = chance.choice(ranks)
        if 2 * inside <= kills:  # half of them: a save that ends before the kill does not count, and another is tried
            wait_for_a_save(victim, killed, chance)
        else:
            time.sleep(chance.uniform(0, startup + SECONDS_OF_TRAINING))
        victim.kill()
        code = victim.wait()
        alone = max(alone, end_of([rank for rank in ranks if rank is not victim]))
        if code == 0:
            break  # it came to the end before it was killed
        if code != -9:
            raise SystemExit(f"a resume failed with code {code} after {kills} kills; {killed} is left as it is")
        kills += 1
        inside += bool(set(half_written(killed)) - before)
        for path in checkpoints.candidates(killed):
            reached = max(reached, checkpoints.verify(path).step)  # what has the name is whole, at any instant
        print(f"kill {kills}/{options.kills}: step {reached}/{steps} is saved", flush=True)
    if any(rank.wait() for rank in start(killed, settings, options.ranks)):
        raise SystemExit(f"the last resume failed; {killed} is left as it is")

    differences = compare(peaceful, killed)
    record = {
        **collect_facts("kill_test", sys.argv[1:], torch.device(options.device)),
        "ranks": options.ranks,
        "kills": kills,
        "kills_inside_a_save": inside,
        "step_saved_at_the_last_kill": reached,
        "steps": steps,
        **({"most_seconds_of_the_others": round(alone, 1)} if options.ranks > 1 else {}),
        "equal": not differences,
        "differences": differences,
    }
    (options.out / "record.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))
    if differences:
        raise SystemExit("the killed run differs from the undisturbed one")
    for folder in (text, options.out / "cache"):
        shutil.rmtree(folder)


def start(run: Path, settings: list[str], ranks: int) -> list[subprocess.Popen[bytes]]:
    """The processes of a run, by rank."""
    command = [sys.executable, str(ROOT / "train.py"), *settings, f"run_dir={run}"]
    if ranks == 1:
        return [subprocess.Popen(command, stdout=subprocess.DEVNULL)]
    return [
        subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, **world})
        for world in local_launch(ranks)
    ]


def end_of(ranks: Sequence[subprocess.Popen[bytes]]) -> float:
    """Seconds until the ranks have ended that lost one of theirs."""
    began = time.monotonic()
    try:
        for rank in ranks:
            rank.wait(max(0.0, MOST_SECONDS_ALONE - (time.monotonic() - began)))
    except subprocess.TimeoutExpired as error:
        for rank in ranks:
            rank.kill()
        raise SystemExit(f"after {MOST_SECONDS_ALONE:.0f} s a rank is still there that lost another") from error
    return time.monotonic() - began


def half_written(run: Path) -> list[Path]:
    return list(checkpoints.checkpoints_of(run).glob(".step-*.part-*"))


def wait_for_a_save(process: subprocess.Popen[bytes], run: Path, chance: random.Random) -> None:
    """Come back while a save is under way, at a random instant of it; or when the process has ended."""
    stale = set(half_written(run))
    skip = chance.randrange(6)  # saves to let pass
    while process.poll() is None:
        if new := set(half_written(run)) - stale:
            if skip == 0:
                time.sleep(chance.uniform(0, 0.004))  # a save of this size takes 8 ms and more
                return
            skip -= 1
            stale |= new


def compare(peaceful: Path, killed: Path) -> list[str]:
    """What differs between two finished runs."""
    last = [checkpoints.candidates(run)[0] for run in (peaceful, killed)]
    tensors = [name for name in checkpoints.read_manifest(last[0]).files if name.endswith(".safetensors")]
    pairs = {name: [folder / name for folder in last] for name in tensors}
    pairs["weights"] = [run / "model.safetensors" for run in (peaceful, killed)]
    found = [name for name, (one, other) in pairs.items() if one.read_bytes() != other.read_bytes()]
    records = [
        [
            {name: value for name, value in record.items() if not name.startswith(MEASURED_BY_CLOCK)}
            for record in read_metrics(run / "metrics.jsonl")
        ]
        for run in (peaceful, killed)
    ]
    return found + ([] if records[0] == records[1] else ["metrics.jsonl"])


if __name__ == "__main__":
    main()
