"""A model on the text that its run held out."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import replace

import torch

from data.corpus import load_corpus
from data.loader import eval_batches
from model.gpt import GPT
from training.batches import held_out_rows
from training.config import TrainConfig, load_config
from training.metrics import DISTANCES, TOKENS_READ, loss_at, recall_at
from training.parallel.world import World
from training.services.evaluation import measure
from training.step import Forward
from training.terminal import say
from training.trained import Found, find, load_model

from .depths import draw, measure_depths, table


def evaluate_held_out(options: argparse.Namespace, notify: Callable[[str], None]) -> dict[str, object]:
    """Print the tables, and return their numbers.

    Raises:
        ValueError: the model or its text cannot be had.
    """
    found = find(options.run, notify)
    config = config_of(found, options)
    masked = config.data.document_mask
    model, tokenizer = load_model(
        found,
        attention=options.attention,
        device=options.device,
        precision=options.precision,
        seq_len=config.seq_len,
        max_documents=config.seq_len if masked else None,
        notify=notify,
    )
    corpus = load_corpus(config.data, config.tokenizer, notify, config.model.vocab_size)
    if corpus.tokenizer.sha256 != tokenizer.sha256:
        raise ValueError(f"the text of {options.run} is not there any more: what is found gives another tokenizer")
    rows = held_out_rows(corpus, config, notify)
    batches = list(eval_batches(rows, config.batch_size, config.eval_tokens))
    model.attention.bound_documents(rows.max_documents if masked else None)
    notify(f"attention  {model.attention.describe()}")
    forward = forward_of(model)
    is_recall = config.data.is_recall
    world = World(torch.device(model.attention.spec.device))
    metrics = measure(forward, batches, corpus.tokenizer.count_bytes, world, is_recall=is_recall)
    assert metrics is not None
    tokens = sum(batch.num_targets for batch in batches)
    say_metrics(metrics, f"{tokens:,} tokens in rows of {rows.seq_len:,}")
    results: dict[str, object] = {
        "model": found.what, "seq_len": rows.seq_len, "eval_tokens": tokens,
        "dtype": model.attention.spec.dtype, "metrics": metrics,
    }  # fmt: skip
    if is_recall:
        pairs = min(8, getattr(config.data, "pairs", 8))
        recall = measure_depths(forward, tokenizer, config.seq_len, pairs, options.documents)
        say(table(recall))
        results |= {"recall": recall, "picture": draw(recall)}
    return results


def config_of(found: Found, options: argparse.Namespace) -> TrainConfig:
    """Of the run, with the rows that are asked for now.

    Raises:
        ValueError: there is no text that it held out.
    """
    if "data" not in found.settings:
        raise ValueError(f"{found.what} is of no run, so no text was held out; name tasks with --tasks")
    config = load_config(found.settings | {"resume": "auto", "init_from": None, "parallel": {"name": "data"}})
    seq_len = options.seq_len or config.seq_len
    eval_tokens = options.eval_tokens or config.eval_tokens
    config.model.check_seq_len(seq_len)
    return replace(
        config, seq_len=seq_len, eval_tokens=eval_tokens, batch_size=options.batch_size, tokens_per_step=None
    )


def forward_of(model: GPT) -> Forward:
    spec = model.attention.spec
    dtype = getattr(torch, spec.dtype)
    return Forward(
        model, torch.device(spec.device), lambda: torch.autocast(spec.device, dtype, enabled=dtype != torch.float32)
    )


def say_metrics(found: dict[str, float], over: str) -> None:
    loss, perplexity = found["val/loss"], math.exp(min(found["val/loss"], 700))
    say(f"loss {loss:.4f} per token, perplexity {perplexity:.2f}, over {over}")
    say(f"     {found['val/bits_per_byte']:.4f} bits per byte")
    if by_tokens := [(end, found[loss_at(end)]) for end in TOKENS_READ if loss_at(end) in found]:
        say("\ntokens read before      loss   perplexity")
        for end, loss in by_tokens:
            begin = 1 if end == TOKENS_READ[0] else end // 2 + 1
            say(f"{f'{begin:,} to {end:,}':>18}   {loss:7.4f}   {math.exp(min(loss, 700)):10.2f}")
    if "val/recall" in found:
        say(f"\nrecall {found['val/recall']:.1%}; by the distance from a key to its question:")
        for end in DISTANCES:
            if recall_at(end) in found:
                say(f"{f'up to {end:,}':>18}   {found[recall_at(end)]:6.1%}")
