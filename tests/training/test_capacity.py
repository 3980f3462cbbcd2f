"""What a run will take is what runs took; memory=auto and refusals follow from it, by arithmetic alone."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir

from model.activations_config import FullConfig, MemoryConfig, OffloadConfig, SelectiveConfig
from model.memory import GIB, predict, state_bytes
from model.precision_config import precision_named
from scripts.compare.jobs import NEEDS
from training import capacity, cli, machine
from training import runtime as runtime_module
from training.capacity import (
    AUTO_FILLS,
    REFUSED_ABOVE,
    as_typed,
    candidates,
    cheapest,
    check_capacity,
    host_memory,
    longest_row,
    one_row,
    resolve_memory,
    workload,
)
from training.cards import CARDS, LINKS
from training.config import TrainConfig, load_config
from training.facts import memory_lines
from training.machine import Gpu
from training.runtime import Runtime, resolve_runtime
from training.step_time import step_time
from training.traffic import NETWORK_BYTES_PER_SECOND, exposed_seconds, sent_in_step
from training.trainer import Trainer

MakeConfig = Callable[..., TrainConfig]
CONFIGS = Path(__file__).parents[2] / "configs"
CPU = Runtime(None, precision_named("fp32"), False)
RECORD = Path(__file__).parents[2] / "docs/benchmarks/long-context-h200.json"
MEASURED = [row for row in json.loads(RECORD.read_text("utf-8"))["rows"] if "step_s" in row]
ON_SEVERAL = [
    row for row in json.loads(RECORD.with_name("parallel-h200.json").read_text("utf-8"))["rows"] if row["gpus"] > 1
]
COMPARED = [
    row for name in ("compare-h200", "compare-llama-1b-h200")
    for row in json.loads(RECORD.with_name(f"{name}.json").read_text("utf-8"))["rows"] if row["outcome"] == "done"
]  # fmt: skip
LLAMA_1B = "model=llama-1b"
MOMENTS = "precision.moments=bfloat16"


@cache
def _composed(settings: tuple[str, ...]) -> Any:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", list(settings))


@pytest.fixture
def on_card(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[TrainConfig, Runtime]]:
    """on_card("seq_len=64k", gib=40): what that command composes and means on an H200 of so much memory."""
    monkeypatch.setattr(cli, "_runs_on_gpu", lambda: True)
    monkeypatch.setattr(capacity, "host_memory", lambda: 2**50)
    cli.register_resolvers()

    def of(*settings: str, gib: float | None = None) -> tuple[TrainConfig, Runtime]:
        card = CARDS["h200"]
        card = card if gib is None else replace(card, memory=int(gib * GIB))
        monkeypatch.setattr(runtime_module, "find_gpu", lambda: card)
        config = load_config(_composed(settings))
        return config, resolve_runtime(config)

    return of


# ---- what was measured


def settings_of(row: dict[str, Any]) -> list[str]:
    """Of the command that was measured, with the name that `unknown_key` offers for the one that moments had then."""
    _python, _train, *words = shlex.split(row["command"].replace("optimizer.moments", "precision.moments"))
    return [*words, "check_memory=false"]


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: row["rung"])
def test_a_peak_that_was_measured_is_predicted(on_card: Callable[..., Any], row: dict[str, Any]) -> None:
    """Within 5 %, and no more than 2 % below it; of a first step without the moments, which its update makes."""
    plan = predict(workload(*on_card(*settings_of(row))))
    is_first = row["step_s"] == row["first_step_s"]
    predicted = (plan.total - (plan.optimizer if is_first else 0)) / GIB
    measured = row["peak_allocated_gib"]
    assert -0.02 <= predicted / measured - 1 <= 0.05, f"{predicted:.2f} GiB, not {measured:.2f}"


@pytest.mark.parametrize("row", COMPARED, ids=lambda row: " ".join(row["command"][1:4]))
def test_a_peak_with_each_attention_is_predicted(on_card: Callable[..., Any], row: dict[str, Any]) -> None:
    config, runtime = on_card(*row["command"][1:])
    predicted = predict(workload(resolve_memory(config, runtime), runtime)).total / GIB
    assert -0.02 <= predicted / row["peak_gib"] - 1 <= 0.05, f"{predicted:.2f} GiB, not {row['peak_gib']:.2f}"


@pytest.mark.parametrize("row", COMPARED, ids=lambda row: " ".join(row["command"][1:4]))
def test_a_step_with_each_attention_takes_about_as_long_as_is_predicted(
    on_card: Callable[..., Any], row: dict[str, Any]
) -> None:
    config, runtime = on_card(*row["command"][1:])
    config = resolve_memory(config, runtime)
    taken = step_time(workload(config, runtime), config.plan.accumulation, runtime.gpu, runtime.dtype_name)
    assert taken is not None
    is_small = "model=gpt2-124m" in row["command"]  # its products are slower than those the prediction knows
    assert -(0.4 if is_small else 0.15) <= taken.total / (row["step_ms"] / 1000) - 1 <= 0.15, f"{taken.total:.3f} s"


@pytest.mark.parametrize("row", ON_SEVERAL, ids=lambda row: f"{row['line']} on {row['gpus']}")
def test_a_peak_and_a_step_that_were_measured_on_several_gpus_are_predicted(
    on_card: Callable[..., Any], row: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": row["gpus"], "LOCAL_WORLD_SIZE": row["gpus"]}.items():
        monkeypatch.setenv(name, str(value))
    _torchrun, _processes, _train, *words = shlex.split(row["command"])
    config, runtime = on_card(*words, "check_memory=false")
    work = workload(config, runtime)
    assert -0.02 <= predict(work).total / GIB / row["peak_allocated_gib"] - 1 <= 0.05
    taken = step_time(work, 1, runtime.gpu, runtime.dtype_name)
    assert taken is not None
    sending = exposed_seconds(sent_in_step(work, 1), taken.total, LINKS["h200"], NETWORK_BYTES_PER_SECOND)
    if "packed" not in row["line"]:  # whose attention is not predicted
        assert taken.total + sending == pytest.approx(row["step_s"], rel=0.05)


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: row["rung"])
def test_a_step_that_was_measured_takes_about_as_long_as_is_predicted(
    on_card: Callable[..., Any], row: dict[str, Any]
) -> None:
    config, runtime = on_card(*settings_of(row))
    taken = step_time(workload(config, runtime), 1, runtime.gpu, runtime.dtype_name)
    assert taken is not None
    assert taken.total == pytest.approx(row["step_s"], rel=0.15)


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["none", "selective", "full", "full memory.keep_attention=0", "offload"])
def test_on_a_gpu_a_run_takes_what_is_predicted(config: MakeConfig, tmp_path: Path, policy: str) -> None:
    """Within 15 %: of so small a model the libraries' own workspaces are a part."""
    options = ["model.n_layers=8", "model.n_heads=8", "model.n_kv_heads=8", "model.dim=512", "model.ffn_dim=2048"]
    options += ["attention=flash", "device=cuda", "precision=bf16", "seq_len=1024", "batch_size=32", "max_steps=4"]
    mine = config(*options, *f"memory={policy}".split(), "compile=true", f"run_dir={tmp_path / 'run'}")
    runtime = resolve_runtime(mine)
    measured = Trainer(mine, lambda line: None, runtime).fit()["memory/peak_allocated_gib"]
    assert predict(workload(mine, runtime)).total / GIB == pytest.approx(measured, rel=0.15)


# ---- memory=auto


def test_the_cheapest_is_the_fastest_that_fits_and_of_equals_the_first() -> None:
    none, selective, full = MemoryConfig(), SelectiveConfig(), FullConfig()
    seconds = {"none": 1.0, "selective": 1.1, "full": 1.1}
    peaks = {"none": 30, "selective": 20, "full": 10}

    def at(limit: int, **changed: float) -> MemoryConfig | None:
        fits = lambda policy: peaks[policy.name] <= limit  # noqa: E731
        return cheapest([none, selective, full], fits, lambda policy: (seconds | changed)[policy.name])

    assert [at(limit) for limit in (30, 29, 19, 9)] == [none, selective, full, None]
    assert at(29, full=1.05) == full
    assert cheapest([selective, full], lambda policy: True, lambda policy: None) == selective, "no times are known"


@pytest.mark.parametrize("n_kv_heads", [1, 8])
def test_every_policy_that_auto_may_choose_can_be_typed(config: MakeConfig, n_kv_heads: int) -> None:
    policies = list(candidates(n_kv_heads))
    assert all(n_kv_heads % getattr(policy, "head_groups", 1) == 0 for policy in policies)
    for policy in policies:
        typed = as_typed(policy).split()
        assert config(*typed, "model.n_heads=8", f"model.n_kv_heads={n_kv_heads}").memory == policy
    assert len(set(map(as_typed, policies))) == len(policies)


def test_auto_may_attend_by_groups_of_heads_and_keep_what_they_give(on_card: Callable[..., Any]) -> None:
    config, runtime = on_card("model=llama-8b", "seq_len=128k", "memory=auto", gib=139.8)
    chosen = resolve_memory(config, runtime).memory
    assert isinstance(chosen, OffloadConfig)
    assert (chosen.keep_attention, chosen.head_groups > 1) == (1.0, True)


@pytest.mark.parametrize(
    ("more", "factor"),
    [
        (["attention=math", "memory=full", "memory.keep_attention=0", "parallel.context=8"], 8),
        (["attention=sdpa", "attention.kernel=efficient", "memory=full", "parallel.context=1"], 1),
    ],
    ids=["scores", "mask"],
)
def test_what_grows_with_the_square_of_a_row_is_that_of_the_whole_row(
    on_card: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, more: list[str], factor: int
) -> None:
    """Of 8 GPUs each has an eighth of the heads, or of the queries."""
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, str(factor))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    peaks = []
    for seq_len in (2**16, 2**17):
        config, runtime = on_card(LLAMA_1B, *more, f"seq_len={seq_len}", "check_memory=false")
        peaks.append(predict(workload(config, runtime)).total)
    bytes_a_pair = 12 * 32 / 8 if "attention=math" in more else 1
    assert peaks[1] - peaks[0] >= bytes_a_pair * (2**34 - 2**32)


def test_the_smaller_the_card_the_slower_and_leaner_is_what_auto_means(on_card: Callable[..., Any]) -> None:
    chosen = []
    for gib in (300, 180, 100, 40, 34, 30, 27):
        config, runtime = on_card(LLAMA_1B, "seq_len=131072", "memory=auto", "precision=bf16-residual", gib=gib)
        work = workload(resolve_memory(config, runtime), runtime)
        assert predict(work).total <= AUTO_FILLS * gib * GIB
        taken = step_time(work, 1, runtime.gpu, "bfloat16")
        assert taken is not None
        chosen.append((taken.total, work.memory))
    assert chosen[0][1] == MemoryConfig()
    assert chosen[1][1] == SelectiveConfig()
    assert isinstance(chosen[-1][1], FullConfig)
    assert [time for time, _ in chosen] == sorted(time for time, _ in chosen)


def test_the_hosts_memory_limits_what_goes_there(on_card: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [LLAMA_1B, "seq_len=131072", "memory=auto", "precision=bf16-residual"]
    config, runtime = on_card(*settings, gib=34)
    assert isinstance(resolve_memory(config, runtime).memory, OffloadConfig)
    monkeypatch.setattr(capacity, "host_memory", lambda: 2**30)
    assert not isinstance(resolve_memory(config, runtime).memory, OffloadConfig)


def test_on_a_cpu_auto_is_none_and_config_yaml_says_so(config: MakeConfig, tmp_path: Path) -> None:
    lines: list[str] = []
    Trainer(config("memory=auto", "max_steps=1", f"run_dir={tmp_path / 'run'}"), lines.append).fit()
    assert any(line.startswith("memory     auto is memory=none") for line in lines)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["memory"] == {"name": "none"}


def test_the_peak_that_is_predicted_is_said_at_the_start(on_card: Callable[..., Any]) -> None:
    config, runtime = on_card(LLAMA_1B, "memory=offload", "seq_len=131072", gib=80)
    plan = predict(workload(config, runtime))
    (line,) = memory_lines(config, runtime)
    assert line.startswith("memory     offload: 16 of 16 layers keep ")
    assert line.endswith(
        f"; {plan.total / GIB:.1f} of 80.0 GiB and {plan.host / GIB:.1f} GiB of the host by prediction"
    )
    assert memory_lines(config, CPU)[0].endswith("compute the rest again")


def test_a_policy_that_was_named_stays(config: MakeConfig) -> None:
    mine = config("memory=selective", "memory.layers=0.5")
    assert resolve_memory(mine, CPU) is mine


def test_the_longest_row_is_the_last_that_fits(on_card: Callable[..., Any]) -> None:
    for settings in ([LLAMA_1B, "memory=full"], ["model=gpt2-124m"]):
        work = workload(*on_card(*settings))
        longest = longest_row(work, 100 * GIB)
        assert longest % 1024 == 0
        assert predict(one_row(work, longest)).total <= 100 * GIB < predict(one_row(work, longest + 1024)).total
    assert longest_row(work, GIB) == 0


# ---- refusals


def refused(config: TrainConfig, runtime: Runtime) -> str:
    with pytest.raises(ValueError, match="; use ") as error:
        check_capacity(config, runtime)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("gib", "settings", "advised"),
    [
        (139.8, ["seq_len=98304"], "memory=selective ("),
        (60, ["seq_len=131072"], "memory=full ("),
        (30, ["seq_len=8192", "batch_size=8"], "memory="),
        (21.5, ["seq_len=16384", "batch_size=8"], "batch_size="),
        (30, ["seq_len=1048576", "memory=full"], "seq_len="),
    ],
)
def test_what_will_not_fit_is_refused_with_what_does(
    on_card: Callable[..., Any], gib: float, settings: list[str], advised: str
) -> None:
    line = refused(*on_card(LLAMA_1B, *settings, gib=gib))
    assert re.search(rf"NVIDIA H200 has {gib:.1f} GiB of memory; use .*{re.escape(advised)}", line)
    assert NEEDS.search(line), "by which scripts.compare knows it"
    remedy = re.findall(r"[a-z_.]+=[\w.-]+", line.partition("; use ")[2].partition(", or check_memory")[0])
    changed = [setting for setting in settings if setting.split("=")[0] not in {word.split("=")[0] for word in remedy}]
    check_capacity(*on_card(LLAMA_1B, *changed, *remedy, gib=gib))


def test_before_rows_are_shortened_numbers_are(on_card: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "host_memory", lambda: 100 * GIB)  # for checkpoints, not for what layers keep
    long = ["model=llama-8b", "seq_len=131072", "memory=full", "check_memory=true"]
    for gib, words in ((139.8, ["precision=bf16-residual"]), (118, ["precision=bf16-residual", MOMENTS])):
        line = refused(*on_card(*long, gib=gib))
        remedy = re.findall(r"[a-z_.]+=[\w.-]+", line.partition("; use ")[2].partition(", or check_memory")[0])
        assert remedy[: len(words) + 1] == [*words, "memory=full"]
        check_capacity(*on_card(*long[:2], *remedy, gib=gib))
    slow = ["optimizer.betas=[0.9,0.99]"]
    assert MOMENTS not in refused(*on_card(*long, *slow, gib=118)), "bf16 would round away what a step adds"


def test_what_fits_is_never_refused_and_the_line_is_drawn_two_percent_above(on_card: Callable[..., Any]) -> None:
    needed = predict(workload(*on_card(LLAMA_1B))).total / GIB
    check_capacity(*on_card(LLAMA_1B, gib=needed / REFUSED_ABOVE * 1.0001))
    assert "memory=none needs" in refused(*on_card(LLAMA_1B, gib=needed / REFUSED_ABOVE * 0.9999))


def test_who_knows_better_is_not_asked(on_card: Callable[..., Any]) -> None:
    check_capacity(*on_card(LLAMA_1B, "seq_len=1048576", "check_memory=false"))


def test_where_nothing_fits_auto_is_refused_too(on_card: Callable[..., Any]) -> None:
    assert "seq_len=" in refused(*on_card(LLAMA_1B, "seq_len=1048576", "memory=auto", gib=30))


@pytest.mark.parametrize("setting", ["model.n_layers=100000000", "model.dim=1000000000000", "model.vocab_size=1e12"])
def test_a_model_that_no_machine_holds_is_refused_with_the_machines_memory(config: MakeConfig, setting: str) -> None:
    line = refused(config(setting), CPU)
    assert re.search(r"model\.dim=.* GiB; this machine has [\d.,]+ GiB of memory; use a smaller", line)


def test_on_a_cpu_the_line_is_drawn_at_the_bytes_of_the_state_and_of_what_checkpoints_are_copied_to(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrices = 32 * 64 + 32 * 32 + 3 * 32 * 64  # of the layer: of these Muon keeps one moment, not two
    parameters = 2 * 300 * 32 + matrices + 3 * 32  # embeddings and head, one layer, norms
    adamw, muon = 12 * parameters, 12 * parameters - 4 * matrices
    often, once = "checkpoint.every=1", "checkpoint.every=0"
    for needed, *words in (
        (4 * parameters + 2 * adamw, often),
        (4 * parameters + 2 * muon, often, "optimizer=muon"),
        (2 * adamw, once),  # by then the gradients are gone
    ):
        mine = config(*words, "max_steps=9", "seq_len=1", "batch_size=1")
        monkeypatch.setattr(capacity, "host_memory", lambda needed=needed: needed - 1)
        assert "alone take" in refused(mine, CPU)
        monkeypatch.setattr(capacity, "host_memory", lambda needed=needed: 2 * needed)
        check_capacity(mine, CPU)


def test_on_a_cpu_rows_are_refused_whose_layers_keep_more_than_there_is(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = config("seq_len=65536", "batch_size=2", "attention=sdpa", "data.document_mask=false")
    monkeypatch.setattr(capacity, "host_memory", lambda: 2**28)
    line = refused(long, CPU)
    assert "2 rows of 65,536 tokens" in line
    assert NEEDS.search(line)
    assert "this machine has 0.2 GiB" in line
    words = line.partition("; use ")[2].partition(" (")[0].split()
    assert not any("offload" in word for word in words), "there is no GPU"
    check_capacity(config("seq_len=65536", "attention=sdpa", "data.document_mask=false", *words), CPU)
    monkeypatch.setattr(capacity, "host_memory", lambda: 2**40)
    check_capacity(long, CPU)


def test_on_a_cpu_the_mask_of_documents_counts(config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number for each query and key, 64 GiB of a row of 256k, which no policy makes smaller."""
    monkeypatch.setattr(capacity, "host_memory", lambda: 60 * GIB)
    words = ["seq_len=262144", "batch_size=1", "attention=sdpa"]
    assert NEEDS.search(refused(config(*words), CPU))
    check_capacity(config(*words, "data.document_mask=false"), CPU)


def test_a_gpu_whose_driver_does_not_say_is_asked_nothing(config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "host_memory", lambda: None)
    check_capacity(config("model.dim=65536"), Runtime(Gpu("a card", (9, 0)), precision_named("bf16"), True))


def test_this_machine_has_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = host_memory()
    assert memory is not None
    assert memory > 2**28
    monkeypatch.setattr(machine, "supposed", CARDS["h200"])
    assert host_memory() is None, "nobody knows that of a machine that is not here"


def test_shards_take_their_share_and_what_is_gathered(on_card: Callable[..., Any]) -> None:
    one = workload(*on_card("model=llama-1b", "memory=full", "seq_len=16384", "batch_size=1"))
    eight = replace(one, shards=8)
    assert [8 * size for size in state_bytes(eight)] == pytest.approx(state_bytes(one), abs=8)
    whole, shared = predict(one), predict(eight)
    assert shared.weights + shared.optimizer < (whole.weights + whole.optimizer) / 7
    assert predict(replace(eight, reshards=False)).copies > shared.copies, "all layers are gathered, not two"
    on_host = predict(replace(eight, state_on_host=True))
    assert on_host.weights == on_host.optimizer == on_host.gradients == 0
    assert on_host.host == sum(state_bytes(eight))


@pytest.mark.parametrize("batch_size", [6, 7, 10])
def test_smaller_batches_of_several_ranks_make_up_the_same_step(
    on_card: Callable[..., Any], monkeypatch: Any, batch_size: int
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = ["model=tiny", "seq_len=256", f"batch_size={batch_size}"]
    config, _ = on_card(*words)
    sizes = capacity.smaller_batches(config)
    assert sizes[-1] == 1
    for size in sizes:
        smaller, _ = on_card(*words, f"batch_size={size}", f"tokens_per_step={config.plan.tokens_per_step}")
        assert smaller.plan.accumulation == batch_size // size


def test_moments_in_bf16_are_advised_where_they_are_possible(on_card: Callable[..., Any]) -> None:
    words = ["model=llama-1b", "seq_len=16384", "batch_size=1", "optimizer=muon"]
    for more, advised in ((["optimizer.momentum=0.95"], True), (["optimizer.momentum=0.99"], False)):
        config, runtime = on_card(*words, *more)
        typed = [word for change, _ in capacity.changes(config, workload(config, runtime)) for word in change]
        assert ("precision.moments=bfloat16" in typed) == advised


def test_a_model_that_fits_in_shards_alone_is_told_so(on_card: Callable[..., Any], monkeypatch: Any) -> None:
    words = ["model=llama-8b", "memory=full", "seq_len=16384", "batch_size=1", "optimizer=adamw"]
    with pytest.raises(ValueError, match=r"8.03e\+09 parameters, whose weights, gradients and optimizer alone take"):
        check_capacity(*on_card(*words, gib=80))
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(ValueError, match="use parallel=fsdp"):
        check_capacity(*on_card(*words, gib=80))
    check_capacity(*on_card(*words, "parallel=fsdp", gib=80))
    check_capacity(*on_card(*words, "parallel=fsdp", "parallel.offload=true", gib=80))
