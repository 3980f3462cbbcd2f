"""Recall by the length of a document and by where in it a key was told: the numbers, a table, and a picture."""

from __future__ import annotations

import random

import numpy as np
import torch

from data.loader import IGNORE_INDEX, Batch
from data.recall import MARKER, write_probe
from data.tokenizer import Tokenizer
from training.step import Forward

SHORTEST = 64  # tokens of a document
TOKENS_AT_ONCE = 16384

Recall = dict[int, list[float]]
"""By length in tokens: of each part of a document, from its beginning, the share of right answers."""


def measure_depths(forward: Forward, tokenizer: Tokenizer, longest: int, depths: int, documents: int) -> Recall:
    """Recall for lengths of 64, 128, … up to `longest`, always over the same documents.

    Args:
        depths: equal parts of a document, with a key in each. documents: of each length.
    Raises:
        ValueError: the documents are too short for so many keys.
    """
    lengths = [SHORTEST]
    while lengths[-1] * 2 <= longest:
        lengths.append(lengths[-1] * 2)
    (marker_id,) = tokenizer.encode(MARKER)
    found: Recall = {}
    for length in lengths:
        rng = random.Random(length)
        right, asked = np.zeros(depths), np.zeros(depths)
        rows = max(1, TOKENS_AT_ONCE // length)
        for first in range(0, documents, rows):
            written = [write_probe(rng, length, depths) for _ in range(min(rows, documents - first))]
            tokens_BS = torch.tensor([[tokenizer.separator_id, *tokenizer.encode(text)] for text, _ in written])
            is_key_BS = tokens_BS.roll(1, 1) == marker_id
            is_key_BS[:, 0] = False
            targets_BS = torch.where(is_key_BS, tokens_BS.roll(-1, 1), IGNORE_INDEX)
            answers = targets_BS[is_key_BS].numpy()
            is_right = forward.predictions(_batch(tokens_BS, targets_BS)).cpu().numpy() == answers
            places = np.array([part for _, parts in written for part in parts])
            right += np.bincount(places, is_right, depths)
            asked += np.bincount(places, minlength=depths)
        found[length] = [float(share) for share in right / np.maximum(asked, 1)]
    return found


def _batch(tokens_BS: torch.Tensor, targets_BS: torch.Tensor) -> Batch:
    B, S = tokens_BS.shape
    starts_BS, positions_1S = torch.zeros(B, S, dtype=torch.int32), torch.arange(S)[None]
    num_targets = int((targets_BS != IGNORE_INDEX).sum())
    return Batch(tokens_BS, targets_BS, starts_BS, positions_1S, 0, B * S, num_targets)


def table(recall: Recall) -> str:
    depths = len(next(iter(recall.values())))
    heads = "".join(f"{f'{100 * part // depths} %':>8}" for part in range(depths))
    heading = "\nrecall by length in tokens, and by where from the beginning on a key was told:"
    lines = [heading, f"{'':>12}{heads}     all"]
    for length, shares in recall.items():
        mean = sum(shares) / depths
        lines.append(f"{length:>12,}" + "".join(f"{share:8.0%}" for share in shares) + f"{mean:8.0%}")
    return "\n".join(lines)


def draw(recall: Recall) -> str:
    """An SVG picture: a row for each part of a document, a column for each length."""
    depths, width, height, left, top = len(next(iter(recall.values()))), 64, 30, 92, 46
    total_width, total_height = max(420, left + width * len(recall) + 16), top + height * depths + 44
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total_width} {total_height}" width="{total_width}" '
        'font-family="system-ui, sans-serif" font-size="12" text-anchor="middle">',
        f'<rect width="{total_width}" height="{total_height}" fill="#fff"/>',
        f'<text x="{left}" y="22" text-anchor="start" font-size="14" fill="#222">Right answers, in percent</text>',
    ]
    for row in range(depths):
        y, place = top + height * row, f"{100 * row // depths} to {100 * (row + 1) // depths} %"
        parts.append(f'<text x="{left - 8}" y="{y + 19}" text-anchor="end" fill="#444">{place}</text>')
        for column, shares in enumerate(recall.values()):
            x, share = left + width * column, shares[row]
            red, green, blue = (round(a + (b - a) * share) for a, b in ((240, 8), (244, 64), (250, 129)))
            parts.append(
                f'<rect x="{x}" y="{y}" width="{width - 2}" height="{height - 2}" fill="rgb({red},{green},{blue})"/>'
                f'<text x="{x + width / 2 - 1:g}" y="{y + 19}" fill="{"#fff" if share > 0.5 else "#222"}">'
                f"{100 * share:.0f}</text>"
            )
    y = top + height * depths + 14
    for column, length in enumerate(recall):
        parts.append(f'<text x="{left + width * (column + 0.5) - 1:g}" y="{y}" fill="#444">{length:,}</text>')
    parts.append(
        f'<text x="{left}" y="{y + 20}" text-anchor="start" fill="#444">tokens of the document; rows: where '
        "the key was told</text></svg>\n"
    )
    return "\n".join(parts)
