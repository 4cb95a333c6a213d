"""The kernels of batch norm. x (N, C, L) is R = N * L rows of C columns, by strides.

Where L > 1 a tile is many rows of few columns, else few rows of many: those lie side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trilith.kernels._runtime.device import multiprocessors
from trilith.kernels._runtime.language import tl, triton
from trilith.kernels._runtime.launch import launch
from trilith.kernels._runtime.reduce import column_sum_pair
from trilith.kernels._runtime.rows import Rows, as_rows, row_offsets
from trilith.kernels._runtime.sizes import cdiv, next_power_of_2

_ELEMENTS, _WARPS = 2048, 4
_COLUMNS, _FEW_COLUMNS = 64, 2
_MOST_SHARES = 128
_MERGED_COLUMNS = 16
_PROGRAMS_PER_MULTIPROCESSOR = 6


@triton.jit
def _load(ptr, rows, cols, inner, strides, mask):
    tile = ptr + row_offsets(rows, inner, strides)[:, None] + (cols * strides[2])[None, :]
    return tl.load(tile, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _statistics_kernel(
    x_ptr, shares_ptr, x_strides, R, C, inner, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """One of P programs owns every P-th [BLOCK_R, BLOCK_C].

    shares (3, P, C) are counts, means and sums of squared differences.
    """
    pid, P = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    cols = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    count = 0.0
    mean = tl.zeros((BLOCK_C,), tl.float32)
    squares = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(pid * BLOCK_R, R, P * BLOCK_R):
        rows = start + tl.arange(0, BLOCK_R)
        mask = (rows < R)[:, None] & (cols < C)[None, :]
        x = _load(x_ptr, rows, cols, inner, x_strides, mask)
        here = tl.minimum(R - start, BLOCK_R).to(tl.float32)
        tile_mean = tl.sum(x, axis=0) / here
        tile_mean += tl.sum(tl.where(mask, x - tile_mean[None, :], 0.0), axis=0) / here
        apart = tl.where(mask, x - tile_mean[None, :], 0.0)
        change = tile_mean - mean
        mean += change * tl.div_rn(here, count + here)  # exactly 1 of the first tile's
        squares += tl.sum(apart * apart, axis=0) + change * change * (count * here / (count + here))
        count += here
    share = shares_ptr + pid * C + cols
    tl.store(share, tl.full((BLOCK_C,), 0.0, tl.float32) + count, mask=cols < C)
    tl.store(share + P * C, mean, mask=cols < C)
    tl.store(share + 2 * P * C, squares, mask=cols < C)


@triton.jit
def _merge_kernel(
    shares_ptr, mean_ptr, var_ptr, P, R, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """One program owns [P, BLOCK_C]."""
    cols = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    lanes = tl.arange(0, BLOCK_P)
    mask = (lanes < P)[:, None] & (cols < C)[None, :]
    share = shares_ptr + lanes[:, None] * C + cols[None, :]
    count = tl.load(share, mask=mask, other=0.0)
    means = tl.load(share + P * C, mask=mask, other=0.0)
    squares = tl.load(share + 2 * P * C, mask=mask, other=0.0)
    mean = tl.sum(means * (count / R), axis=0)
    mean += tl.sum((means - mean[None, :]) * (count / R), axis=0)
    apart = tl.where(mask, means - mean[None, :], 0.0)
    var = tl.sum(squares + count * apart * apart, axis=0) / R
    tl.store(mean_ptr + cols, mean, mask=cols < C)
    tl.store(var_ptr + cols, var, mask=cols < C)


@triton.jit
def _apply_kernel(
    x_ptr,
    mean_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    vector_strides,
    x_strides,
    y_strides,
    R,
    C,
    inner,
    eps,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program owns [BLOCK_R, BLOCK_C]."""
    n_blocks = tl.cdiv(C, BLOCK_C)
    rows = (tl.program_id(0) // n_blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = (tl.program_id(0) % n_blocks).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (rows < R)[:, None] & (cols < C)[None, :]
    x = _load(x_ptr, rows, cols, inner, x_strides, mask)
    mean = tl.load(mean_ptr + cols * vector_strides[0], mask=cols < C, other=0.0).to(tl.float32)
    var = tl.load(var_ptr + cols * vector_strides[1], mask=cols < C, other=1.0).to(tl.float32)
    y = (x - mean[None, :]) * (1.0 / tl.sqrt(var + tl.cast(eps, tl.float32)))[None, :]
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + cols * vector_strides[2], mask=cols < C, other=0.0)
        y *= weight.to(tl.float32)[None, :]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + cols * vector_strides[3], mask=cols < C, other=0.0)
        y += bias.to(tl.float32)[None, :]
    out = y_ptr + row_offsets(rows, inner, y_strides)[:, None] + (cols * y_strides[2])[None, :]
    tl.store(out, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sums_kernel(
    dy_ptr,
    x_ptr,
    mean_ptr,
    var_ptr,
    sums_ptr,
    vector_strides,
    dy_strides,
    x_strides,
    R,
    C,
    inner,
    eps,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One of P programs owns every P-th [BLOCK_R, BLOCK_C]; sums (2, P, C) of dy * x_hat and dy."""
    pid, P = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    cols = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean = tl.load(mean_ptr + cols * vector_strides[0], mask=cols < C, other=0.0).to(tl.float32)
    var = tl.load(var_ptr + cols * vector_strides[1], mask=cols < C, other=1.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt(var + tl.cast(eps, tl.float32))
    sum_x = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    sum_dy = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(pid * BLOCK_R, R, P * BLOCK_R):
        rows = start + tl.arange(0, BLOCK_R)
        mask = (rows < R)[:, None] & (cols < C)[None, :]
        dy = _load(dy_ptr, rows, cols, inner, dy_strides, mask)
        x = _load(x_ptr, rows, cols, inner, x_strides, mask)
        sum_x += tl.where(mask, dy * ((x - mean[None, :]) * rstd[None, :]), 0.0)
        sum_dy += dy
    tl.store(sums_ptr + pid * C + cols, tl.sum(sum_x, axis=0), mask=cols < C)
    tl.store(sums_ptr + (P + pid) * C + cols, tl.sum(sum_dy, axis=0), mask=cols < C)


@triton.jit
def _gradient_kernel(
    dy_ptr,
    x_ptr,
    mean_ptr,
    var_ptr,
    weight_ptr,
    dmean_ptr,
    dvar_ptr,
    sum_x_ptr,
    sum_dy_ptr,
    dx_ptr,
    vector_strides,
    dy_strides,
    x_strides,
    dx_strides,
    R,
    C,
    inner,
    eps,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program owns [BLOCK_R, BLOCK_C]. Without sums the statistics were given."""
    n_blocks = tl.cdiv(C, BLOCK_C)
    rows = (tl.program_id(0) // n_blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = (tl.program_id(0) % n_blocks).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (rows < R)[:, None] & (cols < C)[None, :]
    inside = cols < C
    var = tl.load(var_ptr + cols * vector_strides[1], mask=inside, other=1.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt(var + tl.cast(eps, tl.float32))
    slope = rstd
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + cols * vector_strides[2], mask=inside, other=0.0)
        slope *= weight.to(tl.float32)
    dx = _load(dy_ptr, rows, cols, inner, dy_strides, mask)
    if sum_dy_ptr is not None:
        mean = tl.load(mean_ptr + cols * vector_strides[0], mask=inside, other=0.0).to(tl.float32)
        apart = _load(x_ptr, rows, cols, inner, x_strides, mask) - mean[None, :]
        mean_dy = tl.load(sum_dy_ptr + cols, mask=inside, other=0.0) / R
        mean_x = tl.load(sum_x_ptr + cols, mask=inside, other=0.0) / R
        dx = dx - mean_dy[None, :] - apart * (rstd * mean_x)[None, :]
    dx *= slope[None, :]
    if dmean_ptr is not None:
        dmean = tl.load(dmean_ptr + cols * vector_strides[3], mask=inside, other=0.0)
        dx += (dmean / R)[None, :]
    if dvar_ptr is not None:
        dvar = tl.load(dvar_ptr + cols * vector_strides[4], mask=inside, other=0.0)
        dx += apart * (dvar * (2.0 / R))[None, :]
    out = dx_ptr + row_offsets(rows, inner, dx_strides)[:, None] + (cols * dx_strides[2])[None, :]
    tl.store(out, dx.to(dx_ptr.dtype.element_ty), mask=mask)


class _Work(NamedTuple):
    rows: Rows
    r: int
    c: int
    options: dict[str, int]

    def blocks(self) -> tuple[int, int]:
        return (
            cdiv(self.r, self.options["BLOCK_R"]),
            cdiv(self.c, self.options["BLOCK_C"]),
        )

    def shares(self) -> tuple[int, int]:
        """How many programs share a block of columns, and how many blocks there are."""
        down, across = self.blocks()
        slots = _PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(self.rows.tensors[0].device)
        return min(down, _MOST_SHARES, max(1, slots // across)), across


def _work(*tensors: Tensor) -> _Work:
    """Tensors (N, C, ...) of one shape as rows of channels; a contiguous one is never copied."""
    n, c = tensors[0].shape[:2]
    inner = tensors[0].numel() // (n * c)
    rows = as_rows(*(t.reshape(n, c, inner).transpose(1, 2) for t in tensors))
    most = _COLUMNS if inner == 1 else _FEW_COLUMNS
    block_c = min(next_power_of_2(c), most)
    block_r = min(next_power_of_2(n * inner), _ELEMENTS // block_c)
    options = {"BLOCK_R": block_r, "BLOCK_C": block_c, "num_warps": _WARPS}
    return _Work(rows, n * inner, c, options)


def _strides(*vectors: Tensor | None) -> tuple[int, ...]:
    return tuple(1 if v is None else v.stride(0) for v in vectors)


def batch_norm_statistics(x: Tensor, mean: Tensor, var: Tensor) -> None:
    """Writes each channel's mean and biased variance."""
    work = _work(x)
    grid = work.shares()
    shares = mean.new_empty((3, grid[0], work.c))
    sizes = (work.r, work.c, work.rows.inner)
    launch(
        _statistics_kernel,
        grid,
        *work.rows.tensors,
        shares,
        *work.rows.strides,
        *sizes,
        **work.options,
    )
    launch(
        _merge_kernel,
        (cdiv(work.c, _MERGED_COLUMNS),),
        shares,
        mean,
        var,
        grid[0],
        *sizes[:2],
        BLOCK_P=next_power_of_2(grid[0]),
        BLOCK_C=_MERGED_COLUMNS,
        num_warps=_WARPS,
    )


def batch_norm_apply(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    y: Tensor,
) -> None:
    """Writes the normalised x to y, which is contiguous."""
    work = _work(x, y)
    down, across = work.blocks()
    x, y = work.rows.tensors
    vectors = (mean, var, weight, bias)
    sizes = (work.r, work.c, work.rows.inner, eps)
    strides = (_strides(*vectors), *work.rows.strides)
    launch(_apply_kernel, (down * across,), x, *vectors, y, *strides, *sizes, **work.options)


def batch_norm_gradients(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    needs: Sequence[bool],
    of_statistics: tuple[Tensor | None, Tensor | None],
    training: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weight and bias; `of_statistics` are those of mean and var."""
    vectors: tuple[Any, ...] = (mean, var, weight, *of_statistics)
    dx = x.new_empty(x.shape) if needs[0] else None
    sums: tuple[Tensor | None, Tensor | None] = (None, None)
    if training or needs[1] or needs[2]:
        work = _work(dy, x)
        grid, sizes = work.shares(), (work.r, work.c, work.rows.inner, eps)
        partials = mean.new_empty((2, grid[0], work.c), dtype=torch.float32)
        read = (*work.rows.tensors, mean, var, partials)
        strides = (_strides(*vectors), *work.rows.strides)
        launch(_sums_kernel, grid, *read, *strides, *sizes, **work.options)
        sums = column_sum_pair(partials, torch.float32, torch.float32)
    if dx is not None:
        work = _work(dy, x, dx)
        (down, across), sizes = work.blocks(), (work.r, work.c, work.rows.inner, eps)
        *inputs, out = work.rows.tensors
        tensors = (*inputs, *vectors, *(sums if training else (None, None)), out)
        strides = (_strides(*vectors), *work.rows.strides)
        launch(_gradient_kernel, (down * across,), *tensors, *strides, *sizes, **work.options)
    dweight, dbias = (
        total.to(like.dtype) if need and total is not None and like is not None else None
        for total, like, need in zip(sums, (weight, bias), needs[1:], strict=True)
    )
    return dx, dweight, dbias
