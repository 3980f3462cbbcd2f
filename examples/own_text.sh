#!/usr/bin/env bash
# Your own text, from files to a model that writes: examples/own_text.sh FOLDER [settings of train.py]
# FOLDER holds prose or source code (other kinds: docs/data.md). Started again, it goes on where it stopped.
set -euo pipefail
text=$(realpath "${1:?name a folder of text: examples/own_text.sh FOLDER [settings of train.py]}")
run=${RUN:-runs/own-text}
cd "$(dirname "$0")/.."
python=.venv/bin/python
[[ -x $python ]] || python=python

$python -m scripts.inspect_data data=text data.path="$text"  # what the model will read: documents, rows, the first tokens
$python train.py data=text data.path="$text" run_dir=$run "${@:2}"
$python -m scripts.generate $run "The " --max-tokens 40
$python -m scripts.convert to-hf $run $run/huggingface
