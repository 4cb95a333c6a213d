"""Dropout, alone or on the way into a residual stream: one pass over memory each way.

    dropout            y = keep * x / (1 - p)
    bias_dropout_add   y = residual + keep * (x + bias) / (1 - p)

and backward, the same mask,

    dx = keep * dy / (1 - p)   dbias = sum of dx over rows   dresidual = dy

x, residual (..., N), bias (N,). keep is regenerated from a seed, never stored; besides the seed
nothing is saved for backward. dresidual is the tensor dy itself. Arithmetic is in fp32; the bias
gradient is summed per program, then over programs, in a fixed order.

Source: Srivastava et al., "Dropout", 2014.
"""

from __future__ import annotations

from collections.abc import Iterator

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
from trilith.kernels._runtime.language import tl, triton
from trilith.kernels._runtime.launch import launch
from trilith.kernels._runtime.lead import as_lead
from trilith.kernels._runtime.plan import planned
from trilith.kernels._runtime.random import run_seeded
from trilith.kernels._runtime.reduce import column_sum
from trilith.kernels._runtime.sharding import Strategy, elementwise
from trilith.kernels._runtime.sizes import cdiv
from trilith.plugins import BackwardContext, Cost, Op, OpSpec, Sample

__all__ = ["bias_dropout_add", "dropout"]

_ELEMENTS = 2048


@triton.jit
def _dropout_kernel(
    x_ptr,
    residual_ptr,
    bias_ptr,
    seed_ptr,
    y_ptr,
    x_strides,
    residual_strides,
    bias_stride,
    M,
    N,
    inner,
    p,
    scale,
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
    x = tl.load(x_ptr + offsets(rows, cols, inner, x_strides, ALIGN), mask=mask, other=0.0)
    y = x.to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + cols * bias_stride, mask=cols < N, other=0.0).to(tl.float32)[
            None, :
        ]
    if seed_ptr is not None:
        y = drop(y, seed_ptr, rows, first_col, N, p, scale)
    if residual_ptr is not None:
        residual_tile = residual_ptr + offsets(rows, cols, inner, residual_strides, ALIGN)
        y += tl.load(residual_tile, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + rows[:, None] * N + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _dropout_bwd_kernel(
    dy_ptr,
    seed_ptr,
    dx_ptr,
    dbias_ptr,
    dy_strides,
    M,
    N,
    inner,
    P,
    p,
    scale,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One of P programs per column block owns every P-th [BLOCK_M, BLOCK_N]; dbias is (P, N)."""
    N = N // ALIGN * ALIGN
    pid_p = (tl.program_id(0) // tl.cdiv(N, BLOCK_N)).to(tl.int64)
    first_col = (tl.program_id(0) % tl.cdiv(N, BLOCK_N)).to(tl.int64) * BLOCK_N
    cols = first_col + tl.arange(0, BLOCK_N)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(pid_p * BLOCK_M, M, P * BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        dy = tl.load(dy_ptr + offsets(rows, cols, inner, dy_strides, ALIGN), mask=mask, other=0.0)
        dx = dy.to(tl.float32)
        if seed_ptr is not None:
            dx = drop(dx, seed_ptr, rows, first_col, N, p, scale)
        if dx_ptr is not None:
            dx_tile = dx_ptr + rows[:, None] * N + cols[None, :]
            tl.store(dx_tile, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        dbias += dx
    tl.store(dbias_ptr + pid_p * N + cols, tl.sum(dbias, axis=0), mask=cols < N)


def _apply(
    x: Tensor,
    residual: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    p: float,
    y: Tensor,
) -> None:
    tensors = (x,) if residual is None else (x, residual)
    plane = as_plane(*tensors, columns=bias is not None, p=p)
    tile = plane.tile(_ELEMENTS)
    launch(
        _dropout_kernel,
        (plane.programs(tile),),
        plane.tensors[0],
        None if residual is None else plane.tensors[1],
        bias,
        seed,
        y,
        plane.strides[0],
        plane.strides[-1],
        1 if bias is None else bias.stride(0),
        plane.m,
        plane.n,
        plane.inner,
        p,
        keep_scale(p),
        ALIGN=plane.align,
        num_warps=NUM_WARPS,
        **tile,
    )


def _dropout_out(x: Tensor) -> tuple[Tensor]:
    return (x.new_empty(x.shape),)


@planned
def _dropout_fwd(x: Tensor, seed: Tensor | None, p: float) -> tuple[Tensor, ...]:
    require_seed("dropout", seed, p)
    (y,) = _dropout_out(x)
    _apply(x, None, None, seed, p, y)
    return (y,)


@planned
def _dropout_bwd(ctx: BackwardContext, dy: Tensor) -> tuple[Tensor | None, ...]:
    _, seed, p = ctx.inputs
    return _dropout_fwd(dy, seed, p)


def _dropout_samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    seed = torch.tensor([20240229], device=device)
    yield Sample(randn(3, 64), seed, 0.25)
    yield Sample(randn(5, 33), seed, 0.5)
    yield Sample(randn(2, 24, 3).transpose(1, 2), seed, 0.1)
    yield Sample(randn(7), seed, 1.0)


def _dropout_reference(x: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """x / (1 - p) where it is kept, 0 where it is dropped."""
    return reference_dropout(x, seed, p)


def _dropout_cost(x: Tensor) -> Cost:
    n_bytes = 2 * x.numel() * x.element_size()
    return Cost(forward_bytes=n_bytes, backward_bytes=n_bytes)


DROPOUT = Op(
    OpSpec(
        name="trilith::dropout",
        forward=_dropout_fwd,
        backward=_dropout_bwd,
        reference=_dropout_reference,
        samples=_dropout_samples,
        fake=_dropout_out,
        cost=_dropout_cost,
        save_inputs=("seed",),
        save_outputs=False,
    )
)


def dropout(input: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
    """torch.nn.functional.dropout without a stored mask.

    Args:
        input: any shape, floating dtype and strides.
        p: probability that an element is dropped; those kept are divided by 1 - p.
        training: False returns the input itself.

    Returns:
        A tensor of input's shape and dtype, contiguous. p = 1 gives zeros, also for infinities.

    Raises:
        ValueError: p outside [0, 1].
        TypeError: an input that is not floating-point.

    Numerics:
        fp32 inside, rounded once. The mask depends on torch's generator and on each element's
        position only, not on layout or tiles.

    Source:
        Srivastava et al., "Dropout", 2014.

    Example:
        >>> dropout(torch.ones(4, 8), p=0.5).unique()
        tensor([0., 2.])
    """
    checks.require_floating("dropout", input=input)
    checks.require_probability("dropout", "p", p)
    if not training or p == 0.0:
        return input
    return run_seeded(DROPOUT, (input,), p, (p,))


def _bias_dropout_add_out(residual: Tensor) -> tuple[Tensor]:
    return (residual.new_empty(residual.shape),)


@planned
def _bias_dropout_add_fwd(
    x: Tensor,
    residual: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    p: float,
    x_dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    require_seed("bias_dropout_add", seed, p)
    (y,) = _bias_dropout_add_out(residual)
    _apply(x, residual, bias, seed, p, y)
    return (y,)


@planned
def _bias_dropout_add_bwd(ctx: BackwardContext, dy: Tensor) -> tuple[Tensor | None, ...]:
    _, _, bias, seed, p, _ = ctx.inputs
    dx, _, _ = _bias_dropout_add_grads(ctx, dy)
    if not ctx.needs_input_grad[2]:
        if dx is not None:
            _apply(dy, None, None, seed, p, dx)
        return dx, None, None
    plane = as_plane(dy, columns=True, p=p)
    tile = plane.tile(_ELEMENTS, summed=True)
    programs = plane.row_programs(tile)
    partials = dy.new_empty((programs, plane.n), dtype=torch.float32)
    launch(
        _dropout_bwd_kernel,
        (programs * cdiv(plane.n, tile["BLOCK_N"]),),
        plane.tensors[0],
        seed,
        dx,
        partials,
        plane.strides[0],
        plane.m,
        plane.n,
        plane.inner,
        programs,
        p,
        keep_scale(p),
        ALIGN=plane.align,
        num_warps=NUM_WARPS,
        **tile,
    )
    return dx, None, column_sum(partials, bias.dtype)


def _bias_dropout_add_grads(ctx: BackwardContext, dy: Tensor) -> tuple[Tensor | None, ...]:
    _, _, bias, _, _, x_dtype = ctx.inputs
    needs_x, _, needs_bias, *_ = ctx.needs_input_grad
    dx = dy.new_empty(dy.shape, dtype=x_dtype) if needs_x else None
    return dx, None, bias.new_empty(bias.shape) if needs_bias else None


def _bias_dropout_add_shared(p: float) -> dict[str, int | str]:
    return {"residual": 0} if p > 0.0 else {"residual": 0, "x": 0}


def _bias_dropout_add_reference(
    x: Tensor,
    residual: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    p: float,
    x_dtype: torch.dtype,
) -> Tensor:
    """residual + dropout(x + bias) in float32 (float64 for float64), in residual's dtype."""
    if bias is None and p == 0.0 and x.dtype == residual.dtype:
        return residual + x
    wide = torch.promote_types(torch.promote_types(x.dtype, residual.dtype), torch.float32)
    y = x.to(wide) if bias is None else x.to(wide) + bias
    return (residual + reference_dropout(y, seed, p)).to(residual.dtype)


def _bias_dropout_add_samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def randn(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    seed = torch.tensor([20240229], device=device)
    wide = torch.promote_types(dtype, torch.float32)
    yield Sample(randn(5, 33), randn(5, 33), randn(33), seed, 0.3, dtype)
    yield Sample(randn(2, 3, 48), randn(2, 3, 48), None, seed, 0.5, dtype)
    yield Sample(
        randn(24, 6).t(), randn(6, 24, dtype=wide), randn(24, dtype=wide), None, 0.0, dtype
    )
    yield Sample(randn(4, 40)[:, ::2], randn(4, 20), randn(20), seed, 1.0, dtype)
    yield Sample(randn(3, 10), randn(3, 10, dtype=wide), None, None, 0.0, dtype)


def _bias_dropout_add_cost(x: Tensor, residual: Tensor, bias: Tensor | None, p: float) -> Cost:
    bytes_x, bytes_y = (t.numel() * t.element_size() for t in (x, residual))
    bytes_bias = 0 if bias is None else bias.numel() * bias.element_size()
    reads_dy = p > 0.0 or bias is not None
    return Cost(
        forward_bytes=bytes_x + 2 * bytes_y + bytes_bias,
        backward_bytes=bytes_y * reads_dy + bytes_x * (p > 0.0) + bytes_bias,
    )


def _bias_dropout_add_sharding(x: Tensor, p: float) -> list[Strategy]:
    return [] if p > 0.0 else elementwise(x, 2, biased=True)


BIAS_DROPOUT_ADD = Op(
    OpSpec(
        name="trilith::bias_dropout_add",
        forward=_bias_dropout_add_fwd,
        backward=_bias_dropout_add_bwd,
        reference=_bias_dropout_add_reference,
        samples=_bias_dropout_add_samples,
        fake=_bias_dropout_add_out,
        fake_backward=_bias_dropout_add_grads,
        cost=_bias_dropout_add_cost,
        sharding=_bias_dropout_add_sharding,
        parts=(DROPOUT.spec.name,),
        save_inputs=("bias", "seed"),
        save_outputs=False,
        shared_gradients=_bias_dropout_add_shared,
    )
)


def bias_dropout_add(
    x: Tensor,
    residual: Tensor,
    bias: Tensor | None = None,
    p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """residual + dropout(x + bias) in one pass.

    Args:
        x: (..., N), any floating dtype, any strides.
        residual: of x's shape; may be of a wider dtype than x.
        bias: (N,), any floating dtype.
        p: probability that an element of x + bias is dropped; those kept are divided by 1 - p.
        training: False switches dropout off.

    Returns:
        (..., N), contiguous, in residual's dtype: the residual stream keeps its precision.

    Raises:
        ValueError: a residual or bias of another shape or device, p outside [0, 1].
        TypeError: a tensor that is not floating-point.

    Numerics:
        fp32 inside, rounded once. The bias gradient is summed in fp32 in a fixed order.

    Source:
        Srivastava et al., "Dropout", 2014.

    Example:
        >>> bias_dropout_add(torch.randn(2, 8), torch.zeros(2, 8), torch.ones(8), p=0.1).shape
        torch.Size([2, 8])
    """
    checks.require_floating("bias_dropout_add", x=x, residual=residual)
    checks.require_same_device("bias_dropout_add", x, residual=residual)
    checks.require_shape("bias_dropout_add", "residual", residual, x.shape)
    checks.require_bias("bias_dropout_add", x, bias)
    checks.require_probability("bias_dropout_add", "p", p)
    x, p = as_lead(x, residual.dtype), p if training else 0.0
    return run_seeded(BIAS_DROPOUT_ADD, (x, residual, bias), p, (p, x.dtype))
