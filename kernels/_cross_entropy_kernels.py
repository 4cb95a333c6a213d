"""Kernels of cross-entropy over rows of logits, and the maths of logits that they are made of.

The forward kernel reads each row once and keeps lse = log(sum(exp(y))) in two parts, `peak` =
max(y) and `log_sum` = lse - peak: logits far from zero lose nothing. Where the model is sure of the
label, `log_sum` and p - 1 come from the sum over the other classes, never from a difference of
nearly equal numbers.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trilith.kernels._runtime.elementary import exp, expm1, log1p
from trilith.kernels._runtime.functors import ACTIVATIONS
from trilith.kernels._runtime.language import tl, triton
from trilith.kernels._runtime.rows import RowTile, row_offsets, row_tile
from trilith.kernels._runtime.sizes import next_power_of_2

_STRIDED_TILE, _STRIDED_WARPS = (16, 64), 4
_tanh, _tanh_grad = ACTIVATIONS["tanh"].f, ACTIVATIONS["tanh"].df


def class_strides(x: Tensor) -> tuple[int, int, int]:
    """Steps of logits (N, C) or (N, C, D): from sample to sample, within one, over classes."""
    return x.stride(0), x.stride(2) if x.dim() == 3 else 0, x.stride(1)


def logits_tile(x: Tensor, widest: int, per_thread: int = 8) -> RowTile:
    """The tile for rows of logits (N, C), at most `widest` classes, or for those of (N, C, D)."""
    if x.dim() == 3 and x.shape[2] > 1:  # neighbours in memory are neighbouring rows
        columns = min(next_power_of_2(x.shape[1]), _STRIDED_TILE[1])
        return RowTile(_STRIDED_TILE[0], columns, _STRIDED_WARPS)
    return row_tile(min(x.shape[1], widest), per_thread=per_thread, max_warps=8)


def launch_options(tile: RowTile, softcap: float | None) -> dict[str, Any]:
    """What every kernel over tiles of logits is launched with."""
    options = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "num_warps": tile.num_warps}
    # A capped logit is a product, t * cap. Fused into one subtraction from it, it is not rounded,
    # and into another it is: the largest logit would lie 1e-7 of itself from itself.
    return options if softcap is None else options | {"enable_fp_fusion": False}


def widened_logits(x: Tensor, softcap: float | None) -> Tensor:
    """What `capped` computes, in plain PyTorch: in fp32, or float64 for float64."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x if softcap is None else softcap * torch.tanh(x / softcap)


@triton.jit
def capped(x, softcap):
    """The logits in fp32, after the soft cap if there is one."""
    y = x.to(tl.float32)
    if softcap is not None:
        cap = tl.cast(softcap, tl.float32)
        y = _tanh(y / cap) * cap
    return y


@triton.jit
def cap_slope(x, softcap):
    """The derivative of `capped` where there is a soft cap."""
    return _tanh_grad(x.to(tl.float32) / tl.cast(softcap, tl.float32), 1.0)


@triton.jit
def load_labels(target_ptr, target_stride, rows, M, N, ignore_index):
    """Labels of rows [R], which of them name a class, and which of them are out of range."""
    inside = rows < M
    label = tl.load(target_ptr + rows * target_stride, mask=inside, other=0)
    counted = inside & (label != ignore_index)
    in_range = (label >= 0) & (label < N)
    live = counted & in_range
    return tl.where(live, label, 0).to(tl.int32), live, counted & ~in_range


@triton.jit
def class_weights(weight_ptr, weight_stride, classes, mask):
    """Weights of the classes, 1 where there are none."""
    weight = tl.full(classes.shape, 1.0, tl.float32)
    if weight_ptr is not None:
        offsets = classes.to(tl.int64) * weight_stride
        weight = tl.load(weight_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    return weight


@triton.jit
def row_statistics(
    x_rows, x_step, weight_ptr, weight_stride, label, live, N, softcap,
    SMOOTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of rows of logits, read once: the label's, peak, log_sum, and with SMOOTH sum(weight * y).

    That sum is of y - origin, where origin is the label's logit if it is finite.
    """
    chosen = capped(tl.load(x_rows + label.to(tl.int64) * x_step, mask=live, other=0.0), softcap)
    origin = tl.where(tl.abs(chosen) < float("inf"), chosen, 0.0)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    lane_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    above = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = live[:, None] & (cols < N)[None, :]
        offsets = (cols.to(tl.int64) * x_step)[None, :]
        y = tl.load(x_rows[:, None] + offsets, mask=mask, other=float("-inf"))
        y = capped(y, softcap)
        if softcap is not None:
            y = tl.where(mask, y, float("-inf"))
        if SMOOTH:
            weight = class_weights(weight_ptr, weight_stride, cols, cols < N)[None, :]
            above += tl.sum(tl.where(mask, weight * (y - origin[:, None]), 0.0), axis=1)
        other = tl.where(cols[None, :] == label[:, None], float("-inf"), y)
        new_top = tl.maximum(top, tl.max(other, axis=1))
        safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        lane_sum = lane_sum * exp(top - safe_top)[:, None] + exp(other - safe_top[:, None])
        top = new_top
    peak = tl.maximum(top, chosen)
    others = tl.sum(lane_sum, axis=1) * exp(top - peak)
    log_sum = tl.log(others + exp(chosen - peak))
    log_sum = tl.where(chosen == peak, log1p(others), log_sum)
    log_sum += peak - peak  # NaN if a logit is +inf, or all are -inf
    return chosen, peak, log_sum, origin, above


@triton.jit
def row_losses(
    statistics, weight, weight_sum_ptr, live, wrong, N, label_smoothing, z_loss,
    SMOOTH: tl.constexpr,
):  # fmt: skip
    """The losses of rows with these statistics, whose labels have these weights."""
    chosen, peak, log_sum, origin, above = statistics
    loss = weight * (peak - chosen + log_sum)
    if SMOOTH:
        smoothing = tl.cast(label_smoothing, tl.float32)
        weight_sum = N * 1.0 if weight_sum_ptr is None else tl.load(weight_sum_ptr)
        smooth = weight_sum * (peak - origin + log_sum) - above
        loss = loss * (1.0 - smoothing) + smooth * (smoothing / N)
    z = tl.cast(z_loss, tl.float32)
    lse = peak + log_sum
    loss += tl.where(z == 0.0, 0.0, weight * z * lse * lse)
    return tl.where(live, loss, tl.where(wrong, float("nan"), 0.0))


@triton.jit
def logit_gradients(
    x, chosen, peak, log_sum, dloss, weight, label, live, wrong, cols, N,
    weight_ptr, weight_stride, weight_sum_ptr, label_smoothing, z_loss, softcap,
    SMOOTH: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile of logits x in columns cols; weight is of the rows' labels."""
    spread = 2.0 * tl.cast(z_loss, tl.float32) * weight * (peak + log_sum)
    if SMOOTH:
        share = tl.cast(label_smoothing, tl.float32) / N
        weight_sum = N * 1.0 if weight_sum_ptr is None else tl.load(weight_sum_ptr)
        spread += share * weight_sum
        weight *= 1.0 - tl.cast(label_smoothing, tl.float32)
    p = exp(capped(x, softcap) - peak[:, None] - log_sum[:, None])
    missing = weight * expm1(chosen - peak - log_sum)
    dx = p * (weight + spread)[:, None]
    is_label = cols[None, :] == label[:, None]
    dx = tl.where(is_label, missing[:, None] + p * spread[:, None], dx)
    if SMOOTH:
        dx -= share * class_weights(weight_ptr, weight_stride, cols, cols < N)[None, :]
    if softcap is not None:
        dx *= cap_slope(x, softcap)
    mask = live[:, None] & (cols < N)[None, :]
    return tl.where(mask, dx * dloss[:, None], tl.where(wrong, float("nan"), 0.0)[:, None])


@triton.jit
def cross_entropy_fwd_kernel(
    x_ptr,
    target_ptr,
    weight_ptr,
    weight_sum_ptr,
    loss_ptr,
    peak_ptr,
    log_sum_ptr,
    inner,
    x_strides,
    target_stride,
    weight_stride,
    M,
    N,
    ignore_index,
    label_smoothing,
    z_loss,
    softcap,
    SMOOTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program owns [BLOCK_M, N], and reads it once, BLOCK_N columns at a time."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    label, live, wrong = load_labels(target_ptr, target_stride, rows, M, N, ignore_index)
    weight = class_weights(weight_ptr, weight_stride, label, live)
    x_rows = x_ptr + row_offsets(rows, inner, x_strides)
    statistics = row_statistics(
        x_rows, x_strides[2], weight_ptr, weight_stride, label, live, N,
        softcap, SMOOTH, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    loss = row_losses(
        statistics, weight, weight_sum_ptr, live, wrong, N, label_smoothing, z_loss, SMOOTH
    )
    tl.store(loss_ptr + rows, loss, mask=rows < M)
    if peak_ptr is not None:
        tl.store(peak_ptr + rows, statistics[1], mask=rows < M)
        tl.store(log_sum_ptr + rows, statistics[2], mask=rows < M)


@triton.jit
def cross_entropy_bwd_kernel(
    dloss_ptr,
    x_ptr,
    target_ptr,
    weight_ptr,
    weight_sum_ptr,
    peak_ptr,
    log_sum_ptr,
    dx_ptr,
    dx_strides,
    dloss_stride,
    inner,
    x_strides,
    target_stride,
    weight_stride,
    M,
    N,
    ignore_index,
    label_smoothing,
    z_loss,
    softcap,
    SMOOTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program owns [BLOCK_M, BLOCK_N]."""
    n_blocks = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    rows = (pid // n_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = (pid % n_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    label, live, wrong = load_labels(target_ptr, target_stride, rows, M, N, ignore_index)
    mask = live[:, None] & (cols < N)[None, :]
    x_rows = x_ptr + row_offsets(rows, inner, x_strides)
    offsets = (cols.to(tl.int64) * x_strides[2])[None, :]
    x = tl.load(x_rows[:, None] + offsets, mask=mask, other=0.0)
    chosen = capped(
        tl.load(x_rows + label.to(tl.int64) * x_strides[2], mask=live, other=0.0), softcap
    )
    peak = tl.load(peak_ptr + rows, mask=live, other=0.0)
    log_sum = tl.load(log_sum_ptr + rows, mask=live, other=0.0)
    dloss = tl.load(dloss_ptr + rows * dloss_stride, mask=live, other=0.0).to(tl.float32)
    weight = class_weights(weight_ptr, weight_stride, label, live)
    dx = logit_gradients(
        x, chosen, peak, log_sum, dloss, weight, label, live, wrong, cols, N,
        weight_ptr, weight_stride, weight_sum_ptr, label_smoothing, z_loss, softcap, SMOOTH,
    )  # fmt: skip
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    places = dx_ptr + row_offsets(rows, inner, dx_strides)[:, None]
    places += (cols.to(tl.int64) * dx_strides[2])[None, :]
    tl.store(places, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def cross_entropy_in_place_kernel(
    x_ptr,
    target_ptr,
    weight_ptr,
    weight_sum_ptr,
    dloss_ptr,
    loss_ptr,
    dloss_stride,
    x_strides,
    target_stride,
    weight_stride,
    M,
    N,
    ignore_index,
    label_smoothing,
    z_loss,
    softcap,
    SMOOTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program owns [BLOCK_M, N]: reads it, then puts the gradients where the logits were.

    Without dloss they are those of the sum of the losses. No other program reads these rows.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    label, live, wrong = load_labels(target_ptr, target_stride, rows, M, N, ignore_index)
    weight = class_weights(weight_ptr, weight_stride, label, live)
    x_rows = x_ptr + rows * x_strides[0]
    statistics = row_statistics(
        x_rows, x_strides[1], weight_ptr, weight_stride, label, live, N, softcap,
        SMOOTH, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    if loss_ptr is not None:
        loss = row_losses(
            statistics, weight, weight_sum_ptr, live, wrong, N, label_smoothing, z_loss, SMOOTH
        )
        tl.store(loss_ptr + rows, loss, mask=rows < M)
    dloss = tl.full((BLOCK_M,), 1.0, tl.float32)
    if dloss_ptr is not None:
        dloss = tl.load(dloss_ptr + rows * dloss_stride, mask=live, other=0.0).to(tl.float32)
    tl.debug_barrier()  # every warp has the labels' logits before any of them is replaced
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        inside = (rows < M)[:, None] & (cols < N)[None, :]
        places = x_rows[:, None] + (cols.to(tl.int64) * x_strides[1])[None, :]
        x = tl.load(places, mask=inside & live[:, None], other=0.0)
        dx = logit_gradients(
            x, statistics[0], statistics[1], statistics[2], dloss, weight, label, live, wrong,
            cols, N, weight_ptr, weight_stride, weight_sum_ptr, label_smoothing, z_loss, softcap,
            SMOOTH,
        )  # fmt: skip
        tl.store(places, dx.to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def scale_kernel(x_ptr, scale_ptr, y_ptr, N, BLOCK: tl.constexpr):
    """One program owns [BLOCK] elements: y = scale * x, but 0 where x is, whatever the scale."""
    cols = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    y = tl.where(x == 0.0, 0.0, x * tl.load(scale_ptr).to(tl.float32))
    tl.store(y_ptr + cols, y.to(y_ptr.dtype.element_ty), mask=cols < N)
