"""How our ops say which DTensors they take (`OpSpec.sharding`).

Dropout with p > 0 takes replicated tensors only: its mask is keyed by an element's position in the
whole tensor, which a rank that holds a shard does not know. All ranks take the first one's seed.
Where no kernel runs torch draws the mask, and the ranks' generators must agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

Strategy = tuple[Sequence[Any], Sequence[Any]]


def split(outputs: Sequence[int | None], inputs: Sequence[int | None]) -> Strategy:
    """The dimension in which each is split: None for outputs to be summed, inputs replicated."""
    from torch.distributed.tensor import Partial, Shard

    return (
        [Partial() if dim is None else Shard(dim) for dim in outputs],
        [None if dim is None else Shard(dim) for dim in inputs],
    )


def by_rows(x: Tensor) -> list[Strategy]:
    """Any dimension of x but the last, which the op needs whole."""
    return [split([dim], [dim]) for dim in range(x.ndim - 1)]


def elementwise(x: Tensor, n_tensors: int, *, biased: bool = False) -> list[Strategy]:
    """Any dimension of the first tensors; `biased`: after them comes one of x's last dimension."""
    last = x.ndim - 1
    bias = [[0 if dim == last else None] if biased else [] for dim in range(x.ndim)]
    return [split([dim], [dim] * n_tensors + bias[dim]) for dim in range(x.ndim)]
