#!/usr/bin/env bash
# A run that is longer than a job may be: examples/slurm_resume.sh NAME [settings of train.py], on a login node.
# The job saves itself three minutes before its limit and goes back into the queue; the same command, typed again after any
# accident, goes on too. What the job does is in scripts/slurm_train.sbatch.
set -euo pipefail
cd "$(dirname "$0")/.."
name=${1:?name the run: examples/slurm_resume.sh NAME [settings of train.py]}
mkdir -p runs
sbatch --job-name="$name" --time=04:00:00 --output="runs/$name.log" scripts/slurm_train.sbatch run_dir="runs/$name" "${@:2}"
echo "runs/$name/report.html shows it while it runs; touch runs/$name/STOP ends it, with all saved"
