"""Whole training steps.

python -m scripts.bench_training --out docs/benchmarks/training           # ours beside a plain GPT-2 and nanoGPT
python -m scripts.bench_training --long --out docs/benchmarks/long-context-h200    # models and rows, ever larger
python -m scripts.bench_training --long --list                            # the commands of the second
"""
