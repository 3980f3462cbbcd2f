"""From what Hydra composed to a checked `TrainConfig`, or one line that says why not."""

from __future__ import annotations

import copy
import os
import pwd
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from data.config import StdlibData
from training.config import MuonConfig, Plan, TrainConfig, load_config
from training.config.names import OTHER_NAMES, dotted_keys
from training.schedule import WSDConfig

ROOT = Path(__file__).parents[2]
Composed = Callable[..., DictConfig]


_default: dict[str, Any] = {}


def changed(composed: Composed, key: str, value: Any) -> dict[str, Any]:
    """The default configuration with any key set to anything, as `+key=value` may."""
    if not _default:
        _default.update(OmegaConf.to_container(composed(), resolve=True))  # type: ignore[arg-type]
    raw = copy.deepcopy(_default)
    set_key(raw, key, value)
    return raw


def set_key(raw: dict[str, Any], key: str, value: Any) -> None:
    *groups, name = key.split(".")
    for group in groups:
        raw = raw.setdefault(group, {})
    raw[name] = value


def refusal(composed: DictConfig | dict[str, Any]) -> str:
    with pytest.raises(ValueError) as refused:  # noqa: PT011, what it says is for the caller to check
        load_config(composed)
    return str(refused.value)


def test_the_composed_configuration_becomes_dataclasses(composed: Composed) -> None:
    config = load_config(composed("optimizer=muon", "schedule=wsd", "seq_len=64", "tokenizer.vocab_size=300"))
    assert isinstance(config, TrainConfig)
    assert type(config.optimizer) is MuonConfig
    assert type(config.schedule) is WSDConfig
    assert type(config.data) is StdlibData
    assert (config.seq_len, config.tokenizer.vocab_size, config.model.rotary.theta) == (64, 300, 10000.0)


def test_a_plain_mapping_is_as_good(composed: Composed) -> None:
    raw = composed()
    plain = OmegaConf.to_container(raw, resolve=True)
    assert isinstance(plain, dict)
    assert load_config(plain) == load_config(raw)  # type: ignore[arg-type]


# ---- what a person gets wrong


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("sequence_len", "seq_len"),
        ("model.dims", "model.dim"),
        ("optimizer.beta", "optimizer.betas"),
        ("logger.wandb.projct", "logger.wandb.project"),
        ("theta", "model.rotary.theta"),
        ("lr", "learning_rate"),
        ("optimizer.wd", "optimizer.weight_decay"),
        # What other trainers call it.
        ("block_size", "seq_len"),
        ("max_length", "seq_len"),
        ("model.hidden_size", "model.dim"),
        ("n_embd", "model.dim"),
        ("model.num_hidden_layers", "model.n_layers"),
        ("dtype", "precision"),
        ("batch", "batch_size"),
        ("gradient_accumulation_steps", "tokens_per_step"),
        ("max_iters", "max_steps"),
        ("out_dir", "run_dir"),
        ("warmup_iters", "schedule.warmup_steps"),
        ("rope_theta", "model.rotary.theta"),
        ("save_steps", "checkpoint.every"),
        ("wandb_project", "logger.wandb.project"),
    ],
)
def test_an_unknown_key_is_refused_with_its_nearest_name(composed: Composed, key: str, near: str) -> None:
    assert refusal(changed(composed, key, 1)) == f"{key} is not a setting; did you mean {near}?"


def test_an_unknown_key_like_no_other_is_refused_with_the_way_to_see_all(composed: Composed) -> None:
    message = refusal(changed(composed, "zzzzzz", 1))
    assert message == "zzzzzz is not a setting; python train.py --cfg job shows every setting"


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("epochs", "use max_steps or max_tokens"),
        ("num_gpus", "torchrun --nproc-per-node"),
        ("model.dropout", "no model has dropout"),
    ],
)
def test_a_setting_that_has_no_counterpart_here_says_what_to_do_instead(
    composed: Composed, key: str, remedy: str
) -> None:
    message = refusal(changed(composed, key, 1))
    assert message.startswith(f"{key} is not a setting; ")
    assert remedy in message


def test_every_name_that_is_offered_is_a_setting(composed: Composed) -> None:
    with_paths = [*dotted_keys(composed()), *dotted_keys(composed("data=text", "tokenizer=file"))]
    assert set(OTHER_NAMES.values()) <= set(with_paths)
    assert not set(OTHER_NAMES) & {key for key in with_paths if "." not in key}, "ours are not theirs"


@pytest.mark.parametrize(
    ("key", "value"),
    [("seq_len", "abc"), ("model.dim", "1.5"), ("learning_rate", "fast"), ("data.document_mask", "maybe")],
)
def test_a_value_of_the_wrong_type_is_refused_by_name(composed: Composed, key: str, value: str) -> None:
    message = refusal(changed(composed, key, value))
    assert message.startswith(f"{key}: ")
    assert f"'{value}'" in message
    assert "\n" not in message


@pytest.mark.parametrize("key", ["seq_len", "model", "model.dim", "attention", "optimizer", "data", "schedule.name"])
def test_null_where_something_is_needed_is_refused_by_name(composed: Composed, key: str) -> None:
    assert key in refusal(changed(composed, key, None))


@pytest.mark.parametrize("group", ["attention", "data", "optimizer", "schedule", "model", "tokenizer", "logger"])
def test_a_missing_group_is_refused_by_name(composed: Composed, group: str) -> None:
    raw = changed(composed, "run_dir", "runs/x")
    del raw[group]
    assert group in refusal(raw)


@pytest.mark.parametrize("group", ["attention", "data", "optimizer", "schedule", "tokenizer"])
def test_an_unknown_choice_is_refused_by_name(composed: Composed, group: str) -> None:
    message = refusal(changed(composed, f"{group}.name", "nope"))
    assert f"{group}.name=nope is unknown" in message
    assert "use " in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seq_len", 0),
        ("batch_size", 0),
        ("log_every", 0),
        ("eval_tokens", 0),
        ("eval_every", -1),
        ("sample_every", -1),
        ("sample_tokens", -1),
        ("grad_clip", -0.5),
        ("grad_clip", float("nan")),
        ("z_loss", -1e-4),
        ("label_smoothing", 1.0),
        ("label_smoothing", float("nan")),
        ("seed", -1),
        ("max_steps", 0),
        ("max_tokens", 0),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("learning_rate", 10.0),
        ("device", "tpu"),
        ("precision.moments", "bf16"),
        ("precision.residual", "fp16"),
        ("precision.reduction", "int8"),
        ("compile", "maybe"),
        ("run_dir", ""),
        ("seed", 2**63),
        ("model.norm_eps", float("nan")),
        ("model.rotary.theta", float("inf")),
        ("optimizer.eps", float("inf")),
    ],
)
def test_an_impossible_value_is_refused_with_name_value_and_remedy(composed: Composed, key: str, value: Any) -> None:
    message = refusal(changed(composed, key, value))
    name, _, remedy = message.partition(" is not possible; ")
    assert name == f"{key}={value!r}" or name == f"{key}={value}"
    assert remedy


def test_more_tokens_at_once_than_an_index_counts_are_refused(composed: Composed) -> None:
    message = refusal(composed("seq_len=65536", "batch_size=32768"))
    assert message == "batch_size × seq_len=2147483648 is not possible; use less than 2³¹ tokens at once"
    load_config(composed("seq_len=65536", "batch_size=32767"))


@pytest.mark.parametrize(("asked", "nearest"), [(100, 128), (90, 64), (97, 128), (1, 64), (63, 64), (6401, 6400)])
def test_tokens_per_step_must_be_a_multiple_and_the_nearest_is_named(
    composed: Composed, asked: int, nearest: int
) -> None:
    message = refusal(composed("seq_len=32", "batch_size=2", f"tokens_per_step={asked}"))
    assert f"tokens_per_step={asked} is not a multiple of batch_size × seq_len = 64; use {nearest}," in message
    load_config(composed("seq_len=32", "batch_size=2", f"tokens_per_step={nearest}"))


def test_rows_longer_than_the_learned_positions_are_refused(composed: Composed) -> None:
    message = refusal(composed("model=gpt2-124m", "seq_len=2048", "model.n_positions=1024"))
    assert "seq_len=2048" in message
    assert "1024 learned positions" in message
    load_config(composed("model=gpt2-124m", "seq_len=1024", "model.n_positions=1024"))


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(composed: Composed) -> None:
    message = refusal(composed("model.vocab_size=300", "tokenizer.vocab_size=301"))
    assert "tokenizer.vocab_size=301" in message
    assert "model.vocab_size=300" in message
    load_config(composed("model.vocab_size=301", "tokenizer.vocab_size=300"))


# ---- numbers and paths as people write them


@pytest.mark.parametrize(
    ("key", "written", "meant"),
    [
        ("max_tokens", "1e6", 1_000_000),
        ("max_tokens", 1e6, 1_000_000),
        ("max_tokens", "2B", 2_000_000_000),
        ("max_tokens", "1_000k", 1_000_000),
        ("max_tokens", "1.5M", 1_500_000),
        ("seq_len", "16k", 16_384),
        ("seq_len", "1e3", 1_000),
        ("eval_tokens", "16k", 16_000),
        ("max_steps", 2e3, 2_000),
        ("model.window", "1k", 1_024),
        ("schedule.warmup_tokens", "10k", 10_000),
        ("checkpoint.every", "1e2", 100),
    ],
)
def test_whole_numbers_may_be_written_with_an_exponent_or_a_unit(
    composed: Composed, key: str, written: object, meant: int
) -> None:
    config: Any = load_config(changed(composed, key, written))
    for name in key.split("."):
        config = getattr(config, name)
    assert config == meant
    assert type(config) is int


def test_what_is_computed_from_a_number_sees_it_read(composed: Composed) -> None:
    config = load_config(composed("seq_len=1k"))
    assert (config.seq_len, config.batch_size) == (1024, 2)
    assert config.run_dir.endswith("_1024")


@pytest.mark.parametrize("written", ["1.5", "1e-3", "16kk", "k", "_", "1e999999999", "nan", "1k0"])
def test_what_is_no_whole_number_is_refused(composed: Composed, written: str) -> None:
    assert refusal(changed(composed, "max_tokens", written)).startswith("max_tokens")


@pytest.mark.parametrize("name", ["run_dir", "resume", "init_from"])
def test_home_and_variables_are_read_wherever_a_path_comes_from(
    composed: Composed, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    for written, meant in (("~/x", "/home/me/x"), ("$SCRATCH/x", "/scratch/x"), ("a/$SCRATCH", "a//scratch")):
        assert getattr(load_config(changed(composed, name, written)), name) == meant
    assert "is $SCRATCH, without braces" in refusal(changed(composed, name, "${SCRATCH}/x"))


def test_a_home_that_is_not_in_the_environment_is_known(composed: Composed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    assert load_config(changed(composed, "run_dir", "~/x")).run_dir == f"{pwd.getpwuid(os.getuid()).pw_dir}/x"


@pytest.mark.parametrize("written", ["$NOT_SET_ANYWHERE/x", "~nobody-of-this-name/x"])
def test_a_path_that_leads_nowhere_is_refused(composed: Composed, written: str) -> None:
    message = refusal(changed(composed, "run_dir", written))
    assert f"run_dir={written}" in message
    assert "write the path out" in message


def test_a_name_that_is_no_text_is_refused(composed: Composed) -> None:
    assert r"run_dir='a\udcff' is not possible; use a name that is UTF-8" in refusal(
        changed(composed, "run_dir", "a\udcff")
    )


# ---- settings that exclude each other, or mean nothing


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model.rotary": 10000}, ["model.rotary=10000 is not possible", "or use model.rotary.theta=10000"]),
        ({"model.name": ""}, ["model.name=''", "leave it out"]),
        ({"logger.wandb.project": ""}, ["logger.wandb.project is empty"]),
        ({"resume": "x", "init_from": "y"}, ["resume=x", "init_from=y", "leave out one"]),
        ({"schedule.warmup_steps": 5, "schedule.warmup_tokens": 10}, ["warmup_steps=5", "warmup_tokens=10", "null"]),
        ({"schedule.warmup_steps": 50, "max_steps": 10}, ["warmup_steps=50", "run of 10", "warmup_steps=null"]),
        ({"optimized_metric": "loss"}, ["optimized_metric=loss", "use val/loss"]),
    ],
)
def test_what_was_accepted_in_silence_is_refused(composed: Composed, changes: dict[str, Any], said: list[str]) -> None:
    raw = changed(composed, "seed", 0)
    for key, value in changes.items():
        set_key(raw, key, value)
    message = refusal(raw)
    for words in said:
        assert words in message


@pytest.mark.parametrize("key", ["model", "optimizer", "seq_len"])
def test_what_was_taken_away_is_named_before_what_is_computed_from_it(composed: Composed, key: str) -> None:
    raw = composed()
    OmegaConf.set_struct(raw, False)
    del raw[key]
    assert refusal(raw).startswith(f"{key} is not set; leave out ~{key}, or ")


# ---- secrets

WANDB_KEY = "wandb_v1_" + "aB3_" * 19
HF_TOKEN, HEX = "hf_" + "aB3" * 10, "0123456789abcdef" * 2 + "01234567"
FORMS = [HF_TOKEN, WANDB_KEY, f"local-{HEX}", "hf_oauth_" + "aB3." * 10, "ghp_" + "aB3" * 12, "sk-proj-" + "aB3" * 9]


@pytest.mark.parametrize(
    "key",
    [
        "api_key",
        "logger.wandb.api_key",
        "password",
        "db_passwd",
        "secret",
        "hf_token",
        "token",
        "credentials",
    ],
)
def test_a_key_named_like_a_secret_is_refused_and_its_value_never_shown(composed: Composed, key: str) -> None:
    message = refusal(changed(composed, key, "open-sesame"))
    assert key in message
    assert "use the environment instead" in message
    assert "sesame" not in message


@pytest.mark.parametrize(
    ("value", "secret"),
    [
        ("https://me:open-sesame@example.org/x", "sesame"),
        (HF_TOKEN, HF_TOKEN),
        (f"https://{HF_TOKEN}@huggingface.co/x", HF_TOKEN),
        (WANDB_KEY, WANDB_KEY),
        ([HF_TOKEN], HF_TOKEN),
        (["fine", {"deep": HF_TOKEN}], HF_TOKEN),
        ("${oc.env:A_SECRET}", HEX),
    ],
)
@pytest.mark.parametrize("key", ["sample_prompt", "logger.wandb.tags"])
def test_a_value_that_looks_like_a_secret_is_refused_and_never_shown(
    composed: Composed, monkeypatch: pytest.MonkeyPatch, key: str, value: Any, secret: str
) -> None:
    monkeypatch.setenv("A_SECRET", HEX)
    message = refusal(changed(composed, key, value))
    assert key in message
    assert "looks like a secret" in message
    assert secret not in message


@pytest.mark.parametrize("secret", FORMS)
@pytest.mark.parametrize("key", ["sample_prompt", "logger.wandb.notes", "logger.wandb.tags", "data.cache_dir"])
def test_a_secret_inside_a_longer_text_is_refused_and_never_shown(composed: Composed, key: str, secret: str) -> None:
    text: Any = f"log in with {secret}, then go on"
    message = refusal(changed(composed, key, [text] if key.endswith("tags") else text))
    assert key in message
    assert "looks like a secret" in message
    assert secret[:12] not in message


@pytest.mark.parametrize("variable", ["WANDB_API_KEY", "HF_TOKEN", "MY_CLUSTERS_PASSWORD"])
def test_the_value_of_a_variable_that_holds_a_secret_is_refused_wherever_it_stands(
    composed: Composed, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, HEX)
    assert "looks like a secret" in refusal(changed(composed, "logger.wandb.notes", f"key {HEX}"))
    monkeypatch.delenv(variable)
    load_config(changed(composed, "logger.wandb.notes", f"key {HEX}"))


def test_a_commit_is_no_secret(composed: Composed) -> None:
    config = load_config(changed(composed, "logger.wandb.tags", [HEX, "0123abc", f"at {HEX}"]))
    assert config.logger.wandb.tags == [HEX, "0123abc", f"at {HEX}"]


@pytest.mark.parametrize("value", ["def ", "https://example.org/a:b", "tokens", "hf_short", "0123abcd", None, ""])
def test_an_innocent_value_is_no_secret(composed: Composed, value: str | None) -> None:
    assert load_config(changed(composed, "logger.wandb.notes", value)).logger.wandb.notes == value


def test_a_revision_may_be_a_commit(composed: Composed) -> None:
    config = load_config(composed("data=hf", "data.path=me/mine", f"data.revision={HEX}"))
    assert config.data.revision == HEX  # type: ignore[attr-defined]


def test_the_name_of_a_model_leads_to_no_other_folder(composed: Composed) -> None:
    assert "model.name=../../x is not possible" in refusal(composed("model.name=../../x"))


# ---- arithmetic


def test_steps_and_accumulation_by_hand(composed: Composed) -> None:
    rows = ["seq_len=32", "batch_size=2", "max_tokens=1000"]
    config = load_config(composed(*rows))
    assert config.plan == Plan(max_steps=16, tokens_per_step=64, accumulation=1)  # 15.6 steps
    config = load_config(composed(*rows, "tokens_per_step=256"))
    assert config.plan == Plan(max_steps=4, tokens_per_step=256, accumulation=4)  # 3.9 steps
    config = load_config(composed(*rows, "max_tokens=1024", "tokens_per_step=256"))
    assert config.plan.max_steps == 4


def test_max_steps_wins_over_max_tokens(composed: Composed) -> None:
    assert load_config(composed("max_tokens=1", "max_steps=7")).plan.max_steps == 7
    assert load_config(composed("max_tokens=1_000_000_000", "max_steps=7")).plan.max_steps == 7


# ---- the whole


def test_train_yaml_and_train_config_have_the_same_fields() -> None:
    written = OmegaConf.to_container(OmegaConf.load(ROOT / "configs/train.yaml"), resolve=False)
    assert isinstance(written, dict)
    groups = {name for choice in written.pop("defaults") if choice != "_self_" for name in choice}
    chosen = {group for group in groups if not group.startswith("override ")} - {"experiment"}
    assert {*written, *chosen} - {"hydra"} == {field.name for field in fields(TrainConfig)}


def test_a_loaded_configuration_loads_again_as_itself(composed: Composed) -> None:
    config = load_config(composed("model=gpt2-124m", "seq_len=64", "attention=sdpa"))
    assert load_config(OmegaConf.to_container(OmegaConf.structured(config))) == config  # type: ignore[arg-type]


def test_the_configuration_is_checked_without_torch() -> None:
    # torch costs seconds; a mistyped command must not wait for it.
    code = "import sys, training.config, training.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


KEYS = ["seq_len", "batch_size", "tokens_per_step", "max_steps", "max_tokens", "learning_rate", "seed", "compile"]
KEYS += ["model", "model.dim", "model.n_heads", "model.n_kv_heads", "model.head_dim", "model.window", "model.rotary"]
KEYS += ["attention", "attention.name", "data", "data.val_fraction", "data.name", "tokenizer.vocab_size", "optimizer"]
KEYS += ["optimizer.name", "optimizer.betas", "schedule", "schedule.warmup_tokens", "schedule.name", "logger"]
KEYS += ["logger.wandb", "logger.wandb.tags", "logger.wandb.init_timeout", "run_dir", "device", "new", "new.deep"]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-3, 3)
    | st.floats()
    | st.text("ab1.:?${} ", max_size=8)
    | st.binary()
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "a"]), inner, max_size=2),
    max_leaves=4,
)


@given(changes=st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3))
@example(changes={"attention": None})
@example(changes={"optimizer": "adamw"})
@example(changes={"schedule": [1]})
@example(changes={"data.name": {"a": 1}})
@example(changes={"tokens_per_step": 10**400})
@example(changes={"run_dir": "${nowhere}"})
@example(changes={"attention.name": "???"})
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_the_values_nothing_but_a_value_error_of_one_line_comes_out(
    composed: Composed, changes: dict[str, Any]
) -> None:
    raw = changed(composed, "seed", 0)
    try:
        for key, value in changes.items():
            set_key(raw, key, value)
    except (AttributeError, TypeError):
        return  # schedule=3 and schedule.name=x, which cannot both be
    message = ""
    try:
        load_config(raw)
    except ValueError as error:
        message = str(error)
    assert "\n" not in message
