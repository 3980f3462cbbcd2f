"""The rungs of the ladder: what is trained, and for how many steps."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

EVERY_RUNG = "attention=flash data.document_mask=false tokenizer=bytes batch_size=1"
"""One row a step, read as one text: the whole triangle of attention. As bytes the default text, Python's standard
library, has eight rows of a million tokens; more of a vocabulary costs the head nothing."""
LIGHT = "precision=bf16-residual precision.moments=bfloat16"
LLAMA_1B = "model=llama-1b precision=bf16-residual"
GPT_1B = "model=gpt2-1.5b model.name=gpt-1.3b model.n_layers=24 model.dim=2048 model.n_heads=16 model.ffn_dim=8192"
LLAMA_8B_LAYERS = "model=llama-8b model.name=llama-8b-layers model.n_layers=8 model.vocab_size=32768 seq_len=16k"
"""As wide as the 8 B model, with as many layers as fit beside float32 moments."""
FP8 = "precision=fp8"


@dataclass(frozen=True)
class Rung:
    settings: str
    """Of train.py, beside those of `base`."""
    steps: int
    """How many are trained; the first is measured only where it is the only one."""
    window: int = 1
    """Steps between two looks at the clock, for which the host waits for the GPU."""
    base: str = EVERY_RUNG
    nanogpt: bool = False
    """Whether nanoGPT's model.py computes the same, so that --nanogpt times it, too."""

    @property
    def words(self) -> list[str]:
        return shlex.split(f"{self.base} {self.settings}")


def _short(settings: str, steps: int = 40, nanogpt: bool = False) -> Rung:
    return Rung(settings, steps=steps, window=max(10, steps // 10), nanogpt=nanogpt)


RUNGS: dict[str, Rung] = {
    "gpt2-124m-16k": _short("model=gpt2-124m seq_len=16k", nanogpt=True),
    "gpt2-124m-16k-selective": _short("model=gpt2-124m seq_len=16k memory=selective"),
    "gpt2-124m-16k-light": _short(f"model=gpt2-124m seq_len=16k {LIGHT}"),
    "gpt2-124m-16k-selective-light": _short(f"model=gpt2-124m seq_len=16k memory=selective {LIGHT}"),
    # One row of 4,096, which the GPU is done with before its host has launched it.
    "gpt2-124m-4k": _short("model=gpt2-124m seq_len=4k cuda_graphs=false", steps=500),
    "gpt2-124m-4k-graphs": _short("model=gpt2-124m seq_len=4k cuda_graphs=true", steps=500),
    "gpt2-124m-4k-graphs-light": _short(f"model=gpt2-124m seq_len=4k cuda_graphs=true {LIGHT}", steps=500),
    "gpt2-124m-16k-graphs": _short("model=gpt2-124m seq_len=16k cuda_graphs=true"),
    "gpt2-124m-64k": Rung("model=gpt2-124m seq_len=64k", steps=12, window=2),
    "gpt-1.3b-4k": _short(f"{GPT_1B} seq_len=4k cuda_graphs=false"),
    "gpt-1.3b-4k-graphs": _short(f"{GPT_1B} seq_len=4k cuda_graphs=true"),
    "gpt-1.3b-64k-selective": Rung(f"{GPT_1B} seq_len=64k memory=selective", steps=6),
    "gpt-1.3b-16k": _short(f"{GPT_1B} seq_len=16k", nanogpt=True),
    "gpt-1.3b-16k-light": _short(f"{GPT_1B} seq_len=16k {LIGHT}"),
    "gpt-1.3b-16k-fp8": _short(f"{GPT_1B} seq_len=16k {FP8}"),
    "gpt-1.3b-16k-fp8-light": _short(
        f"{GPT_1B} seq_len=16k {FP8} precision.residual=bfloat16 precision.moments=bfloat16"
    ),
    "gpt-1.3b-16k-fp8-rowwise": _short(f"{GPT_1B} seq_len=16k {FP8} precision.scaling=rowwise"),
    "gpt-1.3b-16k-fp8-bf16-gradients": _short(f"{GPT_1B} seq_len=16k {FP8} precision.weight_gradients=bfloat16"),
    "gpt-1.3b-4k-fp8-graphs": _short(f"{GPT_1B} seq_len=4k cuda_graphs=true {FP8}"),
    "gpt-1.3b-64k-selective-fp8": Rung(f"{GPT_1B} seq_len=64k memory=selective {FP8}", steps=6),
    "llama-8b-layers-16k": _short(LLAMA_8B_LAYERS),
    "llama-8b-layers-16k-fp8": _short(f"{LLAMA_8B_LAYERS} {FP8}"),
    "llama-8b-layers-16k-fp8-full": _short(f"{LLAMA_8B_LAYERS} {FP8} memory=full"),
    "gpt-1.3b-16k-selective": _short(f"{GPT_1B} seq_len=16k memory=selective"),
    "gpt-1.3b-16k-selective-light": _short(f"{GPT_1B} seq_len=16k memory=selective {LIGHT}"),
    "llama-1b-16k": Rung("model=llama-1b seq_len=16k", steps=20, window=5),
    "llama-1b-32k": Rung("model=llama-1b seq_len=32k", steps=20, window=5),
    "llama-1b-64k": Rung("model=llama-1b seq_len=64k", steps=6),
    "llama-1b-64k-full": Rung("model=llama-1b seq_len=64k memory=full", steps=6),
    "llama-1b-64k-offload": Rung("model=llama-1b seq_len=64k memory=offload", steps=6),
    "llama-1b-128k-full": Rung(f"{LLAMA_1B} seq_len=128k memory=full", steps=4),
    "llama-1b-128k-offload": Rung(f"{LLAMA_1B} seq_len=128k memory=offload", steps=4),
    "llama-1b-256k-full": Rung(f"{LLAMA_1B} seq_len=256k memory=full", steps=3),
    "llama-1b-256k-offload": Rung(f"{LLAMA_1B} seq_len=256k memory=offload", steps=3),
    "llama-1b-512k-full": Rung(
        f"{LLAMA_1B} seq_len=512k memory=full memory.keep_attention=0.125 memory.head_groups=4", steps=2
    ),
    "llama-1b-512k-offload": Rung(f"{LLAMA_1B} seq_len=512k memory=offload memory.head_groups=4", steps=2),
    "llama-1b-1m-full": Rung(
        f"{LLAMA_1B} seq_len=1024k memory=full memory.keep_attention=0 memory.head_groups=8", steps=1
    ),
    # All but one layer would keep 122 GiB on the host; three quarters of them keep 98.
    "llama-1b-1m-offload": Rung(
        f"{LLAMA_1B} seq_len=1024k memory=offload memory.host=0.75 memory.head_groups=8", steps=1
    ),
    "llama-8b-128k-offload": Rung(f"model=llama-8b seq_len=128k memory=offload memory.head_groups=8 {LIGHT}", steps=2),
}
