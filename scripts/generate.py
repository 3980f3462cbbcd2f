"""Continue prompts with a trained model.

python -m scripts.generate RUN "Once upon a time"          streamed to the terminal
python -m scripts.generate RUN                             asks for prompts, one line each
python -m scripts.generate RUN < book.txt                  standard input is the prompt
python -m scripts.generate RUN --prompts FILE --json       one prompt a line; one JSON object a line comes out
RUN is a run folder, a checkpoint in one, or a folder of Hugging Face transformers.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from model.generate_config import SamplingConfig
from scripts.model_command import add_machine, exit_code, note
from scripts.parser import parser_of, positive, row_length, whole
from training.terminal import plain, say_error, secure
from training.trained import load_model

if TYPE_CHECKING:
    from data.tokenizer import Tokenizer
    from model.generate import Generator
    from model.gpt import GPT

LEAST_CAPACITY = 1024
"""Tokens that a cache holds at least, so that the next prompt at the terminal finds one that fits."""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = parser_of("generate", __doc__)
    add = parser.add_argument
    add("run", metavar="RUN", help="a run folder, a checkpoint, or a folder of transformers")
    add("prompt", nargs="*", default=[], metavar="PROMPT", help="text to continue; several are continued at once")
    add("--prompts", type=Path, metavar="FILE", help="a text file of prompts, one a line")
    add("--max-tokens", type=positive, default=200, metavar="N", help="tokens to add at most (default 200)")
    add("--temperature", type=float, default=0.8, metavar="T", help="0: the most probable token (default 0.8)")
    add("--top-k", type=whole, default=50, metavar="K", help="only the K most probable; 0: all (default 50)")
    add("--top-p", type=float, default=1.0, metavar="P", help="only those that together have P (default 1)")
    add(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="only those of P times the highest (default 0)",
    )
    add("--seed", type=whole, default=0, help="the same seed gives the same text (default 0)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")
    add("--batch-size", type=positive, default=8, metavar="B", help="prompts continued at once (default 8)")
    add("--chunk", type=row_length, default=8192, metavar="N", help="tokens of a prompt read at once (default 8192)")
    add("--json", action="store_true", help="one JSON object a prompt: prompt, text, tokens, finish")
    add("--tokens-per-second", action="store_true", help="say how fast it was, on standard error")
    add("--compile", action="store_true", help="compile the step first: for long texts on a GPU")
    add_machine(parser)
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0; 2 where something cannot be; 130 after Ctrl-C."""
    options = parse(arguments)
    return exit_code(lambda: generate(options))


def generate(options: argparse.Namespace) -> None:
    """Raises ValueError where something cannot be."""
    sampling = check(options)
    prompts = prompts_of(options)
    model, tokenizer = load_model(
        options.run, attention=options.attention, device=options.device, precision=options.precision, notify=note
    )
    writer = Writer(model, tokenizer, options, sampling)
    if prompts is None:
        converse(writer)
        return
    read = [writer.read(text) for text in prompts]
    for begin in range(0, len(read), options.batch_size):
        writer.write(read[begin : begin + options.batch_size])


def check(options: argparse.Namespace) -> SamplingConfig:
    """Raises ValueError for numbers that cannot be."""
    if "" in options.stop:
        raise ValueError('--stop "" would end every text at its beginning; name a text')
    return SamplingConfig(options.temperature, options.top_k, options.top_p, options.min_p)


def prompts_of(options: argparse.Namespace) -> list[str] | None:
    """What was given; None: ask for it.

    Raises:
        ValueError: a file cannot be read, or holds nothing.
    """
    prompts = list(options.prompt)
    if options.prompts is not None:
        try:
            lines = options.prompts.read_text("utf-8-sig").split("\n")
        except OSError as error:
            raise ValueError(
                f"--prompts {options.prompts} cannot be read: {error.strerror}; name a text file"
            ) from error
        except UnicodeDecodeError as error:
            where = f"byte {error.start:,} is not UTF-8"
            raise ValueError(f"--prompts {options.prompts} cannot be read: {where}; convert it to UTF-8") from error
        prompts += [line.removesuffix("\r") for line in lines if line.strip()]
        if not prompts:
            raise ValueError(f"--prompts {options.prompts} holds no prompt; write one a line")
    if not prompts:
        if sys.stdin is not None and sys.stdin.isatty():
            return None
        text = sys.stdin.read() if sys.stdin is not None else ""
        if not text:
            raise ValueError('no prompt: write one after RUN, such as "Once upon a time"; "" begins with nothing')
        prompts = [text]
    for prompt in prompts:
        check_text(prompt)
    return prompts


def check_text(prompt: str) -> None:
    """Raises ValueError for bytes that are no UTF-8, which Python reads as surrogates."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        around = ascii(prompt[max(0, error.start - 10) : error.end + 10])
        raise ValueError(f"a prompt is not UTF-8, near {around}; convert it, for example by iconv -t utf-8") from error


def converse(writer: Writer) -> None:
    note("a line is a prompt; Ctrl-C ends its continuation, Ctrl-D ends this")
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            print()
            return
        try:
            check_text(prompt)
            writer.write([writer.read(prompt)])
        except KeyboardInterrupt:
            print(flush=True)
        except ValueError as error:  # it is too long
            say_error(str(error))


class Prompt(NamedTuple):
    text: str
    ids: list[int]
    room: int
    """Tokens that may be added: --max-tokens, or fewer where learned positions end."""


@dataclass
class Writer:
    """Continues batches of prompts, and prints what comes."""

    model: GPT
    tokenizer: Tokenizer
    options: argparse.Namespace
    sampling: SamplingConfig
    generator: Generator | None = None

    def write(self, prompts: list[Prompt]) -> None:
        """Raises ValueError where they do not fit into memory."""
        from model.text import write

        options = self.options
        num_tokens = min(prompt.room for prompt in prompts)
        if num_tokens < options.max_tokens and len(prompts) > 1:  # alone each has the room that is left to it
            for prompt in prompts:
                self.write([prompt])
            return
        ids = [prompt.ids for prompt in prompts]
        generator = self._generator(len(prompts), max(map(len, ids)) + num_tokens)
        streams = len(prompts) == 1 and not options.json
        if streams:
            print(plain(prompts[0].text), end="", flush=True)
        began, first, count = time.perf_counter(), 0.0, 0
        texts = [""] * len(prompts)
        for piece in write(generator, self.tokenizer, ids, num_tokens, seed=options.seed, stops=options.stop):
            first = first or time.perf_counter()
            texts[piece.row] += piece.text
            if streams:
                print(plain(piece.text), end="\n" if piece.finish else "", flush=True)
            elif piece.finish:
                self._print(prompts[piece.row].text, texts[piece.row], piece.num_tokens, piece.finish)
            count += piece.num_tokens if piece.finish else 0
        if options.tokens_per_second:
            self._say_speed(generator, ids, count, first - began, time.perf_counter() - first)

    def read(self, text: str) -> Prompt:
        """Raises ValueError where learned positions leave no room."""
        from model.text import encode

        config, ids = self.model.config, encode(self.tokenizer, text)
        room: int = self.options.max_tokens
        if config.position == "learned":
            room = min(room, config.n_positions - len(ids))
        if room < 1:
            raise ValueError(
                f"the prompt {shortened(text)} has {len(ids):,} tokens, which fill the model's {config.n_positions:,} "
                f"learned positions; shorten it"
            )
        return Prompt(text, ids, room)

    def _print(self, prompt: str, text: str, num_tokens: int, finish: str) -> None:
        if self.options.json:
            result = {"prompt": prompt, "text": text, "tokens": num_tokens, "finish": finish}
            print(json.dumps(result), flush=True)
        else:
            print(f"{plain(prompt + text)}\n", flush=True)

    def _say_speed(self, generator: Generator, ids: list[list[int]], count: int, reading: float, adding: float) -> None:
        read = sum(map(len, ids))
        speed = f"{(count - len(ids)) / adding:,.1f} tokens/s" if count > len(ids) else "no more than the first token"
        note(
            f"speed      {read:,} tokens read and the first {'one' if len(ids) == 1 else 'ones'} chosen in "
            f"{reading:.2f} s; {count:,} tokens, {speed}; cache {generator.cache.num_bytes / 2**20:,.1f} MiB"
        )

    def _generator(self, rows: int, tokens: int) -> Generator:
        """One that has room; the last one, with what was captured for it, where that has."""
        from model.generate import Generator

        options, config = self.options, self.model.config
        now = self.generator
        if now is not None and now.batch_size >= rows and now.cache.capacity >= tokens:
            return now
        trained = self.model.attention.spec.seq_len
        if tokens > trained:
            note(f"note       {tokens:,} tokens are more than the {trained:,} of a row that the model was trained on")
        capacity = max(tokens, LEAST_CAPACITY)
        if config.position == "learned":
            capacity = max(tokens, min(capacity, config.n_positions))
        self.generator = None  # its memory first
        rows = max(rows, now.batch_size if now else 1)
        try:
            self.generator = Generator(
                self.model,
                rows,
                capacity,
                self.sampling,
                chunk=options.chunk,
                compile=options.compile,
                cuda_graph=self.model.attention.spec.device == "cuda",
            )
        except (RuntimeError, MemoryError) as error:
            if not (isinstance(error, MemoryError) or re.search("allocate|overflow", str(error))):
                raise
            raise ValueError(
                f"a cache of {rows} × {capacity:,} tokens does not fit into memory; use a smaller --max-tokens"
            ) from error
        if now is None:
            note(f"attention  {self.generator.cache.describe()}")
        return self.generator


def shortened(prompt: str) -> str:
    """As an error names it: its beginning."""
    return json.dumps(prompt if len(prompt) <= 40 else f"{prompt[:40]}…", ensure_ascii=False)


if __name__ == "__main__":
    secure()
    raise SystemExit(main())
