"""What the pages say is so: code and commands run, links lead somewhere, figures stand in records."""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir

import kernels
from kernels import reference
from training import cli
from training.config import load_config
from training.metrics import DISTANCES, METRICS, TOKENS_READ, loss_at, recall_at
from training.metrics import markdown as metrics_table

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
README, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
FLASH = DOCS / "flash-attention.md"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.glob("**/*.md")), *sorted(ROOT.glob("examples/*.md"))]
QUOTE = re.compile(r"# kernels/reference\.py: (\w+)\n")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def of_pages(pages: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", pages, ids=name)


class Block(NamedTuple):
    language: str
    text: str
    line: int  # of its first line in the page, from 1


def blocks(page: Path) -> list[Block]:
    text = page.read_text("utf-8")
    fences = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(fence[1], fence[2], text.count("\n", 0, fence.start(2)) + 1) for fence in fences]


def prose(page: Path) -> Iterator[tuple[int, str]]:
    """(number, line) outside of code blocks."""
    fenced = False
    for number, line in enumerate(page.read_text("utf-8").splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced and not line.startswith("    "):
            yield number, line


@of_pages([page for page in PAGES if "```python" in page.read_text("utf-8")])
def test_snippets_run_in_order_and_print_what_the_page_shows(page, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_gpt", kernels)  # as it is called where it is installed
    namespace: dict[str, object] = {"__name__": page.stem}
    end = Block("", "", 0)
    for block, next_block in pairwise([*blocks(page), end]):
        if block.language != "python" or QUOTE.match(block.text):
            continue
        code = "\n" * (block.line - 1) + block.text  # so that a traceback names the page's line
        if not torch.cuda.is_available():
            code = code.replace('"cuda"', '"cpu"')
        exec(compile(code, str(page), "exec"), namespace)
        shown = next_block.text if next_block.language == "text" else ""
        assert capsys.readouterr().out == shown, f"{page.name}, line {block.line}"


# ---- commands


def commands(page: Path) -> list[str]:
    """The commands that a page shows, each on one line, without prompts and comments."""
    text = re.sub(r"\\\n\s*", "", page.read_text("utf-8"))
    lines = re.findall(r"^ {4,}(?:\$ )?(python3? .*|[.\w/]*python3? -m .*)$", text, re.MULTILINE)
    refused = re.findall(r"^ {4}\$ (python .*)\n {4}error: ", text, re.MULTILINE)
    return [re.sub(r"\s+#.*", "", line) for line in lines if line not in refused and "# error" not in line]


def trains(command: str) -> list[str] | None:
    """The settings of a command that trains; None for another one."""
    words = shlex.split(command.split(" && ")[-1])
    if len(words) < 2 or not words[0].endswith("python") or words[1] != "train.py":
        return None
    flags = {word for word in words if word.startswith("-")}
    if flags - {"-m"} or {"key=value", "key=a,b"} & set(words):
        return None
    return [cli._for_hydra(word) for word in words[2:] if not word.startswith("-") and "…" not in word]


TRAINING = [(name(page), settings) for page in PAGES for line in commands(page) if (settings := trains(line))]


def test_the_pages_show_commands():
    assert len(TRAINING) > 30


@pytest.mark.parametrize(("page", "settings"), TRAINING, ids=[f"{page}-{i}" for i, (page, _) in enumerate(TRAINING)])
def test_every_command_that_trains_is_a_configuration(page: str, settings: list[str], composes_for_cpu: None) -> None:
    """Of a sweep each setting has its first value."""
    first = [re.sub(r"^([\w.]+=)([^\[{'\"]*?),.*", r"\1\2", word) for word in settings]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        load_config(compose("train", first))


SCRIPTS = sorted(
    {(match[1], option) for page in PAGES for line in commands(page)
     if (match := re.search(r"-m (scripts\.\w+)(.*)", line)) for option in ["", *re.findall(r" (--[a-z-]+)", match[2])]}
)  # fmt: skip


@pytest.mark.parametrize(("script", "option"), SCRIPTS)
def test_every_script_on_a_page_exists_with_the_options_that_it_shows(script: str, option: str) -> None:
    spec = find_spec(script)
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin)
    files = [*(path.parent.rglob("*.py") if path.name == "__init__.py" else [path]), ROOT / "scripts/model_command.py"]
    assert option == "" or any(f'"{option}"' in file.read_text("utf-8") for file in files)


@pytest.mark.slow
def test_the_first_line_works_in_an_empty_folder(tmp_path: Path) -> None:
    """The README's, as it stands, with a shorter run. `.ci/run` begins with the second."""
    line = next(line for line in commands(README) if line.endswith("train.py"))
    assert line in commands(CHINESE)
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(tmp_path / "clone")], check=True)
    small = "max_steps=2 eval_tokens=1024 sample_tokens=4 device=cpu run_dir=runs/first"
    environment = os.environ | {"HOME": str(tmp_path), "WANDB_MODE": "offline", "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        ["bash", "-c", f"{line} {small}"], cwd=tmp_path / "clone", env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "runs/first"
    printed = [line.split()[0] for block in indented(README) for line in block if "  " in line]
    assert all(re.search(rf"^{word}\b", done.stdout, re.MULTILINE) for word in printed if word in STARTUP)


STARTUP = ("data", "device", "model", "attention", "plan", "step")


def indented(page: Path) -> list[list[str]]:
    return [block.splitlines() for block in re.findall(r"(?:^ {4}.*\n)+", page.read_text("utf-8"), re.MULTILINE)]


# ---- links, lines, figures


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub and the site make them."""
    headings = (line.lstrip("# ") for _, line in prose(page) if line.startswith("#"))
    shown = (re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in shown}


def links(page: Path) -> list[str]:
    text = "\n".join(line for _, line in prose(page))
    text = re.sub(r"`[^`]*`", "", text)
    return re.findall(r"(?<=\]\()[^)\s]+(?=\))", text) + re.findall(r"^\[\w+\]: (\S+)$", text, re.MULTILINE)


@of_pages(PAGES)
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in links(page):
        if link.startswith(("https://", "http://")):
            continue
        target, _, anchor = link.partition("#")
        there = (page.parent / target).resolve() if target else page
        assert there.exists(), link
        assert not anchor or anchor in anchors(there), link


def test_every_page_can_be_found_from_the_site_and_the_lists_of_notes_and_records():
    nav = re.findall(r"- (?:[\w ]+: )?([\w/.-]+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.MULTILINE)
    guides = (
        page for page in DOCS.rglob("*.md") if page.parent.name in ("docs", "kernels") or page.name == "README.md"
    )
    assert set(nav) == {str(page.relative_to(DOCS)) for page in guides}, "nav in mkdocs.yml has every guide"
    for folder in ("lab", "benchmarks"):
        listed = links(DOCS / folder / "README.md")
        missing = {page.name for page in (DOCS / folder).glob("*.md")} - {"README.md", *listed}
        assert not missing, f"each has a line in docs/{folder}/README.md"


def test_a_lab_note_has_a_date_and_an_id_of_its_own():
    ids = {}
    for note in sorted((DOCS / "lab").glob("2*.md")):
        heading = note.read_text("utf-8").partition("\n")[0]
        found = re.fullmatch(r"# (L\d+) · (\d{4}-\d\d-\d\d) · .+", heading)
        assert found, f"{note.name} begins with: # L1 · 2026-11-23 · what was asked"
        assert note.name.startswith(found[2])
        assert found[1] not in ids, f"{found[1]} is {ids[found[1]]}"
        ids[found[1]] = note.name
    cited = {(name(page), word) for page in PAGES for word in re.findall(r"\bL\d+\b", page.read_text("utf-8"))}
    assert {word for page, word in cited if "lab" in page or "kernels" in page} - {"L1", "L2"} <= set(ids)


@of_pages([page for page in PAGES if page.parent.name != "benchmarks"])
def test_prose_has_lines_of_at_most_120_columns(page: Path) -> None:
    """Tables, code and pictures aside; scripts write the records."""
    long = [number for number, line in prose(page) if len(line) > 120 and not line.startswith(("|", "!", "<!--"))]
    assert not long, f"lines {long}"


def numbers(text: str) -> list[str]:
    """Those that are measured, as they are written: with a point, or of three digits and more; not lengths as 16k."""
    text = re.sub(r"\]\([^)]*\)|`[^`]*`|GPT-2 \w+|[HA]\d00|head_dim \d+|FlashAttention-\d|FA\d|H · D = \S+", " ", text)
    found = re.findall(r"(?<![\w.,-])\d[\d,]*(?:\.\d+)?(?![\w])", text)
    return [number.rstrip(",") for number in found if "." in number or len(number) > 2]


def recorded(number: str, values: set[str]) -> bool:
    """Whether a record has this number, perhaps with more digits."""
    value, digits = number.replace(",", ""), len(number.partition(".")[2])
    return any(f"{float(other):.{digits}f}" == value for other in values)


RECORD = r"((?:benchmarks|lab)/[\w-]+)\.md"


def in_record(link: str) -> set[str]:
    text = (DOCS / f"{link}.md").read_text("utf-8")
    return {number.replace(",", "").rstrip(".") for number in re.findall(r"\d[\d,]*(?:\.\d+)?", text)}


def figures() -> Iterator[tuple[str, str, set[str]]]:
    """(where, text, the records it names): rows of the READMEs' tables, sections of the other pages of results."""
    for page in (README, CHINESE):
        for number, line in prose(page):
            if line.startswith("|") and (found := re.findall(RECORD, line)):
                yield f"{page.name}:{number}", line, set(found)
    for page in (DOCS / "results.md", DOCS / "kernels" / "hopper.md", DOCS / "kernels" / "portable.md"):
        for section in re.split(r"^## ", page.read_text("utf-8"), flags=re.MULTILINE)[1:]:
            if found := re.findall(RECORD, section):
                yield f"{page.name}, {section.partition(chr(10))[0]}", section.partition("\n")[2], set(found)


FIGURES = list(figures())


@pytest.mark.parametrize(("text", "records"), [case[1:] for case in FIGURES], ids=[case[0] for case in FIGURES])
def test_figures_stand_in_the_records_that_are_named_beside_them(text: str, records: set[str]) -> None:
    values = set().union(*(in_record(record) for record in records))
    missing = [number for number in numbers(text) if not recorded(number, values)]
    assert not missing, f"not in {', '.join(sorted(records))}: {', '.join(missing)}"


def test_a_figure_that_is_in_no_record_is_found():
    values = in_record("benchmarks/attention-swap-h100")
    assert recorded("61.0", values)
    assert recorded("367,618", values)
    assert not recorded("61.1", values)
    assert not recorded("367,619", values)
    assert numbers("| 16k, head_dim 128 (H100) | 367,618, 8.5 | [x](y-100.md) |") == ["367,618", "8.5"]


def test_both_readmes_say_the_same():
    def shape(page: Path) -> dict[str, list[str]]:
        text = page.read_text("utf-8")
        code = [re.sub(r"\s*#.*", "", line) for block in indented(page) for line in block]
        return {
            "commands": commands(page),
            "snippets": [re.sub(r"#.*", "", block.text) for block in blocks(page)],
            "links": [link for link in links(page) if not link.startswith("README")],
            "printed": [line for line in code if re.match(r" {4}(\w+ {2,}|step)", line) and ":" in line],
            "numbers": [
                n for line in text.splitlines() if line.startswith("|") for n in numbers(line.replace("，", ", "))
            ],
            "headings": [line.split()[0] for _, line in prose(page) if line.startswith("#")],
        }

    english, chinese = shape(README), shape(CHINESE)
    for what in english:
        assert english[what] == chinese[what], what


def test_the_picture_of_the_readme_shows_the_record():
    from scripts.compare.command import many
    from scripts.compare.report import chart

    record = json.loads((DOCS / "benchmarks" / "compare-h200.json").read_text("utf-8"))
    picture = DOCS / "benchmarks" / "compare-h200.svg"
    assert picture.read_text("utf-8") == chart(record["rows"], list(many(record["facts"]["swept"])))


# ---- the habits of the project


WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@of_pages(WORKFLOWS)
def test_a_workflow_has_jobs_with_a_limit_and_steps_and_asks_for_few_rights(page: Path) -> None:
    """`.ci/run` compares them with GitHub's schema, too."""
    workflow = yaml.safe_load(page.read_text("utf-8"))
    assert workflow[True]  # "on" is a boolean to YAML
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] > 0
        assert set(job.get("needs", "").split()) <= set(workflow["jobs"])
        assert all(set(step) & {"uses", "run"} for step in job["steps"])


def test_the_tests_run_on_the_oldest_and_the_newest_python():
    tests = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text("utf-8"))["jobs"]["tests"]
    assert tests["strategy"]["matrix"]["python"] == ["3.11", "3.13"]
    assert 'requires-python = ">=3.11,<3.14"' in (ROOT / "pyproject.toml").read_text("utf-8")


@pytest.mark.parametrize("form", ["bug", "speed"])
def test_issue_forms_ask_for_the_start_up_lines_and_the_facts(form: str) -> None:
    page = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{form}.yml").read_text("utf-8"))
    fields = {field["id"]: field for field in page["body"]}
    assert all(fields[key]["validations"]["required"] for key in ("command", "startup", "facts"))


@pytest.mark.slow
def test_the_site_is_built_and_workflows_fit_githubs_schema(tmp_path: Path) -> None:
    """Where the extra `docs` is installed, as `.ci/run` does."""
    pytest.importorskip("mkdocs")
    site = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    schema = [sys.executable, "-m", "check_jsonschema", "--builtin-schema"]
    forms = sorted(map(str, (ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml")))
    for command in (
        site,
        [*schema, "vendor.github-workflows", *map(str, WORKFLOWS)],
        [*schema, "vendor.github-issue-forms", *forms],
        [*schema, "vendor.dependabot", str(ROOT / ".github" / "dependabot.yml")],
        [*schema, "vendor.citation-file-format", str(ROOT / "CITATION.cff")],
    ):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "site" / "kernels" / "hopper" / "index.html").read_text("utf-8")
    assert "Ping-pong" in page


# ---- code that is quoted, and metrics


def test_every_metric_is_defined():
    sources = "".join(file.read_text("utf-8") for file in (ROOT / "training").rglob("*.py"))
    metrics = set(re.findall(r'"((?:train|val|throughput|time|memory|checkpoint)/[a-z_]+)"', sources))
    assert len(metrics) > 15
    by_range = {loss_at(end) for end in TOKENS_READ} | {recall_at(end) for end in DISTANCES}
    assert metrics | by_range == set(METRICS), "each has its entry, and each entry is computed"
    assert metrics <= set(re.findall(r"`([a-z]+/[a-z_]+)`", (ROOT / "docs" / "numbers.md").read_text("utf-8")))


def test_the_table_of_metrics_is_that_of_the_registry():
    page = (ROOT / "docs" / "numbers.md").read_text("utf-8")
    assert metrics_table() in page, "python -m training.metrics prints it"


def test_flash_attention_quotes_every_definition_as_it_stands():
    quoted = set()
    for block in blocks(FLASH):
        heading = QUOTE.match(block.text)
        if block.language == "python" and heading:
            quoted.add(heading[1])
            missing = first_missing(block.text[heading.end() :], inspect.getsource(getattr(reference, heading[1])))
            assert not missing, f"{FLASH.name}, line {block.line}: not so in {heading[1]}:\n{missing}"
    softmaxes = {"safe_softmax", "split_softmax", "online_softmax"}
    assert quoted == softmaxes | {"attend", "tiled_attention", "tiled_attention_backward"}


def first_missing(quote: str, source: str) -> str | None:
    """The first part of a quote that does not stand in the source, after the parts before it; "..." joins parts."""
    lines = source.splitlines()
    for part in quote.rstrip("\n").split("\n...\n"):
        length = part.count("\n") + 1
        ends = (i for i in range(length, len(lines) + 1) if textwrap.dedent("\n".join(lines[i - length : i])) == part)
        end = next(ends, None)
        if end is None:
            return part
        lines = lines[end:]
    return None


@pytest.mark.parametrize(
    ("quote", "missing"),
    [
        ("a = 1\nif a:\n    b = 2\n", None),
        ("b = 2\n...\nc = 3\n", None),
        ("c = 3\n...\na = 1\n", "a = 1"),
        ("b = 1\n", "b = 1"),
        ("if a:\nb = 2\n", "if a:\nb = 2"),
        ("a =\n", "a ="),
    ],
)
def test_a_quote_is_compared_line_by_line_and_in_order(quote, missing):
    source = "def f():\n    a = 1\n    if a:\n        b = 2\n    c = 3\n"
    assert first_missing(quote, source) == missing
