"""Forward of layer_norm and rms_norm: a null `mean_ptr` asks for the RMS norm.

M rows of N elements. The variance is the mean of squared differences from the mean, and the mean is
corrected by what the differences sum to: its rounding would show in rows of one large value. A row
that fits on chip is read once. A longer one is read twice: each lane keeps a running mean and sum
of squared differences (Welford), which are merged at the end.

Source: Welford, "Note on a method for calculating corrected sums of squares and products", 1962.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trilith.kernels._runtime.elementwise import drop, keep_scale
from trilith.kernels._runtime.language import tl, triton
from trilith.kernels._runtime.launch import launch
from trilith.kernels._runtime.rows import as_rows, row_offsets, row_tile
from trilith.kernels._runtime.sizes import cdiv

QUAD = 4  # columns that dropout's random numbers come in
_RESIDENT_N = 16384  # 32 elements a thread in 16 warps
_LOOPED_N, _LOOPED_WARPS = 8192, 16
_DROPPING_LOOPED_N, _DROPPING_LOOPED_WARPS = 4096, 8  # with the above they spill 24 bytes


@triton.jit
def _norm_fwd_kernel(
    x_ptr,
    residual_ptr,
    seed_ptr,
    weight_ptr,
    bias_ptr,
    sum_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    x_strides,
    residual_strides,
    weight_stride,
    bias_stride,
    M,
    N,
    inner,
    eps,
    p,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program owns [BLOCK_M, N]."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N).to(tl.int64)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    x_offsets = row_offsets(rows, inner, x_strides)[:, None] + (cols * x_strides[2])[None, :]
    x = tl.load(x_ptr + x_offsets, mask=mask, other=0.0).to(tl.float32)
    y_offsets = rows[:, None] * N + cols[None, :]
    if residual_ptr is not None:
        residual = residual_ptr + row_offsets(rows, inner, residual_strides)[:, None]
        residual = tl.load(residual + (cols * residual_strides[2])[None, :], mask=mask, other=0.0)
        x = _residual_sum(x, residual, seed_ptr, rows, 0, N, p, scale)
        tl.store(sum_ptr + y_offsets, x.to(sum_ptr.dtype.element_ty), mask=mask)
        x = x.to(sum_ptr.dtype.element_ty).to(tl.float32)  # what backward will see
    if mean_ptr is not None:
        mean = tl.sum(x, axis=1) / N
        x = tl.where(mask, x - mean[:, None], 0.0)
        rounding = tl.sum(x, axis=1) / N
        x = tl.where(mask, x - rounding[:, None], 0.0)
        tl.store(mean_ptr + rows, mean + rounding, mask=rows < M)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / N + tl.cast(eps, tl.float32))
    tl.store(rstd_ptr + rows, rstd, mask=rows < M)
    y = x * rstd[:, None]
    y = affine(y, weight_ptr, bias_ptr, cols[None, :], weight_stride, bias_stride, N)
    tl.store(y_ptr + y_offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _residual_sum(x, residual, seed_ptr, rows, first_col, N, p, scale):
    if seed_ptr is not None:
        x = drop(x, seed_ptr, rows, first_col, N, p, scale)
    return x + residual.to(tl.float32)


@triton.jit
def affine(y, weight_ptr, bias_ptr, cols, weight_stride, bias_stride, N):
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + cols * weight_stride, mask=cols < N, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + cols * bias_stride, mask=cols < N, other=0.0).to(tl.float32)
    return y


@triton.jit
def _norm_fwd_looped_kernel(
    x_ptr,
    residual_ptr,
    seed_ptr,
    weight_ptr,
    bias_ptr,
    sum_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    x_strides,
    residual_strides,
    weight_stride,
    bias_stride,
    N,
    inner,
    eps,
    p,
    scale,
    BLOCK_N: tl.constexpr,
):
    """One program owns one row, and reads it twice, BLOCK_N columns at a time.

    Of a sum, the second time is from `sum_ptr`, where the first one wrote it.
    """
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row_offsets(row, inner, x_strides)
    if residual_ptr is not None:
        residual_ptr += row_offsets(row, inner, residual_strides)
        sum_ptr += row * N
    lanes = tl.arange(0, BLOCK_N).to(tl.int64)
    lane_mean = tl.zeros((BLOCK_N,), tl.float32)
    lane_squares = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, N, BLOCK_N):
        cols = start + lanes
        x = tl.load(x_ptr + cols * x_strides[2], mask=cols < N, other=0.0).to(tl.float32)
        if residual_ptr is not None:
            residual = residual_ptr + cols * residual_strides[2]
            residual = tl.load(residual, mask=cols < N, other=0.0)[None, :]
            rows = row + tl.arange(0, 1)
            x = _residual_sum(x[None, :], residual, seed_ptr, rows, start, N, p, scale)
            x = tl.reshape(x, (BLOCK_N,))
            tl.store(sum_ptr + cols, x.to(sum_ptr.dtype.element_ty), mask=cols < N)
            x = x.to(sum_ptr.dtype.element_ty).to(tl.float32)
        if mean_ptr is not None:
            change = tl.where(cols < N, x - lane_mean, 0.0)
            lane_mean += change * (1.0 / (start // BLOCK_N + 1))
            lane_squares += change * (x - lane_mean)
        else:
            lane_squares += x * x
    mean = 0.0
    if mean_ptr is not None:
        lane_count = tl.maximum((N - lanes + BLOCK_N - 1) // BLOCK_N, 0).to(tl.float32)
        mean = tl.sum(lane_mean * lane_count) / N
        mean += tl.sum((lane_mean - mean) * lane_count) / N
        lane_squares += lane_count * (lane_mean - mean) * (lane_mean - mean)
        tl.store(mean_ptr + row, mean)
    rstd = 1.0 / tl.sqrt(tl.sum(lane_squares) / N + tl.cast(eps, tl.float32))
    tl.store(rstd_ptr + row, rstd)
    y_ptr += row * N
    if residual_ptr is not None:
        tl.debug_barrier()  # a lane may read what another one wrote
    for start in range(0, N, BLOCK_N):
        cols = start + lanes
        if residual_ptr is not None:
            x = tl.load(sum_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
        else:
            x = tl.load(x_ptr + cols * x_strides[2], mask=cols < N, other=0.0).to(tl.float32)
        y = affine((x - mean) * rstd, weight_ptr, bias_ptr, cols, weight_stride, bias_stride, N)
        tl.store(y_ptr + cols, y.to(y_ptr.dtype.element_ty), mask=cols < N)


@dataclass(frozen=True)
class Added:
    """What a norm's forward adds up first: summed = residual + dropout(x)."""

    residual: Tensor
    summed: Tensor
    seed: Tensor | None
    p: float


def norm_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    y: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    added: Added | None = None,
) -> None:
    n = x.shape[-1]
    m = x.numel() // n
    rows, residual, seed, summed, p = as_rows(x), None, None, None, 0.0
    if added is not None:
        rows, seed, summed, p = as_rows(x, added.residual), added.seed, added.summed, added.p
        residual = rows.tensors[1]
    tensors = (rows.tensors[0], residual, seed, weight, bias, summed, y, mean, rstd)
    strides = (rows.strides[0], rows.strides[-1], stride_of(weight), stride_of(bias))
    dropout = (p, keep_scale(p))
    if n > _RESIDENT_N:
        block_n, warps = (_LOOPED_N, _LOOPED_WARPS)
        if p:
            block_n, warps = (_DROPPING_LOOPED_N, _DROPPING_LOOPED_WARPS)
        options = {"BLOCK_N": block_n, "num_warps": warps}
        sizes = (n, rows.inner, eps, *dropout)
        launch(_norm_fwd_looped_kernel, (m,), *tensors, *strides, *sizes, **options)
        return
    tile = row_tile(max(n, QUAD if p else 1), per_thread=16 if p else 32, max_warps=16)
    launch(
        _norm_fwd_kernel,
        (cdiv(m, tile.block_m),),
        *tensors,
        *strides,
        m,
        n,
        rows.inner,
        eps,
        *dropout,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        num_warps=tile.num_warps,
    )


def stride_of(vector: Tensor | None) -> int:
    return 1 if vector is None else vector.stride(0)
