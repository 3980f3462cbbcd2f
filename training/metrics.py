"""Every metric of a run, once: the console, the table of a sweep, TensorBoard, W&B and docs/numbers.md read this list.

A new metric is an entry here and the line that computes it. `python -m training.metrics` prints the table of the docs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Literal


def short(number: float) -> str:
    """A count in at most six characters: 950, 12.3k, 1.6M, 2.1B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.99995 * size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


@dataclass(frozen=True)
class Metric:
    """A number that a run reports."""

    name: str
    """section/what, as in metrics.jsonl."""
    unit: str
    meaning: str
    """One clause, in Markdown."""
    better: Literal["lower", "higher", ""] = ""
    form: str = ".4g"
    """Python's format of a value that stands alone."""
    label: str = ""
    """Before the value in a line of the console; "" keeps it off the console."""
    line_form: str = ""
    """The format there, of a fixed width, so that a column is a column; or short, for `short`; then a unit, if any."""
    title: str = ""
    """Heading of its column in the table of a sweep; "" keeps it out of the table."""

    @property
    def section(self) -> str:
        return self.name.partition("/")[0]

    def text(self, value: float) -> str:
        return format(value, self.form)

    def in_line(self, value: float) -> str:
        """With the unit where the console shows one."""
        form, _, unit = self.line_form.partition(" ")
        number = f"{short(value):>6}" if form == "short" else format(value, form)
        return f"{number} {unit}" if unit else number


def loss_at(tokens_read: int) -> str:
    """The metric of the predictions made from more than half of so many tokens, a power of 2, up to that many."""
    return f"val/loss_at_{_binary(tokens_read)}"


def recall_at(distance: int) -> str:
    """The metric of the answers to keys that stand more than half of so many tokens back, a power of 2, up to that."""
    return f"val/recall_at_{_binary(distance)}"


def _binary(tokens: int) -> str:
    """A power of 2 in at most four characters: 512, 1k, 256k, 1m."""
    unit = next(place for place in (3, 2, 1, 0) if tokens >= 1024**place)
    return f"{tokens // 1024**unit}{'kmg'[unit - 1] if unit else ''}"


TOKENS_READ = tuple(2**power for power in range(8, 32))
"""Upper ends of the ranges by which the loss is reported; the first begins at 1. No row is longer than the last."""
DISTANCES = tuple(2**power for power in range(4, 32))
"""The same of the ranges by which recall is reported."""
LOSS_FORM = {"form": ".4f", "line_form": "7.4f"}
PERCENT = {"form": ".1%", "line_form": "5.1%"}
METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "train/loss",
            "nats per token",
            "mean over the steps since the last line; every target of a step weighs the same, whatever micro-batch "
            "it was in; with what `z_loss` and `label_smoothing` add",
            "lower", label="loss", title="loss", **LOSS_FORM,
        ),
        Metric("train/learning_rate", "", "of the last step", form=".2e", label="lr", line_form="8.2e"),
        Metric(
            "train/grad_norm",
            "",
            "global norm of the last step's gradient, before clipping",
            form=".2f", label="grad", line_form="6.2f",
        ),
        Metric(
            "train/skipped_steps",
            "count",
            "bad steps so far (`bad_step.action=skip`), which no parameter took; absent while there is none",
            "lower", form=".0f",
        ),
        Metric(
            "val/loss",
            "nats per token",
            "over the same held-out tokens each time (`eval_tokens`)",
            "lower", label="loss", **LOSS_FORM,
        ),
        Metric(
            "val/bits_per_byte",
            "bits",
            "total nats / ln 2 / UTF-8 bytes the target tokens stand for; separators have none",
            "lower", label="bits/byte", title="val bits/byte", **LOSS_FORM,
        ),
        *(
            Metric(
                loss_at(end),
                "nats per token",
                "of the predictions made from so many tokens of the document or fewer, down to half as many: `…_1k` is "
                "513 to 1,024, the first 1 to 256 (without `data.document_mask`: tokens of the row); absent where all "
                "predictions are of one such range",
                "lower", form=".4f",
            )
            for end in TOKENS_READ
        ),
        Metric(
            "val/recall",
            "fraction",
            "of the answers that are the most likely token (`data.task=recall` only)",
            "higher", label="recall", title="val recall", **PERCENT,
        ),
        *(
            Metric(
                recall_at(end),
                "fraction",
                "the same where the key stands so many tokens before its question or fewer, down to half as many: "
                "`…_1k` is 513 to 1,024, the first 1 to 16",
                "higher", form=".1%",
            )
            for end in DISTANCES
        ),
        Metric(
            "throughput/tokens_per_second",
            "1/s",
            "tokens of a window over its time",
            "higher", form=",.0f", label="tok/s", line_form="short", title="tokens/s",
        ),
        Metric(
            "throughput/tflops",
            "10¹² FLOP/s",
            "tokens/s × the causal FLOPs per token",
            "higher", form=".1f", label="TFLOP/s", line_form="6.1f",
        ),
        Metric(
            "throughput/mfu",
            "fraction",
            "causal: 6 N + 6 · L · d · S per token, over the peak",
            "higher", label="MFU", title="MFU", **PERCENT,
        ),
        Metric(
            "throughput/mfu_palm",
            "fraction",
            "6 N + 12 · L · d · S per token, over the peak",
            "higher", form=".1%",
        ),
        Metric(
            "throughput/mfu_attended",
            "fraction",
            "6 N + 12 · L · d · (mean keys a token really saw), over the peak",
            "higher", label="attended", **PERCENT,
        ),
        Metric(
            "throughput/attended_fraction",
            "fraction",
            "pairs that documents and window let through / pairs of the causal triangle",
            form=".1%",
        ),
        Metric("time/step_ms", "ms", "per optimizer step", "lower", form=",.1f", title="step ms"),
        Metric(
            "time/data_wait_fraction",
            "fraction",
            "of the window, spent waiting for the next batch",
            "lower", form=".1%",
        ),
        Metric(
            "memory/peak_allocated_gib",
            "GiB",
            "highest allocation since the last line",
            "lower", form=".2f", label="peak", line_form="5.1f GiB", title="peak GiB",
        ),
        Metric(
            "memory/peak_reserved_gib",
            "GiB",
            "highest amount PyTorch's allocator held",
            "lower", form=".2f",
        ),
        Metric(
            "memory/alloc_retries",
            "count",
            "times the allocator had to flush its cache and try again: above 0, memory is too tight",
            "lower", form=".0f",
        ),
        Metric(
            "checkpoint/pause_ms",
            "ms",
            "the loop stood still to copy what is saved; the rest happens in the background",
            "lower", form=".1f",
        ),
        Metric(
            "checkpoint/save_seconds",
            "s",
            "that rest, until the checkpoint was in its place",
            "lower", form=".2f",
        ),
        Metric("checkpoint/gib", "GiB", "size of that checkpoint", form=".2f"),
        Metric(
            "checkpoint/load_seconds",
            "s",
            "to verify and load the checkpoint that this process went on from",
            "lower", form=".2f",
        ),
    )
}  # fmt: skip


def in_table() -> list[Metric]:
    """The columns of the table after a sweep: `metric.title` heads it, `metric.text(value)` is a cell."""
    return [metric for metric in METRICS.values() if metric.title]


def on_console(sections: Iterable[str]) -> list[Metric]:
    """What a line of the console shows of these sections, in order."""
    return [metric for metric in METRICS.values() if metric.label and metric.section in sections]


def markdown() -> str:
    """The table of docs/numbers.md."""
    rows = []
    for (unit, meaning), metrics in groupby(METRICS.values(), lambda metric: (metric.unit, metric.meaning)):
        names = [f"`{metric.name}`" for metric in metrics]
        shown = names if len(names) <= 3 else [*names[:3], "…"]
        rows.append(f"| {', '.join(shown)} | {unit} | {meaning} |")
    return "\n".join(["| name | unit | what it is |", "|---|---|---|", *rows])


if __name__ == "__main__":
    print(markdown())
