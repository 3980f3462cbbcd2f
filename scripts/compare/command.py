"""The command: run the combinations, say how it goes, write the report after each."""

from __future__ import annotations

import re
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from data import disk
from scripts.parser import parser_of, whole
from scripts.record import png, write, write_json
from training import cli
from training.config.load import with_types
from training.history import FACTS
from training.machine import find_gpu
from training.mistakes import CONFIGS, explain
from training.report import RunReader, write_page
from training.run_folder import LOCK

from . import __doc__ as usage
from .jobs import Row, Settings, combinations, run_job
from .report import chart, headlines, html, loss_lines, markdown, name_of, shown

DEFAULTS = {
    "gpu": {"attention": "math,sdpa,flex,flash", "seq_len": "1024,4096,16384,65536", "model": "gpt2-124m"},
    "cpu": {"attention": "math,sdpa,flex", "seq_len": "128,512,2048", "model": "tiny"},
}
STEPS = {"gpu": 40, "cpu": 8}
TOLERANCE = 0.005
NOT_SWEPT = ("run_dir", "max_steps", "max_tokens", "log_every", "resume", "init_from", "logger")
OF_A_RUN = ("config.yaml", "metrics.jsonl", FACTS, LOCK)
"""Any of these is in a run's folder, and none in a comparison's."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code; see the package."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = parser_of("compare", usage)
    parser.add_argument("settings", nargs="*", metavar="key=a,b", help="settings of train.py; every value is tried")
    parser.add_argument("--steps", type=whole, help="optimizer steps of each (default 40, on a CPU 8)")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder (default runs/compare)")
    parser.add_argument("--limit", type=float, default=20.0, help="minutes that one may take (default 20)")
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE, help=f"relative difference of equal losses (default {TOLERANCE})"
    )
    options = parser.parse_intermixed_args(arguments)
    try:
        machine = "cpu" if "device=cpu" in options.settings or find_gpu() is None else "gpu"
        steps = STEPS[machine] if options.steps is None else options.steps
        if steps < 5:
            raise ValueError(f"--steps {steps} measures nothing: the first three are warm-up; use 5 or more")
        swept = values_of(options.settings, DEFAULTS[machine])
        check(swept)
        check_out(options.out)
    except ValueError as error:
        return refuse(str(error))
    except OSError as error:
        return refuse(f"--out {options.out} cannot be written: {error.strerror}; name another folder")
    rows: list[Row] = []
    jobs = combinations(swept)
    began = time.monotonic()
    code = 0
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the run ends, too, as by Ctrl-C
    try:
        for number, settings in enumerate(jobs, 1):
            what = f"{number}/{len(jobs)}   {words(settings, swept)}"
            if sys.stdout.isatty():
                print(f"{what}   …", end="\r", flush=True)
            row = run_job(settings, options.out / "jobs" / slug(settings), steps, 60 * options.limit)
            rows.append(row)
            left = (time.monotonic() - began) / number * (len(jobs) - number)
            print(f"{what}   {result(row)}   {left:.0f} s left", flush=True)
            code = write_report(rows, swept, options.out, shown(arguments), options.tolerance)
    except KeyboardInterrupt:
        print(f"\nstopped after {len(rows)} of {len(jobs)}; the same command goes on")
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    print("\n" + "\n".join(headlines(rows, list(many(swept)))))
    if code:
        print(f"losses differ, or a combination failed: see {options.out / 'report.html'}", file=sys.stderr)
    print(options.out / "report.html")
    if all(row["outcome"] == "refused" for row in rows):
        return refuse(rows[0]["why"])
    return code


def refuse(why: str) -> int:
    print(f"error: {' '.join(why.split())}", file=sys.stderr)
    return 2


def values_of(words: Sequence[str], defaults: Mapping[str, str]) -> dict[str, list[str]]:
    """The values of each setting, those that were typed over the defaults.

    Raises:
        ValueError: a word is no setting, or one that the comparison sets itself.
    """
    typed: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key or not value:
            raise ValueError(f"cannot read {word}; write key=value or key=a,b")
        if key in typed:
            raise ValueError(f"{key} is there twice; write all its values as {key}=a,b")
        if key in NOT_SWEPT:
            raise ValueError(f"{key} is set by the comparison; use --steps and --out")
        typed[key] = value
    return {key: split(value) for key, value in {**defaults, **typed}.items()}


def split(value: str) -> list[str]:
    """At commas that are in no brackets or quotes, each value once."""
    parts = re.findall(r"(?:[^,\[{('\"]|\[[^]]*\]|\{[^}]*\}|\([^)]*\)|'[^']*'|\"[^\"]*\")+", value)
    return list(dict.fromkeys(parts))


def check(swept: Mapping[str, Sequence[str]]) -> None:
    """Refuse what is no setting, no choice or no number before anything runs; what a machine refuses is a result.

    Raises:
        ValueError: one line.
    """
    cli.register_resolvers()
    first = {key: values[0] for key, values in swept.items()}
    tried = [first, *({**first, key: value} for key, values in swept.items() for value in values[1:])]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        for settings in tried:
            words = [f"{key}={value}" for key, value in settings.items()]
            try:
                with_types(compose("train", words))
            except (HydraException, OmegaConfBaseException) as error:
                raise ValueError(explain(error, words)) from error


def check_out(out: Path) -> None:
    """Refuse a folder that holds something else; make one that is not there.

    Raises:
        ValueError: a run is there, whose page would be overwritten. OSError: the folder cannot be written.
    """
    if any((out / name).exists() for name in OF_A_RUN):
        raise ValueError(f"--out {out} is the folder of a run, whose report.html would be lost; name another folder")
    out.mkdir(parents=True, exist_ok=True)
    disk.need_writable(out)  # a folder that is there need not take files


def many(swept: Mapping[str, Sequence[str]]) -> dict[str, Sequence[str]]:
    """The settings that have several values."""
    return {key: values for key, values in swept.items() if len(values) > 1}


def words(settings: Settings, swept: Mapping[str, Sequence[str]]) -> str:
    keys = [key for key in swept if key in many(swept) or key == "seq_len"]
    return " ".join(f"{key}={settings[key]}" for key in keys)


def slug(settings: Settings) -> str:
    return re.sub(r"[^\w.-]+", "-", "_".join(f"{key}-{value}" for key, value in settings.items()))[:200]


def result(row: Row) -> str:
    if row["outcome"] != "done":
        return f"{row['outcome']}: {row['why'][:160]}"
    mfu = "" if row["mfu"] is None else f"   MFU {row['mfu']:.1%}"
    speed = f"{row['tokens_per_second']:,.0f} tokens/s   {row['step_ms']:,.1f} ms{mfu}"
    return f"{speed}   {row['peak_gib']:.2f} GiB   loss {row['train_loss']:.4f}"


def write_report(rows: list[Row], swept: Mapping[str, Sequence[str]], out: Path, command: str, tolerance: float) -> int:
    """Write all files of what is known so far; returns 1 where something is wrong with it."""
    axes = list(many(swept))
    done = [row for row in rows if row["outcome"] == "done"]
    checks, agree = loss_lines(rows, tolerance)
    verdict = "agree" if agree else "DO NOT AGREE"
    checks = [f"Same seed, same text, another way to compute: losses {verdict}, {tolerance:.1%} is allowed.", *checks]
    facts = {"command": command, "tolerance": tolerance, "losses_agree": agree, "swept": dict(swept)}
    if done:
        first = done[0]
        versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
        machine = f"{first['device']['name']}, {versions}, commit {first['commit']}"
        memory = {"GPU": "allocated on the GPU", "process": "of the whole process"}[first["peak_of"]]
        facts |= {key: first[key] for key in ("device", "versions", "commit")}
        checks.append(
            f"Peak memory is what was {memory}." if first["peak_of"] == "GPU" else f"Peak memory is {memory}."
        )
    else:
        machine, checks = "nothing ran to its end", []
    write_json(out / "report", facts, rows)
    title = " and ".join(key for key in axes if key != "seq_len") or "attention"
    title = f"{title[0].upper()}{title[1:]} against context length"
    heads = {"title": title, "machine": machine, "command": command}
    write(out / "report.html", html(rows, axes, heads, checks))
    write(out / "report.md", markdown(rows, axes, heads, checks))
    if picture := chart(rows, axes):
        write(out / "report.svg", picture)
        try:
            disk.write_whole(out / "report.png", png(picture))
        except ValueError as error:
            print(f"no report.png: {error}; report.svg is the same picture")
    folders = [out / "jobs" / slug(row["settings"]) / "run" for row in done]
    runs = [RunReader(folder).read() for folder in folders]
    for run, row in zip(runs, done, strict=True):
        run["name"] = f"{name_of(row['settings'], axes)} {row['settings']['seq_len']}"
    if runs:
        write_page(out / "runs.html", runs)
    return 1 if not agree or any(row["outcome"] in ("failed", "too long") for row in rows) else 0
