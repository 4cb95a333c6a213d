"""Activations, alone, after a bias, before dropout, or as a gate: one pass over memory each way.

    bias_act   y = dropout(act(x + bias))      gated_act   y = act(gate) * up

and backward, with z = x + bias, g = dropout(dy) of the same mask,

    dx = g * act'(z)   dbias = sum of dx over rows
    dgate = dy * up * act'(gate)   dup = dy * act(gate)

x, gate, up (..., N), bias (N,). Saved for backward: the inputs only; the activation is recomputed
and the mask regenerated. All arithmetic is in fp32; the bias gradient is summed per program, then
over programs, in a fixed order.

Source: Hendrycks and Gimpel, "Gaussian error linear units", 2016; Shazeer, "GLU variants improve
transformer", 2020; Srivastava et al., "Dropout", 2014.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from trilith.kernels._activation_kernels import (
    bias_act_backward,
    bias_act_forward,
    gated_act_backward,
    gated_act_forward,
)
from trilith.kernels._runtime import checks
from trilith.kernels._runtime.elementwise import reference_dropout, require_seed
from trilith.kernels._runtime.functors import ACTIVATIONS, require_activation
from trilith.kernels._runtime.plan import planned
from trilith.kernels._runtime.random import run_seeded
from trilith.kernels._runtime.sharding import Strategy, elementwise
from trilith.plugins import BackwardContext, Cost, Op, OpSpec, Sample

__all__ = ["bias_act", "gated_act"]


def _bias_act_out(x: Tensor) -> tuple[Tensor]:
    return (x.new_empty(x.shape),)


@planned
def _bias_act_fwd(
    x: Tensor, bias: Tensor | None, seed: Tensor | None, activation: str, p: float
) -> tuple[Tensor, ...]:
    require_seed("bias_act", seed, p)
    (y,) = _bias_act_out(x)
    bias_act_forward(x, bias, seed, activation, p, y)
    return (y,)


@planned
def _bias_act_bwd(ctx: BackwardContext, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, bias, seed, activation, p = ctx.inputs
    return bias_act_backward(dy, x, bias, seed, activation, p, ctx.needs_input_grad[:2], None)


def _bias_act_reference(
    x: Tensor, bias: Tensor | None, seed: Tensor | None, activation: str, p: float
) -> Tensor:
    """dropout(act(x + bias)) in float32 (float64 for float64), rounded once to x's dtype."""
    z = x if bias is None and p == 0.0 else x.to(torch.promote_types(x.dtype, torch.float32))
    y = ACTIVATIONS[activation].torch(z if bias is None else z + bias)
    return reference_dropout(y, seed, p).to(x.dtype)


def _bias_act_samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def randn(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    seed = torch.tensor([20240229], device=device)
    yield Sample(randn(5, 33), None, None, "gelu", 0.0)
    yield Sample(randn(3, 7, 40), randn(40), None, "gelu_tanh", 0.0)
    yield Sample(randn(24, 9).t(), randn(24), None, "silu", 0.0)
    yield Sample(randn(7, 52)[:, :26], randn(26), seed, "tanh", 0.3)
    yield Sample(randn(2, 64), None, seed, "sigmoid", 0.5)
    yield Sample(
        randn(4, 18), randn(18, dtype=torch.promote_types(dtype, torch.float32)), None, "elu", 0.0
    )
    for activation in ("identity", "relu", "relu2", "leaky_relu", "quick_gelu"):
        yield Sample(randn(1, 17), randn(17), None, activation, 0.0)


def _bias_act_cost(x: Tensor, bias: Tensor | None) -> Cost:
    bytes_x = x.numel() * x.element_size()
    bytes_bias = 0 if bias is None else bias.numel() * bias.element_size()
    return Cost(forward_bytes=2 * bytes_x + bytes_bias, backward_bytes=3 * bytes_x + 2 * bytes_bias)


def _bias_act_sharding(x: Tensor, p: float) -> list[Strategy]:
    return [] if p > 0.0 else elementwise(x, 1, biased=True)


BIAS_ACT = Op(
    OpSpec(
        name="trilith::bias_act",
        forward=_bias_act_fwd,
        backward=_bias_act_bwd,
        reference=_bias_act_reference,
        samples=_bias_act_samples,
        fake=_bias_act_out,
        cost=_bias_act_cost,
        sharding=_bias_act_sharding,
        parts=("trilith::dropout",),
        save_outputs=False,
    )
)


def bias_act(
    x: Tensor,
    bias: Tensor | None = None,
    activation: str = "gelu",
    *,
    p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """dropout(act(x + bias)) in one pass.

    Args:
        x: (..., N), any floating dtype, any strides.
        bias: (N,), any floating dtype.
        activation: identity, relu, relu2, leaky_relu (slope 0.01), elu, sigmoid, tanh, gelu (erf),
            gelu_tanh, quick_gelu (x sigmoid(1.702 x)) or silu.
        p: probability that an element is dropped; those kept are divided by 1 - p.
        training: False switches dropout off.

    Returns:
        (..., N), contiguous, in x's dtype.

    Raises:
        ValueError: an unknown activation, a bias of another shape or device, p outside [0, 1].
        TypeError: a tensor that is not floating-point.

    Numerics:
        fp32 inside, rounded once. The bias gradient is summed in fp32 in a fixed order.

    Source:
        Hendrycks and Gimpel, "Gaussian error linear units", 2016.

    Example:
        >>> bias_act(torch.randn(2, 8), torch.zeros(8), "silu").shape
        torch.Size([2, 8])
    """
    require_activation("bias_act", activation)
    checks.require_floating("bias_act", x=x)
    checks.require_bias("bias_act", x, bias)
    checks.require_probability("bias_act", "p", p)
    p = p if training else 0.0
    return run_seeded(BIAS_ACT, (x, bias), p, (activation, p))


def _gated_act_out(gate: Tensor) -> tuple[Tensor]:
    return (gate.new_empty(gate.shape),)


@planned
def _gated_act_fwd(gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, ...]:
    (y,) = _gated_act_out(gate)
    gated_act_forward(gate, up, activation, y)
    return (y,)


@planned
def _gated_act_bwd(ctx: BackwardContext, dy: Tensor) -> tuple[Tensor | None, ...]:
    gate, up, activation = ctx.inputs
    return gated_act_backward(dy, gate, up, activation, ctx.needs_input_grad[:2], None)


def _gated_act_reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) * up in float32 (float64 for float64), rounded once to gate's dtype."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (ACTIVATIONS[activation].torch(gate.to(wide)) * up.to(wide)).to(gate.dtype)


def _gated_act_samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    yield Sample(randn(5, 33), randn(5, 33), "silu")
    yield Sample(*randn(3, 5, 48).chunk(2, dim=-1), "gelu")
    yield Sample(randn(2, 3, 16).transpose(0, 1), randn(3, 2, 16), "relu")
    yield Sample(randn(40, 6).t(), randn(6, 40), "sigmoid")
    names = ("gelu_tanh", "tanh", "elu", "relu2", "leaky_relu", "identity", "quick_gelu")
    for activation in names:
        yield Sample(randn(2, 19), randn(2, 19), activation)


def _gated_act_cost(gate: Tensor, up: Tensor) -> Cost:
    n_bytes = gate.numel() * gate.element_size()
    bytes_up = up.numel() * up.element_size()
    return Cost(forward_bytes=2 * n_bytes + bytes_up, backward_bytes=3 * n_bytes + 2 * bytes_up)


def _gated_act_sharding(gate: Tensor) -> list[Strategy]:
    return elementwise(gate, 2)


GATED_ACT = Op(
    OpSpec(
        name="trilith::gated_act",
        forward=_gated_act_fwd,
        backward=_gated_act_bwd,
        reference=_gated_act_reference,
        samples=_gated_act_samples,
        fake=_gated_act_out,
        cost=_gated_act_cost,
        sharding=_gated_act_sharding,
        save_outputs=False,
    )
)


def gated_act(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """act(gate) * up in one pass: SwiGLU is silu, GeGLU gelu, ReGLU relu, GLU sigmoid.

    Args:
        gate: (..., N), any floating dtype. May be a view, as half of a packed projection.
        up: of gate's shape, with strides of its own.
        activation: one of bias_act's.

    Returns:
        (..., N), contiguous, in gate's dtype. The gradients of gate and up are contiguous too.

    Raises:
        ValueError: an unknown activation, or gate and up of other shapes or devices.
        TypeError: a tensor that is not floating-point.

    Numerics:
        fp32 inside, rounded once.

    Source:
        Shazeer, "GLU variants improve transformer", 2020.

    Example:
        >>> gate, up = torch.randn(2, 16).chunk(2, dim=-1)
        >>> gated_act(gate, up).shape
        torch.Size([2, 8])
    """
    require_activation("gated_act", activation)
    checks.require_floating("gated_act", gate=gate, up=up)
    checks.require_same_device("gated_act", gate, up=up)
    checks.require_shape("gated_act", "up", up, gate.shape)
    return GATED_ACT(gate, up, activation)
