"""Bytes alive at once, counted as storages come and go; on any device, fake tensors included."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_BODY = torch._C.DispatchKey.CompositeExplicitAutograd


class Live:
    """Bytes of the storages made since the count began: all, those that are alive, and their peak.

    What an operator of PyTorch needs while it runs, such as a product's workspace, is not seen.
    """

    def __init__(self) -> None:
        self.made = 0
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()

    def note(self, tensor: Tensor, size: int | None = None) -> None:
        """Count the tensor's storage, or `size` bytes for it, until nothing refers to it."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if size is None else size
        self._known.add(key)
        self.made += size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@contextmanager
def live_bytes() -> Iterator[Live]:
    """Count what is allocated inside, also inside ops written in Python."""
    counts = Live()
    with _Allocations(counts):
        yield counts


class _Allocations(TorchDispatchMode):
    def __init__(self, counts: Live) -> None:
        super().__init__()
        self._counts = counts

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for given in tree_leaves((args, kwargs)):
            if isinstance(given, Tensor):
                self._counts.note(given, size=0)  # it was there before
        if func.namespace not in ("aten", "prim") and func.has_kernel_for_dispatch_key(_BODY):
            with self:
                return func._op_dk(_BODY, *args, **kwargs)
        result = func(*args, **kwargs)
        for made in tree_leaves(result):
            if isinstance(made, Tensor):
                self._counts.note(made)
        return result
