"""The Python in the documentation runs, prints what the page shows, and quotes what really stands in the code."""

from __future__ import annotations

import inspect
import re
import textwrap
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest

from kernels import reference
from training.metrics import DISTANCES, METRICS, TOKENS_READ, loss_at, recall_at
from training.metrics import markdown as metrics_table

ROOT = Path(__file__).parent.parent
FLASH = ROOT / "docs" / "flash-attention.md"
PAGES = [
    page for page in (ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))) if "```python" in page.read_text("utf-8")
]
QUOTE = re.compile(r"# kernels/reference\.py: (\w+)\n")


class Block(NamedTuple):
    language: str
    text: str
    line: int  # of its first line in the page, from 1


def blocks(page: Path) -> list[Block]:
    text = page.read_text("utf-8")
    fences = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(fence[1], fence[2], text.count("\n", 0, fence.start(2)) + 1) for fence in fences]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_snippets_run_in_order_and_print_what_the_page_shows(page, capsys):
    namespace: dict[str, object] = {"__name__": page.stem}
    end = Block("", "", 0)
    for block, next_block in pairwise([*blocks(page), end]):
        if block.language != "python" or QUOTE.match(block.text):
            continue
        code = "\n" * (block.line - 1) + block.text  # so that a traceback names the page's line
        exec(compile(code, str(page), "exec"), namespace)
        shown = next_block.text if next_block.language == "text" else ""
        assert capsys.readouterr().out == shown, f"{page.name}, line {block.line}"


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
