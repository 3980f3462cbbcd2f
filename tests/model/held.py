"""Memory on a CPU, as PyTorch's operators see it."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Held(TorchDispatchMode):
    """Bytes of what was computed since it began and still exists, at most and now, and how often each operator ran."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.peak, self.calls, self._seen = 0, 0, {}, set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls[func.name()] = self.calls.get(func.name(), 0) + 1
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(result):
            storage = x.untyped_storage() if isinstance(x, Tensor) else None
            if storage is not None and storage._cdata not in given | self._seen:
                self.bytes += storage.nbytes()
                self.peak = max(self.peak, self.bytes)
                self._seen.add(storage._cdata)
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return result

    def _freed(self, storage: int, nbytes: int) -> None:
        self.bytes -= nbytes
        self._seen.discard(storage)
