"""Continuing token sequences: prompts are read once, and each new token costs one step over a cache of keys and values.

Shape suffixes: B rows, S sequence, E model width, V vocabulary, K candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention.base import AttentionBackend
from .attention.cache import CachedAttention
from .generate_config import SamplingConfig
from .gpt import GPT


def choose(logits_BV: Tensor, sampling: SamplingConfig, noise_BK: Tensor) -> Tensor:
    """The next token of each row, int64 (B,), without waiting for the device.

    The largest p / e, with e drawn from Exp(1), is a sample of p: so the noise can be drawn outside a CUDA graph.

    Args:
        noise_BK: of Exp(1), one for each of `num_candidates`; not read at temperature 0.
    """
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    values_BK, ids_BK = logits_BV, None
    if sampling.top_k > 0 or sampling.top_p < 1:
        values_BK, ids_BK = largest(logits_BV, noise_BK.shape[1], PARTS if logits_BV.is_cuda else 1)
    probs_BK = torch.softmax(values_BK.float() / sampling.temperature, -1)
    likeliest_B1 = probs_BK.amax(-1, keepdim=True)
    if sampling.top_p < 1:  # the first one stays, whatever it has
        probs_BK = probs_BK.masked_fill(probs_BK.cumsum(-1) - probs_BK >= sampling.top_p, 0)
    if sampling.min_p > 0:
        probs_BK = probs_BK.masked_fill(probs_BK < sampling.min_p * likeliest_B1, 0)
    choice_B1 = (probs_BK / noise_BK).argmax(-1, keepdim=True)
    return (choice_B1 if ids_BK is None else ids_BK.gather(1, choice_B1))[:, 0]


PARTS = 64


def largest(logits_BV: Tensor, k: int, parts: int) -> tuple[Tensor, Tensor]:
    """`topk`, found in each of so many parts first: PyTorch searches one long row on a GPU in 22 kernels (L25)."""
    if logits_BV.shape[1] < 4 * parts * k:
        values_BK, ids_BK = logits_BV.topk(k)
        return values_BK, ids_BK
    logits_BPV = F.pad(logits_BV, (0, -logits_BV.shape[1] % parts), value=-torch.inf).unflatten(1, (parts, -1))
    values_BPK, ids_BPK = logits_BPV.topk(k, sorted=False)
    ids_BPK = ids_BPK + torch.arange(parts, device=logits_BV.device)[:, None] * logits_BPV.shape[2]
    values_BK, index_BK = values_BPK.flatten(1).topk(k)
    return values_BK, ids_BPK.flatten(1).gather(1, index_BK)


def num_candidates(sampling: SamplingConfig, vocab_size: int) -> int:
    """K: of how many tokens, the most probable, one is drawn."""
    return min(sampling.top_k or vocab_size, vocab_size)


class Generator:
    """A model with a cache, for any number of batches of prompts.

    Args:
        batch_size: rows. capacity: most tokens of a row, prompt and continuation.
        attention: what prompts are read with, and whose `decode` the steps run; None: the model's own.
        chunk: tokens of each row that are read at once: what a long prompt takes of memory, beside the cache.
        compile: compile the step, which makes fewer, larger kernels of it, and takes half a minute or more.
        cuda_graph: launch a step as one CUDA graph, captured here; for a model on a GPU.
    Raises:
        ValueError: the capacity is beyond the model's learned positions.
    """

    def __init__(
        self,
        model: GPT,
        batch_size: int,
        capacity: int,
        sampling: SamplingConfig,
        *,
        attention: AttentionBackend | None = None,
        chunk: int = 8192,
        compile: bool = False,
        cuda_graph: bool = False,
    ) -> None:
        config = model.config
        if config.position == "learned" and capacity > config.n_positions:
            raise ValueError(
                f"{capacity} tokens are beyond the model's {config.n_positions} learned positions; "
                f"shorten the prompt, or generate fewer"
            )
        self.model, self.sampling, self.chunk = model, sampling, chunk
        self.cache = CachedAttention(attention or model.attention, config.n_layers, batch_size, capacity)
        self.device = self.cache.lengths_B.device
        dtype = getattr(torch, self.cache.spec.dtype)
        self._autocast = torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)
        self._tokens_B1 = torch.zeros(batch_size, 1, dtype=torch.int64, device=self.device)
        candidates = num_candidates(sampling, config.vocab_size)
        self._noise_BK = torch.ones(batch_size, candidates, device=self.device)
        self._run_forward: Callable[[], None] = self._forward
        if compile:  # one graph for all lengths: none of them is known to Python
            self._run_forward = torch.compile(self._forward, dynamic=False)
        self.run_step: Callable[[], None] = _captured(self._step) if cuda_graph else self._step

    @property
    def batch_size(self) -> int:
        return len(self._tokens_B1)

    def stream(self, prompts: Sequence[Sequence[int]], num_tokens: int, seed: int = 0) -> Iterator[list[int]]:
        """The next token of every row, `num_tokens` times or until the caller has enough.

        Args:
            prompts: token ids, at least one token each; as many as there are rows, or fewer.
        Raises:
            ValueError: a prompt is empty, or a row would not fit.
        """
        rows, capacity, longest = self.batch_size, self.cache.capacity, max(map(len, prompts))
        if not all(map(len, prompts)):
            raise ValueError("a prompt is empty; begin with a token, such as the tokenizer's separator")
        if longest + num_tokens > capacity or len(prompts) > rows:
            raise ValueError(
                f"{len(prompts)} prompts of up to {longest} tokens and {num_tokens} more do not fit into a cache "
                f"for {rows} rows of {capacity}; make a larger Generator"
            )
        prompts = [*prompts, *[[0]] * (rows - len(prompts))]
        random = torch.Generator(self.device).manual_seed(seed)
        self._draw(random)
        self._read(prompts)
        for remaining in reversed(range(num_tokens)):
            tokens = _on_its_way(self._tokens_B1)
            ahead = remaining > 0 and self.device.type == "cuda"
            if ahead:  # the GPU is busy with the next while the caller has this one
                self._draw(random)
                self.run_step()
            yield tokens()
            if remaining > 0 and not ahead:
                self._draw(random)
                self.run_step()

    def _draw(self, random: torch.Generator) -> None:
        if self.sampling.temperature > 0:
            self._noise_BK.exponential_(generator=random)

    @torch.no_grad()
    def _read(self, prompts: Sequence[Sequence[int]]) -> None:
        """Fill the cache, chunk by chunk, and choose the first token of each row."""
        S = max(map(len, prompts))
        tokens_BS = torch.tensor([[*prompt, *[0] * (S - len(prompt))] for prompt in prompts], device=self.device)
        lengths_B = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int32, device=self.device)
        rows_B = torch.arange(len(prompts), device=self.device)
        last_BE: Tensor | None = None
        with self._autocast:
            for start in range(0, S, self.chunk):
                part_BS = tokens_BS[:, start : start + self.chunk]
                positions_1S, mask = self.cache.chunk(start, part_BS.shape[1], lengths_B)
                x_BSE = self.model.hidden(part_BS, positions_1S, self.cache, mask)
                index_B = lengths_B.long() - 1 - start
                ends_here_B1 = ((index_B >= 0) & (index_B < x_BSE.shape[1]))[:, None]
                found_BE = x_BSE[rows_B, index_B.clamp(0, x_BSE.shape[1] - 1)]
                last_BE = found_BE if last_BE is None else torch.where(ends_here_B1, found_BE, last_BE)
                del x_BSE, mask
            assert last_BE is not None
            self._choose(last_BE[:, None])
        self.cache.lengths_B.copy_(lengths_B)

    def _step(self) -> None:
        self.cache.advance()
        self._run_forward()

    @torch.no_grad()
    def _forward(self) -> None:
        """Read the token of each row that was chosen last, and choose the next."""
        with self._autocast:
            positions_B1, mask = self.cache.step()
            self._choose(self.model.hidden(self._tokens_B1, positions_B1, self.cache, mask))

    def _choose(self, x_B1E: Tensor) -> None:
        logits_BV = self.model.logits(x_B1E)[:, 0]
        self._tokens_B1.copy_(choose(logits_BV, self.sampling, self._noise_BK)[:, None])


def _captured(step: Callable[[], None]) -> Callable[[], None]:
    """A step as a CUDA graph. It reads and writes the same memory at each replay, at whatever length rows are."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles kernels, and makes libraries allocate what they keep
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph.replay


def _on_its_way(tokens_B1: Tensor) -> Callable[[], list[int]]:
    """The tokens as they are now, for whoever waits for them."""
    if not tokens_B1.is_cuda:
        now: list[int] = tokens_B1[:, 0].tolist()
        return lambda: now
    host_B1 = torch.empty(tokens_B1.shape, dtype=tokens_B1.dtype, pin_memory=True)
    host_B1.copy_(tokens_B1, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def wait() -> list[int]:
        arrived.synchronize()
        return host_B1[:, 0].tolist()

    return wait


def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    sampling: SamplingConfig | None = None,
    *,
    seed: int = 0,
    stop_ids: Collection[int] = (),
    attention: AttentionBackend | None = None,
    chunk: int = 8192,
    cuda_graph: bool = False,
) -> list[list[int]]:
    """Continue prompts, all of them at once.

    Args:
        prompts: token ids, at least one each. num_tokens: how many to add at most.
        stop_ids: a row ends before one of these.
        The rest: see `Generator`. The same arguments give the same tokens.
    Returns:
        the continuation of each prompt, without it.
    Raises:
        ValueError: see `Generator` and its `stream`.
    """
    if num_tokens < 1 or not prompts:
        return [[] for _ in prompts]
    capacity = max(map(len, prompts)) + num_tokens
    sampling = sampling or SamplingConfig()
    options: dict[str, Any] = {"attention": attention, "chunk": chunk, "cuda_graph": cuda_graph}
    generator = Generator(model, len(prompts), capacity, sampling, **options)
    continuations: list[list[int]] = [[] for _ in prompts]
    going = set(range(len(prompts)))
    for tokens in generator.stream(prompts, num_tokens, seed):
        for row in sorted(going):
            if tokens[row] in stop_ids:
                going.remove(row)
            else:
                continuations[row].append(tokens[row])
        if not going:
            break
    return continuations
