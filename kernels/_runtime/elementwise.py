"""Tiles of elementwise kernels: a tensor (..., N) as M rows of N columns, or as one long row.

Programs are numbered along a single grid axis, columns first. A tensor without gaps whose columns
need no telling apart is one row of M * N elements.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trilith.kernels._runtime.device import multiprocessors
from trilith.kernels._runtime.language import tl, triton
from trilith.kernels._runtime.random import keep_mask, reference_keep_mask
from trilith.kernels._runtime.rows import as_rows, row_offsets
from trilith.kernels._runtime.sizes import cdiv, next_power_of_2

NUM_WARPS = 4
_FLAT_COLUMNS, _COLUMNS, _SUMMED_COLUMNS, _STRIDED_COLUMNS = 2048, 512, 128, 32
_PROGRAMS_PER_MULTIPROCESSOR = 6
_SUMMING_PROGRAMS_PER_MULTIPROCESSOR = 16


class Plane(NamedTuple):
    """Tensors of one shape as (M, N), each addressed by its strides as in `as_rows`."""

    tensors: tuple[Tensor, ...]
    strides: tuple[tuple[int, int, int], ...]
    m: int
    n: int
    inner: int
    align: int

    def tile(self, elements: int, *, summed: bool = False) -> dict[str, int]:
        """BLOCK_M and BLOCK_N of about `elements`; `summed` if the kernel sums over rows."""
        widest = _FLAT_COLUMNS if self.m == 1 else _COLUMNS
        if summed:
            widest = _SUMMED_COLUMNS  # few enough that the partial sums stay small
        if any(s[2] not in (0, 1) for s in self.strides):
            widest = _STRIDED_COLUMNS  # such a tensor may have its rows side by side
        block_n = max(16, min(next_power_of_2(self.n), widest))
        block_m = min(max(1, elements // block_n), next_power_of_2(self.m))
        return {"BLOCK_M": block_m, "BLOCK_N": block_n}

    def programs(self, tile: dict[str, int]) -> int:
        return cdiv(self.m, tile["BLOCK_M"]) * cdiv(self.n, tile["BLOCK_N"])

    def resident_programs(self, tile: dict[str, int]) -> int:
        """How many programs share all tiles, so that all of them run at a time."""
        slots = _PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(self.tensors[0].device)
        return min(self.programs(tile), slots)

    def row_programs(self, tile: dict[str, int]) -> int:
        """How many programs share a column block, so that all of them run at a time."""
        slots = _SUMMING_PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(self.tensors[0].device)
        most = max(1, slots // cdiv(self.n, tile["BLOCK_N"]))
        return min(cdiv(self.m, tile["BLOCK_M"]), most)


def as_plane(*tensors: Tensor, columns: bool, p: float = 0.0) -> Plane:
    """Address tensors of one shape; as one long row if they allow it.

    Args:
        columns: whether the kernel needs to know an element's column.
        p: with dropout, quads must not straddle rows.
    """
    shape = tensors[0].shape
    n = shape[-1] if shape else 1
    numel = tensors[0].numel()
    if not columns and (p == 0.0 or n % 4 == 0) and all(t.is_contiguous() for t in tensors):
        strides = ((0, 0, 1),) * len(tensors)
        return Plane(tensors, strides, 1, numel, 1, _alignment(numel))
    rows = as_rows(*(t if shape else t.reshape(1) for t in tensors))
    steps = [step for s in rows.strides for step in s[:2]]
    return Plane(rows.tensors, rows.strides, numel // n, n, rows.inner, _alignment(n, *steps))


def _alignment(*sizes: int) -> int:
    """8 where each row begins at a multiple of 8 elements, so that loads can be 16 bytes wide."""
    return 8 if all(size % 8 == 0 for size in sizes) else 1


def keep_scale(p: float) -> float:
    """What kept elements are multiplied by: 1 / (1 - p), and 0 where nothing is kept."""
    return 1.0 / (1.0 - p) if p < 1.0 else 0.0


def require_seed(op: str, seed: Tensor | None, p: float) -> None:
    if seed is None and p > 0.0:
        raise ValueError(f"{op}: seed must be given where p > 0, got None; draw_seed(x) makes one")


def reference_dropout(x: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """Dropout in plain PyTorch, with the kernels' mask where there is a seed. Dropped means 0."""
    if p == 0.0:
        return x
    if seed is None and p < 1.0:
        return F.dropout(x, p)
    keep = torch.zeros((), dtype=torch.bool, device=x.device)
    if seed is not None:
        keep = reference_keep_mask(seed, x.shape or (1,), p).reshape(x.shape)
    return torch.where(keep, x * keep_scale(p), 0.0)


@triton.jit
def tile_rows(pid_m, BLOCK_M: tl.constexpr):
    return pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)


@triton.jit
def offsets(rows, cols, inner, strides, ALIGN: tl.constexpr):
    """Where elements [BLOCK_M, BLOCK_N] of a tensor in a Plane lie."""
    starts = row_offsets(rows, inner, strides) // ALIGN * ALIGN  # says so to the compiler
    return starts[:, None] + (cols * strides[2])[None, :]


@triton.jit
def drop(value, seed_ptr, rows, first_col, N, p, scale):
    """value [BLOCK_M, BLOCK_N], whose columns begin at first_col, after dropout."""
    quads: tl.constexpr = value.shape[1] // 4
    lanes = first_col // 4 + tl.arange(0, quads)
    keep = keep_mask(seed_ptr, rows[:, None] * tl.cdiv(N, 4) + lanes[None, :], p)
    return tl.where(keep, value, 0.0) * scale
