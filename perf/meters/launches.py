"""Kernel launches of a piece of code: ours by the launch observers, PyTorch's by dispatch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from perf.meters.aten import operators
from trilith.kernels._runtime.launch import observers


@contextmanager
def launches() -> Iterator[Counter[str]]:
    """Counts by kernel name; PyTorch's operators count once each, views and allocations not."""
    counts: Counter[str] = Counter()

    def ours(kernel: Any, *_: Any) -> None:
        counts[kernel.fn.__name__] += 1

    def torchs(name: str, *_: Any) -> None:
        counts[name] += 1

    observers.append(ours)
    try:
        with operators(torchs):
            yield counts
    finally:
        observers.remove(ours)
