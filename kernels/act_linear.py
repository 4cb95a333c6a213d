"""An activation and the linear layer that reads it, without keeping what is between them.

    bias_act_linear    y = dropout(act(x + bias)) @ weight.T + out_bias
    gated_act_linear   y = (act(gate) * up) @ weight.T + bias

x, gate, up (..., N), weight (K, N). Saved for backward: the inputs, and dropout's seed. With
dh = dy @ weight, backward is that of bias_act or gated_act, whose kernel makes the activated tensor
h again in the same pass; dweight = dy.T @ h. Matrix products are PyTorch's.

Source: Hendrycks and Gimpel, "Gaussian error linear units", 2016; Shazeer, "GLU variants improve
transformer", 2020; Chen et al., "Training deep nets with sublinear memory cost", 2016.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from trilith.kernels._activation_kernels import bias_act_backward, gated_act_backward
from trilith.kernels._runtime import checks
from trilith.kernels._runtime.functors import require_activation
from trilith.kernels._runtime.matrix import (
    input_gradient,
    linear,
    parameter_gradients,
    require_linear,
    room_for,
)
from trilith.kernels._runtime.plan import planned
from trilith.kernels._runtime.random import run_seeded
from trilith.kernels._runtime.sharding import Strategy, by_rows, split
from trilith.kernels.activations import BIAS_ACT, GATED_ACT
from trilith.plugins import BackwardContext, Cost, Op, OpSpec, Sample
from trilith.plugins.autocast import autocasts

__all__ = ["bias_act_linear", "gated_act_linear"]


def _linear_out(x: Tensor, weight: Tensor) -> tuple[Tensor]:
    return (x.new_empty((*x.shape[:-1], weight.shape[0])),)


@planned
def _bias_act_linear_fwd(
    x: Tensor,
    bias: Tensor | None,
    weight: Tensor,
    out_bias: Tensor | None,
    seed: Tensor | None,
    activation: str,
    p: float,
) -> tuple[Tensor]:
    (hidden,) = BIAS_ACT.spec.forward(x, bias, seed, activation, p)
    return (linear(hidden, weight, out_bias),)


@planned
def _bias_act_linear_bwd(ctx: BackwardContext, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, bias, weight, _, seed, activation, p = ctx.inputs
    needs = ctx.needs_input_grad
    hidden = x.new_empty(x.shape) if needs[2] else None
    dx: Tensor | None = None
    dbias: Tensor | None = None
    if needs[0] or needs[1]:
        dh = input_gradient((dy,), (weight,))
        dx, dbias = bias_act_backward(dh, x, bias, seed, activation, p, needs[:2], hidden)
    elif needs[2]:
        (hidden,) = BIAS_ACT.spec.forward(x, bias, seed, activation, p)
    return dx, dbias, *parameter_gradients(dy, hidden, needs[2:4])


def _bias_act_linear_grads(ctx: BackwardContext, dy: Tensor) -> tuple[Tensor | None, ...]:
    return room_for(ctx.inputs[:4], ctx.needs_input_grad)


def _bias_act_linear_reference(
    x: Tensor,
    bias: Tensor | None,
    weight: Tensor,
    out_bias: Tensor | None,
    seed: Tensor | None,
    activation: str,
    p: float,
) -> Tensor:
    """linear(dropout(act(x + bias)), weight, out_bias)."""
    return F.linear(BIAS_ACT.spec.reference(x, bias, seed, activation, p), weight, out_bias)


def _bias_act_linear_samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    seed = torch.tensor([20240229], device=device)
    yield Sample(randn(5, 33), randn(33), 0.2 * randn(12, 33), randn(12), None, "gelu", 0.0)
    yield Sample(randn(3, 7, 40), None, 0.2 * randn(9, 40), None, seed, "silu", 0.3)
    yield Sample(randn(24, 9).t(), randn(24), 0.2 * randn(5, 24), None, None, "relu", 0.0)


def _cost(read: int, x: Tensor, weight: Tensor) -> Cost:
    """`read` tensors of x's size go in; what is made of them is written and read by the product."""
    rows, data = x.numel() // max(1, x.shape[-1]), x.numel() * x.element_size()
    ends = (weight.numel() + rows * weight.shape[0]) * weight.element_size()
    flops = 2 * rows * weight.numel()
    forward, backward = (read + 2) * data + ends, (2 * read + 4) * data + 3 * ends
    return Cost(forward, backward, flops, 2 * flops)


def _bias_act_linear_cost(x: Tensor, weight: Tensor) -> Cost:
    return _cost(1, x, weight)


def _bias_act_linear_sharding(x: Tensor, out_bias: Tensor | None, p: float) -> list[Strategy]:
    if p > 0.0:
        return []
    return by_rows(x) if out_bias is not None else [*by_rows(x), split([None], [x.ndim - 1, 0, 1])]


BIAS_ACT_LINEAR = Op(
    OpSpec(
        name="trilith::bias_act_linear",
        forward=_bias_act_linear_fwd,
        backward=_bias_act_linear_bwd,
        reference=_bias_act_linear_reference,
        samples=_bias_act_linear_samples,
        fake=_linear_out,
        fake_backward=_bias_act_linear_grads,
        cost=_bias_act_linear_cost,
        sharding=_bias_act_linear_sharding,
        parts=(BIAS_ACT.spec.name, *BIAS_ACT.spec.parts),
        save_outputs=False,
        autocast="low",
    )
)


def bias_act_linear(
    x: Tensor,
    bias: Tensor | None,
    weight: Tensor,
    out_bias: Tensor | None = None,
    activation: str = "gelu",
    *,
    p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """linear(dropout(act(x + bias)), weight, out_bias); the activated tensor is not kept.

    Args:
        x: (..., N), any floating dtype, any strides: kept for backward.
        bias: (N,), any floating dtype.
        weight: (K, N), in x's dtype.
        out_bias: (K,), in x's dtype.
        activation: one of bias_act's.
        p: probability that an activated element is dropped; those kept are divided by 1 - p.
        training: False switches dropout off.

    Returns:
        (..., K), contiguous, in x's dtype.

    Raises:
        ValueError: an unknown activation, shapes, devices or dtypes that do not fit, p outside
            [0, 1].
        TypeError: a tensor that is not floating-point.

    Numerics:
        The activation in fp32, rounded to x's dtype; the product is PyTorch's. Under autocast all
        operands are lowered.

    Source:
        Hendrycks and Gimpel, "Gaussian error linear units", 2016; Chen et al., "Training deep nets
        with sublinear memory cost", 2016.

    Example:
        >>> x, down = torch.randn(2, 2048), torch.randn(512, 2048)
        >>> bias_act_linear(x, torch.zeros(2048), down, activation="gelu").shape
        torch.Size([2, 512])
    """
    op = "bias_act_linear"
    require_activation(op, activation)
    checks.require_floating(op, x=x)
    checks.require_bias(op, x, bias)
    checks.require_probability(op, "p", p)
    require_linear(op, x, weight, out_bias, "out_bias")
    _require_dtype(op, x, weight)
    p = p if training else 0.0
    return run_seeded(BIAS_ACT_LINEAR, (x, bias, weight, out_bias), p, (activation, p))


def _require_dtype(op: str, x: Tensor, weight: Tensor) -> None:
    if not autocasts(x):
        rule = f"have the input's dtype {x.dtype}"
        checks.require(weight.dtype == x.dtype, op, "weight", rule, weight.dtype)


def _gated_act_linear_out(gate: Tensor, weight: Tensor) -> tuple[Tensor]:
    return _linear_out(gate, weight)


@planned
def _gated_act_linear_fwd(
    gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor]:
    (hidden,) = GATED_ACT.spec.forward(gate, up, activation)
    return (linear(hidden, weight, bias),)


@planned
def _gated_act_linear_bwd(ctx: BackwardContext, dy: Tensor) -> tuple[Tensor | None, ...]:
    gate, up, weight, _, activation = ctx.inputs
    needs = ctx.needs_input_grad
    hidden = gate.new_empty(gate.shape) if needs[2] else None
    dgate: Tensor | None = None
    dup: Tensor | None = None
    if needs[0] or needs[1]:
        dh = input_gradient((dy,), (weight,))
        dgate, dup = gated_act_backward(dh, gate, up, activation, needs[:2], hidden)
    elif needs[2]:
        (hidden,) = GATED_ACT.spec.forward(gate, up, activation)
    return dgate, dup, *parameter_gradients(dy, hidden, needs[2:4])


def _gated_act_linear_grads(ctx: BackwardContext, dy: Tensor) -> tuple[Tensor | None, ...]:
    return room_for(ctx.inputs[:4], ctx.needs_input_grad)


def _gated_act_linear_reference(
    gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    """linear(act(gate) * up, weight, bias)."""
    return F.linear(GATED_ACT.spec.reference(gate, up, activation), weight, bias)


def _gated_act_linear_samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    yield Sample(randn(5, 33), randn(5, 33), 0.2 * randn(12, 33), randn(12), "silu")
    yield Sample(*randn(3, 5, 48).chunk(2, dim=-1), 0.2 * randn(9, 24), None, "gelu")
    yield Sample(randn(40, 6).t(), randn(6, 40), 0.2 * randn(5, 40), None, "sigmoid")


def _gated_act_linear_cost(gate: Tensor, weight: Tensor) -> Cost:
    return _cost(2, gate, weight)


def _gated_act_linear_sharding(gate: Tensor, bias: Tensor | None) -> list[Strategy]:
    rows = [split([dim], [dim, dim]) for dim in range(gate.ndim - 1)]
    last = gate.ndim - 1
    return rows if bias is not None else [*rows, split([None], [last, last, 1])]


GATED_ACT_LINEAR = Op(
    OpSpec(
        name="trilith::gated_act_linear",
        forward=_gated_act_linear_fwd,
        backward=_gated_act_linear_bwd,
        reference=_gated_act_linear_reference,
        samples=_gated_act_linear_samples,
        fake=_gated_act_linear_out,
        fake_backward=_gated_act_linear_grads,
        cost=_gated_act_linear_cost,
        sharding=_gated_act_linear_sharding,
        parts=(GATED_ACT.spec.name,),
        save_outputs=False,
        autocast="low",
    )
)


def gated_act_linear(
    gate: Tensor,
    up: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "silu",
) -> Tensor:
    """linear(act(gate) * up, weight, bias); the gated tensor is not kept.

    Args:
        gate: (..., N), any floating dtype, any strides: kept for backward.
        up: of gate's shape and dtype: kept for backward.
        weight: (K, N), in gate's dtype.
        bias: (K,), in gate's dtype.
        activation: one of bias_act's.

    Returns:
        (..., K), contiguous, in gate's dtype.

    Raises:
        ValueError: an unknown activation, or shapes, devices or dtypes that do not fit.
        TypeError: a tensor that is not floating-point.

    Numerics:
        The gate in fp32, rounded to gate's dtype; the product is PyTorch's. Under autocast all
        operands are lowered.

    Source:
        Shazeer, "GLU variants improve transformer", 2020; Chen et al., "Training deep nets with
        sublinear memory cost", 2016.

    Example:
        >>> gate, up = torch.randn(2, 4096).chunk(2, dim=-1)
        >>> gated_act_linear(gate, up, torch.randn(512, 2048)).shape
        torch.Size([2, 512])
    """
    op = "gated_act_linear"
    require_activation(op, activation)
    checks.require_floating(op, gate=gate, up=up)
    checks.require_same_device(op, gate, up=up)
    checks.require_shape(op, "up", up, gate.shape)
    require_linear(op, gate, weight, bias)
    _require_dtype(op, gate, weight)
    return GATED_ACT_LINEAR(gate, up, weight, bias, activation)
