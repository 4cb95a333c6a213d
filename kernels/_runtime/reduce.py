"""Column sums of per-program partial sums: the last step of every weight and bias gradient.

A backward kernel of P persistent programs writes its share of a row vector's gradient as one row of
partials (P, N) in fp32. Here the rows are added without atomics, in an order that depends on P and
the tile alone, so a gradient is the same bits each time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trilith.kernels._runtime.device import multiprocessors
from trilith.kernels._runtime.language import tl, triton
from trilith.kernels._runtime.launch import launch
from trilith.kernels._runtime.sizes import cdiv, next_power_of_2

_MAX_BLOCK_P = 64
_MIN_BLOCK_N = 8  # 8 floats are one 32-byte sector
_TILE, _WARPS = 4096, 4  # 32 sums a thread


@triton.jit
def _column_sum_kernel(
    partials_ptr, first_ptr, second_ptr, P, N, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr
):
    """One program owns [P, BLOCK_N] of one of the one or two stacked partials."""
    which = tl.program_id(1).to(tl.int64)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_p = tl.arange(0, BLOCK_P)
    columns = partials_ptr + which * P * N + offs_n[None, :]
    acc = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for start in range(0, P, BLOCK_P):
        rows = (start + offs_p).to(tl.int64)
        mask = (rows[:, None] < P) & (offs_n[None, :] < N)
        acc += tl.load(columns + rows[:, None] * N, mask=mask, other=0.0)
    total = tl.sum(acc, axis=0)
    if which == 0:
        tl.store(first_ptr + offs_n, total.to(first_ptr.dtype.element_ty), mask=offs_n < N)
    elif second_ptr is not None:
        tl.store(second_ptr + offs_n, total.to(second_ptr.dtype.element_ty), mask=offs_n < N)


def column_sum(partials: Tensor, out_dtype: torch.dtype) -> Tensor:
    """partials (P, N) fp32, contiguous -> their column sums (N,), rounded once to out_dtype."""
    total = partials.new_empty(partials.shape[-1], dtype=out_dtype)
    _reduce(partials, total, None)
    return total


def column_sum_pair(
    partials: Tensor, first_dtype: torch.dtype, second_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """partials (2, P, N) fp32, contiguous -> two column sums (N,), in one launch."""
    first = partials.new_empty(partials.shape[-1], dtype=first_dtype)
    second = partials.new_empty(partials.shape[-1], dtype=second_dtype)
    _reduce(partials, first, second)
    return first, second


def _reduce(partials: Tensor, first: Tensor, second: Tensor | None) -> None:
    p, n = partials.shape[-2:]
    block_p = min(next_power_of_2(p), _MAX_BLOCK_P)
    share = next_power_of_2(max(1, n // multiprocessors(partials.device)))
    block_n = min(max(share, _MIN_BLOCK_N), _TILE // block_p)
    grid = (cdiv(n, block_n), 1 if second is None else 2)
    launch(
        _column_sum_kernel,
        grid,
        partials,
        first,
        second,
        p,
        n,
        BLOCK_P=block_p,
        BLOCK_N=block_n,
        num_warps=_WARPS,
    )
