"""What a run reads: training batches from where it stands in the text, and the held-out batches of every evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from data.answers import AnswersOnly
from data.corpus import Corpus
from data.loader import Batch, Loader, eval_batches
from data.packing import Rows, TrainRows, pack, training_rows
from data.recall import MARKER

from .config import TrainConfig
from .parallel.context import SharedRows
from .parallel.world import World
from .parts import Part, check_count, check_tensors


def held_out_rows(corpus: Corpus, config: TrainConfig, notify: Callable[[str], None]) -> Rows:
    """The rows of every evaluation: of seq_len tokens, or of all held-out ones where these are fewer.

    Raises:
        ValueError: one token is held out.
    """
    available = min(len(part.val.tokens) for part in corpus.parts) - 1
    if available < 1:
        raise ValueError("the held-out text has one token, and a row takes two: raise data.val_fraction")
    if available < config.seq_len:
        notify(f"validation rows have {available:,} tokens, not seq_len: that is all the held-out text")
    rows = pack(corpus, "val", min(available, config.seq_len), config.data.document_mask)
    return answers_only(rows, corpus) if config.data.is_recall else rows


def answers_only(rows: Rows, corpus: Corpus) -> AnswersOnly:
    (marker_id,) = corpus.tokenizer.encode(MARKER)
    return AnswersOnly(rows, marker_id)


class Batches(Part):
    """The batches of a run, and its position in the text: a part.

    `open` begins to read at the position, ahead of the loop; `close` ends that.
    """

    name = "data"

    def __init__(
        self,
        corpus: Corpus,
        config: TrainConfig,
        world: World,
        notify: Callable[[str], None],
        shared: SharedRows | None = None,
    ) -> None:
        """shared: how rows are split over the ranks that share them; None where rows are whole."""
        self.corpus, self.config, self.world, self.shared = corpus, config, world, shared
        mask, seq_len = config.data.document_mask, config.seq_len
        if config.data.is_recall:
            self.train_rows: TrainRows = answers_only(pack(corpus, "train", seq_len, mask, config.data.packing), corpus)
        else:
            self.train_rows = training_rows(corpus, seq_len, mask, config.data.packing)
        val_rows = held_out_rows(corpus, config, notify)
        self.val_batches = list(eval_batches(val_rows, config.batch_size, config.eval_tokens))
        self.max_documents = max(self.train_rows.max_documents, val_rows.max_documents) if mask else None
        """Most documents in a row; None where rows are read as one."""
        self.rows = 0
        """Rows read so far, by all ranks: `train_rows.at(seed, position)` is each of them."""
        self._loader: Loader | None = None

    def open(self) -> None:
        config, world = self.config, self.world
        split = {"shard": self.shared.shard} if self.shared else {}
        self._loader = Loader(
            self.train_rows,
            config.batch_size,
            seed=config.seed,
            device=world.device,
            rank=world.data_rank,
            world_size=world.data_size,
            first=self.rows,
            window=config.model.window,
            **split,
        )

    def close(self) -> None:
        if self._loader is not None:
            self._loader.close()

    def next(self, number: int) -> list[Batch]:
        """The next batches of this rank; of those that ranks share (`World.context_group`), its shards."""
        assert self._loader is not None
        batches = [next(self._loader) for _ in range(number)]
        self.rows += number * self.config.batch_size * self.world.data_size
        return batches

    def values(self) -> dict[str, Any]:
        manifest = self.corpus.manifest
        return {"text": manifest["hash"], "tokenizer": manifest["tokenizer"]["sha256"], "rows": self.rows}

    def validate(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Whether the text is the same, `checkpoint.restore` asks."""
        check_tensors(tensors, {})
        check_count("rows", values["rows"])

    def load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        self.rows = values["rows"]
