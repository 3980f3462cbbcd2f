"""`--help` of every command: how it is called, and a word on each option."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from processes import LIMIT_S

from scripts import generate, parser
from scripts.evaluate import __main__ as evaluate
from training import terminal
from training.mistakes import CONFIGS, options
from training.usage import usage

ROOT = Path(__file__).resolve().parents[2]
HYDRA = ("plan", "prepare_data", "inspect_data")
SCRIPTS = ROOT / "scripts"
COMMANDS = [path.stem for path in SCRIPTS.glob("*.py") if '__name__ == "__main__"' in path.read_text("utf-8")]
COMMANDS += [path.parent.name for path in SCRIPTS.glob("*/__main__.py")]


def help_of(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_train_shows_how_it_is_called_its_choices_and_its_settings():
    said = help_of("train.py")
    assert said.startswith("Train a GPT.\n\npython train.py ")
    assert re.search(r"^  attention +auto +auto, flash, sdpa, flex, math: ", said, re.MULTILINE)
    assert re.search(r"^  seq_len +512 \| 16384 +tokens per row$", said, re.MULTILINE)
    assert re.search(r"^  checkpoint.every +as eval_every +steps ", said, re.MULTILINE)
    assert "${" not in said
    assert max(map(len, said.splitlines())) <= 120


def test_help_has_every_setting_with_a_word_and_every_option_of_a_choice():
    said = usage("")
    config = OmegaConf.to_container(OmegaConf.load(CONFIGS / "train.yaml"))
    defaults, _ = config.pop("defaults"), config.pop("hydra")
    groups = [name for default in defaults if isinstance(default, dict) for name in default if " " not in name]
    sections = {name for name, value in config.items() if isinstance(value, dict)}
    names = [*groups, *(set(config) - sections), *(f"{name}.{key}" for name in sections for key in config[name])]
    words = {name: re.search(rf"^  {name} +(.*(?:\n {{20,}}.*)*)", said, re.MULTILINE) for name in names}
    assert all(found and len(found[1]) > 8 for found in words.values()), words
    for group in groups:
        assert set(options(group)) <= set(re.findall(r"[\w.-]+", words[group][1])), group


@pytest.mark.parametrize("name", HYDRA)
def test_a_script_that_takes_the_settings_of_train_says_first_how_it_is_called(name: str) -> None:
    assert f"\npython -m scripts.{name} " in help_of("-m", f"scripts.{name}").partition("\nChoices ")[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(COMMANDS) - set(HYDRA)))
def test_a_script_says_how_it_is_called_and_what_each_option_is(name: str) -> None:
    said = help_of("-m", f"scripts.{name}")
    assert said.startswith(f"usage: python -m scripts.{name} ")
    options = re.findall(r"^  (-.*(?:\n {6,}.*)*)", said.partition("options:")[2], re.MULTILINE)
    assert options
    for option in options:
        assert re.search(r"(  |\n)\s*\S.*$", option), f"{option.split()[0]} has no word"


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(COMMANDS) - set(HYDRA)))
def test_an_option_that_a_script_does_not_have_is_refused_in_one_line(name: str) -> None:
    command = [sys.executable, "-m", f"scripts.{name}", "--no-such-option"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"error: .+; python -m scripts\.{name}.* --help shows what there is\n", done.stderr)


@pytest.mark.parametrize("text", ["0", "-3", "2.5", "many", "1e-3", "k", "1e30"])
def test_how_many_is_a_whole_number_from_1(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    parsing = parser.parser_of("bench_x", "")
    parsing.add_argument("--repeat", nargs="+", type=parser.positive)
    with pytest.raises(SystemExit) as ended:
        parsing.parse_args([f"--repeat={text}"])
    assert ended.value.code == 2
    assert f"argument --repeat: {text} is not possible; use a whole number from 1 to 2⁶³ − 1" in capsys.readouterr().err


def test_whole_numbers_are_written_as_in_the_settings_of_train() -> None:
    parsing = parser.parser_of("bench_x", "")
    parsing.add_argument("--tokens", nargs="+", type=parser.positive)
    parsing.add_argument("--seq-len", nargs="+", type=parser.row_length)
    parsing.add_argument("--seed", type=parser.whole)
    words = ["3", "12_000", "1e6", "1.5k", "2M"]
    options = parsing.parse_args(["--tokens", *words, "--seq-len", *words, "--seed=0"])
    assert options.tokens == [3, 12_000, 1_000_000, 1500, 2_000_000]
    assert options.seq_len == [3, 12_000, 1_000_000, 1536, 2 * 1024**2]
    assert options.seed == 0
    assert generate.parse(["RUN", "--max-tokens=1k", "--chunk=16k"]).max_tokens == 1000
    assert evaluate.parse(["RUN", "--seq-len=16k"]).seq_len == 16_384


def test_the_beginning_of_an_option_is_not_that_option(capsys: pytest.CaptureFixture[str]) -> None:
    parsing = parser.parser_of("generate", "")
    parsing.add_argument("--max-tokens")
    parsing.add_argument("--tokens-per-second", action="store_true")
    with pytest.raises(SystemExit) as ended:
        parsing.parse_args(["--tokens", "40"])
    assert ended.value.code == 2
    assert "unrecognized arguments: --tokens 40 (did you mean --max-tokens?); " in capsys.readouterr().err


# ---- under a launcher of several processes


@pytest.mark.parametrize(("rank", "before"), [(0, "error: "), (1, "error: rank 1 on ")])
def test_a_script_of_one_process_is_refused_under_a_launcher_by_the_first_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: int, before: str
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(terminal.time, "sleep", waited.append)
    for name, value in {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(SystemExit) as ended:
        parser.parser_of("report", "")
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(before)
    assert said.endswith(
        "scripts.report runs in one process, not in 2; use python -m scripts.report, without torchrun\n"
    )
    assert len(waited) == rank, "by then the launcher has ended it"
    parser.parser_of("bench_context", "", of_ranks=True)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_script_says_whether_it_is_one_of_several_processes(name: str) -> None:
    files = [SCRIPTS / f"{name}.py", *(SCRIPTS / name).glob("*.py")]
    text = "".join(file.read_text("utf-8") for file in files if file.exists())
    assert re.search(rf'(parser_of|refuse_ranks)\("{name}', text)
