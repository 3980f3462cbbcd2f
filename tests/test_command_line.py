"""The command line as a person meets it: real processes, their exit codes, and what they print."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from processes import LIMIT_S, wait_until

from scripts.kill_test import write_small_text

ROOT = Path(__file__).parents[1]

SMALL = ["model=tiny", "model.n_layers=1", "model.n_heads=2", "model.n_kv_heads=1", "model.dim=32", "model.ffn_dim=64"]
SMALL += ["model.vocab_size=300", "seq_len=32", "eval_tokens=128", "sample_tokens=2", "device=cpu", "logger=none"]
SMALL += ["data=text", "data.path=text", "data.val_fraction=0.3", "data.cache_dir=cache", "log_every=1"]


class Done(NamedTuple):
    code: int
    out: list[str]
    err: list[str]
    cpu_seconds: float


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a small text, which is the home folder too: nothing of the person's own is touched."""
    folder = tmp_path_factory.mktemp("home")
    write_small_text(folder / "text")
    return folder


@pytest.fixture(scope="module")
def no_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that, on PYTHONPATH, makes `import torch` fail, though a CUDA build of it is installed."""
    folder = tmp_path_factory.mktemp("no_torch")
    (folder / "torch").mkdir()
    (folder / "torch/__init__.py").write_text("raise AssertionError('torch was imported')\n")
    (folder / "torch/version.py").write_text("cuda, hip = '13.0', None\n")
    return folder


def environment(home: Path, **more: str) -> dict[str, str]:
    own = ("HYDRA", "WANDB", "TRITON_INTERPRET")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    # One thread: on a busy machine two of them, with so little to do each, wait for each other.
    return {**inherited, "HOME": str(home), "OMP_NUM_THREADS": "1", **more}


def run(home: Path, *arguments: str, **more: str) -> Done:
    with tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, str(ROOT / "train.py"), *arguments]
        process = subprocess.Popen(
            command, cwd=home, env=environment(home, **more), stdout=subprocess.PIPE, stderr=errors, text=True
        )
        assert process.stdout is not None
        with process.stdout:
            out = process.stdout.read().splitlines()
        # Not the time on the clock but the process's own: others may keep the machine busy.
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        return Done(process.returncode, out, errors.read().splitlines(), used.ru_utime + used.ru_stime)


def check_refusal(done: Done, *said: str) -> None:
    """Exit code 2 and exactly one line, which holds all that is `said`."""
    assert len(done.err) == 1, done.err
    assert done.err[0].startswith("error: ")
    for words in said:
        assert words in done.err[0]
    assert done.code == 2


# ---- mistakes: the name, the value, what to do instead

SECRET = "hf_" + "sesame" * 5
MISTAKES = {
    "attn=math": ["attn", "did you mean attention?"],
    "model.dims=64": ["model.dims", "did you mean model.dim?"],
    "attention=flsh": ["attention=flsh", "use auto, flash", "did you mean flash?"],
    "model=gpt2-125m": ["model=gpt2-125m", "llama-1b", "did you mean gpt2-124m?"],
    "seq_len=long": ["seq_len", "'long'", "whole number"],
    "seq_len=0": ["seq_len=0", "use 1 or more"],
    "tokens_per_step=3000": ["tokens_per_step=3000", "2048", "use 2048"],
    "schedule.decay_fraction=0.1": ["schedule.decay_fraction", "schedule=wsd", "choose that too"],
    "data=text": ["data.path", "data.path=FILE"],
    "data.packing=tight": ["data.packing=tight", "use end_to_end or best_fit"],
    "data=mix": ["data.parts", "data.parts={NAME: {weight: 1, name: stdlib}"],
    "tokenizer=file": ["tokenizer.path", "tokenizer.path=tokenizer.json"],
    "seq_len": ["'seq_len'", "write key=value"],
    "attention=null": ["attention=null", "use auto, flash"],
    "attention=": ["attention=", "use auto, flash"],
    "attention=3": ["attention=3", "use auto, flash"],
    "attention=[math,sdpa]": ["attention=[math,sdpa]", "-m attention=a,b"],
    "seq_len=512,1024": ["seq_len=512,1024", "add -m"],
    "+seq_len=512": ["seq_len", "without +"],
    "lr=1e-3": ["lr", "did you mean learning_rate?"],
    "data.path=~/notes": ["data.path", "data=codeparrot or fineweb_edu or hf or pg19 or text", "choose that too"],
    "batch_size=1_000_000_000": ["batch_size × seq_len=512000000000", "use less than"],
    "seed=99999999999999999999": ["seed=99999999999999999999", "below 2⁶³"],
    "seq_len=null": ["seq_len", "it needs a value"],
    "optimizer={lr: 1}": ["optimizer", "use adamw, muon"],
    "~optimizer": ["optimizer", "use adamw, muon"],
    "+logger.wandb.api_key=sesame": ["logger.wandb.api_key", "WANDB_API_KEY"],
    "run_dir=${nowhere}": ["run_dir", "nowhere"],
    "--nope": ["--nope", "write settings as key=value"],
    "run_dir=text/1.txt/deeper": ["run_dir=text/1.txt/deeper", "cannot be written", "choose another"],
    "init_from=": ["init_from=''", "name a run or a checkpoint"],
    "resume=nowhere": ["resume=nowhere", "does not exist", "name a run folder or a checkpoint"],
    "init_from=nowhere": ["init_from=nowhere", "does not exist"],
    "checkpoint.keep_last=0": ["checkpoint.keep_last=0", "use 1 or more"],
    "checkpoint.evry=5": ["checkpoint.evry", "did you mean checkpoint.every?"],
    "bad_step.action=hope": ["bad_step.action=hope", "use stop or skip"],
    "max_time=soon": ["max_time", "'soon'", "use a number"],
    "~model": ["model is not set", "leave out ~model"],
    "run_dir=$NOT_SET_ANYWHERE/x": ["run_dir=$NOT_SET_ANYWHERE/x", "not set", "write the path out"],
    f"sample_prompt='my {SECRET}'": ["sample_prompt", "looks like a secret", "HF_TOKEN"],
    f"+hydra.job.env_set.MINE={SECRET}": ["hydra.job.env_set.MINE", "looks like a secret"],
    # What depends on the machine.
    "model.n_layers=1e8": ["model.n_layers=100000000", "GiB of memory", "model=tiny"],
    "device=cuda": ["device=cuda", "use device=cpu"],
    "precision=tf32": ["precision=tf32", "use precision=fp32"],
    "cuda_graphs=true": ["cuda_graphs=true", "a CPU has none", "use cuda_graphs=auto or false"],
    "optimizer.moments=bfloat16": ["optimizer.moments", "did you mean precision.moments?"],
    "attention=flash": ["attention=flash", "not on a CPU", "use attention=auto"],
}


# The rest are other ways into the same refusals.
QUICK = ("attn=math", "attention=flsh", "seq_len=long", "tokens_per_step=3000", "schedule.decay_fraction=0.1")
QUICK += ("data=text", "tokenizer=file", "seq_len", "attention=[math,sdpa]", "lr=1e-3", "data.path=~/notes")
QUICK += ("+logger.wandb.api_key=sesame", "--nope", "resume=nowhere", "checkpoint.evry=5", "~model")
QUICK += (f"sample_prompt='my {SECRET}'", "model.n_layers=1e8", "device=cuda", "attention=flash")


@pytest.fixture(scope="module")
def answers(request: pytest.FixtureRequest, home: Path, no_torch: Path) -> dict[str, Done]:
    """Every mistake that is asked for, two at a time."""
    asked = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    mistakes = [item.callspec.params["mistake"] for item in asked if "mistake" in item.callspec.params]

    def make(mistake: str) -> Done:
        no_gpu = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(no_torch)}
        return run(home, "device=cpu", "logger=none", mistake, **no_gpu)

    with ThreadPoolExecutor(2) as pool:
        done = dict(zip(mistakes, pool.map(make, mistakes), strict=True))
    assert [path.name for path in home.iterdir()] == ["text"], "a command that cannot work leaves nothing behind"
    return done


@pytest.mark.parametrize(
    "mistake", [pytest.param(mistake, marks=[] if mistake in QUICK else [pytest.mark.slow]) for mistake in MISTAKES]
)
def test_a_mistake_is_one_line_with_the_remedy_before_torch_is_loaded(answers: dict[str, Done], mistake: str) -> None:
    done = answers[mistake]
    check_refusal(done, *MISTAKES[mistake])
    assert "sesame" not in done.err[0], "a secret is not repeated"
    assert done.out == []
    assert done.cpu_seconds < 3


# ---- what needs files or torch: a process takes seconds to load it, so all of them are run together, two at a time

COMMANDS = {
    "run_dir": ["run_dir=text/1.txt"],
    "data": ["data.path=nowhere", "run_dir=refused"],
    "glob": ["data.path=text/*.md", "run_dir=refused"],
    "tokenizer": ["tokenizer=file", "tokenizer.path=nowhere.json", "run_dir=refused"],
    "run": ["max_steps=2"],
    # Three jobs, of which one cannot work: attention=flash has no kernel for a CPU.
    "sweep": ["attention=math,flash,sdpa", "max_steps=5", "-m"],
}


@pytest.fixture(scope="module")
def ran(home: Path, answers: dict[str, Done]) -> dict[str, Done]:
    with ThreadPoolExecutor(2) as pool:
        done = pool.map(lambda arguments: run(home, *SMALL, *arguments), COMMANDS.values())
        return dict(zip(COMMANDS, done, strict=True))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("run_dir", ["run_dir=text/1.txt", "choose another"]),
        ("data", ["data.path=nowhere", "does not exist"]),
        ("glob", ["data.path=text/*.md", "does not exist"]),
        ("tokenizer", ["tokenizer.path=nowhere.json", "name a tokenizer.json"]),
    ],
)
def test_what_only_the_files_can_tell_is_one_line_too(
    home: Path, ran: dict[str, Done], name: str, said: list[str]
) -> None:
    check_refusal(ran[name], *said)
    assert ran[name].cpu_seconds < 3
    assert not (home / "refused").exists()


@pytest.mark.slow
def test_output_that_nobody_can_take_is_no_reason_to_end_a_run(home: Path) -> None:
    arguments = [sys.executable, str(ROOT / "train.py"), *SMALL, "max_steps=1"]
    for name, redirection in (("closed", ">&-"), ("full", "> /dev/full")):
        command = ["sh", "-c", f'"$@" {redirection}', "sh", *arguments, f"run_dir={name}"]
        done = subprocess.run(command, cwd=home, env=environment(home), stderr=subprocess.PIPE, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert [record["step"] for record in metrics(home / name)] == [0, 1, 1]
        assert (home / name / "model.safetensors").exists()


def test_nothing_that_is_opened_takes_the_place_of_a_closed_output(home: Path) -> None:
    """Of the two sockets that signals come through, for instance: a library's words would be taken for signals."""
    program = (
        "import os; from training import cli; "
        "cli.run(lambda: exit(not os.path.samestat(os.fstat(1), os.stat(os.devnull))))"
    )
    command = ["sh", "-c", '"$@" >&-', "sh", sys.executable, "-c", program]
    assert subprocess.run(command, cwd=ROOT, env=environment(home)).returncode == 0


def test_a_person_who_wants_the_traceback_gets_it(home: Path) -> None:
    done = run(home, "seq_len=0", "device=cpu", HYDRA_FULL_ERROR="1")
    assert done.code == 1
    assert "Traceback (most recent call last):" in done.err
    assert any("seq_len=0 is not possible" in line for line in done.err)


def test_the_configuration_can_be_seen_without_running(home: Path, no_torch: Path) -> None:
    done = run(home, *SMALL, "--cfg", "job", "--resolve", PYTHONPATH=str(no_torch))
    assert (done.code, done.err) == (0, [])
    assert "seq_len: 32" in done.out
    assert "  vocab_size: 300" in done.out
    assert not [line for line in done.out if "${" in line]


# ---- runs


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_ends_with_its_folder_on_the_last_line(home: Path, ran: dict[str, Done]) -> None:
    done = ran["run"]
    assert (done.code, done.err) == (0, [])
    folder = home / done.out[-1]
    assert folder.parent == home / "runs"
    assert folder.name.endswith("_tiny_auto_32")
    assert [record["step"] for record in metrics(folder)] == [0, 1, 2, 2]
    assert (folder / "model.safetensors").exists()


def test_a_run_goes_on_from_its_folder_alone_and_what_is_typed_is_a_change(home: Path) -> None:
    (home / "alone").mkdir()
    command = [sys.executable, str(ROOT / "train.py"), *SMALL, "max_steps=2", "learning_rate=1e-3", "run_dir=alone"]
    with open(home / "alone" / "printed", "w") as log:  # a log inside the run folder, in an encoding without a ×
        more = environment(home, PYTHONIOENCODING="ascii")
        began = subprocess.run(command, cwd=home, env=more, stdout=log, stderr=subprocess.PIPE, text=True)
    assert (began.returncode, began.stderr) == (0, "")
    assert "plan       2 steps x 2,048 tokens" in (home / "alone" / "printed").read_text()
    done = run(home, "run_dir=alone", "max_steps=3")
    assert (done.code, done.err) == (0, [])
    changed = [line.split(": ")[1] for line in done.out if line.startswith("           changed: ")]
    assert changed == ["max_steps 2 → 3"]
    assert done.out[0] == "settings   those of alone, changed by what is typed"
    assert [record["step"] for record in metrics(home / "alone")] == [0, 1, 2, 2, 3, 3]
    assert "learning_rate: 0.001" in (home / "alone" / "config.yaml").read_text()


def test_a_sweep_goes_on_after_a_job_that_cannot_work(home: Path, ran: dict[str, Done]) -> None:
    done = ran["sweep"]
    folders = [home / line for line in done.out if line.startswith("runs/")]
    check_refusal(done, "attention=flash", "use attention=auto")
    assert [folder.name for folder in folders] == ["0_tiny_math_32", "2_tiny_sdpa_32"]
    assert folders[0].parent == folders[1].parent, "one folder holds the whole sweep"
    losses = [[record["train/loss"] for record in metrics(folder) if "train/loss" in record] for folder in folders]
    assert len(losses[0]) == 5
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
def test_the_jobs_of_a_sweep_share_the_folder_that_was_named(home: Path) -> None:
    done = run(home, *SMALL, "seed=1,2", "max_steps=1", "run_dir=named", "-m")
    assert (done.code, done.err) == (0, [])
    assert [line for line in done.out if line.startswith("named")] == ["named/0", "named/1"]


def test_a_sweep_ends_with_a_table_of_the_jobs_that_worked(ran: dict[str, Done]) -> None:
    done = ran["sweep"]
    header = next(number for number, line in enumerate(done.out) if "val bits/byte" in line)
    assert "tokens/s" in done.out[header]
    rows = [line.split() for line in done.out[header + 1 :] if line.strip()]
    assert ["math" in " ".join(row) for row in rows] == [True, False]
    assert ["sdpa" in " ".join(row) for row in rows] == [False, True]
    assert "flash" not in "".join(done.out[header:])


def begin(home: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *SMALL, *arguments],
        cwd=home,
        env=environment(home),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a group of its own, for signals that go to a whole group
        # A shell that runs the tests in the background has switched SIGINT off for all its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # type: ignore[arg-type, return-value]
    )


def lines_of(folder: Path) -> int:
    record = folder / "metrics.jsonl"
    return record.read_text().count("\n") if record.exists() else 0


ENDLESS = ["max_steps=1_000_000", "eval_every=0", "log_every=1"]
REQUESTS = {"SIGINT": 130, "SIGTERM": 75, "SIGUSR1": 75, "SIGHUP": 75, "STOP": 75}


@pytest.mark.parametrize("names", [["SIGTERM", "STOP"], pytest.param(list(REQUESTS), marks=pytest.mark.slow)])
def test_a_run_that_is_asked_to_stop_saves_itself_and_the_same_command_goes_on(
    home: Path, no_torch: Path, names: list[str]
) -> None:
    run_dir = f"long-{len(names)}"
    folder, again = home / run_dir, [*SMALL, *ENDLESS, f"run_dir={run_dir}"]
    for name in names:
        before = lines_of(folder)
        process = begin(home, *ENDLESS, f"run_dir={run_dir}")
        try:
            wait_until(lambda before=before: lines_of(folder) > before + 3, process)  # type: ignore[misc]
            second = run(home, *again, PYTHONPATH=str(no_torch)) if name == "STOP" else None
            if name == "STOP":
                (folder / "STOP").touch()
            else:
                process.send_signal(getattr(signal, name))
            out, err = process.communicate(timeout=LIMIT_S)
        finally:
            process.kill()
        assert process.returncode == REQUESTS[name]
        (line,) = err.splitlines()
        assert line.startswith(f"error: interrupted by {'the STOP file' if name == 'STOP' else name}; saved {run_dir}/")
        assert "run interrupted" in out.splitlines()
        assert f"next       run_dir={run_dir} goes on from here" in out.splitlines()
        assert ("resume     step" in out) == (before > 0)
        if second is not None:
            check_refusal(second, f"run_dir={run_dir}", f"is being trained by process {process.pid}", "choose another")
    changed = run(home, *again, "seed=7", PYTHONPATH=str(no_torch))
    check_refusal(changed, f"seed=7 does not fit {run_dir}/checkpoints/step-", "which was trained with seed=")
    assert not (folder / "STOP").exists()
    steps = [line["step"] for line in metrics(folder)]
    assert steps == list(range(len(steps))), "each step once, over all processes"
    assert not (folder / "model.safetensors").exists()


def ask_to_stop(home: Path, moment: Callable[[], bool], *arguments: str) -> tuple[str, list[str]]:
    """SIGTERM at a moment to the run and all that it has started, as Slurm and `timeout` send it; what the run printed.
    It ends with code 75 and one line, having saved."""
    process, err = begin(home, *arguments), list[str]()
    assert process.stderr is not None
    try:
        wait_until(moment, process)
        os.killpg(process.pid, signal.SIGTERM)
        for line in process.stderr:
            err.append(line)
            if line.startswith("error: "):  # PyTorch has warnings of its own
                os.killpg(process.pid, signal.SIGTERM)  # once more, while Python ends
        out, _ = process.communicate(timeout=LIMIT_S)
    finally:
        process.kill()
    assert process.returncode == 75, err
    told = [line for line in err if line.startswith("error: ")]
    assert len(told) == 1, err
    (line,) = told
    assert line.startswith("error: interrupted by SIGTERM; saved ")
    saved = Path(line.rpartition(" ")[2].strip())
    assert (home / saved / "manifest.json").exists()
    return saved.name, out.splitlines()


@pytest.mark.slow
def test_a_run_that_is_asked_during_an_evaluation_leaves_it_to_the_next_process(home: Path) -> None:
    folder = home / "evaluating"
    (home / "much").mkdir()
    (home / "much" / "a.txt").write_text("a line of a long text\n" * 200_000)
    much = ["data.path=much", "tokenizer=bytes", "eval_tokens=10_000_000", "max_steps=2", "run_dir=evaluating"]
    saved, _ = ask_to_stop(home, lambda: (folder / "facts.json").exists(), *much)
    assert saved == "step-00000000"
    assert lines_of(folder) == 0, "the evaluation at step 0 was cut"


@pytest.mark.slow
def test_a_run_that_is_asked_inside_a_save_ends_with_a_good_checkpoint(home: Path) -> None:
    folder = home / "saving"
    inside = lambda: any(folder.glob("checkpoints/.step-*.part-*"))  # noqa: E731
    saved, _ = ask_to_stop(home, inside, *ENDLESS, "run_dir=saving", "checkpoint.every=1", "model.dim=256")
    done = run(home, *SMALL, *ENDLESS, "run_dir=saving", "checkpoint.every=1", "model.dim=256", "max_time=0.001")
    (resumed,) = (line for line in done.out if line.startswith("resume "))
    assert f"saving/checkpoints/{saved}, verified" in resumed
    assert not list(folder.glob("checkpoints/.step-*")), "nothing half-written is left"


@pytest.mark.parametrize(
    ("name", "code"),
    [("SIGINT", 130), *(pytest.param(name, 75, marks=pytest.mark.slow) for name in ("SIGTERM", "SIGUSR1"))],
)
def test_a_run_that_is_asked_before_it_trains_has_nothing_to_save_and_says_so(home: Path, name: str, code: int) -> None:
    (home / "much").mkdir(exist_ok=True)
    (home / "much" / "a.txt").write_text("a line of a long text\n" * 200_000)
    cache = home / f"cache-{name}"
    much = ["data.path=much", f"data.cache_dir={cache}", f"run_dir=early-{name}"]
    process = begin(home, *much)
    try:
        wait_until(cache.exists, process)  # the data is being prepared
        process.send_signal(getattr(signal, name))
        out, err = process.communicate(timeout=LIMIT_S)
    finally:
        process.kill()
    assert (process.returncode, err) == (code, f"error: interrupted by {name} before training began\n")
    assert "run  " not in out
    assert not (home / f"early-{name}").exists()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")
def test_a_run_that_is_asked_while_it_compiles_answers_after_its_first_step(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = home / "inductor"  # nothing is compiled yet
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(compiled))
    compiling = lambda: any(compiled.rglob("*.cpp"))  # noqa: E731
    saved, out = ask_to_stop(home, compiling, *ENDLESS, "run_dir=compiling", "compile=true")
    assert any(line.startswith("compiling") for line in out)
    assert saved in ("step-00000000", "step-00000001")


@pytest.mark.slow
def test_a_run_ends_after_max_time(home: Path) -> None:
    done = run(home, *SMALL, *ENDLESS, "run_dir=timed", "max_time=0.001")
    assert done.code == 75
    assert done.err == ["error: interrupted by max_time; saved timed/checkpoints/step-00000000"]


def cpu_seconds(process: subprocess.Popen[str]) -> float:
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads from /proc how much a process has computed")
def test_a_run_ends_at_once_at_a_second_ctrl_c(home: Path) -> None:
    """The first comes after a second of the first step, which takes most of a minute."""
    process = begin(home, *ENDLESS, "run_dir=twice", "tokens_per_step=1_280_000")
    try:
        wait_until(lambda: lines_of(home / "twice") > 0, process)
        used = cpu_seconds(process)
        wait_until(lambda: cpu_seconds(process) > used + 1, process)
        process.send_signal(signal.SIGINT)
        wait_until(lambda: cpu_seconds(process) > used + 2, process)  # it is at its step
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=LIMIT_S)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "saved" not in err
    assert lines_of(home / "twice") == 1, "the step was cut"


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(home: Path) -> None:
    """Five kills, alternately at any instant and inside a save; scripts/kill_test.py does two hundred."""
    command = [sys.executable, "-m", "scripts.kill_test", "--kills", "5", "--out", str(home / "kills")]
    done = subprocess.run(command, cwd=ROOT, env=environment(home), capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((home / "kills" / "record.json").read_text())
    assert record["kills"] == 5
    assert record["kills_inside_a_save"] >= 2
    assert record["equal"]
