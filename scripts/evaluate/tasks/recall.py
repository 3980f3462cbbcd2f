"""The documents of recall.yaml."""

from __future__ import annotations

import random
from typing import Any

from datasets import Dataset

from data.recall import VALUES, write_probe


def documents(seq_len: int = 256, documents: int = 64, pairs: int = 8, **others: Any) -> dict[str, Dataset]:
    """Documents of seq_len, seq_len / 2 and seq_len / 4 tokens in turn, up to their first question."""
    rng = random.Random(0)
    rows = []
    for number in range(documents):
        text, _ = write_probe(rng, max(64, seq_len >> (number % 3)), pairs)
        question = text.index("?")
        rows.append({"text": text[: question + 2], "choices": list(VALUES), "answer": VALUES.index(text[question + 2])})
    return {"test": Dataset.from_list(rows)}
