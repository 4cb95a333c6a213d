"""Which DTensors attention takes: batches, or heads.

Dropout takes replicated tensors only, for the reason in `_runtime.sharding`, and so does a score
mod, which is told the number of the batch entry and of the head.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from trilith.kernels._runtime.sharding import Strategy, split


def dense(
    q: Any, k: Tensor, bias: Tensor | None, slopes: Tensor | None, p: float, score_mod: str
) -> list[Strategy]:
    """Of q (B, H, ...), k and v (B, Hkv, ...): either dimension."""
    if p > 0 or score_mod:
        return []
    batch = split([0, 0], [0, 0, 0, unless_one(bias, 0), 0, unless_one(slopes, 0)])
    terms = [unless_one(bias, 1), None, unless_one(slopes, 1), 0]
    return [batch, *(split([1, 1], [1, dim, dim, *terms]) for dim in _key_heads(q, k, 1))]


def packed(
    q: Any, k: Tensor, bias: Tensor | None, slopes: Tensor | None, p: float, score_mod: str
) -> list[Strategy]:
    """Of q (total, H, D), k and v (total, Hkv, ...), lse (H, total): heads."""
    if p > 0 or score_mod:
        return []
    terms = [None, None, unless_one(bias, 1), unless_one(slopes, 1), 0]
    return [split([1, 0], [1, dim, dim, *terms]) for dim in _key_heads(q, k, 1)]


def cached(q: Any, k: Tensor, table: Tensor | None, slopes: Tensor | None) -> list[Strategy]:
    """Of q (B, H, ...), caches in rows (B, S, Hkv, ...): batch or heads. Pages are every rank's."""
    rows = None if table is not None else 0
    batch = split([0, 0], [0, rows, rows, 0, 0, unless_one(slopes, 0)])
    terms = [None, None, unless_one(slopes, 1), 0]
    return [batch, *(split([1, 1], [1, dim, dim, *terms]) for dim in _key_heads(q, k, 2))]


def _key_heads(q: Any, k: Tensor, at: int) -> list[int | None]:
    """How key heads go with split query heads: each rank reads its own, or all the only one."""
    sizes = (q.device_mesh.size(i) for i, place in enumerate(q.placements) if place.is_shard(1))
    heads, found = k.shape[at], list[int | None]()
    if heads == q.shape[1] or heads % math.prod(sizes) == 0:
        found.append(at)
    if heads == 1:
        found.append(None)
    return found


def unless_one(tensor: Tensor | None, dim: int) -> int | None:
    return None if tensor is None or tensor.shape[dim] == 1 else dim
