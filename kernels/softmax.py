"""Softmax and its logarithm over one dimension of N elements.

    softmax      y = exp(x - max(x)) / sum(exp(x - max(x)))    dx = y * (dy - sum(dy * y))
    log_softmax  y = x - max(x) - log(sum(exp(x - max(x))))    dx = dy - exp(y) * sum(dy)

x (..., N, ...). Saved for backward: x, and each row's maximum and sum in fp32; y is made again from
them, unrounded: a bfloat16 y, saved instead, puts gradients up to 100 times further off than one
rounding, and under autocast y is twice as large as x. Rows that fit on chip are read once. Longer
ones, and rows that lie across memory, are read twice: a running maximum and sum first, then the
result.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from trilith.kernels._runtime.checks import require_floating, require_tensors
from trilith.kernels._runtime.elementary import exp
from trilith.kernels._runtime.language import tl, triton
from trilith.kernels._runtime.launch import launch
from trilith.kernels._runtime.plan import planned
from trilith.kernels._runtime.rows import Rows, as_rows, row_offsets, row_tile
from trilith.kernels._runtime.sharding import Strategy, split
from trilith.kernels._runtime.sizes import cdiv, next_power_of_2
from trilith.plugins import BackwardContext, Cost, Op, OpSpec, Sample
from trilith.plugins.autocast import autocasts

__all__ = ["log_softmax", "softmax"]

_FWD_RESIDENT_N, _BWD_RESIDENT_N = 16384, 8192
_LOOPED_N, _LOOPED_WARPS = 4096, 8
_ACROSS_M, _ACROSS_N, _ACROSS_WARPS = 64, 64, 8  # rows side by side in memory


@triton.jit
def _softmax_fwd_kernel(
    x_ptr,
    y_ptr,
    peak_ptr,
    total_ptr,
    x_strides,
    y_strides,
    M,
    N,
    inner,
    LOG: tl.constexpr,
    RESIDENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program owns [BLOCK_M, N]."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (rows < M)[:, None]
    lanes = tl.arange(0, BLOCK_N).to(tl.int64)[None, :]
    x_rows = x_ptr + row_offsets(rows, inner, x_strides)[:, None]
    y_rows = y_ptr + row_offsets(rows, inner, y_strides)[:, None]
    if RESIDENT:
        mask = inside & (lanes < N)
        x = tl.load(x_rows + lanes * x_strides[2], mask=mask, other=float("-inf")).to(tl.float32)
        peak = tl.max(x, axis=1)
        e = tl.where(mask, exp(x - peak[:, None]), 0.0)
        total = tl.sum(e, axis=1)
        y = e / total[:, None]
        if LOG:
            y = x - peak[:, None] - tl.log(total)[:, None]
        tl.store(y_rows + lanes * y_strides[2], y.to(y_ptr.dtype.element_ty), mask=mask)
    else:
        peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, N, BLOCK_N):
            cols = start + lanes
            mask = inside & (cols < N)
            x = tl.load(x_rows + cols * x_strides[2], mask=mask, other=float("-inf"))
            x = x.to(tl.float32)
            top = tl.maximum(peak, tl.max(x, axis=1))
            safe = tl.where(top == float("-inf"), 0.0, top)
            sums = sums * exp(peak - safe)[:, None] + exp(x - safe[:, None])
            peak = top
        total = tl.sum(sums, axis=1)
        for start in range(0, N, BLOCK_N):
            cols = start + lanes
            mask = inside & (cols < N)
            x = tl.load(x_rows + cols * x_strides[2], mask=mask, other=0.0).to(tl.float32)
            y = x - peak[:, None]
            y = y - tl.log(total)[:, None] if LOG else exp(y) / total[:, None]
            tl.store(y_rows + cols * y_strides[2], y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(peak_ptr + rows, peak, mask=rows < M)
    tl.store(total_ptr + rows, total, mask=rows < M)


@triton.jit
def _load_tile(dy_rows, x_rows, cols, dy_strides, x_strides, peak, total, mask):
    """dy and softmax(x) in fp32."""
    dy = tl.load(dy_rows + cols * dy_strides[2], mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_rows + cols * x_strides[2], mask=mask, other=float("-inf")).to(tl.float32)
    p = exp(x - peak[:, None]) / total[:, None]
    return dy, tl.where(mask, p, 0.0)


@triton.jit
def _softmax_bwd_kernel(
    dy_ptr,
    x_ptr,
    peak_ptr,
    total_ptr,
    dx_ptr,
    dy_strides,
    x_strides,
    dx_strides,
    M,
    N,
    inner,
    LOG: tl.constexpr,
    RESIDENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program owns [BLOCK_M, N]."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (rows < M)[:, None]
    lanes = tl.arange(0, BLOCK_N).to(tl.int64)[None, :]
    dy_rows = dy_ptr + row_offsets(rows, inner, dy_strides)[:, None]
    x_rows = x_ptr + row_offsets(rows, inner, x_strides)[:, None]
    dx_rows = dx_ptr + row_offsets(rows, inner, dx_strides)[:, None]
    peak = tl.load(peak_ptr + rows, mask=rows < M, other=0.0)
    total = tl.load(total_ptr + rows, mask=rows < M, other=1.0)
    if RESIDENT:
        mask = inside & (lanes < N)
        dy, p = _load_tile(dy_rows, x_rows, lanes, dy_strides, x_strides, peak, total, mask)
        if LOG:
            dx = dy - p * tl.sum(dy, axis=1)[:, None]
        else:
            dx = p * (dy - tl.sum(dy * p, axis=1)[:, None])
        tl.store(dx_rows + lanes * dx_strides[2], dx.to(dx_ptr.dtype.element_ty), mask=mask)
    else:
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, N, BLOCK_N):
            cols = start + lanes
            mask = inside & (cols < N)
            if LOG:
                dy = tl.load(dy_rows + cols * dy_strides[2], mask=mask, other=0.0)
                sums += dy.to(tl.float32)
            else:
                dy, p = _load_tile(dy_rows, x_rows, cols, dy_strides, x_strides, peak, total, mask)
                sums += dy * p
        sum_dy = tl.sum(sums, axis=1)[:, None]
        for start in range(0, N, BLOCK_N):
            cols = start + lanes
            mask = inside & (cols < N)
            dy, p = _load_tile(dy_rows, x_rows, cols, dy_strides, x_strides, peak, total, mask)
            dx = dy - p * sum_dy if LOG else p * (dy - sum_dy)
            tl.store(dx_rows + cols * dx_strides[2], dx.to(dx_ptr.dtype.element_ty), mask=mask)


class _Work(NamedTuple):
    """Tensors as M rows of N, and how they are tiled."""

    rows: Rows
    m: int
    n: int
    options: dict[str, int]


def _work(dim: int, resident_n: int, out: Tensor, *inputs: Tensor) -> _Work:
    """Rows along `dim` of inputs, then of the contiguous `out`, which is never copied."""
    n = out.shape[dim]
    if dim == out.dim() - 1:
        rows = as_rows(*inputs, out)
    else:
        shape = (-1, n, out[(0,) * (dim + 1)].numel())
        rows = as_rows(*(t.reshape(shape).transpose(1, 2) for t in (*inputs, out)))
    if dim < out.dim() - 1:
        block_n = min(next_power_of_2(n), _ACROSS_N)
        tile = (block_n >= n, _ACROSS_M, block_n, _ACROSS_WARPS)
    elif n <= resident_n:
        tile = (True, *row_tile(n, per_thread=16, max_warps=16))
    else:
        tile = (False, 1, _LOOPED_N, _LOOPED_WARPS)
    names = ("RESIDENT", "BLOCK_M", "BLOCK_N", "num_warps")
    return _Work(rows, out.numel() // n, n, dict(zip(names, tile, strict=True)))


def _softmax_out(x: Tensor, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.numel() // max(1, x.shape[dim])
    peak = x.new_empty(rows, dtype=torch.float32)
    return x.new_empty(x.shape, dtype=dtype), peak, peak.new_empty(peak.shape)


def _forward(
    x: Tensor, dim: int, dtype: torch.dtype, *, log: bool
) -> tuple[Tensor, Tensor, Tensor]:
    y, peak, total = _softmax_out(x, dim, dtype)
    work = _work(dim, _FWD_RESIDENT_N, y, x)
    (x, y_view), (x_strides, y_strides) = work.rows.tensors, work.rows.strides
    grid = (cdiv(work.m, work.options["BLOCK_M"]),)
    sizes = (work.m, work.n, work.rows.inner)
    tensors = (x, y_view, peak, total)
    launch(
        _softmax_fwd_kernel, grid, *tensors, x_strides, y_strides, *sizes, LOG=log, **work.options
    )
    return y, peak, total


def _backward(ctx: BackwardContext, dy: Tensor, *, log: bool) -> tuple[Tensor]:
    x, dim, _ = ctx.inputs
    dx = x.new_empty(x.shape)
    work = _work(dim, _BWD_RESIDENT_N, dx, dy, x)
    dy_view, x_view, dx_view = work.rows.tensors
    grid = (cdiv(work.m, work.options["BLOCK_M"]),)
    sizes = (work.m, work.n, work.rows.inner)
    tensors = (dy_view, x_view, *ctx.aux, dx_view)
    launch(_softmax_bwd_kernel, grid, *tensors, *work.rows.strides, *sizes, LOG=log, **work.options)
    return (dx,)


@planned
def _softmax_fwd(x: Tensor, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(x, dim, dtype, log=False)


@planned
def _softmax_bwd(ctx: BackwardContext, dy: Tensor) -> tuple[Tensor]:
    return _backward(ctx, dy, log=False)


@planned
def _log_softmax_fwd(x: Tensor, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(x, dim, dtype, log=True)


@planned
def _log_softmax_bwd(ctx: BackwardContext, dy: Tensor) -> tuple[Tensor]:
    return _backward(ctx, dy, log=True)


def _softmax_reference(x: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """torch.softmax in float32 (float64 for float64), rounded once to dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.softmax(x.to(wide), dim).to(torch.promote_types(x.dtype, dtype))


def _log_softmax_reference(x: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """torch.log_softmax in float32 (float64 for float64), rounded once to dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.log_softmax(x.to(wide), dim).to(torch.promote_types(x.dtype, dtype))


def _softmax_samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    yield Sample(randn(7, 33), 1, dtype)
    yield Sample(randn(2, 3, 130), 2, torch.promote_types(dtype, torch.float32))
    yield Sample(randn(3, 70, 5), 1, dtype)
    yield Sample(randn(4, 3, 20).transpose(0, 1), 0, dtype)
    yield Sample(randn(40, 6).t(), 1, dtype)
    yield Sample(randn(5), 0, dtype)


def _softmax_cost(x: Tensor, dim: int, dtype: torch.dtype) -> Cost:
    data, rows = x.numel() * x.element_size(), x.numel() // max(1, x.shape[dim])
    y = x.numel() * dtype.itemsize
    return Cost(data + y + 8 * rows, 2 * data + y + 8 * rows, 5 * x.numel(), 6 * x.numel())


def _softmax_sharding(x: Tensor, dim: int) -> list[Strategy]:
    return [split([other], [other]) for other in range(x.ndim) if other != dim % x.ndim]


SOFTMAX = Op(
    OpSpec(
        name="trilith::softmax",
        forward=_softmax_fwd,
        backward=_softmax_bwd,
        reference=_softmax_reference,
        samples=_softmax_samples,
        fake=_softmax_out,
        cost=_softmax_cost,
        sharding=_softmax_sharding,
        save_outputs=False,
    )
)
LOG_SOFTMAX = Op(
    OpSpec(
        name="trilith::log_softmax",
        forward=_log_softmax_fwd,
        backward=_log_softmax_bwd,
        reference=_log_softmax_reference,
        samples=_softmax_samples,
        fake=_softmax_out,
        cost=_softmax_cost,
        sharding=_softmax_sharding,
        save_outputs=False,
    )
)


def softmax(input: Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    """exp(x) / sum(exp(x)) over one dimension, as torch.softmax.

    Args:
        input: any shape and strides, floating-point (anything, if dtype is given).
        dim: the dimension that sums to one, of any length.
        dtype: input is converted to it first; None keeps input's.

    Returns:
        A contiguous tensor of input's shape, in dtype; under autocast float32 (or float64).

    Raises:
        IndexError: dim is out of range; as torch.
        TypeError: input is not floating-point and no dtype is given.

    Numerics: fp32 after subtracting the maximum, one rounding. A row of -inf alone is NaN.

    Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.

    Example:
        >>> softmax(torch.zeros(2, 4))[0]
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    return _over_dim(SOFTMAX, "softmax", input, dim, dtype)


def log_softmax(input: Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    """x - log(sum(exp(x))) over one dimension, as torch.log_softmax.

    Args:
        input: any shape and strides, floating-point (anything, if dtype is given).
        dim: the dimension whose exponentials sum to one, of any length.
        dtype: input is converted to it first; None keeps input's.

    Returns:
        A contiguous tensor of input's shape, in dtype; under autocast float32 (or float64).

    Raises:
        IndexError: dim is out of range; as torch.
        TypeError: input is not floating-point and no dtype is given.

    Numerics: fp32 after subtracting the maximum, one rounding. A row of -inf alone is NaN.

    Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.

    Example:
        >>> log_softmax(torch.zeros(2, 1))[0]
        tensor([0.])
    """
    return _over_dim(LOG_SOFTMAX, "log_softmax", input, dim, dtype)


def _over_dim(op: Op, name: str, input: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
    require_tensors(name, input=input)
    dims = max(1, input.dim())
    if not -dims <= dim < dims:
        raise IndexError(f"{name}: dim must be in [{-dims}, {dims - 1}], got {dim}")
    if dtype is None:
        require_floating(name, input=input)
        dtype = input.dtype
        if autocasts(input):
            dtype = torch.promote_types(dtype, torch.float32)
    widens = input.is_floating_point() and dtype == torch.float32 != input.dtype
    if not widens or input.dtype == torch.float64:  # else the kernel converts as it loads
        input = input.to(dtype)
    y = op(input if input.dim() else input.reshape(1), dim % dims, dtype)
    return y if input.dim() else y.reshape(())
