"""The rungs of the ladder: what is trained, and for how many steps."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

EVERY_RUNG = "attention=flash data.document_mask=false tokenizer=bytes batch_size=1"
"""One row a step, read as one text: the whole triangle of attention. As bytes the default text, Python's standard
library, has eight rows of a million tokens; more of a vocabulary costs the head nothing."""
LIGHT = "precision=bf16-residual precision.moments=bfloat16"
LLAMA_1B = "model=llama-1b precision=bf16-residual"
GPT_1B = (
    "model=gpt2-1.5b model.name=gpt-1.3b model.n_layers=24 model.dim=2048 model.n_heads=16 model.ffn_dim=8192 "
    "seq_len=16k"
)


@dataclass(frozen=True)
class Rung:
    settings: str
    """Of train.py, beside those of `base`."""
    steps: int
    """How many are trained; the first is measured only where it is the only one."""
    window: int = 1
    """Steps between two looks at the clock, for which the host waits for the GPU."""
    base: str = EVERY_RUNG

    @property
    def words(self) -> list[str]:
        return shlex.split(f"{self.base} {self.settings}")


def _short(settings: str) -> Rung:
    return Rung(settings, steps=40, window=10)


RUNGS: dict[str, Rung] = {
    "gpt2-124m-16k": _short("model=gpt2-124m seq_len=16k"),
    "gpt2-124m-16k-selective": _short("model=gpt2-124m seq_len=16k memory=selective"),
    "gpt2-124m-16k-light": _short(f"model=gpt2-124m seq_len=16k {LIGHT}"),
    "gpt2-124m-16k-selective-light": _short(f"model=gpt2-124m seq_len=16k memory=selective {LIGHT}"),
    "gpt-1.3b-16k": _short(GPT_1B),
    "gpt-1.3b-16k-selective": _short(f"{GPT_1B} memory=selective"),
    "gpt-1.3b-16k-selective-light": _short(f"{GPT_1B} memory=selective {LIGHT}"),
    "llama-1b-16k": _short("model=llama-1b seq_len=16k"),
    "llama-1b-64k": Rung("model=llama-1b seq_len=64k", steps=6),
    "llama-1b-64k-full": Rung("model=llama-1b seq_len=64k memory=full", steps=6),
    "llama-1b-64k-offload": Rung("model=llama-1b seq_len=64k memory=offload", steps=6),
    "llama-1b-128k-full": Rung(f"{LLAMA_1B} seq_len=128k memory=full", steps=4),
    "llama-1b-128k-offload": Rung(f"{LLAMA_1B} seq_len=128k memory=offload", steps=4),
    "llama-1b-256k-full": Rung(f"{LLAMA_1B} seq_len=256k memory=full memory.keep_attention=0.75", steps=3),
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
