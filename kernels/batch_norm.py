"""Batch norm: each channel's elements less their mean, over their standard deviation.

    y = (x - mean) * rstd * weight + bias     rstd = 1 / sqrt(var + eps)

x (N, C, ...), one mean and one (biased) variance for each of C channels, over the R other elements:
of this batch, or given. Backward, with g = dy * weight and x_hat = (x - mean) * rstd:

    dx = rstd * (g - mean(g) - x_hat * mean(g * x_hat)), or rstd * g where the statistics were given
    dweight = sum(dy * x_hat)    dbias = sum(dy)

Statistics in fp32 without atomics: each program finds mean and squared differences of its share of
the elements, tile by tile, and a second kernel merges the shares in a fixed order.

Source: Ioffe and Szegedy, "Batch normalization", 2015; Chan, Golub and LeVeque, "Updating formulae
and a pairwise algorithm for computing sample variances", 1979 (the merge).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trilith.kernels._batch_norm_kernels import (
    batch_norm_apply,
    batch_norm_gradients,
    batch_norm_statistics,
)
from trilith.kernels._runtime.checks import (
    require,
    require_floating,
    require_floating_if_given,
    require_same_device,
)
from trilith.kernels._runtime.plan import planned
from trilith.kernels._runtime.sharding import Strategy, split
from trilith.plugins import BackwardContext, Cost, Op, OpSpec, Sample

__all__ = ["batch_norm"]


def _train_out(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty(x.shape[1], dtype=torch.float32)
    return x.new_empty(x.shape), mean, mean.new_empty(mean.shape)


@planned
def _train_fwd(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, var = _train_out(x)
    batch_norm_statistics(x, mean, var)
    batch_norm_apply(x, mean, var, weight, bias, eps, y)
    return y, mean, var


@planned
def _train_bwd(
    ctx: BackwardContext, dy: Tensor | None, dmean: Tensor | None, dvar: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, weight, bias, eps = ctx.inputs
    mean, var = ctx.outputs
    dy = torch.zeros_like(x) if dy is None else dy
    needs = ctx.needs_input_grad[:3]
    return batch_norm_gradients(dy, x, mean, var, weight, bias, eps, needs, (dmean, dvar), True)


def _wide(*tensors: Tensor | None) -> tuple[Any, ...]:
    """In float32, or float64 if the first is."""
    assert tensors[0] is not None
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return tuple(None if t is None else t.to(dtype) for t in tensors)


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(-1, *(1,) * (x.dim() - 2))


def _train_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised batch, and its channels' means and biased variances."""
    wide, weight, bias = _wide(x, weight, bias)
    dims = [d for d in range(x.dim()) if d != 1]
    var, mean = torch.var_mean(wide, dims, correction=0)
    y = (wide - _per_channel(mean, x)) * _per_channel(torch.rsqrt(var + eps), x)
    y = y if weight is None else y * _per_channel(weight, x)
    y = y if bias is None else y + _per_channel(bias, x)
    return y.to(x.dtype), mean, var


def _given_out(x: Tensor) -> tuple[Tensor]:
    return (x.new_empty(x.shape),)


@planned
def _given_fwd(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor]:
    (y,) = _given_out(x)
    batch_norm_apply(x, mean, var, weight, bias, eps, y)
    return (y,)


@planned
def _given_bwd(ctx: BackwardContext, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, mean, var, weight, bias, eps = ctx.inputs
    needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[3:5])
    none = (None, None)
    grads = batch_norm_gradients(dy, x, mean, var, weight, bias, eps, needs, none, False)
    return grads[0], None, None, *grads[1:]


def _given_reference(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """The normalised batch; mean and var are constants."""
    wide, mean, var, weight, bias = _wide(x, mean.detach(), var.detach(), weight, bias)
    return F.batch_norm(wide, mean, var, weight, bias, False, 0.0, eps).to(x.dtype)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, ...]]:
    def pair(n: int) -> tuple[Tensor, Tensor]:
        first, second = torch.randn(2, n, device=device, dtype=dtype)
        return first, second

    yield torch.randn(33, 7, device=device, dtype=dtype), *pair(7)
    yield torch.randn(5, 18, 21, device=device, dtype=dtype), *pair(18)
    yield torch.randn(3, 4, 6, 5, device=device, dtype=dtype).transpose(0, 1), *pair(3)


def _train_samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    for x, weight, bias in _samples(device, dtype):
        yield Sample(x, weight, bias, 1e-5)
    yield Sample(x, None, None, 1e-3)


def _given_samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    for x, weight, bias in _samples(device, dtype):
        mean = torch.randn(x.shape[1], device=device)
        yield Sample(x, mean, mean.square() + 0.5, weight, bias, 1e-5)
    yield Sample(x, mean, mean.square() + 0.5, None, None, 1e-3)


def _cost(x: Tensor, passes: int) -> Cost:
    """Training reads x twice, and in backward dy and x twice."""
    data, channels = x.numel() * x.element_size(), 4 * x.shape[1]
    return Cost(
        forward_bytes=(1 + passes) * data + 4 * channels,
        backward_bytes=(3 if passes == 1 else 5) * data + 6 * channels,
        forward_flops=8 * x.numel(),
        backward_flops=13 * x.numel(),
    )


def _train_cost(x: Tensor) -> Cost:
    return _cost(x, passes=2)


def _given_cost(x: Tensor) -> Cost:
    return _cost(x, passes=1)


def _train_sharding(x: Tensor) -> list[Strategy]:
    """Channels; statistics of the whole batch need all of it."""
    return [split([1, 0, 0], [1, 0, 0])]


def _given_sharding(x: Tensor) -> list[Strategy]:
    """Any dimension, and what belongs to the channels with them."""
    return [split([d], [1, 0, 0, 0, 0] if d == 1 else [d]) for d in range(x.ndim)]


BATCH_NORM = Op(
    OpSpec(
        name="trilith::batch_norm",
        forward=_train_fwd,
        backward=_train_bwd,
        reference=_train_reference,
        samples=_train_samples,
        outputs=3,
        save_outputs=(1, 2),
        fake=_train_out,
        cost=_train_cost,
        sharding=_train_sharding,
        materialize_grads=False,
    )
)
BATCH_NORM_GIVEN = Op(
    OpSpec(
        name="trilith::batch_norm_given",
        forward=_given_fwd,
        backward=_given_bwd,
        reference=_given_reference,
        samples=_given_samples,
        fake=_given_out,
        cost=_given_cost,
        sharding=_given_sharding,
        save_outputs=False,
    )
)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise each channel of a batch, as torch.nn.functional.batch_norm.

    Args:
        input: (N, C) or (N, C, ...), floating-point, any strides.
        running_mean, running_var: (C,), floating-point. Training moves them, in place, towards the
            batch's mean and unbiased variance; else they are what is normalised with.
        weight, bias: (C,), multiplied and added last.
        training: whether the batch's own statistics normalise it.
        momentum: how far the running statistics move; a scalar tensor keeps it on the device.
        eps: added to the variance under the square root.

    Returns:
        The normalised tensor, in input's shape and dtype, contiguous.

    Raises:
        ValueError: training on one value per channel; eps is not positive.
        RuntimeError: a vector is not of C elements, or there are no statistics and no training, as
            in torch.
        TypeError: a tensor is not floating-point.

    Numerics: statistics and arithmetic in fp32, rounded once; all sums in a fixed order.

    Source: Ioffe and Szegedy, "Batch normalization", 2015.

    Example:
        >>> batch_norm(torch.randn(8, 3), None, None, training=True).shape
        torch.Size([8, 3])
    """
    vectors = {
        "running_mean": running_mean,
        "running_var": running_var,
        "weight": weight,
        "bias": bias,
    }
    require_floating("batch_norm", input=input)
    if input.dim() == 1 and not input.numel():
        return input.clone()  # torch takes nothing in any shape
    require(eps > 0, "batch_norm", "eps", "be positive", eps)
    _check(input, vectors, training)
    if not training:
        assert running_mean is not None
        assert running_var is not None
        given = (running_mean.detach(), running_var.detach())
        return BATCH_NORM_GIVEN(input, *given, weight, bias, eps)
    y, mean, var = BATCH_NORM(input, weight, bias, eps)
    count = input.numel() // max(1, input.shape[1])
    if not count:
        return y  # nothing was seen: the statistics stay
    with torch.no_grad():
        if running_mean is not None:
            running_mean.lerp_(mean.detach().to(running_mean.dtype), momentum)
        if running_var is not None:
            unbiased = var.detach() * (count / max(1, count - 1))
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    return y


def _check(input: Tensor, vectors: dict[str, Tensor | None], training: bool) -> None:
    op = "batch_norm"
    require_floating_if_given(op, **vectors)
    require_same_device(op, input, **vectors)
    if input.dim() < 2:
        raise ValueError(f"{op}: input must be (N, C, ...), got {tuple(input.shape)}")
    for name, vector in vectors.items():
        if vector is not None and vector.shape != input.shape[1:2]:
            raise RuntimeError(
                f"{op}: {name} must have {input.shape[1]} elements, one per channel, "
                f"got {tuple(vector.shape)}"
            )
    if not training and (vectors["running_mean"] is None or vectors["running_var"] is None):
        raise RuntimeError(f"{op}: running_mean and running_var must be given without training")
    if training and _values_per_channel(input.shape) == 1:
        raise ValueError(
            f"{op}: expected more than 1 value per channel when training, got {tuple(input.shape)}"
        )


def _values_per_channel(shape: Sequence[int]) -> int:
    count = shape[0]
    for size in shape[2:]:
        count *= size
    return count
