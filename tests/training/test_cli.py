"""The command's words before Hydra reads them, and what Hydra says of them afterwards."""

from __future__ import annotations

import json
import os
import pwd
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import train
from training import cli, jobs, mistakes
from training.config import Plan, load_config
from training.facts import epochs
from training.loggers import tensorboard

Composed = Callable[..., DictConfig]


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("--cfg job seed=3", "seed=3 --cfg job"),
        ("data=text --cfg job seed=3 --resolve", "data=text seed=3 --cfg job --resolve"),
        ("a=1 -m b=2,3", "a=1 b=2,3 -m"),
        ("-cn other a=1 -cd dir b=2", "a=1 b=2 -cn other -cd dir"),
        ("--config-name=other ~model", "~model --config-name=other"),
    ],
)
def test_settings_may_stand_on_both_sides_of_a_flag(typed: str, read: str) -> None:
    assert cli.settings_first(typed.split()) == read.split()


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("run_dir=~/x", "run_dir=/home/me/x"),
        ("data.path=[~/a,~/b]", "data.path=[/home/me/a,/home/me/b]"),
        ("run_dir='~/x'", "run_dir='~/x'"),
        ("run_dir=läufe/日本", "run_dir='läufe/日本'"),
        ('run_dir="läufe"', 'run_dir="läufe"'),
        ("a=b~c", "a=b~c"),
    ],
)
def test_words_are_made_what_hydras_grammar_takes(monkeypatch: pytest.MonkeyPatch, typed: str, read: str) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert cli._for_hydra(typed) == read


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("hydra/launcher=joblib", "hydra/launcher=joblib is not installed: pip install hydra-joblib-launcher"),
        ("hydra/sweeper=optuna", "hydra/sweeper=optuna is not installed: pip install hydra-optuna-sweeper"),
        ("hydra/launcher=mine", "hydra/launcher=mine is unknown; use basic, or a plug-in of Hydra: joblib"),
        ("~nothing", "~nothing takes away what is not there"),
        ("attention=flsh", "did you mean flash?"),
        ("model='${x}'", "model='${x}' is not possible; use gpt2-1.5b"),
        ("hidden_size=64", "hidden_size is not a setting; did you mean model.dim?"),
        ("/dev/null", "/dev/null is no setting; run_dir=/dev/null goes on with a run"),
        ("run_dir=a=b", "cannot read run_dir=a=b: mismatched input"),
        ("epochs=3", "epochs is not a setting; use max_steps or max_tokens"),
        ("data.block_size=3", "data.block_size is not a setting; did you mean seq_len?"),
    ],
)
def test_what_hydra_says_in_pages_is_one_line(
    composes_for_cpu: None, monkeypatch: pytest.MonkeyPatch, word: str, said: str
) -> None:
    with initialize_config_dir(str(cli.CONFIGS), version_base="1.3"), pytest.raises(Exception) as refused:  # noqa: PT011
        compose("train", [word])
    line = mistakes.explain(refused.value, [word])
    assert said in line
    assert "\n" not in line


def test_a_plug_in_that_is_named_can_be_installed() -> None:
    assert all(package.startswith("hydra-") for group in mistakes.PLUGINS.values() for package in group.values())


def test_overfit_reads_our_own_files_from_any_folder(composed: Composed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    config = load_config(composed("experiment=overfit"))
    assert (Path(config.data.path) / "gpt.py").exists()  # type: ignore[attr-defined]


def test_settings_of_a_choice_that_a_run_has_need_no_choice_beside_them(
    composes_for_cpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, schedule = {"name": "text", "path": "a", "val_fraction": 0.3}, {"name": "wsd", "decay_fraction": 0.1}
    (tmp_path / "config.yaml").write_text(json.dumps({"data": data, "schedule": schedule}))
    for first in (f"run_dir={tmp_path}", f"resume='{tmp_path}'"):
        words = [first, "data.path=b", "seq_len=64", "schedule.decay_fraction=0.3"]
        changed = cli.with_saved_options(words)
        assert changed == [first, "++data.path=b", "seq_len=64", "++schedule.decay_fraction=0.3"]
        monkeypatch.setattr(jobs, "typed", lambda changed=changed: changed)
        with initialize_config_dir(str(cli.CONFIGS), version_base="1.3"):
            goes_on = jobs.settings_of_job(compose("train", changed))
        assert goes_on.data == data | {"path": "b"}
        assert goes_on.schedule == schedule | {"decay_fraction": 0.3}
    there = f"run_dir={tmp_path}"
    for words in (["data.path=b"], [there, "data=text", "data.path=b"], [there, "data.typo=1"], ["run_dir=none/a"]):
        assert cli.with_saved_options(words) == words


@pytest.mark.parametrize("first", ["max_steps=7", "experiment=overfit"])  # which has a max_steps
def test_two_lengths_of_one_run_are_refused(composed: Composed, monkeypatch: pytest.MonkeyPatch, first: str) -> None:
    monkeypatch.setattr(jobs, "typed", lambda: [first, "max_tokens=1M"])
    with pytest.raises(ValueError, match=r"max_steps=\d+ and max_tokens=1M are two lengths .* leave out max_tokens"):
        jobs.settings_of_job(composed(*jobs.typed()))


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        (["max_steps=null", "max_tokens=1M"], None),
        (["experiment=recall", "max_steps=7"], 7),  # whose max_tokens is a default
        (["experiment=overfit", "max_tokens=1M", "max_steps=null"], None),
    ],
)
def test_one_length_may_be_typed_over_another(
    composed: Composed, monkeypatch: pytest.MonkeyPatch, words: list[str], steps: int | None
) -> None:
    monkeypatch.setattr(jobs, "typed", lambda: words)
    assert jobs.settings_of_job(composed(*words)).max_steps == steps


@pytest.mark.parametrize(("variable", "project"), [(None, "flash-gpt"), ("theirs", "theirs")])
def test_wandb_project_counts(
    composed: Composed, monkeypatch: pytest.MonkeyPatch, variable: str | None, project: str
) -> None:
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    if variable:
        monkeypatch.setenv("WANDB_PROJECT", variable)
    assert load_config(composed("logger=wandb")).logger.wandb.project == project
    typed = OmegaConf.merge(composed("logger=wandb"), {"logger": {"wandb": {"project": "typed"}}})
    assert load_config(typed).logger.wandb.project == "typed"


def test_the_plans_line_says_how_often_the_text_is_read() -> None:
    plan = Plan(max_steps=100, tokens_per_step=50, accumulation=1)
    assert epochs(plan, {"train": {"tokens": 10_000}}) == ", 0.50 epochs of the text"
    assert epochs(plan, {"train": {"tokens": 100}}) == ", 50 epochs of the text"
    assert epochs(plan, {"prepared": False}) == ""


def test_without_home_the_user_database_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    cli.set_home()
    assert os.environ["HOME"] == pwd.getpwuid(os.getuid()).pw_dir
    monkeypatch.setenv("HOME", "/home/me")
    cli.set_home()
    assert os.environ["HOME"] == "/home/me"


def test_a_missing_package_is_refused_before_any_text_is_read(
    composed: Composed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorboard, "find_spec", lambda name: None)
    config = load_config(composed("logger=tensorboard", "run_dir=nowhere/x", "device=cpu"))
    with pytest.raises(ValueError, match=r"pip install tensorboard, or logger\.tensorboard=false"):
        train.check(config)


ODD = {
    "seq_len={a:1}": "seq_len",
    "model=[]": "model=[]",
    "+model.deep.er=1": "model.deep",
    "optimizer.betas=3": "optimizer.betas",
    "=": "names nothing; write key=value",
    "~": "names nothing; write key=value",
    "+=1": "names nothing; write key=value",
    "seed": "'seed'",
    "seed=???": "seed is not set",
    "seed=[": "write key=value",
    "seed='": "write key=value",
    "seed=${": "write key=value",
    "seed=@a": "use a whole number",
    "hydra.mode=x": "hydra.mode=x is not possible",
    "hydra/x=y": "hydra/x",
    "logger.wandb=3": "use logger.wandb.mode=…",
    "checkpoint=null": "checkpoint=None is not possible: settings stand in it; leave it out",
    "model.rotary.theta.x=1": "did you mean model.rotary.theta?",
    "++seed.x=1": "seed",
}


@pytest.mark.parametrize(("word", "said"), ODD.items())
def test_an_odd_word_is_refused_in_one_line(
    composes_for_cpu: None, monkeypatch: pytest.MonkeyPatch, word: str, said: str
) -> None:
    def read() -> None:
        mistakes.refuse_lists([word])
        with initialize_config_dir(str(cli.CONFIGS), version_base="1.3"):
            load_config(compose("train", [word]))

    with pytest.raises((HydraException, OmegaConfBaseException, ValueError)) as refused:
        read()
    line = mistakes.explain(refused.value, [word])
    assert said in line
    assert "\n" not in line
