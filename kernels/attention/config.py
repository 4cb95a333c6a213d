"""Tile sizes by kernel, architecture, dtype class and head dim: data that measurements change."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trilith.kernels._runtime.device import architecture
from trilith.plugins.spec import INTERPRETING


class Tiles(NamedTuple):
    """A program's queries and keys; the loop's side of them in masked tiles; warps and stages."""

    block_m: int
    block_n: int
    block_masked: int
    num_warps: int
    num_stages: int


_INTERPRETED = Tiles(32, 32, 16, 4, 1)
_CACHE_BYTES = 24 << 20

_TABLE: dict[tuple[str, str, str, int], Tiles] = {}


def tiles_for(kernel: str, q: Tensor, block_d: int, block_dv: int) -> Tiles:
    """The tiles of `kernel` (fwd, dkdv, dq, dbias) for q's device and dtype."""
    if INTERPRETING and q.device.type == "cpu":
        return _INTERPRETED
    dtype_class = "single" if q.dtype == torch.float32 else "half"
    head_dim = max(64, block_d, block_dv)
    return _TABLE[kernel, architecture(q.device), dtype_class, head_dim]


def heads_together(first: Tensor, second: Tensor, group: int = 1) -> int:
    """How many heads, or groups of them, have both their matrices in the last-level cache."""
    head_bytes = first.shape[2] * (first.shape[3] + second.shape[3]) * first.element_size()
    return max(1, _CACHE_BYTES // (head_bytes * group))
