"""Kernels of activations after a bias, before dropout, or as a gate, and their launchers.

One pass over memory each way. The bias gradient is summed per program, then over programs, in a
fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trilith.kernels._runtime.elementwise import (
    NUM_WARPS,
    as_plane,
    drop,
    keep_scale,
    offsets,
    tile_rows,
)
from trilith.kernels._runtime.functors import ACTIVATIONS
from trilith.kernels._runtime.language import tl, triton
from trilith.kernels._runtime.launch import launch
from trilith.kernels._runtime.reduce import column_sum
from trilith.kernels._runtime.sizes import cdiv

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


def bias_act_forward(
    x: Tensor, bias: Tensor | None, seed: Tensor | None, activation: str, p: float, y: Tensor
) -> None:
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


def gated_act_forward(gate: Tensor, up: Tensor, activation: str, y: Tensor) -> None:
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
