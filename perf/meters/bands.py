"""How much of the other side's rows attention's programs go through, of all that there are.

Counted by running the kernels' own `band_range` for every program of a launch: a loop loads each
row between its bounds once, in whole tiles. It takes no tensors, so lengths can be real ones.
"""

from __future__ import annotations

from typing import Any

import torch

from trilith.kernels._runtime.language import tl, triton
from trilith.kernels.attention.config import Tiles
from trilith.kernels.attention.tables import TABLES
from trilith.kernels.attention.tiles import band_range


@triton.jit
def _rows_read_kernel(
    rows_ptr: Any,
    length: Any,
    low: Any,
    high: Any,
    OWN: tl.constexpr,
    LOOP: tl.constexpr,
    LOOP_MASKED: tl.constexpr,
    HAS_LOW: tl.constexpr,
    HAS_HIGH: tl.constexpr,
) -> None:
    """One program owns the number of rows that the loops of one tile of OWN rows load."""
    pid = tl.program_id(0)
    start = pid * OWN
    stop = tl.minimum(start + OWN, length)
    begin, full_begin, full_end, end = band_range(
        start, stop, length, low, high, HAS_LOW, HAS_HIGH, LOOP
    )
    before = tl.minimum(tl.cdiv(full_begin - begin, LOOP_MASKED) * LOOP_MASKED, length - begin)
    after = tl.minimum(tl.cdiv(end - full_end, LOOP_MASKED) * LOOP_MASKED, length - full_end)
    if not HAS_LOW:
        before = 0
    tl.store(rows_ptr + pid, before + (full_end - full_begin) + after)


def share_read(kernel: str, length: int, left: int, right: int, arch: str = "sm_90") -> float:
    """Of `length` positions attending to themselves, 16-bit, with head dim 128."""
    tiles = Tiles(*TABLES[arch]["half"][kernel, 128][0])
    own, loop, low, high = tiles.block_m, tiles.block_n, -left, right
    has_low, has_high = left >= 0, right >= 0
    if kernel == "dkdv":
        own, loop, low, high = loop, own, -right, left
        has_low, has_high = has_high, has_low
    programs = triton.cdiv(length, own)
    rows = torch.zeros(programs, dtype=torch.int32)
    _rows_read_kernel[(programs,)](
        *(rows, length, low, high, own, loop, tiles.block_masked, has_low, has_high)
    )
    return rows.sum().item() / (programs * length)
