"""karpathy/nanoGPT's model.py on the model and the rows of a `train.py` command, timed in a process of its own.

    python -m scripts.bench_training.nanogpt nanoGPT model=gpt2-124m seq_len=16k

Its own initialisation; random tokens, one row a step, as `peers.time_peer` trains. The last line printed is the result,
in JSON.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

from .measure import settings
from .peers import checkout, nanogpt, time_peer

WINDOWS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=checkout, help="with model.py in it")
    parser.add_argument("words", nargs="*", help="settings of train.py")
    args = parser.parse_args()
    try:
        config = settings(args.words)
    except ValueError as error:
        parser.error(str(error))
    model = replace(config.model, n_positions=config.seq_len)
    peer = nanogpt(args.checkout, model)
    found = time_peer(peer, config.seq_len, model, loss_of=lambda m, x, y: m(x, y)[1], windows=WINDOWS)
    print(json.dumps({
        "tokens_per_second": found["tokens_per_second"], "step_s": found["step_ms"] / 1000, "steps": 10 * WINDOWS,
        "tflops": found["tflops"], "peak_allocated_gib": found["peak_gib"],
    }))  # fmt: skip


if __name__ == "__main__":
    main()
