"""What an evaluation says of the recall task, and that a small model learns it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import DictConfig

from data.loader import Batch
from tests.training.conftest import TINY
from training.config import TrainConfig, load_config
from training.loggers import read_metrics
from training.metrics import DISTANCES, recall_at
from training.services.evaluation import count_right
from training.trainer import Trainer


@pytest.fixture
def recall(composed: Callable[..., DictConfig], tmp_path: Path) -> Callable[..., TrainConfig]:
    """recall("seed=1") is a run of a tiny model on the recall task."""

    def load(*overrides: str) -> TrainConfig:
        task = [
            "data=synthetic",
            "tokenizer=bytes",
            "data.task=recall",
            "data.documents=40",
            "data.length=512",
            "data.val_fraction=0.2",
        ]
        folders = [f"data.cache_dir={tmp_path / 'cache'}", f"run_dir={tmp_path / 'run'}"]
        return load_config(composed(*TINY, *task, *folders, "seq_len=512", "batch_size=2", *overrides))

    return load


def finished(config: TrainConfig) -> tuple[Trainer, list[dict[str, float]]]:
    trainer = Trainer(config, lambda line: None)
    trainer.fit()
    return trainer, list(read_metrics(trainer.run.folder / "metrics.jsonl"))


def test_right_answers_are_counted_by_distance_from_logits_by_hand() -> None:
    tokens_BS = torch.zeros(2, 600, dtype=torch.int64)
    targets_BS = torch.full((2, 600), -100)
    for row, told, asked, answer in ((0, 2, 258, 7), (0, 3, 260, 8), (1, 0, 599, 9)):
        tokens_BS[row, [told, asked]] = 100 + told
        targets_BS[row, asked] = answer
    logits_AV = torch.zeros(3, 10)
    logits_AV[0, 7], logits_AV[1, 3], logits_AV[2, 9] = 1.0, 1.0, 1.0  # right, wrong, right
    positions_BS = torch.arange(600)[None]
    batch = Batch(tokens_BS, targets_BS, None, positions_BS, visible_pairs=0, num_tokens=1200, num_targets=3)
    right, asked = count_right(batch, logits_AV.argmax(-1).numpy())
    assert dict(zip(DISTANCES, right.tolist(), strict=True)) == {**dict.fromkeys(DISTANCES, 0), 256: 1, 1024: 1}
    assert dict(zip(DISTANCES, asked.tolist(), strict=True)) == {
        **dict.fromkeys(DISTANCES, 0),
        256: 1,
        512: 1,
        1024: 1,
    }


@pytest.mark.parametrize("attention", ["math", "sdpa", pytest.param("flex", marks=pytest.mark.slow)])
def test_recall_is_that_of_the_models_logits(recall: Callable[..., TrainConfig], attention: str) -> None:
    trainer, records = finished(recall("max_steps=1", "eval_tokens=4096", "eval_every=0", f"attention={attention}"))
    found: dict[str, list[bool]] = defaultdict(list)
    for batch in trainer.run.batches.val_batches:
        predicted_BS = trainer.run.model(batch.tokens_BS, None, batch.starts_BS).argmax(-1)
        for row, key in zip(*np.nonzero(batch.targets_BS.numpy() != -100), strict=True):
            tokens = batch.tokens_BS[row, : key + 1].tolist()
            distance = tokens[::-1].index(tokens[-1], 1)
            name = recall_at(next(end for end in DISTANCES if distance <= end))
            found[name].append(predicted_BS[row, key].item() == batch.targets_BS[row, key].item())
    every = [is_right for of_range in found.values() for is_right in of_range]
    assert len(every) > 200
    expected = {name: sum(right) / len(right) for name, right in found.items()} | {
        "val/recall": sum(every) / len(every)
    }
    assert {"val/recall", "val/recall_at_16", "val/recall_at_128"} <= expected.keys()
    last = records[-1]
    assert {name: value for name, value in last.items() if name.startswith("val/recall")} == pytest.approx(expected)


def test_the_loss_is_the_mean_over_answers(recall: Callable[..., TrainConfig]) -> None:
    _, records = finished(recall("max_steps=1", "learning_rate=1e-9"))
    for name in ("train/loss", "val/loss"):
        (loss, *_) = (record[name] for record in records if name in record)
        assert loss == pytest.approx(np.log(300), rel=0.02), "300 tokens, of which none is likelier yet"


def test_a_text_has_no_recall(config: Callable[..., TrainConfig]) -> None:
    _, records = finished(config("max_steps=1"))
    assert not [name for record in records for name in record if "recall" in name]


def test_a_run_with_rows_that_are_cut_is_refused(recall: Callable[..., TrainConfig]) -> None:
    with pytest.raises(ValueError, match=r"data\.length=384 does not divide seq_len=512"):
        recall("data.length=384")


@pytest.mark.slow  # 70 s of one core
@pytest.mark.parametrize("seed", [0, 1])
def test_a_small_model_learns_to_find_what_it_read(
    composed: Callable[..., DictConfig], tmp_path: Path, seed: int
) -> None:
    folders = [f"data.cache_dir={tmp_path / 'cache'}", f"run_dir={tmp_path / 'run'}"]
    seeds = [f"seed={seed}", f"data.seed={seed}"]
    _, records = finished(
        load_config(composed("experiment=recall", "device=cpu", "logger=none", "eval_every=0", *folders, *seeds))
    )
    assert records[0]["val/recall"] < 0.2
    assert records[-1]["val/recall"] > 0.9
    assert records[-1]["val/recall_at_128"] > 0.8
