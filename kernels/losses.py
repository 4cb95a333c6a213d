"""Losses of one prediction and one target each: binary cross-entropy with logits, squared error.

    bce   loss = w * (t * q * softplus(-x) + (1 - t) * softplus(x))    q = pos_weight
          dx = w * ((1 - t) * sigmoid(x) - t * q * sigmoid(-x))   dt = w * (q * softplus(-x)
          - softplus(x))
    mse   loss = w * (x - t)^2     dx = 2 * w * (x - t)     dt = -dx     dw = (x - t)^2

softplus(x) = max(x, 0) + log1p(exp(-|x|)), so that without q the first is the well-known
max(x, 0) - x * t + log1p(exp(-|x|)); written with both softplus it keeps its digits where the model
is sure. The losses are returned one by one, or added: each program writes the sum of its share in
fp32, and a second kernel adds these in a fixed order. Saved for backward: the inputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn._reduction import legacy_get_string

from trilith.kernels._loss_kernels import BCE, MSE, loss_backward, loss_forward, loss_out
from trilith.kernels._runtime.checks import (
    require,
    require_floating,
    require_floating_if_given,
    require_same_device,
    require_tensors,
)
from trilith.kernels._runtime.lead import as_lead
from trilith.kernels._runtime.plan import planned
from trilith.kernels._runtime.sharding import Strategy, split
from trilith.plugins import BackwardContext, Cost, Op, OpSpec, Sample
from trilith.plugins.autocast import autocasts
from trilith.plugins.sharding import is_dtensor

__all__ = ["binary_cross_entropy_with_logits", "mse_loss"]

_REDUCTIONS = ("none", "mean", "sum")


@planned
def _bce_fwd(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    reduction: str,
    dtype: torch.dtype,
) -> tuple[Tensor]:
    return loss_forward(BCE, (x, target, weight, pos_weight), reduction, dtype)


@planned
def _bce_bwd(ctx: BackwardContext, dloss: Tensor) -> tuple[Tensor | None, ...]:
    needs = (*ctx.needs_input_grad[:2], False)
    return loss_backward(BCE, dloss, ctx.inputs[:4], ctx.inputs[4], needs)[:2]


def _fake(x: Tensor, reduction: str, dtype: torch.dtype) -> tuple[Tensor]:
    return (loss_out(x, reduction, dtype),)


def _bce_reference(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    reduction: str,
    dtype: torch.dtype,
) -> Tensor:
    """torch's function in float32 (float64 for float64), rounded once; weights are constants."""
    wide = torch.promote_types(x.dtype, torch.float32)
    constants = [None if w is None else w.detach().to(wide) for w in (weight, pos_weight)]
    loss = F.binary_cross_entropy_with_logits(
        x.to(wide), target.to(wide), constants[0], pos_weight=constants[1], reduction=reduction
    )
    return loss.to(torch.promote_types(dtype, x.dtype))


@planned
def _mse_fwd(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: str, dtype: torch.dtype
) -> tuple[Tensor]:
    return loss_forward(MSE, (x, target, weight, None), reduction, dtype)


@planned
def _mse_bwd(ctx: BackwardContext, dloss: Tensor) -> tuple[Tensor | None, ...]:
    given = (*ctx.inputs[:3], None)
    return loss_backward(MSE, dloss, given, ctx.inputs[3], ctx.needs_input_grad[:3])


def _mse_reference(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: str, dtype: torch.dtype
) -> Tensor:
    """weight * (x - target)^2, alone, summed, or its mean over all elements."""
    wide = torch.promote_types(x.dtype, torch.float32)
    loss = (x.to(wide) - target.to(wide)).square()
    loss = loss if weight is None else loss * weight.to(wide)
    loss = loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.mean()
    return loss.to(torch.promote_types(dtype, x.dtype))


def _draws(
    device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor, Tensor | None, str, torch.dtype]]:
    """Logits or predictions, targets in [0, 1], weights, reduction, dtype of the loss."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, device=device).to(dtype)

    yield randn(5, 33), rand(5, 33), None, "mean", dtype
    yield randn(64), rand(64), rand(64), "sum", torch.promote_types(dtype, torch.float32)
    yield randn(3, 40, 7).transpose(0, 1), rand(40, 3, 7), None, "none", dtype
    yield randn(26, 9).t(), rand(9, 26), rand(26).expand(9, 26), "mean", dtype
    yield randn(2, 3, 16), rand(2, 3, 16), rand(2, 3, 16), "none", dtype


def _bce_samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    for i, (x, target, weight, *rest) in enumerate(_draws(device, dtype)):
        q = torch.rand(x.shape[-1], device=device) + 0.5
        yield Sample(x, target, weight, q.expand(x.shape) if i % 2 else None, *rest)


def _mse_samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    for arguments in _draws(device, dtype):
        yield Sample(*arguments)


def _loss_cost(x: Tensor, target: Tensor, *rest: Any) -> Cost:
    """Reads everything; writes the loss, and in backward the input's gradient."""
    given = [t for t in (x, target, *rest) if isinstance(t, Tensor)]
    read = sum(t.untyped_storage().nbytes() for t in given)
    each = x.numel() if rest[-2] == "none" else 1
    loss = each * rest[-1].itemsize
    dx = x.numel() * x.element_size()
    return Cost(read + loss, read + loss + dx, 10 * x.numel(), 10 * x.numel())


def _loss_sharding(x: Tensor, *rest: Any) -> list[Strategy]:
    """Any dimension, each alike; a mean is not the sum of the ranks' means."""
    *tensors, reduction, _ = rest
    if reduction == "mean":
        return []
    tall = 1 + len(tensors)
    return [split([dim if reduction == "none" else None], [dim] * tall) for dim in range(x.ndim)]


BCE_WITH_LOGITS = Op(
    OpSpec(
        name="trilith::binary_cross_entropy_with_logits",
        forward=_bce_fwd,
        backward=_bce_bwd,
        reference=_bce_reference,
        samples=_bce_samples,
        fake=_fake,
        cost=_loss_cost,
        sharding=_loss_sharding,
        save_outputs=False,
    )
)
MSE_LOSS = Op(
    OpSpec(
        name="trilith::mse_loss",
        forward=_mse_fwd,
        backward=_mse_bwd,
        reference=_mse_reference,
        samples=_mse_samples,
        fake=_fake,
        cost=_loss_cost,
        sharding=_loss_sharding,
        save_outputs=False,
    )
)


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    """Binary cross-entropy between logits and targets, as torch.nn.functional's.

    Args:
        input: logits of any shape, floating-point.
        target: of input's shape, floating-point, in [0, 1].
        weight: multiplies the losses; broadcasts to input's shape. A constant.
        size_average, reduce: torch's deprecated spelling of `reduction`.
        reduction: "none", "sum", or "mean" over all elements, whatever the weights.
        pos_weight: multiplies what positive targets cost; broadcasts likewise. A constant.

    Returns:
        A scalar, or for "none" a tensor of input's shape; in the wider of both dtypes, float32 (or
        float64) under autocast.

    Raises:
        ValueError: target has another shape, or the reduction is unknown; as torch.
        RuntimeError: a weight does not broadcast or requires a gradient; as torch.
        TypeError: a tensor is not floating-point.

    Numerics: fp32 from the load on, without overflow, and precise where the model is sure. Sums in
    fp32 in a fixed order. Infinite logits have torch's losses.

    Source: Goodfellow et al., "Deep Learning", 2016, 6.2.2.2.

    Example:
        >>> binary_cross_entropy_with_logits(torch.zeros(3), torch.ones(3))
        tensor(0.6931)
    """
    op = "binary_cross_entropy_with_logits"
    reduction = _reduction(op, size_average, reduce, reduction)
    require_floating(op, input=input, target=target)
    require_floating_if_given(op, weight=weight, pos_weight=pos_weight)
    require_same_device(op, input, target=target, weight=weight, pos_weight=pos_weight)
    if target.shape != input.shape:
        raise ValueError(
            f"{op}: target must have input's shape {tuple(input.shape)}, got {tuple(target.shape)}"
        )
    constants = [
        _constant(op, name, w, input)
        for name, w in (("weight", weight), ("pos_weight", pos_weight))
    ]
    dtype = _loss_dtype(input, target)
    given = (as_lead(input, dtype), target, *constants)
    if reduction == "mean" and is_dtensor(input):
        return _mean_by_sum(BCE_WITH_LOGITS, given, input.numel(), dtype)
    return BCE_WITH_LOGITS(*given, reduction, dtype)


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """Squared error between predictions and targets, as torch.nn.functional's.

    Args:
        input, target: of shapes that broadcast to each other; a warning if they differ. A target
            of integers or booleans is taken as of input's dtype.
        size_average, reduce: torch's deprecated spelling of `reduction`.
        reduction: "none", "sum", or "mean": over all elements, or weighted by `weight`.
        weight: of input's shape, multiplies the errors; differentiable.

    Returns:
        A scalar, or for "none" a tensor of the broadcast shape; in the wider of both dtypes,
        float32 (or float64) under autocast.

    Raises:
        ValueError: weight is not of input's shape, or the reduction is unknown; as torch.
        RuntimeError: the shapes don't broadcast; as torch.
        TypeError: a tensor is not floating-point.

    Numerics: fp32 from the load on; sums in fp32 in a fixed order.

    Source: Gauss, "Theoria motus corporum coelestium", 1809 (least squares).

    Example:
        >>> mse_loss(torch.zeros(4), torch.full((4,), 2.0))
        tensor(4.)
    """
    op = "mse_loss"
    reduction = _reduction(op, size_average, reduce, reduction)
    require_floating(op, input=input)
    require_tensors(op, target=target)
    if not (target.is_floating_point() or target.is_complex()):
        target = target.to(input.dtype)
    require_floating(op, target=target)
    require_floating_if_given(op, weight=weight)
    require_same_device(op, input, target=target, weight=weight)
    if target.shape != input.shape:
        warnings.warn(
            f"{op}: target has shape {tuple(target.shape)} and input {tuple(input.shape)}; they "
            "are broadcast, which is rarely meant",
            stacklevel=2,
        )
    if weight is not None and weight.shape != input.shape:
        raise ValueError(
            f"{op}: weight must have input's shape {tuple(input.shape)}, got {tuple(weight.shape)}"
        )
    dtype = _loss_dtype(input, target, weight)
    input, target = torch.broadcast_tensors(input, target)
    x = as_lead(input, dtype)
    given = (x, target, None if weight is None else weight.expand(x.shape))
    if reduction == "mean" and weight is not None:
        wide = torch.promote_types(dtype, torch.float32)
        return _mean_by_sum(MSE_LOSS, given, weight.sum(dtype=wide), dtype)
    if reduction == "mean" and is_dtensor(input):
        return _mean_by_sum(MSE_LOSS, given, input.numel(), dtype)
    return MSE_LOSS(*given, reduction, dtype)


def _mean_by_sum(
    op: Op, given: tuple[Tensor | None, ...], count: int | Tensor, dtype: torch.dtype
) -> Tensor:
    """The op's sum, wide until it is divided by the count."""
    total: Tensor = op(*given, "sum", torch.promote_types(dtype, torch.float32))
    return (total / count).to(dtype)


def _reduction(op: str, size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    if size_average is not None or reduce is not None:
        reduction = legacy_get_string(size_average, reduce)
    require(reduction in _REDUCTIONS, op, "reduction", f"be one of {_REDUCTIONS}", repr(reduction))
    return reduction


def _constant(op: str, name: str, weight: Tensor | None, input: Tensor) -> Tensor | None:
    """The weight as a view of input's shape."""
    if weight is None:
        return None
    if weight.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"{op}: {name} must not require a gradient; detach it")
    return weight.expand(input.shape)


def _loss_dtype(input: Tensor, *others: Tensor | None) -> torch.dtype:
    dtype = input.dtype
    for other in others:
        dtype = dtype if other is None else torch.promote_types(dtype, other.dtype)
    autocast = autocasts(input)
    return torch.promote_types(dtype, torch.float32) if autocast else dtype
