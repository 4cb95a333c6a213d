"""Rows: how kernels that reduce over the last dimension address and tile a tensor (..., N).

The M = numel / N rows are numbered in row-major order of the leading dimensions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trilith.kernels._runtime.device import multiprocessors
from trilith.kernels._runtime.language import tl, triton
from trilith.kernels._runtime.sizes import cdiv, next_power_of_2

_WARP = 32
_FEW_ELEMENTS = 1024  # rows shorter than this share a program


class RowTile(NamedTuple):
    block_m: int
    block_n: int
    num_warps: int


def row_tile(n: int, *, per_thread: int, max_warps: int) -> RowTile:
    """The tile [block_m, block_n] that holds rows of n whole, about `per_thread` elements a thread.

    16-byte loads of two-byte elements need 8 elements of a row in each thread, that is block_n >=
    256 * num_warps: `per_thread` of 8 and more allows them. Short rows share a program.
    """
    block_n = next_power_of_2(n)
    block_m = max(1, _FEW_ELEMENTS // block_n)
    num_warps = min(max(block_m * block_n // (_WARP * per_thread), 1), max_warps)
    return RowTile(block_m, block_n, num_warps)


def persistent_programs(
    m: int, tile: RowTile, resident: int, device: torch.device, splits: int = 1
) -> int:
    """How many programs share m rows, when each row is split over `splits` programs.

    `resident` of them run on a multiprocessor.
    """
    return min(cdiv(m, tile.block_m), cdiv(resident * multiprocessors(device), splits))


class Rows(NamedTuple):
    """Tensors of one shape (..., N), each addressed as (M / inner, inner, N) by its strides.

    `inner` is 1 wherever one stride steps from row to row, which costs the kernel no division.
    """

    inner: int
    tensors: tuple[Tensor, ...]
    strides: tuple[tuple[int, int, int], ...]


def as_rows(*tensors: Tensor) -> Rows:
    """Address tensors of one shape as rows; copies one only if its strides don't allow it."""
    steps = [step for step in map(_row_step, tensors) if step is not None]
    if len(steps) == len(tensors):
        single = tuple((s, 0, t.stride(-1)) for s, t in zip(steps, tensors, strict=True))
        return Rows(1, tensors, single)
    inner, n = tensors[0].shape[-2:]
    views = tuple(t.reshape(-1, inner, n) for t in tensors)
    return Rows(inner, views, tuple((v.stride(0), v.stride(1), v.stride(2)) for v in views))


def _row_step(x: Tensor) -> int | None:
    """The step from one row to the next, or None if there is no single one."""
    if x.is_contiguous():
        return x.shape[-1]
    step, rows = 0, 1
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if rows == 1:
            step = stride
        elif stride != step * rows:
            return None
        rows *= size
    return step


@triton.jit
def row_offsets(rows, inner, strides):
    """Where the given rows of a tensor addressed by `as_rows` begin, in elements, int64."""
    rows = rows.to(tl.int64)
    outer = rows // inner
    return outer * strides[0] + (rows - outer * inner) * strides[1]


@triton.jit
def row_sums(a, b):
    """Sums of the rows of two tiles [BLOCK_M, BLOCK_N], as [BLOCK_M, 1].

    Warps exchange both at once: two reductions one after the other wait twice.
    """
    return tl.reduce((a, b), 1, _add_pairs, keep_dims=True)


@triton.jit
def _add_pairs(a, b, more_a, more_b):
    return a + more_a, b + more_b
