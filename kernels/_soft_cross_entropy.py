"""Cross-entropy of rows of logits against class probabilities, one loss a row.

    y = x, or softcap * tanh(x / softcap)      lse = log(sum(exp(y)))      p = exp(y - lse)
    q = weight * ((1 - s) * t + s / C)         Q = sum(q)
    loss = sum(q * (lse - y)) + z_loss * lse^2
    dy = p * (Q + 2 * z_loss * lse) - q        dt = weight * (1 - s) * (lse - y)

x and t (N, C) or (N, C, D), weight (C,) or all ones, s the label smoothing. Saved for backward: x,
t, weight, and in fp32, one a row each, `peak` = max(y), `log_sum` = lse - peak, Q, and `rest`, the
sum of q where y < peak.

Numerics: fp32 throughout, one rounding of each gradient. The loss is Q * log_sum + sum(q * (peak -
y)), whose terms have one sign: nothing cancels, however far from zero the logits are. Where the
model is sure, log_sum is log1p of the sum over the classes below the peak, and the gradient of the
class at the peak is p * rest + q * (p - 1): no difference of nearly equal numbers either.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trilith.kernels._cross_entropy_kernels import (
    cap_slope,
    capped,
    class_strides,
    class_weights,
    expm1,
    launch_options,
    log1p,
    logits_tile,
    widened_logits,
)
from trilith.kernels._runtime.elementary import exp
from trilith.kernels._runtime.language import tl, triton
from trilith.kernels._runtime.launch import launch
from trilith.kernels._runtime.plan import planned
from trilith.kernels._runtime.rows import RowTile, row_offsets
from trilith.kernels._runtime.sharding import Strategy, split
from trilith.kernels._runtime.sizes import cdiv
from trilith.plugins import BackwardContext, Cost, Op, OpSpec, Sample

_FEW_CLASSES = 1024
_WIDEST_BLOCK = 2048  # three sums a lane live beside the two tiles
_SURE = tl.constexpr(0.69)  # below log 2: one class is at the peak, likelier than all the others


@triton.jit
def _places(tensor_ptr, rows, cols, inner, strides):
    """Pointers to [rows, cols] of logits (M / inner, N, inner)."""
    offsets = (cols.to(tl.int64) * strides[2])[None, :]
    return tensor_ptr + row_offsets(rows, inner, strides)[:, None] + offsets


@triton.jit
def _shares(t, weight_ptr, weight_stride, cols, N, label_smoothing):
    """q of a tile of probabilities t, in columns cols; and the slope dq / dt of these columns."""
    smoothing = tl.cast(label_smoothing, tl.float32)
    weight = class_weights(weight_ptr, weight_stride, cols, cols < N)[None, :]
    slope = weight * (1.0 - smoothing)
    return slope * t.to(tl.float32) + weight * (smoothing / N), slope


@triton.jit
def soft_cross_entropy_fwd_kernel(
    x_ptr,
    target_ptr,
    weight_ptr,
    loss_ptr,
    peak_ptr,
    log_sum_ptr,
    total_ptr,
    rest_ptr,
    inner,
    x_strides,
    target_strides,
    weight_stride,
    M,
    N,
    label_smoothing,
    z_loss,
    softcap,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program owns [BLOCK_M, N], and reads it once, BLOCK_N columns at a time."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < M
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    base = tl.zeros((BLOCK_M,), tl.float32)  # top where that is finite: what y is measured from
    # of the classes at the top so far: how many, and their shares; the lanes hold those below it
    tied = tl.zeros((BLOCK_M,), tl.float32)
    top_share = tl.zeros((BLOCK_M,), tl.float32)
    left_exp = tl.zeros((BLOCK_M,), tl.float32)  # of those that were at the top before
    left_share = tl.zeros((BLOCK_M,), tl.float32)
    left_below = tl.zeros((BLOCK_M,), tl.float32)
    exp_lanes = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    share_lanes = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    below_lanes = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)  # q * (base - y)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = inside[:, None] & (cols < N)[None, :]
        x = tl.load(_places(x_ptr, rows, cols, inner, x_strides), mask=mask, other=0.0)
        t = tl.load(_places(target_ptr, rows, cols, inner, target_strides), mask=mask, other=0.0)
        y = tl.where(mask, capped(x, softcap), float("-inf"))
        q, _ = _shares(t, weight_ptr, weight_stride, cols, N, label_smoothing)
        q = tl.where(mask, q, 0.0)
        new_top = tl.maximum(top, tl.max(y, axis=1))
        new_base = tl.where(new_top == float("-inf"), 0.0, new_top)
        rise = tl.where(top == float("-inf"), 0.0, new_base - base)
        rises = new_top != top
        fall = exp(top - new_base)
        left_exp = (left_exp + tl.where(rises, tied, 0.0)) * fall
        left_share += tl.where(rises, top_share, 0.0)
        left_below += left_share * rise
        at_top = y == new_top[:, None]
        tied = tl.where(rises, 0.0, tied) + tl.sum(tl.where(at_top, 1.0, 0.0), axis=1)
        top_share = tl.where(rises, 0.0, top_share) + tl.sum(tl.where(at_top, q, 0.0), axis=1)
        e = tl.where(at_top, 0.0, exp(y - new_base[:, None]))
        exp_lanes = exp_lanes * fall[:, None] + e
        below_lanes += share_lanes * rise[:, None]
        below_lanes += tl.where(mask, q * (new_base[:, None] - y), 0.0)
        share_lanes += tl.where(at_top, 0.0, q)
        top, base = new_top, new_base
    others = left_exp + tl.sum(exp_lanes, axis=1)
    log_sum = tl.where(tied == 1.0, log1p(others), tl.log(tied + others))
    log_sum += top - top  # NaN if a logit is inf, or all are -inf
    rest = left_share + tl.sum(share_lanes, axis=1)
    total = rest + top_share
    loss = total * log_sum + (left_below + tl.sum(below_lanes, axis=1))
    z = tl.cast(z_loss, tl.float32)
    lse = top + log_sum
    loss += tl.where(z == 0.0, 0.0, z * lse * lse)
    tl.store(loss_ptr + rows, loss, mask=inside)
    tl.store(peak_ptr + rows, top, mask=inside)
    tl.store(log_sum_ptr + rows, log_sum, mask=inside)
    tl.store(total_ptr + rows, total, mask=inside)
    tl.store(rest_ptr + rows, rest, mask=inside)


@triton.jit
def soft_cross_entropy_bwd_kernel(
    dloss_ptr,
    x_ptr,
    target_ptr,
    weight_ptr,
    peak_ptr,
    log_sum_ptr,
    total_ptr,
    rest_ptr,
    dx_ptr,
    dtarget_ptr,
    gradient_strides,
    dloss_stride,
    inner,
    x_strides,
    target_strides,
    weight_stride,
    M,
    N,
    label_smoothing,
    z_loss,
    softcap,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program owns [BLOCK_M, BLOCK_N]."""
    n_blocks = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    rows = (pid // n_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = (pid % n_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < M
    mask = inside[:, None] & (cols < N)[None, :]
    x = tl.load(_places(x_ptr, rows, cols, inner, x_strides), mask=mask, other=0.0)
    t = tl.load(_places(target_ptr, rows, cols, inner, target_strides), mask=mask, other=0.0)
    peak = tl.load(peak_ptr + rows, mask=inside, other=0.0)
    log_sum = tl.load(log_sum_ptr + rows, mask=inside, other=0.0)
    total = tl.load(total_ptr + rows, mask=inside, other=0.0)
    rest = tl.load(rest_ptr + rows, mask=inside, other=0.0)
    dloss = tl.load(dloss_ptr + rows * dloss_stride, mask=inside, other=0.0).to(tl.float32)
    q, slope = _shares(t, weight_ptr, weight_stride, cols, N, label_smoothing)
    below = peak[:, None] - capped(x, softcap)
    if dx_ptr is not None:
        z = tl.cast(z_loss, tl.float32)
        spread = tl.where(z == 0.0, 0.0, 2.0 * z * (peak + log_sum))
        p = exp(-below - log_sum[:, None])
        sure = (below == 0.0) & (log_sum < _SURE)[:, None]
        missing = q * expm1(-log_sum)[:, None]
        plain = p * (total + spread)[:, None] - q
        dx = tl.where(sure, p * (rest + spread)[:, None] + missing, plain)
        if softcap is not None:
            dx *= cap_slope(x, softcap)
        dx *= dloss[:, None]
        places = _places(dx_ptr, rows, cols, inner, gradient_strides)
        tl.store(places, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if dtarget_ptr is not None:
        dt = slope * (below + log_sum[:, None]) * dloss[:, None]
        places = _places(dtarget_ptr, rows, cols, inner, gradient_strides)
        tl.store(places, dt.to(dtarget_ptr.dtype.element_ty), mask=mask)


def _soft_cross_entropy_out(x: Tensor) -> tuple[Tensor, ...]:
    shape = (x.shape[0], *x.shape[2:])
    return tuple(x.new_empty(shape, dtype=torch.float32) for _ in range(5))


@planned
def _soft_cross_entropy_fwd(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
) -> tuple[Tensor, ...]:
    outputs = _soft_cross_entropy_out(x)
    tile, tail, options = _launch_arguments(x, target, weight, label_smoothing, z_loss, softcap)
    grid = (cdiv(outputs[0].numel(), tile.block_m),)
    launch(soft_cross_entropy_fwd_kernel, grid, x, target, weight, *outputs, *tail, **options)
    return outputs


@planned
def _soft_cross_entropy_bwd(
    ctx: BackwardContext, dloss: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    x, target, weight = ctx.inputs[:3]
    if not any(ctx.needs_input_grad[:2]):
        return None, None
    dx = x.new_empty(x.shape) if ctx.needs_input_grad[0] else None
    dtarget = target.new_empty(x.shape) if ctx.needs_input_grad[1] else None
    tile, tail, options = _launch_arguments(*ctx.inputs)
    grid = (cdiv(dloss.numel(), tile.block_m) * cdiv(x.shape[1], tile.block_n),)
    dloss = dloss.reshape(-1)
    made = dtarget if dx is None else dx
    assert made is not None
    steps = (class_strides(made), dloss.stride(0))
    inputs = (dloss, x, target, weight, *ctx.aux)
    launch(soft_cross_entropy_bwd_kernel, grid, *inputs, dx, dtarget, *steps, *tail, **options)
    return dx, dtarget


def _launch_arguments(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
) -> tuple[RowTile, tuple[Any, ...], dict[str, Any]]:
    """What both kernels take: the tile, the arguments from inner on, options."""
    inner = x.shape[2] if x.dim() == 3 else 1
    weight_stride = None if weight is None else weight.stride(0)
    strides = (class_strides(x), class_strides(target), weight_stride)
    per_thread = 16 if x.shape[1] > _FEW_CLASSES else 8  # of several rows 16 would spill
    tile = logits_tile(x, _WIDEST_BLOCK, per_thread)
    sizes = (x.shape[0] * inner, x.shape[1])
    tail = (inner, *strides, *sizes, label_smoothing, z_loss, softcap)
    return tile, tail, launch_options(tile, softcap)


def soft_cross_entropy_rows(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
) -> Tensor:
    """Cross-entropy per row, fp32 (float64 for float64 logits); class weights are constants."""
    logits = widened_logits(x, softcap)
    loss = F.cross_entropy(
        logits,
        target.to(logits.dtype),
        None if weight is None else weight.detach().to(logits.dtype),
        reduction="none",
        label_smoothing=label_smoothing,
    )
    return loss + z_loss * torch.logsumexp(logits, dim=1).square() if z_loss else loss


def _soft_cross_entropy_samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def draw(*shape: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(*shape, device=device, dtype=dtype)
        return x, torch.randn(*shape, device=device).softmax(1).to(dtype)

    def weight(n: int) -> Tensor:
        return torch.rand(n, device=device) + 0.5

    yield Sample(*draw(5, 33), None, 0.0, 0.0, None)
    yield Sample(*draw(2, 5, 21), weight(5), 0.1, 1e-2, None)
    x, target = draw(9, 7)
    yield Sample(x * 4, target, weight(7).to(dtype), 0.2, 1e-2, 5.0)
    x, target = draw(130, 6)
    yield Sample(x.t(), target.t().float(), weight(130), 0.0, 1e-3, None)
    yield Sample(*draw(3, 1), None, 0.0, 0.0, 30.0)


def _soft_cross_entropy_cost(x: Tensor, target: Tensor) -> Cost:
    """Forward reads both; backward reads both, and writes the logits' gradient."""
    logits, rows = x.numel() * x.element_size(), 4 * (x.numel() // max(1, x.shape[1]))
    read = logits + target.numel() * target.element_size()
    return Cost(
        forward_bytes=read + 5 * rows,
        backward_bytes=read + logits + 5 * rows,
        forward_flops=6 * x.numel(),
        backward_flops=5 * x.numel(),
    )


def _soft_cross_entropy_sharding() -> list[Strategy]:
    return [split([0], [0, 0])]


SOFT_CROSS_ENTROPY = Op(
    OpSpec(
        name="trilith::soft_cross_entropy",
        forward=_soft_cross_entropy_fwd,
        backward=_soft_cross_entropy_bwd,
        reference=soft_cross_entropy_rows,
        samples=_soft_cross_entropy_samples,
        fake=_soft_cross_entropy_out,
        cost=_soft_cross_entropy_cost,
        sharding=_soft_cross_entropy_sharding,
        save_outputs=False,
    )
)
