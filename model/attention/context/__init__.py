"""Context parallelism: several ranks hold the tokens of a row, and attention over all of them stays exact."""

from .wrapper import ContextAttention, Shard

__all__ = ["ContextAttention", "Shard"]
