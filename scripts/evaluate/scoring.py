"""How probable a model finds continuations of texts, and what it continues them with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from data.tokenizer import Tokenizer
from model.generate import Generator
from model.generate_config import SamplingConfig
from model.gpt import GPT
from model.text import write

from .held_out import forward_of

Ids = Sequence[int]


class Scorer:
    """Nothing is cut off from a text, however long; what has more tokens than a row in training is said once.

    Args:
        batch_size: rows at once.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, batch_size: int, notify: Callable[[str], None]) -> None:
        self.model, self.tokenizer, self.batch_size, self.notify = model, tokenizer, batch_size, notify
        self.forward = forward_of(model)
        self.is_noted = False

    @property
    def seq_len(self) -> int:
        """Tokens of a row in training."""
        return self.model.attention.spec.seq_len

    def score(self, requests: Sequence[tuple[Ids, Ids]]) -> list[tuple[float, bool]]:
        """(log-probability, whether each token is the most likely one) of a continuation after its context.

        Requests that differ in their last token alone, such as the choices of one question, share a row.

        Raises:
            ValueError: a row is beyond the model's learned positions.
        """
        sharing: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, (context, continuation) in enumerate(requests):
            sharing[(*context, *continuation[:-1])].append(index)
        ordered = sorted(sharing, key=len, reverse=True)
        found: dict[int, tuple[float, bool]] = {}
        for first in range(0, len(ordered), self.batch_size):
            rows = ordered[first : first + self.batch_size]
            longest = max(len(requests[index][1]) for row in rows for index in sharing[row])
            for row, logprobs_LV in zip(rows, self._logprobs(rows, longest), strict=True):
                for index in sharing[row]:
                    tokens_L = torch.tensor(requests[index][1], device=logprobs_LV.device)
                    own_LV = logprobs_LV[longest - len(tokens_L) :]
                    logprob = own_LV.gather(1, tokens_L[:, None]).sum().item()
                    found[index] = logprob, bool((own_LV.argmax(1) == tokens_L).all())
        return [found[index] for index in range(len(requests))]

    @torch.no_grad()
    def _logprobs(self, rows: Sequence[Ids], last: int) -> Iterator[Tensor]:
        """log p of what follows each of the last tokens of each row: float32 (last, V). Rows are filled up on the
        right, where causal attention does not look; the first is the longest."""
        device, attention, S = self.forward.device, self.model.attention, len(rows[0])
        self._check_length(S)
        tokens_BS = torch.tensor([[*row, *[0] * (S - len(row))] for row in rows], device=device)
        with self.forward.autocast():
            mask = attention.prepare(None, S)
            x_BSE = self.model.hidden(tokens_BS, torch.arange(S, device=device)[None], attention, mask)
            for row, x_SE in zip(rows, x_BSE, strict=True):
                # A short row may have fewer: what stands before its first token is of no request.
                own_LE = F.pad(x_SE[: len(row)][-last:], (0, 0, max(0, last - len(row)), 0))
                yield F.log_softmax(self.model.logits(own_LE[None])[0].float(), -1)

    def continue_(self, prompt: Ids, most: int, stops: Sequence[str], temperature: float) -> str:
        """Up to so many tokens, ending before a stop string or where the document ends.

        Raises:
            ValueError: they would be beyond the model's learned positions.
        """
        self._check_length(len(prompt) + most)
        generator = Generator(self.model, 1, len(prompt) + most, SamplingConfig(temperature, 0, 1.0, 0.0))
        return "".join(piece.text for piece in write(generator, self.tokenizer, [prompt], most, stops=stops))

    def _check_length(self, tokens: int) -> None:
        self.model.config.check_seq_len(tokens)
        if tokens > self.seq_len and not self.is_noted:
            self.notify(f"note       {tokens:,} tokens are more than the {self.seq_len:,} of a row in training")
            self.is_noted = True
