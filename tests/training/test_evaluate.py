"""A trained model is evaluated: on held-out text by position, on recall by depth, and by lm-evaluation-harness."""

from __future__ import annotations

import importlib.util
import json
import math
import random
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import DictConfig

from data.recall import MARKER, write_probe
from scripts.convert import main as convert
from scripts.evaluate.__main__ import main
from scripts.evaluate.scoring import Scorer
from tests.training.conftest import TINY
from training.config import TrainConfig, load_config
from training.loggers import read_metrics
from training.trained import load_model
from training.trainer import Trainer

MakeConfig = Callable[..., TrainConfig]


def fit(config: TrainConfig) -> Path:
    trainer = Trainer(config, lambda line: None)
    trainer.fit()
    return trainer.run.folder


ROWS = ["max_steps=4", "seq_len=512", "batch_size=1", "eval_tokens=1024", "learning_rate=1e-2"]


@pytest.fixture
def run(config: MakeConfig) -> Path:
    """A model that has learnt a little."""
    return fit(config(*ROWS, "data.document_mask=false"))


@pytest.fixture
def recall_run(composed: Callable[..., DictConfig], tmp_path: Path) -> Path:
    task = ["data=synthetic", "tokenizer=bytes", "data.task=recall", "data.documents=40", "data.length=256"]
    folders = [f"data.cache_dir={tmp_path / 'cache'}", f"run_dir={tmp_path / 'run'}"]
    options = ["seq_len=256", "batch_size=2", "max_steps=1", "data.val_fraction=0.2"]
    return fit(load_config(composed(*TINY, *task, *folders, *options)))


def evaluate(*arguments: object) -> int:
    return main([*map(str, arguments), "--device", "cpu"])


def results_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def test_held_out_text_gives_the_metrics_of_the_runs_last_evaluation(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = {name: value for record in read_metrics(run / "metrics.jsonl") for name, value in record.items()}
    expected = {name: value for name, value in last.items() if name.startswith("val/")}
    assert {"val/loss", "val/loss_at_256", "val/loss_at_512"} <= expected.keys()
    assert evaluate(run) == 0
    assert results_of(run / "evaluation")["metrics"] == pytest.approx(expected, rel=1e-4)
    printed = capsys.readouterr().out
    loss = expected["val/loss_at_512"]
    assert f"257 to 512    {loss:.4f}   {math.exp(loss):10.2f}" in printed
    assert "over 1,024 tokens in rows of 512" in printed


def test_rows_may_be_longer_than_the_text_that_was_trained_on(config: MakeConfig, capsys: Any) -> None:
    folder = fit(config(*ROWS, "data.document_mask=false", "data.val_fraction=0.6"))
    assert evaluate(folder, "--seq-len", "1M", "--eval-tokens", "1M") == 0
    found, printed = results_of(folder / "evaluation"), capsys.readouterr()
    assert found["seq_len"] == found["eval_tokens"] > 1024
    assert f"over {found['seq_len']:,} tokens in rows of {found['seq_len']:,}" in printed.out
    assert f"validation rows have {found['seq_len']:,} tokens, not seq_len" in printed.err


def test_documents_are_read_one_at_a_time_where_the_run_did(config: MakeConfig) -> None:
    run = fit(config(*ROWS))
    losses = [record["val/loss"] for record in read_metrics(run / "metrics.jsonl") if "val/loss" in record]
    assert evaluate(run) == 0
    assert results_of(run / "evaluation")["metrics"]["val/loss"] == pytest.approx(losses[-1], rel=1e-4)


def test_rows_of_another_length_are_evaluated(run: Path, tmp_path: Path) -> None:
    assert evaluate(run / "checkpoints" / "step-00000004", "--seq-len", 256, "--out", tmp_path / "out") == 0
    found = results_of(tmp_path / "out")
    assert found["seq_len"] == 256
    assert "val/loss_at_512" not in found["metrics"]


def test_recall_is_told_by_length_and_depth_and_drawn(recall_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(recall_run, "--documents", 6) == 0
    recall = results_of(recall_run / "evaluation")["recall"]
    assert list(recall) == ["64", "128", "256"]
    assert all(len(shares) == 8 and all(0 <= share <= 1 for share in shares) for shares in recall.values())
    assert "recall by length in tokens" in capsys.readouterr().out
    picture = ET.parse(recall_run / "evaluation" / "recall.svg").getroot()
    texts = [element.text for element in picture.iter() if element.tag.endswith("text")]
    assert {"0 to 12 %", "87 to 100 %", "64", "256"} <= set(texts)
    cells = [element for element in picture.iter() if element.tag.endswith("rect")]
    assert len(cells) == 1 + 3 * 8


def test_a_probe_tells_a_key_in_each_part_and_asks_for_half() -> None:
    rng = random.Random(0)
    for length in (64, 65, 256):
        text, asked = write_probe(rng, length, 8)
        body, *questions = text.split(MARKER)
        assert len(text) == length - 1
        assert len(questions) == len(asked) == 4
        for question, part in zip(questions, asked, strict=True):
            assert part * len(body) // 8 <= body.index(question) < (part + 1) * len(body) // 8 - 1
    with pytest.raises(ValueError, match="24 tokens are too few to tell 8 keys"):
        write_probe(rng, 24, 8)


def test_right_answers_are_counted_where_they_were_told(recall_run: Path) -> None:
    """A model that knows what was told in the first half only."""
    from scripts.evaluate.depths import measure_depths

    _, tokenizer = load_model(str(recall_run), device="cpu")

    def predictions(batch: Any) -> torch.Tensor:
        found = []
        for row, key in batch.targets_BS.ne(-100).nonzero().tolist():
            tokens = batch.tokens_BS[row].tolist()
            told = tokens.index(tokens[key])
            is_early = told - 1 < (len(tokens) - 1 - 12) // 2
            found.append(tokens[told + 1] if is_early else 0)
        return torch.tensor(found)

    forward: Any = SimpleNamespace(predictions=predictions)
    found = measure_depths(forward, tokenizer, longest=128, depths=8, documents=30)
    assert found == {64: [1.0] * 4 + [0.0] * 4, 128: [1.0] * 4 + [0.0] * 4}


@torch.no_grad()
def test_continuations_are_scored_from_the_models_logits(run: Path) -> None:
    model, tokenizer = load_model(str(run), attention="math", device="cpu")
    scorer = Scorer(model, tokenizer, 3, lambda line: None)
    ids = tokenizer.encode("line 3 of file 7 holds 4 apples and more")
    requests = [(ids[:9], ids[9:10]), (ids[:9], ids[4:5]), (ids[:2], ids[2:8]), (ids[:1], ids[1:4]), (ids[:5], ids[5:])]
    for (context, continuation), (logprob, is_greedy) in zip(requests, scorer.score(requests), strict=True):
        logits = model(torch.tensor([[*context, *continuation]]))[0, len(context) - 1 : -1]
        expected = torch.log_softmax(logits, -1)[range(len(continuation)), continuation].sum()
        assert logprob == pytest.approx(expected.item(), rel=1e-4)
        assert is_greedy == (logits.argmax(-1).tolist() == list(continuation))
    best = model(torch.tensor([ids[:9]]))[0, -1].argmax().item()
    assert scorer.score([(ids[:9], [best])])[0][1]


def test_a_text_beyond_the_rows_of_training_is_scored_whole_and_that_is_said(run: Path) -> None:
    said: list[str] = []
    model, tokenizer = load_model(str(run), device="cpu")
    scorer = Scorer(model, tokenizer, 1, said.append)
    scorer.score([([5] * 600, [6]), ([5] * 700, [6])])
    assert said == ["note       700 tokens are more than the 512 of a row in training"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is no folder"),
        (["RUN", "--limit", "5"], "are about tasks; name some with --tasks"),
        (["RUN", "--tasks", ""], '--tasks "" names none'),
        (["RUN", "--out", "/dev/null/there"], "/dev/null/there cannot be written"),
        (["RUN", "--attention", "flsh"], "--attention flsh is unknown"),
        (["OUT"], "OUT is of no run, so no text was held out; name tasks with --tasks"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    places = {"RUN": str(run), "OUT": str(tmp_path / "OUT")}
    if arguments == ["OUT"]:
        convert(["to-hf", str(run), places["OUT"]])
    capsys.readouterr()
    assert evaluate(*(places.get(argument, argument) for argument in arguments)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_without_the_harness_one_line_says_how_to_get_it(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "scripts.evaluate.harness", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert evaluate(run, "--tasks", "recall") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--tasks needs lm-evaluation-harness" in error
    assert error.endswith("pip install -e '.[evaluate]'")


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_a_task_of_the_harness_gives_the_accuracy_of_the_models_answers(recall_run: Path) -> None:
    from scripts.evaluate.tasks.recall import documents

    assert evaluate(recall_run, "--tasks", "recall", "--limit", 20) == 0
    model, tokenizer = load_model(str(recall_run), attention="math", device="cpu")
    digits = [tokenizer.encode(digit)[0] for digit in "0123456789"]
    right = []
    for row in documents()["test"].select(range(20)):
        with torch.no_grad():
            logits = model(torch.tensor([[tokenizer.separator_id, *tokenizer.encode(row["text"])]]))[0, -1]
        right.append(logits[digits].argmax().item() == row["answer"])
    found = results_of(recall_run / "evaluation")
    assert found["tasks"]["recall"]["acc,none"] == pytest.approx(sum(right) / 20)


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_texts_are_scored_by_pieces_and_continued(run: Path) -> None:
    from scripts.evaluate.harness import OurModel

    model, tokenizer = load_model(str(run), device="cpu")
    ours = OurModel(Scorer(model, tokenizer, 2, lambda line: None))
    short, long = "line 3 of file 7", "line 3 of file 7 holds 4 apples\n" * 60
    found = ours.loglikelihood_rolling([SimpleNamespace(args=(text,)) for text in (short, long)])
    ids = tokenizer.encode(short)
    assert found[0] == pytest.approx(ours.scorer.score([([tokenizer.separator_id], ids)])[0][0], rel=1e-5)
    assert found[1] < found[0]
    asked = {"until": ["\n"], "max_gen_toks": 12}
    (text,) = ours.generate_until([SimpleNamespace(args=(short, asked))])
    assert text
    assert "\n" not in text
