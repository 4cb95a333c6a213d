"""The ops of a norm and the linear layers that read it: alone, and after a residual sum.

Saved for backward: x, or the sum in its place, the parameters, one or two fp32 statistics a row,
and dropout's seed. Backward makes the norm's output again in the kernel that computes the norm's
gradient:

    dnormed = dy @ weight     dx = norm's gradient (dnormed) + dsummed     dweight = dy.T @ normed

Source: Chen et al., "Training deep nets with sublinear memory cost", 2016.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trilith.kernels._norm_backward import AddedGradients, norm_backward
from trilith.kernels._norm_forward import Added, norm_forward
from trilith.kernels._runtime.elementwise import require_seed
from trilith.kernels._runtime.matrix import (
    input_gradient,
    linear,
    parameter_gradients,
    room_for,
)
from trilith.kernels._runtime.plan import planned
from trilith.kernels._runtime.sharding import Strategy, split
from trilith.kernels.add_norm import ADD_NORM, residual_sum, shared_with_residual, statistics
from trilith.kernels.norms import norm_reference
from trilith.plugins import BackwardContext, Cost, Op, OpSpec, Sample


def _products(
    x: Tensor, weight: Tensor, bias: Tensor | None, second: Tensor | None, bias2: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Both linear layers of x; the result of one that is left out has no elements."""
    y = linear(x, weight, bias)
    return y, x.new_empty(0) if second is None else linear(x, second, bias2)


def _products_out(x: Tensor, weight: Tensor, weight2: Tensor | None) -> tuple[Tensor, Tensor]:
    shapes = [(0,) if w is None else (*x.shape[:-1], w.shape[0]) for w in (weight, weight2)]
    y, y2 = (weight.new_empty(shape) for shape in shapes)
    return y, y2


def _norm_linear_out(
    x: Tensor, weight: Tensor, weight2: Tensor | None, centred: bool
) -> tuple[Tensor, ...]:
    return *_products_out(x, weight, weight2), *statistics(x, centred)


@planned
def _norm_linear_fwd(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    weight2: Tensor | None,
    bias2: Tensor | None,
    eps: float,
    centred: bool,
) -> tuple[Tensor, ...]:
    saved = statistics(x, centred)
    mean = saved[0] if centred else None
    normed = weight.new_empty(x.shape)
    norm_forward(x, norm_weight, norm_bias, eps, normed, mean, saved[-1])
    return *_products(normed, weight, bias, weight2, bias2), *saved


@planned
def _norm_linear_bwd(
    ctx: BackwardContext, dy: Tensor | None, dy2: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, *parameters, eps, centred = ctx.inputs
    dnorm, dlinear = _gradients(
        (dy, dy2), x, parameters, eps, ctx.aux, ctx.needs_input_grad[:7], AddedGradients()
    )
    return *dnorm, *dlinear


def _gradients(
    dys: Sequence[Tensor | None],
    x: Tensor,
    parameters: Sequence[Tensor | None],
    eps: float,
    stats: Sequence[Tensor],
    needs: Sequence[bool],
    more: AddedGradients,
) -> tuple[tuple[Tensor | None, ...], list[Tensor | None]]:
    """Gradients of (x, norm's weight and bias), and of both linear layers' weight and bias.

    x is what was normalised; needs are in the order (x, *parameters).
    """
    norm_weight, norm_bias, weight, _, weight2, _ = parameters
    assert weight is not None
    mean, rstd = stats if len(stats) == 2 else (None, stats[0])
    dys = (dys[0], None if weight2 is None else dys[1])
    y = weight.new_empty(x.shape) if needs[3] or needs[5] else None
    dnorm: tuple[Tensor | None, ...] = (None, None, None)
    if any(needs[:3]) or more.dbranch is not None:
        if all(dy is None for dy in dys):
            dnormed = torch.zeros_like(x)
        else:
            dnormed = input_gradient(dys, (weight, weight2))
        more = replace(more, y=y)
        dnorm = norm_backward(dnormed, x, norm_weight, norm_bias, mean, rstd, needs[:3], more)
    elif y is not None:
        again = None if mean is None else torch.empty_like(mean)
        norm_forward(x, norm_weight, norm_bias, eps, y, again, torch.empty_like(rstd))
    first = parameter_gradients(dys[0], y, needs[3:5])
    return dnorm, [*first, *parameter_gradients(dys[1], y, needs[5:7])]


def _norm_linear_grads(
    ctx: BackwardContext, dy: Tensor | None, dy2: Tensor | None
) -> tuple[Tensor | None, ...]:
    return room_for(ctx.inputs[:7], ctx.needs_input_grad)


def _norm_linear_reference(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    weight2: Tensor | None,
    bias2: Tensor | None,
    eps: float,
    centred: bool,
) -> tuple[Tensor, Tensor]:
    """linear(norm(x), weight, bias), and the same of weight2: without elements if that is None."""
    normed = norm_reference(x, norm_weight, norm_bias, eps, centred).to(weight.dtype)
    y = F.linear(normed, weight, bias)
    return y, y.flatten()[:0].clone() if weight2 is None else F.linear(normed, weight2, bias2)


def _add_norm_linear_out(
    x: Tensor, residual: Tensor, weight: Tensor, weight2: Tensor | None, centred: bool
) -> tuple[Tensor, ...]:
    summed = residual.new_empty(residual.shape)
    return *_products_out(x, weight, weight2), summed, *statistics(summed, centred)


@planned
def _add_norm_linear_fwd(
    x: Tensor,
    residual: Tensor,
    seed: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    weight2: Tensor | None,
    bias2: Tensor | None,
    eps: float,
    p: float,
    centred: bool,
    x_dtype: torch.dtype | None,
) -> tuple[Tensor, ...]:
    require_seed("add_norm_linear", seed, p)
    summed, saved = residual.new_empty(residual.shape), statistics(residual, centred)
    mean = saved[0] if centred else None
    normed = weight.new_empty(x.shape)
    added = Added(residual, summed, seed, p)
    norm_forward(x, norm_weight, norm_bias, eps, normed, mean, saved[-1], added)
    return *_products(normed, weight, bias, weight2, bias2), summed, *saved


@planned
def _add_norm_linear_bwd(
    ctx: BackwardContext, dy: Tensor | None, dy2: Tensor | None, dsummed: Tensor | None
) -> tuple[Tensor | None, ...]:
    _, _, seed, *parameters, eps, p, _, x_dtype = ctx.inputs
    (summed,), needs = ctx.outputs, ctx.needs_input_grad
    dx = summed.new_empty(summed.shape, dtype=x_dtype) if needs[0] else None
    more = AddedGradients(dsum=dsummed, seed=seed, p=p, dbranch=dx)
    wanted = (needs[1], *needs[3:9])
    dnorm, dlinear = _gradients((dy, dy2), summed, parameters, eps, ctx.aux, wanted, more)
    return dx, dnorm[0], None, *dnorm[1:], *dlinear


def _add_norm_linear_grads(
    ctx: BackwardContext, dy: Tensor | None, dy2: Tensor | None, dsummed: Tensor | None
) -> tuple[Tensor | None, ...]:
    (summed,), needs, x_dtype = ctx.outputs, ctx.needs_input_grad, ctx.inputs[-1]
    dx = summed.new_empty(summed.shape, dtype=x_dtype) if needs[0] else None
    dresidual = summed.new_empty(summed.shape) if needs[1] else None
    return dx, dresidual, None, *room_for(ctx.inputs[3:9], needs[3:])


def _add_norm_linear_reference(
    x: Tensor,
    residual: Tensor,
    seed: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    weight2: Tensor | None,
    bias2: Tensor | None,
    eps: float,
    p: float,
    centred: bool,
    x_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """norm_linear of residual + dropout(x), and that sum; x_dtype None is residual's."""
    summed = residual_sum(x, residual, seed, p)
    y, y2 = _norm_linear_reference(
        summed, norm_weight, norm_bias, weight, bias, weight2, bias2, eps, centred
    )
    return y, y2, summed


def _randn(device: torch.device, dtype: torch.dtype) -> Any:
    def randn(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        scale = shape[-1] ** -0.5 if len(shape) == 2 and shape[0] > 10 else 1.0
        return scale * torch.randn(*shape, device=device, dtype=dtype)

    return randn


def _norm_linear_samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    randn = _randn(device, dtype)
    yield Sample(
        randn(7, 33), randn(33), randn(33), randn(12, 33), randn(12), None, None, 1e-5, True
    )
    pair = (randn(16, 20), None, randn(13, 20), randn(13))
    yield Sample(randn(3, 4, 20).transpose(0, 1), randn(20), None, *pair, 1e-3, False)
    yield Sample(randn(5, 24), None, None, randn(11, 24), None, None, None, 1e-5, True)


def _add_norm_linear_samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    randn = _randn(device, dtype)
    seed = torch.tensor([20240229], device=device)
    wide = torch.promote_types(dtype, torch.float32)
    narrow = None if wide == dtype else dtype
    one = (randn(12, 33), randn(12), None, None)
    yield Sample(randn(7, 33), randn(7, 33), seed, randn(33), None, *one, 1e-5, 0.3, False, None)
    pair = (randn(16, 20), None, randn(13, 20), randn(13))
    both = (randn(3, 4, 20).transpose(0, 1), randn(4, 3, 20))
    yield Sample(*both, None, randn(20), randn(20), *pair, 1e-3, 0.0, True, None)
    mixed = (randn(6, 24), randn(6, 24, dtype=wide), None, randn(24), None)
    yield Sample(*mixed, randn(11, 24), None, None, None, 1e-5, 0.0, False, narrow)


def _linear_cost(x: Tensor, weights: Sequence[Tensor | None], moved: tuple[int, int]) -> Cost:
    """The products' work, besides what the norm moves forward and backward."""
    rows, flops, data = x.numel() // max(1, x.shape[-1]), 0, 0
    for weight in weights:
        if weight is not None:
            flops += 2 * rows * weight.numel()
            data += (weight.numel() + rows * weight.shape[0]) * weight.element_size()
    return Cost(moved[0] + data, moved[1] + 3 * data, flops, 2 * flops)


def _norm_linear_cost(x: Tensor, weight: Tensor, weight2: Tensor | None) -> Cost:
    """The norm's output is written once and read by each product, in backward again."""
    weights = (weight, weight2)
    data, normed = x.numel() * x.element_size(), x.numel() * weight.element_size()
    readers = 1 + sum(w is not None for w in weights)
    return _linear_cost(x, weights, (data + readers * normed, 2 * data + (1 + readers) * normed))


def _add_norm_linear_cost(
    x: Tensor, residual: Tensor, weight: Tensor, weight2: Tensor | None, p: float
) -> Cost:
    weights = (weight, weight2)
    data, added = residual.numel() * residual.element_size(), x.numel() * x.element_size()
    normed = x.numel() * weight.element_size()
    separate = p > 0.0 or x.dtype != residual.dtype
    readers = 1 + sum(w is not None for w in weights)
    forward = added + 2 * data + readers * normed
    return _linear_cost(x, weights, (forward, 3 * data + separate * added + (1 + readers) * normed))


def _norm_linear_sharding(x: Tensor, weight: Tensor, weight2: Tensor | None) -> list[Strategy]:
    """Rows; or the linear layers' outputs, as many of each: a rank has a share of each weight's."""
    is_pair = weight2 is not None  # left out, its output is empty on every rank
    rows = [split([dim, dim if is_pair else None], [dim]) for dim in range(x.ndim - 1)]
    if weight2 is not None and weight2.shape[0] != weight.shape[0]:
        return rows
    last = x.ndim - 1
    outputs = split([last, last if is_pair else None], [None, None, None, 0, 0, 0, 0])
    return [*rows, outputs]


def _add_norm_linear_sharding(x: Tensor, weight2: Tensor | None, p: float) -> list[Strategy]:
    """Rows: the sum is an output too, and one that every rank has whole can't be split."""
    dims = range(x.ndim - 1) if p == 0.0 else ()
    return [split([dim, None if weight2 is None else dim, dim], [dim, dim]) for dim in dims]


NORM_LINEAR = Op(
    OpSpec(
        name="trilith::norm_linear",
        forward=_norm_linear_fwd,
        backward=_norm_linear_bwd,
        reference=_norm_linear_reference,
        samples=_norm_linear_samples,
        outputs=2,
        save_outputs=False,
        fake=_norm_linear_out,
        fake_backward=_norm_linear_grads,
        materialize_grads=False,
        cost=_norm_linear_cost,
        sharding=_norm_linear_sharding,
        parts=("trilith::layer_norm", "trilith::rms_norm"),
        autocast="low",
    )
)
ADD_NORM_LINEAR = Op(
    OpSpec(
        name="trilith::add_norm_linear",
        forward=_add_norm_linear_fwd,
        backward=_add_norm_linear_bwd,
        reference=_add_norm_linear_reference,
        samples=_add_norm_linear_samples,
        outputs=3,
        save_inputs=("seed", "norm_weight", "norm_bias", "weight", "bias", "weight2", "bias2"),
        save_outputs={2: "residual"},
        shared_gradients=shared_with_residual,
        fake=_add_norm_linear_out,
        fake_backward=_add_norm_linear_grads,
        materialize_grads=False,
        cost=_add_norm_linear_cost,
        sharding=_add_norm_linear_sharding,
        parts=(ADD_NORM.spec.name, *ADD_NORM.spec.parts),
        autocast="low",
    )
)
