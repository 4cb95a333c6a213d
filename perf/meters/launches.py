"""Kernel launches of a piece of code: ours by the launch observers, PyTorch's by dispatch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trilith.kernels._runtime.launch import observers

_NO_LAUNCH = {
    "aten::detach",
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::lift_fresh",
    "aten::_unsafe_view",
    "aten::_local_scalar_dense",
}


class _AtenLaunches(TorchDispatchMode):
    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        aliases = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if name.startswith("aten::") and name not in _NO_LAUNCH and not aliases:
            self.counts[name] += 1
        return result


@contextmanager
def launches() -> Iterator[Counter[str]]:
    """Counts by kernel name; PyTorch's operators count once each, views and allocations not."""
    counts: Counter[str] = Counter()

    def observe(kernel: Any, *_: Any) -> None:
        counts[kernel.fn.__name__] += 1

    observers.append(observe)
    try:
        with _AtenLaunches(counts):
            yield counts
    finally:
        observers.remove(observe)


def launches_of_backward(loss: torch.Tensor) -> Counter[str]:
    """The launches of `loss.backward()`."""
    with launches() as counts:
        loss.backward()
    return counts
