"""The loop as a whole: tiny models on a CPU, trained for real."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_model

from data.loader import Batch
from data.tokenizer import Tokenizer
from model.gpt import GPT
from training.config import TrainConfig, load_config
from training.errors import Interrupted, NonFiniteError
from training.loggers import read_metrics
from training.loggers.base import Logger, RunInfo
from training.metrics import TOKENS_READ, loss_at
from training.run import Run
from training.services.evaluation import Evaluation
from training.trainer import Trainer

MakeConfig = Callable[..., TrainConfig]


def silently(line: str) -> None:
    """Instead of print."""


@pytest.fixture
def train(config: MakeConfig, tmp_path: Path) -> Callable[..., Trainer]:
    """train("seed=1") is a finished run of four steps in a folder of its own."""
    number = 0

    def run(*overrides: str) -> Trainer:
        nonlocal number
        number += 1
        trainer = Trainer(config(f"run_dir={tmp_path / str(number)}", *overrides), silently)
        trainer.fit()
        return trainer

    return run


def records(trainer: Trainer) -> list[dict[str, float]]:
    return list(read_metrics(trainer.run.folder / "metrics.jsonl"))


def losses(trainer: Trainer, name: str = "train/loss") -> list[float]:
    return [record[name] for record in records(trainer) if name in record]


# ---- the same run gives the same numbers


def test_a_seed_is_a_run_and_another_seed_another(train: Callable[..., Trainer]) -> None:
    first, again, other = train("seed=1"), train("seed=1"), train("seed=2")
    for name in ("train/loss", "train/grad_norm", "val/loss"):
        assert losses(first, name) == losses(again, name), "not one bit may differ"
        assert losses(first, name) != losses(other, name)
    for value, same in zip(first.run.model.parameters(), again.run.model.parameters(), strict=True):
        assert torch.equal(value, same)


def test_the_seed_decides_the_first_weights_and_the_order_of_the_rows(config: MakeConfig, tmp_path: Path) -> None:
    weights, rows = [], []
    for seed in (1, 1, 2):
        trainer = Trainer(config(f"seed={seed}", f"run_dir={tmp_path / str(len(rows))}", "max_steps=1"), silently)
        weights.append(trainer.run.model.embedding.weight.detach().clone())
        read: list[torch.Tensor] = []
        loss = trainer.run.train_step.loss

        def spy(batch: Batch, loss: Any = loss, read: list[torch.Tensor] = read) -> torch.Tensor:
            if torch.is_grad_enabled():  # not the evaluation
                read.append(batch.tokens_BS)
            return loss(batch)

        trainer.run.train_step.loss = spy  # type: ignore[method-assign]
        trainer.fit()
        rows.append(torch.cat(read))
    for values in (weights, rows):
        assert torch.equal(values[0], values[1])
        assert not torch.equal(values[0], values[2])


@pytest.mark.parametrize("masked", ["true", "false"])
def test_every_attention_trains_alike(train: Callable[..., Trainer], masked: str) -> None:
    options = [f"data.document_mask={masked}", "schedule.warmup_steps=1"]
    math_run, *others = (train(f"attention={name}", *options) for name in ("math", "sdpa", "flex"))
    assert len(losses(math_run)) == 4
    for other in others:
        assert losses(other) == pytest.approx(losses(math_run), rel=1e-4)
        assert losses(other, "val/loss") == pytest.approx(losses(math_run, "val/loss"), rel=1e-4)


def test_documents_do_not_see_each_other_unless_they_may(train: Callable[..., Trainer]) -> None:
    masked, open_rows = train("data.document_mask=true"), train("data.document_mask=false")
    assert masked.run.batches.corpus.manifest == open_rows.run.batches.corpus.manifest
    assert losses(masked) != losses(open_rows)


def test_accumulation_is_the_same_step_in_less_memory(train: Callable[..., Trainer]) -> None:
    options = ["tokens_per_step=128", "learning_rate=1e-2", "schedule.warmup_steps=1"]
    whole, parts = train("batch_size=4", *options), train("batch_size=1", *options)
    assert (whole.run.plan.accumulation, parts.run.plan.accumulation) == (1, 4)
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-5)
    assert losses(parts, "train/grad_norm") == pytest.approx(losses(whole, "train/grad_norm"), rel=1e-4)


def test_log_lines_between_steps_hold_the_mean_of_theirs(train: Callable[..., Trainer]) -> None:
    each, some = train("max_steps=5"), train("max_steps=5", "log_every=3")
    a, b, c, d, e = losses(each)
    assert losses(some) == pytest.approx([a, (b + c) / 2, (d + e) / 2], rel=1e-6)
    assert [record["step"] for record in records(some) if "train/loss" in record] == [1, 3, 5]


# ---- what is measured


def test_bits_per_byte_by_hand(train: Callable[..., Trainer]) -> None:
    trainer = train()
    tokenizer, nats, num_bytes, num_tokens = trainer.run.batches.corpus.tokenizer, 0.0, 0, 0
    for batch in trainer.run.batches.val_batches:
        log_p_BSV = trainer.run.model(batch.tokens_BS, None, batch.starts_BS).detach().double().log_softmax(-1)
        for log_p_SV, targets_S in zip(log_p_BSV, batch.targets_BS, strict=True):
            for log_p_V, target in zip(log_p_SV, targets_S.tolist(), strict=True):
                nats -= log_p_V[target].item()
                num_tokens += 1
                if target != tokenizer.separator_id:
                    # What a token stands for alone may be half a character; between two letters it is only itself.
                    num_bytes += len(tokenizer._backend.id_to_token(target))
    assert num_tokens == 256
    *_, last = (record for record in records(trainer) if "val/bits_per_byte" in record)
    assert last["step"] == 4
    assert last["val/loss"] == pytest.approx(nats / num_tokens, rel=1e-5)
    assert last["val/bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)


@pytest.mark.parametrize("masked", ["true", "false"])
def test_the_loss_by_tokens_read_by_hand(train: Callable[..., Trainer], masked: str) -> None:
    """A prediction is made from the tokens of its document up to its place, or of its row."""
    rows = ["tokenizer=bytes", "seq_len=600", "eval_tokens=1800", "batch_size=2", "max_steps=1"]
    trainer = train(f"data.document_mask={masked}", *rows)
    ranges = {"val/loss_at_256": range(1, 257), "val/loss_at_512": range(257, 513), "val/loss_at_1k": range(513, 1025)}
    found: dict[str, list[float]] = {name: [] for name in ranges}
    for batch in trainer.run.batches.val_batches:
        log_p_BSV = trainer.run.model(batch.tokens_BS, None, batch.starts_BS).detach().double().log_softmax(-1)
        for row, targets_S in enumerate(batch.targets_BS.tolist()):
            for place, target in enumerate(targets_S):
                read = place + 1 - (0 if batch.starts_BS is None else int(batch.starts_BS[row, place]))
                if target != -100:
                    name = next(name for name, range_ in ranges.items() if read in range_)
                    found[name].append(-log_p_BSV[row, place, target].item())
    assert sum(map(len, found.values())) in (600, 1200, 1800)
    last = records(trainer)[-1]
    expected = {name: sum(nats) / len(nats) for name, nats in found.items() if nats}
    assert len(expected) >= 2
    assert {name: last[name] for name in last if name.startswith("val/loss_at")} == pytest.approx(expected, rel=1e-5)
    weighted = sum(last[name] * len(nats) for name, nats in found.items() if nats)
    assert last["val/loss"] == pytest.approx(weighted / sum(map(len, found.values())), rel=1e-9)


def test_tokens_read_are_named_by_the_ends_of_their_ranges() -> None:
    names = [loss_at(end).removeprefix("val/loss_at_") for end in TOKENS_READ]
    assert names[:4] == ["256", "512", "1k", "2k"]
    assert names[12:15] == ["1m", "2m", "4m"]
    assert TOKENS_READ[-1] == 2**31, "the most tokens that a batch may have"


def test_tokens_steps_and_rates_are_those_of_the_plan(train: Callable[..., Trainer]) -> None:
    trainer = train("tokens_per_step=256", "learning_rate=0.5", "schedule.warmup_steps=2", "schedule.min_ratio=0")
    lines = [record for record in records(trainer) if "train/loss" in record]
    assert [record["tokens"] for record in lines] == [256, 512, 768, 1024]
    assert [record["train/learning_rate"] for record in lines] == pytest.approx([0.25, 0.5, 0.25, 0.0])


def test_gradients_are_clipped_after_their_norm_is_taken(config: MakeConfig, tmp_path: Path) -> None:
    seen = []

    def norm_at_the_step(clip: str) -> float:
        trainer = Trainer(config("max_steps=1", f"grad_clip={clip}", f"run_dir={tmp_path / clip}"), silently)
        step = trainer.run.optimizer.step

        def spy(rate: float, finite: torch.Tensor, scale: torch.Tensor | None) -> None:
            grads = [parameter.grad for parameter in trainer.run.model.parameters() if parameter.grad is not None]
            seen.append(torch.nn.utils.get_total_norm(grads).item() * (1.0 if scale is None else scale.item()))
            step(rate, finite, scale)

        trainer.run.optimizer.step = spy  # type: ignore[method-assign]
        return trainer.fit()["train/grad_norm"]

    logged = [norm_at_the_step(clip) for clip in ("0", "0.01")]
    assert logged[0] == logged[1] > 0.01
    assert seen == pytest.approx([logged[0], 0.01], rel=1e-3)


def test_z_loss_and_label_smoothing_are_trained_on_and_not_validated_with(train: Callable[..., Trainer]) -> None:
    plain, smoothed, both = train(), train("label_smoothing=0.2"), train("z_loss=0.1", "label_smoothing=0.2")
    assert losses(plain, "val/loss")[0] == losses(smoothed, "val/loss")[0] == losses(both, "val/loss")[0]
    first = [losses(trainer)[0] for trainer in (plain, smoothed, both)]
    assert first[2] - first[1] == pytest.approx(0.1 * math.log(300) ** 2, rel=0.05), "log Σ exp is log 300 at first"
    assert len({losses(trainer, "val/loss")[-1] for trainer in (plain, smoothed, both)}) == 3


def test_losses_fall_on_a_text_that_is_easily_learnt(train: Callable[..., Trainer]) -> None:
    trainer = train("max_steps=60", "learning_rate=1e-2", "schedule.warmup_steps=5", "log_every=20")
    first, *_, last = losses(trainer)
    assert first == pytest.approx(math.log(300), rel=0.05), "at first every token is as likely as any other"
    assert last < 0.5 * first
    before, after = losses(trainer, "val/bits_per_byte")[:: len(losses(trainer, "val/bits_per_byte")) - 1]
    assert after < 0.5 * before


@pytest.mark.parametrize(
    "overrides",
    [
        ["precision=bf16"],
        ["optimizer=muon"],
        ["schedule=wsd"],
        ["model=gpt2-124m", "model.n_layers=1", "model.n_heads=2", "model.dim=32", "model.vocab_size=300"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_every_way_to_train_learns(train: Callable[..., Trainer], overrides: list[str]) -> None:
    trainer = train(*overrides, "max_steps=12", "learning_rate=1e-2", "schedule.warmup_steps=2")
    assert all(map(math.isfinite, losses(trainer)))
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.2


def test_muon_moves_the_matrices_of_the_layers_and_adamw_the_rest(config: MakeConfig) -> None:
    trainer = Trainer(config("optimizer=muon"), silently)
    names = {id(parameter): name for name, parameter in trainer.run.model.named_parameters()}
    by_adamw, *by_muons = (
        {names[id(p)] for group in inner.param_groups for p in group["params"]} for inner in trainer.run.optimizer.all
    )
    by_muon = set().union(*by_muons)
    layers = ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down")
    assert by_muon == {f"blocks.0.{layer}.weight" for layer in layers}
    assert by_adamw == set(names.values()) - by_muon


# ---- what goes wrong


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_gradient_that_is_not_a_number_ends_the_run_and_moves_nothing(config: MakeConfig, optimizer: str) -> None:
    # Noticed only at the next log line, two steps later: the message must still name the step that was bad.
    trainer = Trainer(config(f"optimizer={optimizer}", "max_steps=9", "log_every=6"), silently)
    step, history = trainer.run.optimizer.step, []

    def spoil(grad: torch.Tensor) -> torch.Tensor:
        return torch.full_like(grad, math.nan) if trainer.run.progress.step == 4 else grad

    trainer.run.model.blocks[0].mlp.down.weight.register_hook(spoil)  # type: ignore[union-attr]

    def spy(rate: float, finite: torch.Tensor, scale: torch.Tensor | None) -> None:
        before = [parameter.detach().clone() for parameter in trainer.run.model.parameters()]
        step(rate, finite, scale)
        changed = [not torch.equal(*pair) for pair in zip(before, trainer.run.model.parameters(), strict=True)]
        history.append((trainer.run.progress.step, any(changed)))

    trainer.run.optimizer.step = spy  # type: ignore[method-assign]
    with pytest.raises(NonFiniteError, match=r"at step 4; .*learning_rate"):
        trainer.fit()
    assert history == [(1, True), (2, True), (3, True), (4, False), (5, False), (6, False)]
    assert all(parameter.isfinite().all() for parameter in trainer.run.model.parameters())
    assert not (trainer.run.folder / "model.safetensors").exists()


def test_a_folder_that_holds_a_run_is_refused_and_left_alone(config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    Trainer(config(), silently)  # an empty one is fine
    (tmp_path / "run" / "model.safetensors").write_text("weeks of work")
    with pytest.raises(ValueError, match=r"run_dir=.*already holds something, and no run to resume; choose another"):
        Trainer(config(), silently)
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("run_dir", ["file", "file/run", "x" * 300])
def test_a_folder_that_cannot_be_made_is_refused_in_one_line(config: MakeConfig, tmp_path: Path, run_dir: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="run_dir=") as refused:
        Trainer(config(f"run_dir={tmp_path / run_dir}"), silently).fit()
    assert "\n" not in str(refused.value)
    assert "choose another" in str(refused.value)


def test_rows_longer_than_the_text_are_refused(config: MakeConfig) -> None:
    with pytest.raises(ValueError, match=r"seq_len=100000 needs at least 100001 tokens"):
        Trainer(config("seq_len=100000", "batch_size=1"), silently)


def test_a_held_out_text_of_one_token_is_refused(config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(bytes([65, 0]) * 4000)
    options = ["data=tokens", f"data.path={tmp_path / 'x.bin'}", "data.val_fraction=0.0002", "tokenizer=bytes"]
    with pytest.raises(ValueError, match=r"the held-out text has one token.* raise data.val_fraction"):
        Trainer(config(*options), silently)


def test_held_out_text_shorter_than_a_row_is_read_whole_with_a_notice(config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("".join(f"{number} bottles on the wall\n" for number in range(400)))
    lines: list[str] = []
    options = [f"data.path={tmp_path / 'one.txt'}", "data.val_fraction=0.02", "seq_len=512", "batch_size=1"]
    trainer = Trainer(config(*options, "max_steps=2"), lines.append)
    held_out = len(trainer.run.batches.corpus.parts[0].val.tokens) - 1
    assert 0 < held_out < 512
    assert f"validation rows have {held_out:,} tokens, not seq_len: that is all the held-out text" in lines
    summary = trainer.fit()
    assert math.isfinite(summary["val/loss"])
    assert [batch.tokens_BS.shape for batch in trainer.run.batches.val_batches] == [(1, held_out)]


class Broken(Logger):
    """Raises in the method it is named for, or everywhere."""

    def __init__(self, name: str) -> None:
        self.name = name

    def start(self, run: RunInfo) -> None:
        self._maybe_raise("start")

    def log(self, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        self._maybe_raise("log")

    def sample(self, step: int, tokens: int, text: str) -> None:
        self._maybe_raise("sample")

    def finish(self, status: str) -> None:
        self._maybe_raise("finish")

    def _maybe_raise(self, method: str) -> None:
        if self.name == method:
            raise OSError(f"the server said no to {method}")


def test_a_logger_that_fails_does_not_stop_training(config: MakeConfig) -> None:
    lines: list[str] = []
    trainer = Trainer(config("sample_tokens=2"), lines.append)
    methods = ["start", "log", "sample", "finish"]
    trainer.run.loggers.loggers[:0] = map(Broken, methods)
    trainer.fit()
    assert (trainer.run.folder / "model.safetensors").exists()
    assert len(losses(trainer)) == 4, "those after it are not touched"
    assert [sum(f"logger {method} is dropped" in line for line in lines) for method in methods] == [1] * 4


def test_an_interrupted_run_says_so_and_keeps_its_record(config: MakeConfig) -> None:
    trainer = Trainer(config(), silently)
    statuses: list[str] = []

    class Watcher(Broken):
        def finish(self, status: str) -> None:
            statuses.append(status)

    trainer.run.loggers.loggers.append(Watcher("nothing"))
    (evaluation,) = (service for service in trainer.services if isinstance(service, Evaluation))
    evaluate = evaluation.evaluate

    def interrupted(run: Run) -> None:
        if trainer.run.progress.step == 2:
            raise KeyboardInterrupt
        evaluate(run)

    evaluation.evaluate = interrupted  # type: ignore[method-assign]
    trainer.run.config.eval_every = 2
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert statuses == ["interrupted"]
    assert [record["step"] for record in records(trainer)] == [0, 1, 2]


def test_a_second_sigterm_does_not_cut_the_loggers_short(config: MakeConfig) -> None:
    """As Slurm sends it; W&B may upload for half a minute after the save."""
    trainer, deaths = Trainer(config(), silently), list[int]()

    class Slow(Broken):
        def finish(self, status: str) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)

    trainer.run.loggers.loggers.append(Slow("nothing"))
    trainer.run.interrupt._reason = "SIGTERM"
    before = signal.signal(signal.SIGTERM, lambda number, frame: deaths.append(number))
    try:
        with pytest.raises(Interrupted, match="by SIGTERM; saved"):
            trainer.fit()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not deaths


# ---- the run folder


@pytest.fixture
def finished(config: MakeConfig, tmp_path: Path) -> Trainer:
    trainer = Trainer(config("max_steps=6", "eval_every=3", "sample_tokens=8", "sample_every=3"), silently)
    trainer.fit()
    return trainer


def test_the_run_folder_holds_all_that_the_run_was(finished: Trainer) -> None:
    folder = finished.run.folder
    files = {"config.yaml", "metrics.jsonl", "samples.md", "tokenizer.json", "model.safetensors"}
    assert {path.name for path in folder.iterdir()} >= files
    assert not [path for path in folder.iterdir() if path.suffix == ".part"]

    assert load_config(yaml.safe_load((folder / "config.yaml").read_text())) == finished.run.config

    text = "line 3 of file 4 holds 5 apples"
    assert Tokenizer.load(folder / "tokenizer.json").encode(text) == finished.run.batches.corpus.tokenizer.encode(text)

    samples = (folder / "samples.md").read_text()
    assert samples.count("## step 3 ") == samples.count("## step 6 ") == 1
    assert samples.count("def") >= 2, "a sample begins with its prompt"


def test_the_metrics_of_a_run_are_these(finished: Trainer) -> None:
    train = {"train/loss", "train/grad_norm", "train/learning_rate"}
    speed = {f"throughput/{name}" for name in ("tokens_per_second", "tflops", "attended_fraction")}
    speed |= {"time/step_ms", "time/data_wait_fraction"}
    validation = {"val/loss", "val/bits_per_byte"}
    found = [(record.pop("step"), names(record) - {"tokens", "time"}) for record in records(finished)]
    warm_up = [(0, validation), (1, train), (2, train), (3, train), (3, validation)]
    assert found == [*warm_up, *((step, train | speed) for step in (4, 5, 6)), (6, validation)]
    assert names(finished.run.progress.summary) == train | speed | validation


def names(metrics: Mapping[str, float]) -> set[str]:
    """Without those of checkpoints, which come with the first line after a save has ended, whenever that is."""
    return {name for name in metrics if not name.startswith("checkpoint/")}


@torch.no_grad()
def test_the_saved_weights_are_the_trained_model(finished: Trainer) -> None:
    torch.manual_seed(1)
    fresh = GPT(finished.run.config.model, finished.run.attention)
    batch = finished.run.batches.val_batches[0]
    logits = finished.run.model(batch.tokens_BS, None, batch.starts_BS)
    assert not torch.equal(fresh(batch.tokens_BS, None, batch.starts_BS), logits)
    load_model(fresh, str(finished.run.folder / "model.safetensors"))
    assert torch.equal(fresh(batch.tokens_BS, None, batch.starts_BS), logits)


def test_samples_and_evaluation_change_nothing_in_the_training(train: Callable[..., Trainer]) -> None:
    quiet = train("eval_every=0")
    busy = train("eval_every=1", "sample_every=1", "sample_tokens=4")
    assert losses(quiet) == losses(busy)


def test_samples_are_switched_off_by_zero_tokens(train: Callable[..., Trainer]) -> None:
    assert not (train("sample_every=1", "sample_tokens=0").run.folder / "samples.md").exists()


def test_what_was_decided_at_the_start_is_said(config: MakeConfig) -> None:
    lines: list[str] = []
    said: list[RunInfo] = []

    class Watcher(Broken):
        def start(self, run: RunInfo) -> None:
            said.append(run)

    trainer = Trainer(config("attention=math", "tokens_per_step=256", "max_steps=1"), lines.append)
    trainer.run.loggers.loggers.append(Watcher("nothing"))
    trainer.fit()
    text = "\n".join(lines)
    for expected in ("fp32, eager, torch ", "attention  math: ", "1 steps × 256 tokens (2 × 4 rows of 32)"):
        assert expected in text
    facts: dict[str, Any] = said[0].facts
    assert facts["parameters"] == sum(parameter.numel() for parameter in trainer.run.model.parameters())
    assert facts["data"] == trainer.run.batches.corpus.manifest
    assert (facts["precision"], facts["compile"], facts["peak_flops"]) == ("fp32", False, None)


def test_a_run_computes_in_its_own_precision_after_another_in_the_same_process(train: Callable[..., Trainer]) -> None:
    """As jobs of a sweep are: precision=tf32,fp32."""
    torch.set_float32_matmul_precision("high")
    train("max_steps=1")
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_config_is_not_changed_by_running_it(config: MakeConfig) -> None:
    mine = config("max_steps=1")
    twin = replace(mine)
    Trainer(mine, silently).fit()
    assert mine == twin
