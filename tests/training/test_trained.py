"""A trained model is loaded and continues prompts: `training.trained`, and the command scripts.generate."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.convert import main as convert
from scripts.generate import main
from training.checkpoint import folder as checkpoints
from training.config import TrainConfig
from training.trained import load_model
from training.trainer import Trainer

MakeConfig = Callable[..., TrainConfig]
PROMPT = "line 3 of"


def silently(line: str) -> None:
    """Instead of print."""


@pytest.fixture
def trained(config: MakeConfig) -> Trainer:
    """A run that has learnt a little."""
    trainer = Trainer(config("max_steps=8", "checkpoint.every=4", "learning_rate=1e-2", "sample_tokens=16"), silently)
    trainer.fit()
    return trainer


def generate(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


# ---- loading


@torch.no_grad()
def test_a_loaded_model_computes_what_the_trained_one_does(trained: Trainer) -> None:
    lines: list[str] = []
    folder, tokens = trained.run.folder, torch.randint(300, (2, 20))
    expected = trained.run.model(tokens)
    for path in (folder, checkpoints.path_of(folder, 8)):
        model, tokenizer = load_model(str(path), attention="math", device="cpu", notify=lines.append)
        torch.testing.assert_close(model(tokens), expected)
        assert tokenizer.encode(PROMPT) == trained.run.batches.corpus.tokenizer.encode(PROMPT)
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all("step-00000008 (step 8)" in line for line in lines)
    early, _ = load_model(str(checkpoints.path_of(folder, 4)), device="cpu")
    assert not torch.allclose(early(tokens), expected)


@pytest.mark.parametrize("family", ["gpt2-124m", "tiny"])
def test_a_tied_model_loads_and_bf16_is_what_autocast_makes_of_it(config: MakeConfig, family: str) -> None:
    size = [f"model={family}", "model.tie_head=true", "model.n_kv_heads=2"]
    trainer = Trainer(config(*size, "max_steps=2", "precision=bf16"), silently)
    trainer.fit()
    tokens = torch.randint(300, (2, 20))
    model, _ = load_model(str(trainer.run.folder), attention="math", device="cpu", precision="bf16")
    assert model.head.weight.dtype == model.blocks[0].mlp.down.weight.dtype == torch.bfloat16
    assert model.embedding.weight.dtype == torch.float32
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(tokens), trainer.run.model(tokens, attention=model.attention))


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(trained: Trainer) -> None:
    file = checkpoints.path_of(trained.run.folder, 8) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
    lines: list[str] = []
    load_model(str(trained.run.folder), device="cpu", notify=lines.append)
    assert "step-00000008 is damaged and not used: model.safetensors has changed" in lines[0]
    assert "step-00000004 (step 4)" in lines[1]
    with pytest.raises(ValueError, match="is damaged"):
        load_model(str(file.parent), device="cpu")


def test_a_run_whose_checkpoints_are_gone_has_its_weights(trained: Trainer) -> None:
    shutil.rmtree(trained.run.folder / "checkpoints")
    lines: list[str] = []
    load_model(str(trained.run.folder), device="cpu", notify=lines.append)
    assert f"{trained.run.folder / 'model.safetensors'}: tiny" in lines[0]


@torch.no_grad()
def test_a_folder_of_transformers_loads_and_is_continued(
    trained: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, tokens = tmp_path / "out", torch.randint(300, (2, 20))
    assert convert(["to-hf", str(trained.run.folder), str(out), "--shard-size", "1e-5"]) == 0
    model, tokenizer = load_model(str(out), attention="math", device="cpu")
    torch.testing.assert_close(model(tokens), trained.run.model(tokens))
    assert tokenizer.separator_id == trained.run.batches.corpus.tokenizer.separator_id
    assert model.attention.spec.seq_len == 32
    texts = []
    for path in (trained.run.folder, out):
        capsys.readouterr()
        assert generate(path, PROMPT, "--device", "cpu", "--max-tokens", 12) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    (out / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"out has no tokenizer\.json"):
        load_model(str(out), device="cpu")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"path": "nowhere"}, "nowhere is no folder"),
        ({"path": "."}, "holds no trained model"),
        ({"attention": "flsh"}, "attention=flsh is unknown"),
        ({"device": "gpu"}, "device=gpu is unknown; use auto, cuda, cpu"),
        ({"precision": "fp8"}, "precision=fp8 is unknown"),
        ({"device": "cpu", "precision": "tf32"}, "precision=tf32 needs an NVIDIA GPU"),
    ],
)
def test_what_cannot_be_loaded_is_refused_in_one_line(
    trained: Trainer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(ValueError, match=said) as refused:
        load_model(**{"path": str(trained.run.folder), **options})
    assert "\n" not in str(refused.value)


def test_another_versions_model_is_refused(trained: Trainer, tmp_path: Path) -> None:
    shutil.copytree(trained.run.folder, copy := tmp_path / "copy")
    shutil.rmtree(copy / "checkpoints")
    settings = copy / "config.yaml"
    settings.write_text(settings.read_text().replace("n_layers:", "depth:"))
    with pytest.raises(ValueError, match=r"no model that this version knows: .*depth"):
        load_model(str(copy), device="cpu")


# ---- the command


def test_a_prompt_is_continued_on_standard_output_as_in_the_runs_own_samples(
    trained: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(trained.run.folder, "--device=cpu", "--max-tokens=16", "def", "--attention=math") == 0
    out, err = capsys.readouterr()
    assert out.strip("\n") in (trained.run.folder / "samples.md").read_text()
    assert err.startswith("model  ")
    assert "attention  plain PyTorch" in err


def test_json_lines_have_every_prompt_in_batches(trained: Trainer, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "prompts.txt").write_text("line\n\n  apples\n")
    arguments = ["--device=cpu", "--json", "--max-tokens=6", "--prompts", tmp_path / "prompts.txt", "--batch-size=2"]
    assert generate(trained.run.folder, PROMPT, *arguments, "--tokens-per-second") == 0
    out, err = capsys.readouterr()
    results = [json.loads(line) for line in out.splitlines()]
    assert {result["prompt"] for result in results} == {PROMPT, "line", "  apples"}
    assert all(result["tokens"] <= 6 and result["finish"] in ("stop", "length") for result in results)
    assert err.count("tokens/s") == 2


def test_a_stop_string_ends_the_text_and_the_seed_decides_it(trained: Trainer, capsys: Any) -> None:
    def text(*arguments: str) -> str:
        assert generate(trained.run.folder, PROMPT, "--device=cpu", "--json", *arguments) == 0
        return str(json.loads(capsys.readouterr().out)["text"])

    whole = text("--seed=3")
    assert text("--seed=3") == whole != text("--seed=4")
    assert text("--seed=3", "--stop=nowhere", f"--stop={whole[5:8]}") == whole[: whole.index(whole[5:8])]


def test_standard_input_is_the_prompt_where_none_is_given(
    trained: Trainer, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("line 1\nline 2"))
    assert generate(trained.run.folder, "--device=cpu", "--max-tokens=2") == 0
    assert capsys.readouterr().out.startswith("line 1\nline 2")
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert generate(trained.run.folder, "--device=cpu") == 2
    assert "no prompt" in capsys.readouterr().err


def test_at_a_terminal_prompts_are_asked_for(trained: Trainer, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    asked = ["line", "apples " * 2000, "of"]

    def answer(question: str) -> str:
        if not asked:
            raise EOFError
        return asked.pop(0)

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", answer)
    assert generate(trained.run.folder, "--device=cpu", "--max-tokens=2") == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0].startswith("line")
    assert "\nof" in out
    assert err.count("\nnote ") == 1, "rows longer than those of training are possible, and said"


def test_nothing_that_a_terminal_would_obey_is_printed(trained: Trainer, capsys: Any) -> None:
    assert generate(trained.run.folder, "a\x1b[2Jb", "--device=cpu", "--max-tokens=1") == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert out.startswith("a\\x1b[2Jb")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--temperature=-1"], "--temperature -1.0: use 0"),
        (["--top-p=0"], "--top-p 0.0"),
        (["--stop="], '--stop "" would end every text at its beginning'),
        (["x\udce9"], r"a prompt is not UTF-8, near 'x\udce9'"),
        (
            ["--prompts=nowhere.txt"],
            "nowhere.txt cannot be read: No such file or directory; name a text file",
        ),
        (["--device=cuda", "--attention=math"], "sees no CUDA GPU"),
        (["--attention=flsh"], "--attention flsh is unknown"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(trained: Trainer, capsys: Any, arguments: list[str], said: str) -> None:
    if "--device=cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is one")
    assert generate(trained.run.folder, PROMPT, *arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert said in err


@pytest.mark.parametrize(("tokens", "shown"), [("9999999999999", "10,000,000,"), ("9e18", "9,000,000,")])
def test_a_cache_that_does_not_fit_is_refused(trained: Trainer, capsys: Any, tokens: str, shown: str) -> None:
    assert generate(trained.run.folder, PROMPT, "--device=cpu", f"--max-tokens={tokens}") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: a cache of 1 × {shown}")
    assert error.endswith("tokens does not fit into memory; use a smaller --max-tokens")


@pytest.mark.parametrize(
    "arguments", [[], ["run", "--nope"], *(["run", word] for word in ("--seed=x", "--seed=1e19", "--max-tokens=0"))]
)
def test_arguments_that_are_none_are_one_line_too(capsys: Any, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_learned_positions_end(config: MakeConfig, capsys: Any) -> None:
    trainer = Trainer(config("model=gpt2-124m", "model.n_kv_heads=2", "max_steps=1"), silently)
    trainer.fit()
    capsys.readouterr()
    assert generate(trainer.run.folder, PROMPT, PROMPT * 9, "--device=cpu") == 2
    out, err = capsys.readouterr()
    assert out == "", "no prompt is continued before all are known to fit"
    assert f'the prompt "{PROMPT}' in err
    assert "fill the model's 32 learned positions; shorten it" in err
    assert generate(trainer.run.folder, PROMPT, PROMPT + PROMPT, "--device=cpu", "--temperature=0", "--json") == 0
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [result["finish"] for result in results] == ["length"] * 2
    assert results[0]["tokens"] > results[1]["tokens"], "each to the end of its own positions"
