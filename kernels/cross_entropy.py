"""Cross-entropy of M rows of V logits against class indices, one loss a row.

    y = x, or softcap * tanh(x / softcap)      lse = log(sum(exp(y)))      p = exp(y - lse)
    loss = weight[t] * ((1 - s) * (lse - y[t]) + z_loss * lse^2) + s / V * sum(weight * (lse - y))
    dy = weight[t] * ((1 - s) * (p - onehot) + 2 * z_loss * lse * p) + s / V * (p * W - weight)

x (M, V) logits, t (M,) labels, weight (V,) or all ones, W = sum(weight), s the label smoothing.
Rows labelled `ignore_index` have loss and gradient exactly 0; their logits are not read. Saved for
backward: x, t, weight, and in fp32 (M,) each `peak` = max(y) and `log_sum` = lse - peak.

Numerics: fp32 throughout, one rounding of the gradient.

Source: the z loss: Chowdhery et al., "PaLM", 2022; the soft cap: Gemma Team, "Gemma 2", 2024.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from trilith.kernels._cross_entropy_kernels import (
    class_strides,
    cross_entropy_bwd_kernel,
    cross_entropy_fwd_kernel,
    launch_options,
    logits_tile,
    widened_logits,
)
from trilith.kernels._runtime.checks import (
    require,
    require_floating,
    require_floating_if_given,
    require_same_device,
    require_tensors,
)
from trilith.kernels._runtime.launch import launch
from trilith.kernels._runtime.plan import planned
from trilith.kernels._runtime.rows import RowTile
from trilith.kernels._runtime.sharding import Strategy, split
from trilith.kernels._runtime.sizes import cdiv
from trilith.kernels._soft_cross_entropy import SOFT_CROSS_ENTROPY
from trilith.plugins import BackwardContext, Cost, Op, OpSpec, Sample
from trilith.plugins.autocast import autocasts
from trilith.plugins.sharding import is_dtensor

_WIDEST_BLOCK = 4096
_WIDEST_CAPPED_BLOCK = 2048  # tanh's temporaries spill at 4096 when rows are unaligned
_REDUCTIONS = ("none", "mean", "sum")
_LABEL_DTYPES = (torch.int64, torch.uint8)
_OP = "cross_entropy"


def require_labels(
    op: str, losses: Tensor, target: Tensor, ignore_index: int, n_classes: int
) -> None:
    """On CPU, as torch: an IndexError. On a GPU a look at the labels would stall the host.

    A wrong label's loss is NaN: only where the losses' sum is, are the labels looked at.
    """
    if target.device.type != "cpu" or isinstance(target, FakeTensor):
        return
    if not math.isnan(losses.sum().item()):
        return
    wrong = (target != ignore_index) & ((target < 0) | (target >= n_classes))
    if wrong.any():
        first = target[wrong][0].item()
        raise IndexError(f"{op}: target must be in [0, {n_classes}) or {ignore_index}, got {first}")


def _cross_entropy_out(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    loss, peak, log_sum = (x.new_empty(target.shape, dtype=torch.float32) for _ in range(3))
    return loss, peak, log_sum


@planned
def _cross_entropy_fwd(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _cross_entropy_out(x, target)
    weight_sum, tile, tail, options = _launch_arguments(
        x, target, weight, ignore_index, label_smoothing, z_loss, softcap
    )
    grid = (cdiv(target.numel(), tile.block_m),)
    inputs = (x, target.reshape(-1), weight, weight_sum)
    launch(cross_entropy_fwd_kernel, grid, *inputs, *outputs, *tail, **options)
    require_labels(_OP, outputs[0], target, ignore_index, x.shape[1])
    return outputs


@planned
def _cross_entropy_bwd(ctx: BackwardContext, dloss: Tensor) -> tuple[Tensor]:
    x, target, weight = ctx.inputs[:3]
    dx = x.new_empty(x.shape)
    weight_sum, tile, tail, options = _launch_arguments(*ctx.inputs)
    grid = (cdiv(target.numel(), tile.block_m) * cdiv(x.shape[1], tile.block_n),)
    dloss = dloss.reshape(-1)
    inputs = (dloss, x, target.reshape(-1), weight, weight_sum, *ctx.aux)
    steps = (class_strides(dx), dloss.stride(0))
    launch(cross_entropy_bwd_kernel, grid, *inputs, dx, *steps, *tail, **options)
    return (dx,)


def _launch_arguments(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
) -> tuple[Tensor | None, RowTile, tuple[Any, ...], dict[str, Any]]:
    """What both kernels take: sum(weight), the tile, the arguments from inner on, options."""
    smooth = label_smoothing > 0
    weight_sum = weight.sum(dtype=torch.float32) if smooth and weight is not None else None
    weight_stride = None if weight is None else weight.stride(0)
    strides = (class_strides(x), target.reshape(-1).stride(0), weight_stride)
    inner = x.shape[2] if x.dim() == 3 else 1
    scalars = (ignore_index, label_smoothing, z_loss, softcap)
    widest = _WIDEST_BLOCK if softcap is None else _WIDEST_CAPPED_BLOCK
    tile = logits_tile(x, widest)
    options = {"SMOOTH": smooth, **launch_options(tile, softcap)}
    return weight_sum, tile, (inner, *strides, target.numel(), x.shape[1], *scalars), options


def cross_entropy_rows(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
) -> Tensor:
    """Cross-entropy per row, fp32 (float64 for float64 logits); class weights are constants."""
    logits = widened_logits(x, softcap)
    weight = None if weight is None else weight.detach().to(logits.dtype)
    loss = F.cross_entropy(
        logits,
        target,
        weight,
        ignore_index=ignore_index,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    if z_loss:
        z = z_loss * torch.logsumexp(logits, dim=1).square()
        if weight is not None:
            z = z * weight[target.clamp(0, weight.shape[0] - 1)]
        loss = loss + z.masked_fill(target == ignore_index, 0.0)
    return loss


def _cross_entropy_samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def draw(m: int, n: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(m, n, device=device, dtype=dtype)
        return x, torch.randint(0, n, (m,), device=device)

    def weight(n: int) -> Tensor:
        return torch.rand(n, device=device) + 0.5

    x, target = draw(5, 33)
    yield Sample(x, target, None, -100, 0.0, 0.0, None)
    target[2] = -100
    yield Sample(x, target, weight(33), -100, 0.0, 0.0, None)
    x, target = draw(9, 7)
    yield Sample(x, target, None, 3, 0.1, 0.0, None)
    yield Sample(x * 4, target, weight(7).to(dtype), -1, 0.2, 1e-2, 5.0)
    x, target = draw(130, 6)
    yield Sample(x.t(), target[:6], weight(130), -100, 0.1, 1e-3, None)
    x, target = draw(3, 1)
    yield Sample(x, target, None, -100, 0.0, 0.0, 30.0)
    x, target = torch.randn(2, 5, 21, device=device, dtype=dtype), draw(42, 5)[1].view(2, 21)
    yield Sample(x, target, weight(5), 1, 0.1, 1e-2, None)


def _cross_entropy_cost(x: Tensor, target: Tensor) -> Cost:
    logits, rows = x.numel() * x.element_size(), 4 * target.numel()
    labels = target.numel() * target.element_size()
    return Cost(
        forward_bytes=logits + labels + 3 * rows,
        backward_bytes=2 * logits + labels + 3 * rows,
        forward_flops=4 * x.numel(),
        backward_flops=4 * x.numel(),
    )


def _cross_entropy_sharding() -> list[Strategy]:
    return [split([0], [0, 0])]


CROSS_ENTROPY = Op(
    OpSpec(
        name="trilith::cross_entropy",
        forward=_cross_entropy_fwd,
        backward=_cross_entropy_bwd,
        reference=cross_entropy_rows,
        samples=_cross_entropy_samples,
        fake=_cross_entropy_out,
        cost=_cross_entropy_cost,
        sharding=_cross_entropy_sharding,
        save_outputs=False,
    )
)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Cross-entropy between logits and targets, as `torch.nn.functional.cross_entropy`.

    Args:
        input: logits (N, C), (C,) or (N, C, d1, ...), floating-point. Read where they lie; of
            several dims d1, ... that are not one stretch of memory a copy is made.
        target: class indices (N,), () or (N, d1, ...), int64 or uint8; or class probabilities,
            floating-point and shaped as input, which may require a gradient.
        weight: (C,) weight of each class, floating-point; it cannot require a gradient.
        ignore_index: label of the rows that have loss and gradient exactly 0 and are not counted.
            Negative with class probabilities, which ignore no row.
        reduction: "none", "sum", or "mean": the mean over the counted rows, weighted by their
            labels' weights. If no row is counted the mean is NaN, and the gradient 0. With class
            probabilities the plain mean over all rows.
        label_smoothing: share of the target that is spread evenly over all classes.
        z_loss: adds `z_loss * lse ** 2` to the loss of each row, multiplied like the rest of it by
            its label's weight, so that the mean is a weighted mean of both; with class
            probabilities, without a weight. lse is the row's logsumexp after the soft cap.
        softcap: replaces the logits x by `softcap * tanh(x / softcap)`.
        dtype: of the loss. float32 is what it is computed in: with 16-bit logits the loss of
            `input.float()` without that copy, and the gradient still in the input's dtype.

    Returns:
        A scalar, or for "none" a tensor shaped as the class indices; without `dtype` in the input's
        dtype, but float32 (float64 for float64 logits) under autocast.

    Raises:
        IndexError: a label is out of range, on CPU. On a GPU that row's loss and gradient are NaN.
        RuntimeError: target is of another integer dtype or, with as many rows as input, of another
            shape; weight's shape does not fit, or it requires a gradient; label_smoothing is out of
            its range; ignore_index is not negative with class probabilities. As torch.
        ValueError: target has another number of rows, or another option is out of its range.
        TypeError: input or weight is not floating-point.

    Numerics: fp32 from the load on, one rounding of the result and one of the gradient; input's and
    weight's dtypes may differ. Deterministic.

    Source: Szegedy et al., "Rethinking the Inception Architecture", 2016 (label smoothing); Milakov
        and Gimelshein, "Online normalizer calculation for softmax", 2018.

    Example:
        >>> loss = cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), z_loss=1e-4)
    """
    _check(input, target, weight, ignore_index, reduction, label_smoothing, softcap)
    require_loss_dtype(_OP, dtype)
    x = input.unsqueeze(0) if input.dim() == 1 else input
    x = x.flatten(2) if x.dim() > 3 else x
    soft, scalars = target.is_floating_point(), (label_smoothing, z_loss, softcap)
    arguments: tuple[Any, ...]
    if soft:
        op, arguments = SOFT_CROSS_ENTROPY, (x, target.reshape(x.shape), weight, *scalars)
    else:
        labels = target.to(torch.int64).reshape(x.shape[0], *x.shape[2:])
        op, arguments = CROSS_ENTROPY, (x, labels, weight, ignore_index, *scalars)
    provider = op.choose(*arguments)
    if z_loss or is_dtensor(input) or provider is not None:
        loss = op.run(provider, *arguments)
        if reduction == "none":
            loss = loss.reshape(input.shape[:1] + input.shape[2:] if input.dim() > 1 else ())
        elif soft and reduction == "mean":
            loss = loss.mean()
        else:
            loss = loss.sum()
            if reduction == "mean":
                loss = loss / counted_rows(labels, weight, ignore_index)
    else:
        options = (ignore_index, label_smoothing, softcap)
        loss = _in_plain_pytorch(input, target, weight, reduction, *options)
    return loss_in(dtype, loss, input)


def loss_in(dtype: torch.dtype | None, loss: Tensor, input: Tensor) -> Tensor:
    """The loss in `dtype`; None is the input's, and under autocast what it was computed in."""
    if dtype is None and autocasts(input):
        return loss
    return loss.to(input.dtype if dtype is None else dtype)


def _check(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    softcap: float | None,
) -> None:
    op = _OP
    require_floating(op, input=input)
    require_floating_if_given(op, weight=weight)
    require_tensors(op, target=target)
    require(input.dim() > 0, op, "input", "have a class dimension", "a scalar")
    class_dim = min(input.dim() - 1, 1)
    classes, shape = input.shape[class_dim], list(input.shape)
    if not target.is_floating_point():
        del shape[class_dim]
        require_label_dtype(op, target)
    elif ignore_index >= 0:
        raise RuntimeError(
            f"{op}: ignore_index must be negative with class probabilities, got {ignore_index}; "
            "zero the rows' probabilities"
        )
    _require_target_shape(input, target, tuple(shape))
    if weight is not None and weight.shape != (classes,):
        raise RuntimeError(f"{op}: weight must have shape ({classes},), got {tuple(weight.shape)}")
    require_same_device(op, input, target=target, weight=weight)
    require_constant_weight(op, weight)
    require_options(op, reduction, label_smoothing, softcap)


def _require_target_shape(input: Tensor, target: Tensor, shape: tuple[int, ...]) -> None:
    """As torch: another number of rows is a ValueError, any other shape a RuntimeError."""
    if tuple(target.shape) == shape or (input.dim() == 1 and not shape and target.shape == (1,)):
        return
    as_many = input.dim() > 1 and target.shape[:1] == input.shape[:1]
    kind = RuntimeError if as_many else ValueError
    raise kind(f"{_OP}: target must have shape {shape}, got {tuple(target.shape)}")


def require_label_dtype(op: str, target: Tensor) -> None:
    if target.dtype not in _LABEL_DTYPES:
        raise RuntimeError(
            f"{op}: target must be int64 or uint8 class indices, or floating-point class "
            f"probabilities, got {target.dtype}"
        )


def require_constant_weight(op: str, weight: Tensor | None) -> None:
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"{op}: weight must not require a gradient; detach it")


def require_options(op: str, reduction: str, label_smoothing: float, softcap: float | None) -> None:
    require(reduction in _REDUCTIONS, op, "reduction", f"be one of {_REDUCTIONS}", repr(reduction))
    if not 0 <= label_smoothing <= 1:  # torch's kind of error
        raise RuntimeError(f"{op}: label_smoothing must be in [0, 1], got {label_smoothing}")
    require(softcap is None or softcap > 0, op, "softcap", "be None or positive", softcap)


def require_loss_dtype(op: str, dtype: torch.dtype | None) -> None:
    fits = dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point)
    require(fits, op, "dtype", "be None or a floating-point dtype", dtype)


def counted_rows(target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """What the mean divides by: how many rows are not ignored, or the sum of their weights."""
    counted = target != ignore_index
    if weight is None:
        return counted.sum()
    weight = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    return torch.where(counted, weight[target.clamp(0, weight.shape[0] - 1)], 0.0).sum()


def _in_plain_pytorch(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
) -> Tensor:
    """The loss without a z loss by torch's own function, in fp32 or float64."""
    logits = widened_logits(input, softcap)
    return F.cross_entropy(
        logits,
        target.to(logits.dtype) if target.is_floating_point() else target,
        None if weight is None else weight.detach().to(logits.dtype),
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
