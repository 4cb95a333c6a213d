"""A residual sum and its norm in one pass: what a pre-norm transformer does between two branches.

    summed = residual + dropout(x)    normed = layer_norm(summed) or rms_norm(summed)

Both are outputs, and both are differentiable. With dnorm the gradient that reaches the sum through
the norm, backward is one pass too:

    dresidual = dnorm + dsummed       dx = dropout's mask * dresidual

x, residual (..., N), weight, bias (N,). Saved for backward: the sum, which goes on to the next
branch anyway, weight, bias, one or two fp32 statistics a row, and dropout's seed. The norm is taken
of the rounded sum, the one that is returned.

Source: Ba et al., "Layer Normalization", 2016; Zhang and Sennrich, "Root Mean Square Layer
Normalization", 2019; Srivastava et al., "Dropout", 2014.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from trilith.kernels._norm_backward import AddedGradients, norm_backward
from trilith.kernels._norm_forward import Added, norm_forward
from trilith.kernels._runtime import checks
from trilith.kernels._runtime.elementwise import require_seed
from trilith.kernels._runtime.lead import as_lead
from trilith.kernels._runtime.matrix import room_for
from trilith.kernels._runtime.plan import planned
from trilith.kernels._runtime.random import run_seeded
from trilith.kernels._runtime.sharding import Strategy, split
from trilith.kernels.dropout import BIAS_DROPOUT_ADD
from trilith.kernels.norms import norm_reference, rms_eps
from trilith.plugins import BackwardContext, Cost, Op, OpSpec, Sample

__all__ = ["add_layer_norm", "add_rms_norm"]


def statistics(rows: Tensor, centred: bool) -> tuple[Tensor, ...]:
    """Room for a norm's saved numbers of each row: (mean, rstd), or (rstd,) of an RMS norm."""
    count = 2 if centred else 1
    return tuple(rows.new_empty(rows.shape[:-1], dtype=torch.float32) for _ in range(count))


def _out(residual: Tensor, centred: bool) -> tuple[Tensor, ...]:
    outputs = (residual.new_empty(residual.shape), residual.new_empty(residual.shape))
    return (*outputs, *statistics(residual, centred))


@planned
def _fwd(
    x: Tensor,
    residual: Tensor,
    seed: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    p: float,
    centred: bool,
    x_dtype: torch.dtype | None,
) -> tuple[Tensor, ...]:
    require_seed("add_norm", seed, p)
    normed, summed, *saved = _out(residual, centred)
    mean = saved[0] if centred else None
    added = Added(residual, summed, seed, p)
    norm_forward(x, weight, bias, eps, normed, mean, saved[-1], added)
    return normed, summed, *saved


def _grads(
    ctx: BackwardContext, dnormed: Tensor | None, dsummed: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Room for the gradients that are asked for."""
    (summed,), needs = ctx.outputs, ctx.needs_input_grad
    dx = summed.new_empty(summed.shape, dtype=ctx.inputs[8]) if needs[0] else None
    dresidual = summed.new_empty(summed.shape) if needs[1] else None
    return dx, dresidual, *room_for(ctx.inputs[2:5], needs[2:])


@planned
def _bwd(
    ctx: BackwardContext, dnormed: Tensor | None, dsummed: Tensor | None
) -> tuple[Tensor | None, ...]:
    _, _, seed, weight, bias, _, p, centred, x_dtype = ctx.inputs
    (summed,), needs = ctx.outputs, ctx.needs_input_grad
    dx = summed.new_empty(summed.shape, dtype=x_dtype) if needs[0] else None
    more = AddedGradients(dsum=dsummed, seed=seed, p=p, dbranch=dx)
    dnormed = torch.zeros_like(summed) if dnormed is None else dnormed
    mean = ctx.aux[0] if centred else None
    wanted = (needs[1], needs[3], needs[4])
    dresidual, dweight, dbias = norm_backward(
        dnormed, summed, weight, bias, mean, ctx.aux[-1], wanted, more
    )
    return dx, dresidual, None, dweight, dbias


def shared_with_residual(p: float, x_dtype: torch.dtype | None) -> dict[str, int | str]:
    """x's gradient is that of the residual where nothing is dropped and the dtype is the same."""
    return {"x": "residual"} if p == 0.0 and x_dtype is None else {}


def residual_sum(x: Tensor, residual: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """residual + dropout(x) in plain PyTorch."""
    summed: Tensor = BIAS_DROPOUT_ADD.spec.reference(x, residual, None, seed, p, x.dtype)
    return summed


def _reference(
    x: Tensor,
    residual: Tensor,
    seed: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    p: float,
    centred: bool,
    x_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """(norm(summed), summed) with summed = residual + dropout(x); x_dtype None is residual's."""
    summed = residual_sum(x, residual, seed, p)
    return norm_reference(summed, weight, bias, eps, centred), summed


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def randn(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    seed = torch.tensor([20240229], device=device)
    wide = torch.promote_types(dtype, torch.float32)
    narrow = None if wide == dtype else dtype
    yield Sample(randn(7, 33), randn(7, 33), seed, randn(33), randn(33), 1e-5, 0.3, True, None)
    yield Sample(randn(2, 3, 130), randn(2, 3, 130), None, randn(130), None, 1e-3, 0.0, False, None)
    yield Sample(
        randn(3, 4, 20).transpose(0, 1), randn(4, 3, 20), seed, None, None, 1e-5, 0.5, False, None
    )
    yield Sample(
        randn(6, 24), randn(6, 24, dtype=wide), None, randn(24), randn(24), 1e-5, 0.0, True, narrow
    )
    yield Sample(randn(5, 3), randn(5, 3), seed, None, randn(3), 1e-5, 0.2, True, None)


def _cost(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    p: float,
    centred: bool,
) -> Cost:
    """Forward reads two and writes two; backward reads three, and writes one or two."""
    bytes_x, bytes_sum = (t.numel() * t.element_size() for t in (x, residual))
    saved = 4 * (2 if centred else 1) * (x.numel() // max(1, x.shape[-1]))
    sizes = [t.numel() * t.element_size() for t in (weight, bias) if t is not None]
    separate = p > 0.0 or x.dtype != residual.dtype
    return Cost(
        forward_bytes=bytes_x + 3 * bytes_sum + saved + sum(sizes),
        backward_bytes=4 * bytes_sum + separate * bytes_x + saved + sum(sizes) + sum(sizes[:1]),
        forward_flops=9 * x.numel(),
        backward_flops=15 * x.numel(),
    )


def _sharding(x: Tensor, p: float) -> list[Strategy]:
    return [] if p > 0.0 else [split([dim] * 2, [dim] * 2) for dim in range(x.ndim - 1)]


ADD_NORM = Op(
    OpSpec(
        name="trilith::add_norm",
        forward=_fwd,
        backward=_bwd,
        reference=_reference,
        samples=_samples,
        outputs=2,
        save_inputs=("seed", "weight", "bias"),
        save_outputs={1: "residual"},
        shared_gradients=shared_with_residual,
        fake=_out,
        fake_backward=_grads,
        materialize_grads=False,
        cost=_cost,
        sharding=_sharding,
        parts=(
            "trilith::layer_norm",
            "trilith::rms_norm",
            "trilith::bias_dropout_add",
            "trilith::dropout",
        ),
    )
)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    p: float = 0.0,
    training: bool = True,
) -> tuple[Tensor, Tensor]:
    """layer_norm(residual + dropout(x)) and the sum itself, in one pass.

    Args:
        x: (..., N), any floating dtype, any strides: what a branch adds.
        residual: of x's shape; may be of a wider dtype than x.
        weight, bias: (N,), any floating dtype.
        eps: added to the variance under the square root.
        p: probability that an element of x is dropped; those kept are divided by 1 - p.
        training: False switches dropout off.

    Returns:
        (normed, summed), both (..., N), contiguous, in residual's dtype.

    Raises:
        ValueError: another shape or device, p outside [0, 1].
        TypeError: a tensor that is not floating-point.

    Numerics:
        fp32 inside. The sum is rounded once, and the norm is that of the rounded sum, rounded once.
        Weight and bias gradients are accumulated in fp32 in a fixed order.

    Source:
        Ba et al., "Layer Normalization", 2016; Srivastava et al., "Dropout", 2014.

    Example:
        >>> normed, x = add_layer_norm(torch.randn(8, 512), torch.randn(8, 512), torch.ones(512))
    """
    parameters = {"weight": weight, "bias": bias}
    check_sum("add_layer_norm", x, residual, parameters, p)
    return _call(x, residual, weight, bias, eps, p if training else 0.0, True)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    p: float = 0.0,
    training: bool = True,
) -> tuple[Tensor, Tensor]:
    """rms_norm(residual + dropout(x)) and the sum itself, in one pass.

    Args:
        x: (..., N), any floating dtype, any strides: what a branch adds.
        residual: of x's shape; may be of a wider dtype than x.
        weight: (N,), any floating dtype.
        eps: added to the mean square under the square root; None is as in rms_norm.
        p: probability that an element of x is dropped; those kept are divided by 1 - p.
        training: False switches dropout off.

    Returns:
        (normed, summed), both (..., N), contiguous, in residual's dtype.

    Raises:
        ValueError: another shape or device, p outside [0, 1].
        TypeError: a tensor that is not floating-point.

    Numerics:
        As add_layer_norm.

    Source:
        Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.

    Example:
        >>> normed, x = add_rms_norm(torch.randn(8, 512), torch.randn(8, 512), torch.ones(512))
    """
    check_sum("add_rms_norm", x, residual, {"weight": weight}, p)
    eps = rms_eps(residual) if eps is None else eps
    return _call(x, residual, weight, None, eps, p if training else 0.0, False)


def check_sum(
    op: str, x: Tensor, residual: Tensor, parameters: dict[str, Tensor | None], p: float
) -> None:
    checks.require_floating(op, x=x, residual=residual)
    checks.require_floating_if_given(op, **parameters)
    checks.require_same_device(op, x, residual=residual, **parameters)
    checks.require(x.ndim > 0, op, "x", "have a dimension to normalise over", tuple(x.shape))
    checks.require_shape(op, "residual", residual, x.shape)
    for name, parameter in parameters.items():
        checks.require_shape(op, name, parameter, x.shape[-1:])
    checks.require_probability(op, "p", p)


def _call(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    p: float,
    centred: bool,
) -> tuple[Tensor, Tensor]:
    x = as_lead(x, residual.dtype)
    x_dtype = None if x.dtype == residual.dtype else x.dtype
    rest = (weight, bias, eps, p, centred, x_dtype)
    normed, summed = run_seeded(ADD_NORM, (x, residual), p, rest)
    return normed, summed
