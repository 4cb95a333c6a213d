"""Squared-ReLU gate of a gated MLP, over tensors of one shape.

    y = r^2 * up            r = max(gate, 0)
    dgate = 2 * r * up * dy
    dup = r^2 * dy

Source: So et al., "Primer: Searching for Efficient Transformers for Language Modeling", 2021.
"""

# ruff: noqa: ANN001, ANN202

from __future__ import annotations

from collections.abc import Iterable

import torch
import triton
import triton.language as tl
from torch import Tensor

from trilith.kernels import launch
from trilith.plugins import BackwardContext, Cost, Op, OpSpec, Sample

BLOCK = 1024


@triton.jit
def _relu(x):
    return tl.where(x <= 0.0, 0.0, x)  # keeps a NaN


@triton.jit
def _forward_kernel(gate_ptr, up_ptr, y_ptr, size, BLOCK: tl.constexpr):
    """One program owns BLOCK elements."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    r = _relu(tl.load(gate_ptr + offs, mask=mask, other=0.0).to(tl.float32))
    up = tl.load(up_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs, r * r * up, mask=mask)


@triton.jit
def _backward_kernel(gate_ptr, up_ptr, dy_ptr, dgate_ptr, dup_ptr, size, BLOCK: tl.constexpr):
    """One program owns BLOCK elements."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    r = _relu(tl.load(gate_ptr + offs, mask=mask, other=0.0).to(tl.float32))
    dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if dgate_ptr is not None:
        up = tl.load(up_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(dgate_ptr + offs, 2.0 * r * up * dy, mask=mask)
    if dup_ptr is not None:
        tl.store(dup_ptr + offs, r * r * dy, mask=mask)


def _out(gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    return (gate.new_empty(gate.shape),)


def _forward(gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    (y,) = _out(gate, up)
    size = gate.numel()
    grid = (triton.cdiv(size, BLOCK),)
    launch(_forward_kernel, grid, gate.contiguous(), up.contiguous(), y, size, BLOCK=BLOCK)
    return (y,)


def _backward(ctx: BackwardContext, dy: Tensor) -> tuple[Tensor | None, ...]:
    gate, up = ctx.inputs
    gradients = [
        t.new_empty(t.shape) if need else None
        for t, need in zip(ctx.inputs, ctx.needs_input_grad, strict=True)
    ]
    size = gate.numel()
    grid = (triton.cdiv(size, BLOCK),)
    tensors = (gate.contiguous(), up.contiguous(), dy.contiguous(), *gradients)
    launch(_backward_kernel, grid, *tensors, size, BLOCK=BLOCK)
    return tuple(gradients)


def _reference(gate: Tensor, up: Tensor) -> Tensor:
    """max(gate, 0)^2 * up, in float32 (float64 when given it), rounded once."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (torch.relu(gate.to(wide)).square() * up.to(wide)).to(gate.dtype)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    yield Sample(randn(3, 35), randn(3, 35))
    yield Sample(*randn(2, 3, 16).chunk(2, -1))
    yield Sample(randn(1025), randn(1025))


def _cost(gate: Tensor, up: Tensor) -> Cost:
    size = gate.numel() * gate.element_size()
    return Cost(forward_bytes=3 * size, backward_bytes=5 * size)


RELU2_GATE = Op(
    OpSpec(
        name="acme::relu2_gate",
        forward=_forward,
        backward=_backward,
        reference=_reference,
        samples=_samples,
        fake=_out,
        cost=_cost,
        save_outputs=False,
    )
)


def relu2_gate(gate: Tensor, up: Tensor) -> Tensor:
    """max(gate, 0)^2 * up, for tensors of one shape and dtype.

    Raises:
        ValueError: the shapes or dtypes differ.

    Example:
        >>> relu2_gate(torch.tensor([-1.0, 3.0]), torch.tensor([5.0, 2.0]))
        tensor([ 0., 18.])
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"relu2_gate: up must have gate's shape {tuple(gate.shape)} and dtype {gate.dtype}, "
            f"got {tuple(up.shape)} and {up.dtype}"
        )
    return RELU2_GATE(gate, up)
