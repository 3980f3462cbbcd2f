"""scripts.convert: a run as transformers reads it, and a model of transformers as a run begins with it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from processes import LIMIT_S, ROOT, run_unread
from safetensors.torch import load_file

from scripts import convert
from scripts.convert import main
from scripts.settings import train_config
from training.config import TrainConfig
from training.loggers import read_metrics
from training.trainer import Trainer

MakeConfig = Callable[..., TrainConfig]
QWEN = ["model.qk_norm=true", "model.tie_head=true", "model.head_dim=24", "model.rotary.theta=500"]


def fit(config: TrainConfig) -> Path:
    Trainer(config, lambda line: None).fit()
    return Path(config.run_dir)


def val_losses(run: Path) -> list[float]:
    return [record["val/loss"] for record in read_metrics(run / "metrics.jsonl") if "val/loss" in record]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


USED_BY_TRANSFORMERS = """
import json
import torch, transformers
from safetensors.torch import save_file

tokenizer = transformers.AutoTokenizer.from_pretrained("out")
model = transformers.AutoModelForCausalLM.from_pretrained("out", dtype="float32")
ids = tokenizer("line 3 of file 7 holds <|endoftext|> apples", return_tensors="pt").input_ids
with torch.no_grad():
    logits = model(ids).logits
said = model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
facts = {"ids": ids[0].tolist(), "text": tokenizer.decode(ids[0]), "said": said[0].tolist()}
facts |= {"eos": tokenizer.eos_token_id, "length": tokenizer.model_max_length}
json.dump(facts, open("facts.json", "w"))
save_file({"logits": logits}, "logits.safetensors")
model.save_pretrained("saved", max_shard_size="20KB")
tokenizer.save_pretrained("saved")
"""


def test_a_run_goes_to_transformers_and_comes_back(
    config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    trainer = Trainer(config(*QWEN, "learning_rate=0.05"), lambda line: None)
    trainer.fit()
    run = trainer.run.folder
    assert main(["to-hf", str(run), str(tmp_path / "out")]) == 0
    assert "Qwen3ForCausalLM, 0.0 M parameters in float32" in capsys.readouterr().out

    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", "-c", USED_BY_TRANSFORMERS]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr[-3000:]
    facts = json.loads((tmp_path / "facts.json").read_text())
    tokenizer = trainer.run.batches.corpus.tokenizer
    before, after = "line 3 of file 7 holds ", " apples"
    assert facts["ids"] == [*tokenizer.encode(before), tokenizer.separator_id, *tokenizer.encode(after)]
    assert facts["text"] == f"{before}<|endoftext|>{after}"
    assert len(facts["said"]) in (len(facts["ids"]) + 1, len(facts["ids"]) + 2)
    assert (facts["eos"], facts["length"]) == (tokenizer.separator_id, 32)
    with torch.no_grad():
        logits = trainer.run.model(torch.tensor([facts["ids"]]))
    assert (logits - load_file(tmp_path / "logits.safetensors")["logits"]).abs().max() < 1e-4 * logits.std()

    assert (tmp_path / "saved" / "model.safetensors.index.json").is_file()
    back = tmp_path / "back"
    assert main(["from-hf", str(tmp_path / "saved"), str(back)]) == 0
    told = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert told[:3] == ["python", "train.py", f"init_from={back}"]
    trained, found = load_file(run / "model.safetensors"), load_file(back / "model.safetensors")
    assert found.keys() == trained.keys()
    assert all(torch.equal(found[name], trained[name]) for name in found)

    odd = tmp_path / "it's a=b, c"
    assert main(["from-hf", str(tmp_path / "saved"), str(odd)]) == 0
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])[2:]
    read = train_config(words)
    assert (read.init_from, read.model.name) == (str(odd), odd.name)

    for number, source in enumerate((back, tmp_path / "saved")):
        typed = [word for word in told[3:] if not word.startswith("model=")]
        new = config(
            *typed, f"init_from={source}", "max_steps=1", "learning_rate=1e-9", f"run_dir={tmp_path / f'new-{number}'}"
        )
        assert val_losses(fit(new))[0] == pytest.approx(val_losses(run)[-1], abs=1e-5)


def test_shards_hold_every_weight_in_the_dtype_that_is_asked_for(config: MakeConfig, tmp_path: Path) -> None:
    run = fit(config("max_steps=1"))
    for name, options in {"one": [], "many": ["--shard-size", "1e-5", "--dtype", "bfloat16"]}.items():
        assert main(["to-hf", str(run), str(tmp_path / name), *options]) == 0
    assert [path.name for path in (tmp_path / "one").glob("*.safetensors*")] == ["model.safetensors"]
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    one, many = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "many")
    files = {name: load_file(tmp_path / "many" / name).keys() for name in set(index["weight_map"].values())}
    assert len(files) > 2
    assert all(name in files[file] for name, file in index["weight_map"].items())
    assert index["weight_map"].keys() == one.keys() == many.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in many.values())
    assert all(torch.equal(many[name], one[name].bfloat16()) for name in one)
    assert json.loads((tmp_path / "many" / "config.json").read_text())["dtype"] == "bfloat16"
    largest = max(tensor.nbytes for tensor in many.values())
    assert all((tmp_path / "many" / file).stat().st_size < max(10_000, largest) + 4000 for file in files)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_mode_that_the_umask_gives(out: Path, tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        assert main(["to-hf", str(tmp_path / "run"), str(tmp_path / "there"), "--shard-size", "1e-5"]) == 0
        assert main(["from-hf", str(out), str(tmp_path / "back")]) == 0
    finally:
        os.umask(before)
    files = [*(tmp_path / "there").iterdir(), *(tmp_path / "back").iterdir()]
    assert {file.stat().st_mode & 0o777 for file in files} == {mode}


def test_a_checkpoint_and_a_run_that_was_stopped_are_taken_too(config: MakeConfig, tmp_path: Path) -> None:
    run = fit(config("max_steps=2"))
    assert main(["to-hf", str(run), str(tmp_path / "finished")]) == 0
    assert main(["to-hf", str(run / "checkpoints" / "step-00000002"), str(tmp_path / "step")]) == 0
    (run / "model.safetensors").unlink()
    assert main(["to-hf", str(run), str(tmp_path / "stopped")]) == 0
    for file in sorted(path.name for path in (tmp_path / "finished").iterdir()):
        contents = [(tmp_path / name / file).read_bytes() for name in ("finished", "step", "stopped")]
        assert contents[0] == contents[1] == contents[2], file


@pytest.fixture
def out(config: MakeConfig, tmp_path: Path) -> Path:
    """A small Llama in a folder of transformers."""
    run = fit(config("max_steps=1"))
    assert main(["to-hf", str(run), str(tmp_path / "out")]) == 0
    return tmp_path / "out"


def test_what_cannot_be_converted_is_refused_in_one_line(
    config: MakeConfig, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capped = fit(config("max_steps=1", "model.logit_softcap=30", f"run_dir={tmp_path / 'capped'}"))
    (tmp_path / "empty").mkdir()
    new = str(tmp_path / "new")
    refusals = {
        ("to-hf", str(capped), new): r"LlamaForCausalLM has no model\.logit_softcap=30",
        ("to-hf", str(tmp_path / "run"), str(out)): r"out is there already; name another folder",
        ("to-hf", str(tmp_path / "empty"), new): r"empty holds no trained model",
        ("to-hf", str(tmp_path / "none"), new): r"none is no folder",
        ("to-hf", str(tmp_path / "run"), new, "--shard-size", "0"): r"--shard-size 0 is not possible",
        ("to-hf", str(tmp_path / "run"), new, "--shard-size", "inf"): r"--shard-size inf is not possible",
        ("to-hf", str(tmp_path / "run"), new, "--shard-size", "1e300"): r"--shard-size 1e\+300 is not possible",
        ("to-hf", str(tmp_path / "run"), new, "--shard-size", "nan"): r"--shard-size nan is not possible",
        ("from-hf", str(tmp_path / "empty"), new): r"empty has no config\.json",
    }
    for arguments, message in refusals.items():
        with pytest.raises(SystemExit, match="2"):
            main(list(arguments))
        last = capsys.readouterr().err.splitlines()[-1]
        assert re.search(message, last), last
        assert not Path(new).exists()
    described = json.loads((out / "config.json").read_text())
    for text, message in {'{"model_type": ': "cannot be read as JSON (", "[1]": "holds no JSON object"}.items():
        (out / "config.json").write_text(text)
        with pytest.raises(SystemExit, match="2"):
            main(["from-hf", str(out), new])
        assert f"error: {out / 'config.json'} {message}" in capsys.readouterr().err
    (out / "config.json").write_text(json.dumps(described | {"model_type": "gemma2"}))
    with pytest.raises(SystemExit, match="2"):
        main(["from-hf", str(out), new])
    assert "out/config.json has model_type=gemma2, which this model cannot be" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.json", "[" * 100_000, "cannot be read as JSON"),
        ("tokenizer_config.json", "[" * 100_000, "cannot be read as JSON"),
        ("model.safetensors.index.json", "[" * 100_000, "cannot be read as JSON"),
        ("model.safetensors.index.json", '{"weight_map": {"a": 1, "b": []}}', "does not name the file of each tensor"),
    ],
)
def test_a_damaged_file_beside_the_weights_is_refused_in_one_line(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, text: str, message: str
) -> None:
    (out / file).write_text(text)
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main(["from-hf", str(out), str(tmp_path / "new")])
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"error: {out / file} {message}")
    assert not (tmp_path / "new").exists()


def test_a_reader_that_went_away_and_ctrl_c_give_no_traceback(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    done = run_unread(["-m", "scripts.convert", "to-hf", str(run), str(tmp_path / "unread")], cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert tensors_of(tmp_path / "unread").keys() == tensors_of(out).keys()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    capsys.readouterr()
    monkeypatch.setattr(convert, "write_tokenizer", interrupted)  # the last file
    assert main(["to-hf", str(run), str(tmp_path / "new")]) == 130
    assert capsys.readouterr() == ("", "")
    assert not list(tmp_path.glob("*new*"))


def test_a_folder_of_transformers_that_does_not_fit_is_refused(config: MakeConfig, out: Path, tmp_path: Path) -> None:
    run_dir = f"run_dir={tmp_path / 'new'}"
    file = ["tokenizer=file", f"tokenizer.path={out / 'tokenizer.json'}"]
    with pytest.raises(ValueError, match=r"model\.dim=64 does not fit .*out, which was trained with model\.dim=32"):
        fit(config(*file, "model.dim=64", f"init_from={out}", run_dir))
    with pytest.raises(ValueError, match=r"trained with another tokenizer.*use tokenizer=file tokenizer\.path=.*out"):
        fit(config("tokenizer=bytes", f"init_from={out}", run_dir))
    (out / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"out has no model\.safetensors"):
        fit(config(*file, f"init_from={out}", run_dir))


def test_what_differs_and_may_is_said(config: MakeConfig, out: Path, tmp_path: Path) -> None:
    said: list[str] = []
    file = ["tokenizer=file", f"tokenizer.path={out / 'tokenizer.json'}"]
    new = config(*file, "model.rotary.theta=50", "max_steps=1", f"init_from={out}", f"run_dir={tmp_path / 'new'}")
    Trainer(new, said.append).fit()
    assert f"init       weights of {out}" in said
    assert "           changed: model.rotary.theta 10000.0 → 50.0" in said
