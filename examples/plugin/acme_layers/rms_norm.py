"""Another implementation of trilith::rms_norm: one program a row, in blocks of columns.

It returns what the op's own forward returns, in the same order: y, then rstd in float32, one a row.
The weight's gradient is summed by PyTorch, in float32 and in a fixed order.
"""

# ruff: noqa: ANN001, ANN202

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trilith.kernels import launch
from trilith.plugins import BackwardContext, Implementation

BLOCK = 1024


@triton.jit
def _forward_kernel(x_ptr, weight_ptr, y_ptr, rstd_ptr, N, eps, BLOCK: tl.constexpr):
    """One program owns a row."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * N + offs, mask=offs < N, other=0.0).to(tl.float32)
        total += x * x
    rstd = 1.0 / tl.sqrt(tl.sum(total) / N + tl.cast(eps, tl.float32))
    tl.store(rstd_ptr + row, rstd)
    for start in range(0, N, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        y = tl.load(x_ptr + row * N + offs, mask=offs < N, other=0.0).to(tl.float32) * rstd
        if weight_ptr is not None:
            y *= tl.load(weight_ptr + offs, mask=offs < N, other=0.0).to(tl.float32)
        tl.store(y_ptr + row * N + offs, y, mask=offs < N)


@triton.jit
def _backward_kernel(x_ptr, weight_ptr, rstd_ptr, dy_ptr, dx_ptr, N, BLOCK: tl.constexpr):
    """One program owns a row."""
    row = tl.program_id(0).to(tl.int64)
    rstd = tl.load(rstd_ptr + row)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        g = tl.load(dy_ptr + row * N + offs, mask=offs < N, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * N + offs, mask=offs < N, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            g *= tl.load(weight_ptr + offs, mask=offs < N, other=0.0).to(tl.float32)
        total += g * x * rstd
    mean = tl.sum(total) / N
    for start in range(0, N, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        g = tl.load(dy_ptr + row * N + offs, mask=offs < N, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * N + offs, mask=offs < N, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            g *= tl.load(weight_ptr + offs, mask=offs < N, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * N + offs, (g - x * rstd * mean) * rstd, mask=offs < N)


def _forward(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    y, rstd = x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)
    weight = None if weight is None else weight.contiguous()
    tensors = (x.contiguous(), weight, y, rstd)
    launch(_forward_kernel, (rstd.numel(),), *tensors, x.shape[-1], eps, BLOCK=BLOCK)
    return y, rstd


def _backward(ctx: BackwardContext, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, _ = ctx.inputs
    (rstd,) = ctx.aux
    dx = dweight = None
    if ctx.needs_input_grad[0]:
        dx = x.new_empty(x.shape)
        dense = None if weight is None else weight.contiguous()
        tensors = (x.contiguous(), dense, rstd, dy.contiguous(), dx)
        launch(_backward_kernel, (rstd.numel(),), *tensors, x.shape[-1], BLOCK=BLOCK)
    if ctx.needs_input_grad[1]:
        products = dy.float() * x.float() * rstd.unsqueeze(-1)
        dweight = products.reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
    return dx, dweight


RMS_NORM = Implementation(
    op="trilith::rms_norm",
    provider="acme",
    forward=_forward,
    backward=_backward,
    priority=-1,
)
