"""Which entry of the launch tables a call takes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trilith.kernels._runtime.device import architecture
from trilith.kernels.attention.tables import TABLES
from trilith.plugins.spec import INTERPRETING

LARGEST_HEAD_DIM = 512


class Tiles(NamedTuple):
    """A program's queries and keys; the loop's side of them in masked tiles; warps and stages.

    A program makes its scores of `chunk` head dims at a time, and owns as many of its output.
    """

    block_m: int
    block_n: int
    block_masked: int
    num_warps: int
    num_stages: int
    chunk: int = LARGEST_HEAD_DIM


_INTERPRETED = Tiles(32, 32, 16, 4, 1, 128)
_CACHE_BYTES = 24 << 20


def tiles_for(kernel: str, q: Tensor, precision: str, head_dim: int, is_plain: bool) -> Tiles:
    """The tiles of `kernel` (fwd, dkdv, dq, dbias) for q's device and dtype.

    `head_dim` is the wider of both, a power of two. With tf32 a row takes the bytes, and the matrix
    instructions, of a 16-bit row twice as long, more registers: never tiles for plain scores.
    """
    if INTERPRETING and q.device.type == "cpu":
        return _INTERPRETED
    head_dim = max(64, head_dim)
    is_single = q.dtype == torch.float32 and precision == "ieee"
    is_tf32 = q.dtype == torch.float32 and not is_single
    if is_tf32:
        head_dim = min(2 * head_dim, LARGEST_HEAD_DIM)
    table = TABLES[architecture(q.device)]["single" if is_single else "half"]
    plain, laden = table[kernel, head_dim]
    is_plain &= not is_tf32
    tiles = Tiles(*(plain if is_plain and plain is not None else laden))
    return tiles._replace(chunk=tiles.chunk // 2) if is_tf32 else tiles


def heads_together(first: Tensor, second: Tensor, group: int = 1) -> int:
    """How many heads, or groups of them, have both their matrices in the last-level cache."""
    head_bytes = first.shape[2] * (first.shape[3] + second.shape[3]) * first.element_size()
    return max(1, _CACHE_BYTES // (head_bytes * group))
