"""scripts.checkpoint and scripts/slurm_train.sbatch."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import LIMIT_S, wait_until

from scripts.checkpoint import main
from training.checkpoint import folder as checkpoints

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Checkpoints at steps 1 to 5, the best at step 2."""
    for step in range(1, 6):
        tensors = {
            name: lambda path: path.write_bytes(os.urandom(100))
            for name in ("model.safetensors", "optimizer.safetensors")
        }
        facts = {"step": step, "tokens": 10 * step, "world_size": 1, "val_loss": abs(step - 2) + 1.0, "versions": {}}
        checkpoints.write(checkpoints.path_of(tmp_path, step), tensors, {"state.json": {}, "config.json": {}}, facts)  # type: ignore[arg-type]
    return tmp_path


def spoil(run: Path, step: int) -> None:
    path = checkpoints.path_of(run, step) / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")


def test_list_and_verify_name_what_is_good_and_what_is_not(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", str(run)]) == 0
    assert "step-00000002   step 2   20 tokens" in capsys.readouterr().out
    assert main(["verify", str(run)]) == 0
    assert capsys.readouterr().out.count("   good") == 5
    (path := checkpoints.path_of(run, 4) / "optimizer.safetensors").write_bytes(b"x" * path.stat().st_size)
    assert main(["list", str(run)]) == 0, "list reads manifests only"
    capsys.readouterr()
    assert main(["verify", str(run)]) == 1
    out = capsys.readouterr().out
    assert out.count("   good") == 4
    assert "step-00000004   DAMAGED: optimizer.safetensors has changed" in out


def test_export_to_a_folder_that_is_not_there_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", str(run), str(run / "nowhere" / "weights.safetensors")])
    assert f"there is no folder {run / 'nowhere'}; make it, or name another file" in capsys.readouterr().err


def test_prune_leaves_the_newest_and_the_best_and_refuses_while_the_newest_is_damaged(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(run, 5)
    assert main(["prune", str(run)]) == 1
    assert "nothing removed" in capsys.readouterr().out
    assert len(checkpoints.candidates(run)) == 5
    (checkpoints.path_of(run, 5) / "manifest.json").unlink()
    assert main(["prune", str(run)]) == 0
    assert [int(path.name[5:]) for path in checkpoints.candidates(run)] == [5, 4, 2]
    for wrong in (["prune", str(run), "--keep-last", "0"], ["list", str(run / "nowhere")]):
        with pytest.raises(SystemExit) as ended:
            main(wrong)
        assert ended.value.code == 2


def test_prune_refuses_a_run_that_is_being_trained(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open(run / "run.lock", "w") as lock:
        lock.write("process 7 on node")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit) as ended:
            main(["prune", str(run)])
    assert ended.value.code == 2
    assert "is being trained by process 7 on node; stop that" in capsys.readouterr().err
    assert len(checkpoints.candidates(run)) == 5


def test_the_script_needs_no_torch(tmp_path: Path) -> None:
    code = "import sys, scripts.checkpoint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


TRAINING = """#!/bin/bash
trap 'sleep 0.3; echo saved; exit 75' USR1 TERM
echo "$@"
while true; do sleep 0.05; done
"""
STARTING = TRAINING.replace("trap", "# trap")  # Python, before it listens


def _catches(pid: int, number: signal.Signals) -> bool:
    (mask,) = re.findall(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Slurm runs on Linux, as does what this test reads")
@pytest.mark.parametrize(("training", "said"), [(TRAINING, "saved\n"), (STARTING, "")])
@pytest.mark.parametrize("sent", [signal.SIGUSR1, signal.SIGTERM])
def test_the_slurm_job_passes_the_signal_on_waits_for_the_save_and_requeues(
    tmp_path: Path, sent: signal.Signals, training: str, said: str
) -> None:
    commands = {".venv/bin/python": training, "bin/scontrol": '#!/bin/bash\necho "scontrol $@"\n'}
    for name, text in commands.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "42"}
    command = ["bash", str(ROOT / "scripts/slurm_train.sbatch"), "run_dir=runs/a"]
    job = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    assert job.stdout is not None
    assert job.stdout.readline() == "train.py run_dir=runs/a\n"
    wait_until(lambda: _catches(job.pid, sent), job)
    job.send_signal(sent)
    out, _ = job.communicate(timeout=LIMIT_S)
    assert (job.returncode, out) == (0, f"{said}scontrol requeue 42\n")
    refused = subprocess.run(command[:2], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "name the run" in refused.stderr


SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for rank in 0 1 2 3; do
    SLURM_PROCID=$rank SLURM_LOCALID=$((rank % 2)) "$@" &
    ranks+=($!)
done
trap 'kill -USR1 "${ranks[@]}"' USR1
code=0
for rank in "${ranks[@]}"; do
    wait "$rank"; ended=$?
    while kill -0 "$rank" 2>/dev/null; do wait "$rank"; ended=$?; done
    ((ended > code)) && code=$ended
done
exit $code
"""
RANK = """#!/bin/bash
echo "$RANK of $WORLD_SIZE, $LOCAL_RANK of $LOCAL_WORLD_SIZE, $MASTER_ADDR:$MASTER_PORT, $@" >> ranks
trap 'exit 75' USR1
while true; do sleep 0.05; done
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Slurm runs on Linux, as does what this test reads")
def test_a_slurm_job_of_several_nodes_starts_a_rank_a_task_and_requeues(tmp_path: Path) -> None:
    hosts = """#!/bin/bash\n[[ $1 == show ]] && printf 'gpu-7\\ngpu-8\\n' || echo "scontrol $@"\n"""
    commands = {".venv/bin/python": RANK, "bin/srun": SRUN, "bin/scontrol": hosts}
    for name, text in commands.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "42", "SLURM_NTASKS": "4"}
    environment |= {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "gpu-[7-8]"}
    command = ["bash", str(ROOT / "scripts/slurm_train.sbatch"), "run_dir=runs/a", "parallel=fsdp"]
    job = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    said = tmp_path / "ranks"
    wait_until(lambda: said.exists() and len(said.read_text().splitlines()) == 4, job)
    wait_until(lambda: _catches(job.pid, signal.SIGUSR1), job)
    children = [int(pid) for pid in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()]
    tasks = [int(pid) for pid in Path(f"/proc/{children[0]}/task/{children[0]}/children").read_text().split()]
    wait_until(lambda: all(_catches(pid, signal.SIGUSR1) for pid in tasks), job)
    job.send_signal(signal.SIGUSR1)
    out, _ = job.communicate(timeout=LIMIT_S)
    assert (job.returncode, out) == (0, "scontrol requeue 42\n")
    ranks = [f"{rank} of 4, {rank % 2} of 2, gpu-7:20042, train.py run_dir=runs/a parallel=fsdp" for rank in range(4)]
    assert sorted(said.read_text().splitlines()) == ranks
