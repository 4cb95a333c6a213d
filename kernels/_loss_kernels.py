"""Kernels of losses of one prediction and one target each, and their launchers.

The losses are written one by one, or added: each program writes the sum of its share in fp32, and a
second kernel adds these in a fixed order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from trilith.kernels._runtime.elementary import softplus_tail
from trilith.kernels._runtime.elementwise import NUM_WARPS, Plane, as_plane, offsets, tile_rows
from trilith.kernels._runtime.functors import sigmoid_pair
from trilith.kernels._runtime.language import tl, triton
from trilith.kernels._runtime.launch import launch
from trilith.kernels._runtime.matrix import room_for
from trilith.kernels._runtime.reduce import column_sum

_ELEMENTS = 1024


@triton.jit
def _bce(x, t, q):
    tail = softplus_tail(x)
    loss = t * q * (tl.maximum(-x, 0.0) + tail) + (1.0 - t) * (tl.maximum(x, 0.0) + tail)
    return tl.where(x == float("-inf"), float("nan"), loss)  # as in torch


@triton.jit
def _bce_grads(x, t, q):
    above, below = sigmoid_pair(x)
    dx = (1.0 - t) * above - t * q * below
    dt = q * tl.maximum(-x, 0.0) - tl.maximum(x, 0.0) + (q - 1.0) * softplus_tail(x)
    return dx, dt


@triton.jit
def _mse(x, t, q):
    return (x - t) * (x - t)


@triton.jit
def _mse_grads(x, t, q):
    dx = 2.0 * (x - t)
    return dx, -dx


@triton.jit
def _load(ptr, rows, cols, inner, strides, mask, ALIGN: tl.constexpr):
    """The tile in fp32; 1 where there is no tensor."""
    value = tl.full((rows.shape[0], cols.shape[0]), 1.0, tl.float32)
    if ptr is not None:
        value = tl.load(ptr + offsets(rows, cols, inner, strides, ALIGN), mask=mask, other=0.0)
    return value.to(tl.float32)


@triton.jit
def _loss_fwd_kernel(
    x_ptr,
    target_ptr,
    weight_ptr,
    pos_weight_ptr,
    out_ptr,
    x_strides,
    target_strides,
    weight_strides,
    pos_weight_strides,
    M,
    N,
    inner,
    scale,
    LOSS: tl.constexpr,
    REDUCED: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One of P programs owns every P-th [BLOCK_M, BLOCK_N]; writes losses, or its sum of them."""
    N = N // ALIGN * ALIGN
    n_blocks = tl.cdiv(N, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * n_blocks, tl.num_programs(0)):
        rows = tile_rows(tile // n_blocks, BLOCK_M)
        cols = tl.cast(tile % n_blocks, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        x = _load(x_ptr, rows, cols, inner, x_strides, mask, ALIGN)
        t = _load(target_ptr, rows, cols, inner, target_strides, mask, ALIGN)
        q = _load(pos_weight_ptr, rows, cols, inner, pos_weight_strides, mask, ALIGN)
        weight = _load(weight_ptr, rows, cols, inner, weight_strides, mask, ALIGN)
        loss = weight * LOSS(x, t, q)
        if REDUCED:
            total += tl.where(mask, loss, 0.0)
        else:
            out = out_ptr + rows[:, None] * N + cols[None, :]
            tl.store(out, loss.to(out_ptr.dtype.element_ty), mask=mask)
    if REDUCED:
        tl.store(out_ptr + tl.program_id(0), tl.sum(total) * tl.cast(scale, tl.float32))


@triton.jit
def _loss_bwd_kernel(
    dloss_ptr,
    x_ptr,
    target_ptr,
    weight_ptr,
    pos_weight_ptr,
    dx_ptr,
    dtarget_ptr,
    dweight_ptr,
    dloss_strides,
    x_strides,
    target_strides,
    weight_strides,
    pos_weight_strides,
    M,
    N,
    inner,
    scale,
    LOSS: tl.constexpr,
    GRADS: tl.constexpr,
    REDUCED: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program owns [BLOCK_M, BLOCK_N]; a reduced loss has one gradient for all of them."""
    N = N // ALIGN * ALIGN
    n_blocks = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    rows = tile_rows(pid // n_blocks, BLOCK_M)
    cols = (pid % n_blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    x = _load(x_ptr, rows, cols, inner, x_strides, mask, ALIGN)
    t = _load(target_ptr, rows, cols, inner, target_strides, mask, ALIGN)
    q = _load(pos_weight_ptr, rows, cols, inner, pos_weight_strides, mask, ALIGN)
    weight = _load(weight_ptr, rows, cols, inner, weight_strides, mask, ALIGN)
    if REDUCED:
        dloss = tl.load(dloss_ptr).to(tl.float32) * tl.cast(scale, tl.float32)
    else:
        dloss = _load(dloss_ptr, rows, cols, inner, dloss_strides, mask, ALIGN)
    dx, dtarget = GRADS(x, t, q)
    out = rows[:, None] * N + cols[None, :]
    if dx_ptr is not None:
        tl.store(dx_ptr + out, (dx * weight * dloss).to(dx_ptr.dtype.element_ty), mask=mask)
    if dtarget_ptr is not None:
        dtarget = dtarget * weight * dloss
        tl.store(dtarget_ptr + out, dtarget.to(dtarget_ptr.dtype.element_ty), mask=mask)
    if dweight_ptr is not None:
        dweight = LOSS(x, t, q) * dloss
        tl.store(dweight_ptr + out, dweight.to(dweight_ptr.dtype.element_ty), mask=mask)


class Loss(NamedTuple):
    """A loss and its gradients as Triton functions of a prediction, a target and a weight."""

    f: Any
    grads: Any


BCE, MSE = Loss(_bce, _bce_grads), Loss(_mse, _mse_grads)


def loss_out(x: Tensor, reduction: str, dtype: torch.dtype) -> Tensor:
    """Room for the losses, or for their sum or mean."""
    return x.new_empty(x.shape if reduction == "none" else (), dtype=dtype)


def _plane(given: tuple[Tensor | None, ...]) -> tuple[Plane, list[Tensor | None], list[Any]]:
    """The tensors that are there in one plane, and for each place its tensor and strides."""
    plane = as_plane(*[t for t in given if t is not None], columns=False)
    found = iter(zip(plane.tensors, plane.strides, strict=True))
    places = [next(found) if t is not None else (None, (0, 0, 0)) for t in given]
    return plane, [tensor for tensor, _ in places], [strides for _, strides in places]


def _scale(x: Tensor, reduction: str) -> float:
    return 1.0 / x.numel() if reduction == "mean" else 1.0


def loss_forward(
    loss: Loss, given: tuple[Tensor | None, ...], reduction: str, dtype: torch.dtype
) -> tuple[Tensor]:
    """given: input, target, weight and the weight of positives, of one shape or None."""
    x, reduced = given[0], reduction != "none"
    assert x is not None
    plane, tensors, strides = _plane(given)
    tile = plane.tile(_ELEMENTS)
    programs = plane.resident_programs(tile) if reduced else plane.programs(tile)
    if reduced:
        out = x.new_empty((programs, 1), dtype=torch.float32)
    else:
        out = loss_out(x, reduction, dtype)
    launch(
        _loss_fwd_kernel,
        (programs,),
        *tensors,
        out,
        *strides,
        plane.m,
        plane.n,
        plane.inner,
        _scale(x, reduction),
        LOSS=loss.f,
        REDUCED=reduced,
        ALIGN=plane.align,
        num_warps=NUM_WARPS,
        **tile,
    )
    return (column_sum(out, dtype).reshape(()) if reduced else out,)


def loss_backward(
    loss: Loss,
    dloss: Tensor,
    given: tuple[Tensor | None, ...],
    reduction: str,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of input, target and weight."""
    x, reduced = given[0], reduction != "none"
    assert x is not None
    plane, tensors, strides = _plane((None if reduced else dloss, *given))
    tile = plane.tile(_ELEMENTS)
    grads = room_for(given[:3], needs)
    launch(
        _loss_bwd_kernel,
        (plane.programs(tile),),
        dloss if reduced else tensors[0],
        *tensors[1:],
        *grads,
        *strides,
        plane.m,
        plane.n,
        plane.inner,
        _scale(x, reduction),
        LOSS=loss.f,
        GRADS=loss.grads,
        REDUCED=reduced,
        ALIGN=plane.align,
        num_warps=NUM_WARPS,
        **tile,
    )
    return grads
