"""Attention kernels side by side, forward and backward.

    python -m scripts.bench_attention --out docs/benchmarks/attention
    python -m scripts.bench_attention --quick
    python -m scripts.bench_attention --only causal --head-dim 64 128 --seq-len 16384 --peers flash fa4

Ours beside every kernel of PyTorch's SDPA, FlexAttention and, where installed, FlashAttention-3 and -4. No speed is
printed for a wrong result: at every point each implementation's output and gradients are first compared with float64.
"""
