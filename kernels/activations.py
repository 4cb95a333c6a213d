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

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from trilith.kernels._runtime import checks
from trilith.kernels._runtime.elementwise import (
    NUM_WARPS,
    as_plane,
    drop,
    keep_scale,
    offsets,
    reference_dropout,
    require_seed,
    tile_rows,
)
from trilith.kernels._runtime.functors import ACTIVATIONS, require_activation
from trilith.kernels._runtime.language import tl, triton
from trilith.kernels._runtime.launch import launch
from trilith.kernels._runtime.plan import planned
from trilith.kernels._runtime.random import run_seeded
from trilith.kernels._runtime.reduce import column_sum
from trilith.kernels._runtime.sharding import Strategy, elementwise
from trilith.kernels._runtime.sizes import cdiv
from trilith.plugins import BackwardContext, Cost, Op, OpSpec, Sample

__all__ = ["bias_act", "gated_act"]

_FORWARD_ELEMENTS, _BACKWARD_ELEMENTS = 4096, 1024


@triton.jit
def _bias_act_fwd_kernel(
    x_ptr,
    bias_ptr,
    seed_ptr,
    y_ptr,
    x_strides,
    bias_stride,
    M,
    N,
    inner,
    p,
    scale,
    ACT: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program owns [BLOCK_M, BLOCK_N]."""
    N = N // ALIGN * ALIGN
    pid = tl.program_id(0)
    rows = tile_rows(pid // tl.cdiv(N, BLOCK_N), BLOCK_M)
    first_col = (pid % tl.cdiv(N, BLOCK_N)).to(tl.int64) * BLOCK_N
    cols = first_col + tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    z = tl.load(x_ptr + offsets(rows, cols, inner, x_strides, ALIGN), mask=mask, other=0.0)
    z = z.to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + cols * bias_stride, mask=cols < N, other=0.0).to(tl.float32)[
            None, :
        ]
    y = ACT(z)
    if seed_ptr is not None:
        y = drop(y, seed_ptr, rows, first_col, N, p, scale)
    tl.store(y_ptr + rows[:, None] * N + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bias_act_bwd_kernel(
    dy_ptr,
    x_ptr,
    bias_ptr,
    seed_ptr,
    dx_ptr,
    dbias_ptr,
    y_ptr,
    dy_strides,
    x_strides,
    bias_stride,
    M,
    N,
    inner,
    P,
    p,
    scale,
    ACT: tl.constexpr,
    DACT: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One of P programs per column block owns every P-th [BLOCK_M, BLOCK_N]; dbias is (P, N).

    y_ptr takes forward's output, made again.
    """
    N = N // ALIGN * ALIGN
    pid_p = (tl.program_id(0) // tl.cdiv(N, BLOCK_N)).to(tl.int64)
    first_col = (tl.program_id(0) % tl.cdiv(N, BLOCK_N)).to(tl.int64) * BLOCK_N
    cols = first_col + tl.arange(0, BLOCK_N)
    bias = tl.zeros((BLOCK_N,), tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + cols * bias_stride, mask=cols < N, other=0.0).to(tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(pid_p * BLOCK_M, M, P * BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        dy = tl.load(dy_ptr + offsets(rows, cols, inner, dy_strides, ALIGN), mask=mask, other=0.0)
        z = tl.load(x_ptr + offsets(rows, cols, inner, x_strides, ALIGN), mask=mask, other=0.0)
        z = z.to(tl.float32) + bias[None, :]
        g = dy.to(tl.float32)
        if seed_ptr is not None:
            g = drop(g, seed_ptr, rows, first_col, N, p, scale)
        if y_ptr is not None:
            y = ACT(z)
            if seed_ptr is not None:
                y = drop(y, seed_ptr, rows, first_col, N, p, scale)
            y_tile = y_ptr + rows[:, None] * N + cols[None, :]
            tl.store(y_tile, y.to(y_ptr.dtype.element_ty), mask=mask)
        dx = DACT(z, g)
        if dx_ptr is not None:
            dx_tile = dx_ptr + rows[:, None] * N + cols[None, :]
            tl.store(dx_tile, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if dbias_ptr is not None:
            dbias += tl.where(mask, dx, 0.0)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + pid_p * N + cols, tl.sum(dbias, axis=0), mask=cols < N)


@triton.jit
def _gated_act_fwd_kernel(
    gate_ptr,
    up_ptr,
    y_ptr,
    gate_strides,
    up_strides,
    M,
    N,
    inner,
    ACT: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program owns [BLOCK_M, BLOCK_N]."""
    N = N // ALIGN * ALIGN
    pid = tl.program_id(0)
    rows = tile_rows(pid // tl.cdiv(N, BLOCK_N), BLOCK_M)
    cols = (pid % tl.cdiv(N, BLOCK_N)).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    gate = tl.load(gate_ptr + offsets(rows, cols, inner, gate_strides, ALIGN), mask=mask, other=0.0)
    up = tl.load(up_ptr + offsets(rows, cols, inner, up_strides, ALIGN), mask=mask, other=0.0)
    y = ACT(gate.to(tl.float32)) * up.to(tl.float32)
    tl.store(y_ptr + rows[:, None] * N + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gated_act_bwd_kernel(
    dy_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    y_ptr,
    dy_strides,
    gate_strides,
    up_strides,
    M,
    N,
    inner,
    ACT: tl.constexpr,
    DACT: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program owns [BLOCK_M, BLOCK_N]; y_ptr takes forward's output, made again."""
    N = N // ALIGN * ALIGN
    pid = tl.program_id(0)
    rows = tile_rows(pid // tl.cdiv(N, BLOCK_N), BLOCK_M)
    cols = (pid % tl.cdiv(N, BLOCK_N)).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    dy = tl.load(dy_ptr + offsets(rows, cols, inner, dy_strides, ALIGN), mask=mask, other=0.0)
    gate = tl.load(gate_ptr + offsets(rows, cols, inner, gate_strides, ALIGN), mask=mask, other=0.0)
    dy = dy.to(tl.float32)
    gate = gate.to(tl.float32)
    out = rows[:, None] * N + cols[None, :]
    if (dgate_ptr is not None) or (y_ptr is not None):
        up = tl.load(up_ptr + offsets(rows, cols, inner, up_strides, ALIGN), mask=mask, other=0.0)
        up = up.to(tl.float32)
        if y_ptr is not None:
            tl.store(y_ptr + out, (ACT(gate) * up).to(y_ptr.dtype.element_ty), mask=mask)
        if dgate_ptr is not None:
            dgate = DACT(gate, dy * up)
            tl.store(dgate_ptr + out, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
    if dup_ptr is not None:
        dup = dy * ACT(gate)
        tl.store(dup_ptr + out, dup.to(dup_ptr.dtype.element_ty), mask=mask)


def _bias_act_out(x: Tensor) -> tuple[Tensor]:
    return (x.new_empty(x.shape),)


@planned
def _bias_act_fwd(
    x: Tensor, bias: Tensor | None, seed: Tensor | None, activation: str, p: float
) -> tuple[Tensor, ...]:
    require_seed("bias_act", seed, p)
    (y,) = _bias_act_out(x)
    plane = as_plane(x, columns=bias is not None, p=p)
    tile = plane.tile(_FORWARD_ELEMENTS)
    launch(
        _bias_act_fwd_kernel,
        (plane.programs(tile),),
        plane.tensors[0],
        bias,
        seed,
        y,
        plane.strides[0],
        1 if bias is None else bias.stride(0),
        plane.m,
        plane.n,
        plane.inner,
        p,
        keep_scale(p),
        ACT=ACTIVATIONS[activation].f,
        ALIGN=plane.align,
        num_warps=NUM_WARPS,
        **tile,
    )
    return (y,)


@planned
def _bias_act_bwd(ctx: BackwardContext, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, bias, seed, activation, p = ctx.inputs
    return bias_act_backward(dy, x, bias, seed, activation, p, ctx.needs_input_grad[:2], None)


def bias_act_backward(
    dy: Tensor,
    x: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    activation: str,
    p: float,
    needs: Sequence[bool],
    y: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and bias, if needed; y takes forward's output in the same pass."""
    needs_x, needs_bias = needs
    plane = as_plane(dy, x, columns=bias is not None, p=p)
    tile = plane.tile(_BACKWARD_ELEMENTS if needs_bias else _FORWARD_ELEMENTS, summed=needs_bias)
    programs = plane.row_programs(tile) if needs_bias else cdiv(plane.m, tile["BLOCK_M"])
    dx = x.new_empty(x.shape) if needs_x else None
    partials = x.new_empty((programs, plane.n), dtype=torch.float32) if needs_bias else None
    launch(
        _bias_act_bwd_kernel,
        (programs * cdiv(plane.n, tile["BLOCK_N"]),),
        *plane.tensors,
        bias,
        seed,
        dx,
        partials,
        y,
        *plane.strides,
        1 if bias is None else bias.stride(0),
        plane.m,
        plane.n,
        plane.inner,
        programs,
        p,
        keep_scale(p),
        ACT=ACTIVATIONS[activation].f,
        DACT=ACTIVATIONS[activation].df,
        ALIGN=plane.align,
        num_warps=NUM_WARPS,
        **tile,
    )
    if partials is None or bias is None:
        return dx, None
    return dx, column_sum(partials, bias.dtype)


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
    for activation in ("identity", "relu", "relu2", "leaky_relu"):
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
            gelu_tanh or silu.
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
    plane = as_plane(gate, up, columns=False)
    tile = plane.tile(_FORWARD_ELEMENTS)
    launch(
        _gated_act_fwd_kernel,
        (plane.programs(tile),),
        *plane.tensors,
        y,
        *plane.strides,
        plane.m,
        plane.n,
        plane.inner,
        ACT=ACTIVATIONS[activation].f,
        ALIGN=plane.align,
        num_warps=NUM_WARPS,
        **tile,
    )
    return (y,)


@planned
def _gated_act_bwd(ctx: BackwardContext, dy: Tensor) -> tuple[Tensor | None, ...]:
    gate, up, activation = ctx.inputs
    return gated_act_backward(dy, gate, up, activation, ctx.needs_input_grad[:2], None)


def gated_act_backward(
    dy: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    needs: Sequence[bool],
    y: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of gate and up, if needed; y takes forward's output in the same pass."""
    plane = as_plane(dy, gate, up, columns=False)
    tile = plane.tile(_BACKWARD_ELEMENTS)
    dgate, dup = (
        t.new_empty(t.shape) if need else None for t, need in zip((gate, up), needs, strict=True)
    )
    launch(
        _gated_act_bwd_kernel,
        (plane.programs(tile),),
        *plane.tensors,
        dgate,
        dup,
        y,
        *plane.strides,
        plane.m,
        plane.n,
        plane.inner,
        ACT=ACTIVATIONS[activation].f,
        DACT=ACTIVATIONS[activation].df,
        ALIGN=plane.align,
        num_warps=NUM_WARPS,
        **tile,
    )
    return dgate, dup


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
    for activation in ("gelu_tanh", "tanh", "elu", "relu2", "leaky_relu", "identity"):
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
