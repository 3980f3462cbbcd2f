"""Look at what a model will read: how many documents, how long, how they fill rows, and the first rows as text.

python -m scripts.inspect_data data=stdlib seq_len=16384

Every token file is read again and compared with its SHA-256.
"""

from __future__ import annotations

import hydra
import numpy as np
from omegaconf import DictConfig

from scripts.parser import refuse_ranks
from training import cli
from training.config import load_config

ROWS = 2
DOCUMENTS = 4  # of a row
CHARS = 200  # of a document's beginning and of its end


@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
def main(composed: DictConfig) -> None:
    cli.job(inspect, composed)


def inspect(composed: DictConfig) -> None:
    config = load_config(composed)

    from data.config import PACKINGS
    from data.corpus import Unprepared, load_corpus
    from data.packing import PackedRows, training_rows
    from data.prepared import damaged_files

    corpus = load_corpus(config.data, config.tokenizer, cli.say)
    for part in corpus.parts:
        if part.folder is None or isinstance(part.train, Unprepared):
            continue  # nothing is kept that could be counted
        if damaged := damaged_files(part.folder):
            raise ValueError(
                f"{part.folder / damaged[0]} is not what was written: remove {part.folder} to make it anew"
            )
        cli.say(f"\n{part.name}: {part.folder}, every byte as it was written")
        histogram(part.train.document_lengths)
        for packing in PACKINGS:
            packed = PackedRows(part.train, config.seq_len, config.data.document_mask, packing)
            cli.say(
                f"  {packing:10}  {len(packed):,} rows of {config.seq_len:,}; of the tokens in documents that fit into "
                f"one, {packed.cut_fraction:.2%} are cut off from their beginning"
            )
    rows = training_rows(corpus, config.seq_len, config.data.document_mask, config.data.packing)
    for position in range(ROWS):
        cli.say(f"\nrow {position} of training")
        row = rows.at(config.seed, position)
        starts = np.zeros(1, int) if row.starts is None else np.unique(row.starts)
        ends = np.append(starts[1:], len(row.tokens))
        for begin, end in list(zip(starts, ends, strict=True))[:DOCUMENTS]:
            text = corpus.tokenizer.decode(row.tokens[begin:end])
            shown = text if len(text) <= 2 * CHARS else f"{text[:CHARS]}\n  […]\n{text[-CHARS:]}"
            cli.say(f"── tokens {begin:,} to {end:,} " + "─" * 40)
            cli.say(shown)
        if len(starts) > DOCUMENTS:
            cli.say(f"── and {len(starts) - DOCUMENTS} more documents")


def histogram(lengths: np.ndarray) -> None:
    """Documents and tokens by length, in powers of two."""
    bins = np.ceil(np.log2(lengths)).astype(int)
    cli.say("  tokens in a document   documents   of all tokens")
    for power in range(bins.min(), bins.max() + 1):
        inside = bins == power
        share = lengths[inside].sum() / lengths.sum()
        cli.say(f"  up to {2**power:>13,} {inside.sum():>13,} {share:>14.1%}  {'█' * round(40 * share)}")


if __name__ == "__main__":
    refuse_ranks("inspect_data")
    cli.run(main)
