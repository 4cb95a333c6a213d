"""Starts the attention kernels: what they share is gathered once in a `_Call`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from trilith.kernels._runtime.language import triton
from trilith.kernels._runtime.launch import launch
from trilith.kernels.attention.backward import attention_bwd_dkdv_kernel, attention_delta_kernel
from trilith.kernels.attention.backward_queries import (
    attention_bwd_dbias_kernel,
    attention_bwd_dq_kernel,
)
from trilith.kernels.attention.config import heads_together, tiles_for
from trilith.kernels.attention.forward import attention_fwd_kernel
from trilith.kernels.attention.reference import diagonal_of
from trilith.plugins import BackwardContext


def attention_out(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse, and the lse in base 2 that backward reads.

    out lies in memory as (B, T, H, Dv), so that merging the heads is a view.
    """
    B, H, T, _ = q.shape
    out = q.new_empty((B, T, H, v.shape[3])).transpose(1, 2)
    lse, lse2 = (q.new_empty(q.shape[:3], dtype=torch.float32) for _ in range(2))
    return out, lse, lse2


def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    scale: float,
    softcap: float,
    p: float,
    alignment: str,
    left: int,
    right: int,
) -> tuple[Tensor, Tensor, Tensor]:
    call = _Call(q, k, v, bias, key_mask, slopes, seed, scale, softcap, p, alignment, left, right)
    out, lse, lse2 = attention_out(q, v)
    options = call.options("fwd")
    launch(
        attention_fwd_kernel,
        (call.BH * triton.cdiv(call.T, options["BLOCK_M"]),),
        *(q, k, v, call.bias, key_mask, call.slopes, sinks, call.seed, out, lse, lse2),
        *call.strides,
        0 if sinks is None else sinks.stride(0),
        out.stride(),
        *(call.BH, *call.sizes, heads_together(k, v)),
        *call.scalars,
        NEGATIVE_SCALE=scale < 0,
        **options,
    )
    return out, lse, lse2


def attention_bwd(
    ctx: BackwardContext, dout: Tensor | None, dlse: Tensor | None
) -> tuple[Tensor | None, ...]:
    q, k, v, bias, key_mask, slopes, sinks, seed, *rest = ctx.inputs
    (out,) = ctx.outputs
    (lse2,) = ctx.aux
    needs_q, needs_k, needs_v, needs_bias, _, needs_slopes, needs_sinks = ctx.needs_input_grad[:7]
    if dout is None:
        dout = out.new_zeros(()).expand(out.shape)
    call = _Call(q, k, v, bias, key_mask, slopes, seed, *rest)
    delta = call.delta(out, dout, dlse)
    dq = dk = dv = dbias = dslopes = dsinks = None
    if needs_q or needs_slopes:
        dq, dslopes = call.query_gradients(dout, lse2, delta, slopes if needs_slopes else None)
    if needs_k or needs_v:
        dk, dv = call.key_gradients(dout, lse2, delta)
    if needs_bias:
        dbias = call.bias_gradient(bias, dout, lse2, delta)
    if needs_sinks:
        share = torch.exp(sinks.float()[:, None] - lse2 * math.log(2))
        dsinks = -torch.where(lse2 == -torch.inf, 0.0, share * delta).sum((0, 2)).to(sinks.dtype)
    return dq, dk, dv, dbias, None, dslopes, dsinks


class _Call:
    """One call's tensors, strides, sizes and scalars, in the order of every kernel's arguments."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        key_mask: Tensor | None,
        slopes: Tensor | None,
        seed: Tensor | None,
        scale: float,
        softcap: float,
        p: float,
        alignment: str,
        left: int,
        right: int,
    ) -> None:
        B, H, self.T, D = q.shape
        Hkv, self.S, DV = v.shape[1:]
        self.BH, self.HKV = B * H, Hkv
        self.q, self.k, self.v, self.key_mask = q, k, v, key_mask
        self.bias = None if bias is None else bias.expand(B, H, self.T, self.S)
        self.slopes = None if slopes is None else slopes.expand(B, H)
        self.seed = seed if p > 0 else None
        self.sizes = (H, H // Hkv, self.T, self.S, D, DV)
        diagonal = diagonal_of(alignment, self.T, self.S)
        keep_scale = 0.0 if p >= 1 else 1 / (1 - p)
        self.scalars = (
            *(diagonal - left, diagonal + right, diagonal),
            *(scale, softcap, p, keep_scale),
        )
        self.strides = (
            *(q.stride(), k.stride(), v.stride()),
            (0, 0, 0, 0) if self.bias is None else self.bias.stride(),
            (0, 0) if key_mask is None else key_mask.stride(),
            (0, 0) if self.slopes is None else self.slopes.stride(),
        )
        laden = (bias, key_mask, slopes, self.seed)
        self._is_plain = softcap == 0 and all(t is None for t in laden)
        self._flags = (left >= 0, right >= 0, slopes is not None, softcap > 0)

    def options(self, kernel: str) -> dict[str, Any]:
        """The constexprs and launch options of fwd, dkdv, dq or dbias."""
        D, DV = self.sizes[4:]
        block_d, block_dv = (max(16, triton.next_power_of_2(n)) for n in (D, DV))
        tiles = tiles_for(kernel, self.q, block_d, block_dv, self._is_plain)
        masked = {} if kernel == "dbias" else {"BLOCK_MASKED": tiles.block_masked}
        return {
            **masked,
            "BLOCK_M": tiles.block_m,
            "BLOCK_N": tiles.block_n,
            "BLOCK_D": block_d,
            "BLOCK_DV": block_dv,
            "PAD_D": block_d != D,
            "PAD_DV": block_dv != DV,
            "num_warps": tiles.num_warps,
            "num_stages": tiles.num_stages,
            "FLAGS": self._flags,
        }

    def delta(self, out: Tensor, dout: Tensor, dlse: Tensor | None) -> Tensor:
        block_dv = max(16, triton.next_power_of_2(out.shape[3]))
        block_m = max(16, 2048 // block_dv)
        delta = out.new_empty(out.shape[:3], dtype=torch.float32)
        launch(
            attention_delta_kernel,
            (self.BH * triton.cdiv(self.T, block_m),),
            *(out, dout, dlse, delta, out.stride(), dout.stride()),
            (0, 0, 0) if dlse is None else dlse.stride(),
            *(self.sizes[0], self.T, self.sizes[5]),
            BLOCK_M=block_m,
            BLOCK_DV=block_dv,
            num_warps=4,
        )
        return delta

    def query_gradients(
        self, dout: Tensor, lse2: Tensor, delta: Tensor, slopes: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """dq, and where `slopes` are given their gradient, summed over the rows here."""
        dq = self.q.new_empty(self.q.shape)
        dslopes = None if slopes is None else torch.empty_like(delta)
        options = self.options("dq")
        launch(
            attention_bwd_dq_kernel,
            (self.BH * triton.cdiv(self.T, options["BLOCK_M"]),),
            *self._tensors(dout, lse2, delta),
            *(dq, dslopes),
            *(*self.strides, dout.stride(), dq.stride()),
            *(self.BH, *self.sizes, heads_together(self.k, self.v)),
            *self.scalars,
            **options,
        )
        if slopes is not None and dslopes is not None:
            dslopes = dslopes.sum(2).sum_to_size(slopes.shape).to(slopes.dtype)
        return dq, dslopes

    def key_gradients(self, dout: Tensor, lse2: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        dk, dv = self.k.new_empty(self.k.shape), self.v.new_empty(self.v.shape)
        options = self.options("dkdv")
        launch(
            attention_bwd_dkdv_kernel,
            (self.BH // self.sizes[1] * triton.cdiv(self.S, options["BLOCK_N"]),),
            *self._tensors(dout, lse2, delta),
            *(dk, dv),
            *(*self.strides, dout.stride(), dk.stride(), dv.stride()),
            *(self.BH, *self.sizes, heads_together(self.q, dout, self.sizes[1])),
            *self.scalars,
            **options,
        )
        return dk, dv

    def bias_gradient(self, bias: Tensor, dout: Tensor, lse2: Tensor, delta: Tensor) -> Tensor:
        """Summed over the sharing batches and heads by the kernel, over T or S of 1 here."""
        B, H = self.q.shape[:2]
        bias_b, bias_h = bias.shape[:2]
        shape = (bias_b, bias_h, self.T, self.S)
        short = [i for i in (2, 3) if bias.shape[i] != shape[i]]
        dbias = bias.new_empty(shape, dtype=torch.float32 if short else bias.dtype)
        options = self.options("dbias")
        tiles = triton.cdiv(self.T, options["BLOCK_M"]) * triton.cdiv(self.S, options["BLOCK_N"])
        launch(
            attention_bwd_dbias_kernel,
            (bias_b * bias_h * tiles,),
            *self._tensors(dout, lse2, delta),
            dbias,
            *(*self.strides, dout.stride(), dbias.stride()),
            *(bias_h, B // bias_b, H // bias_h, *self.sizes),
            *self.scalars,
            **options,
        )
        return dbias.sum(short, keepdim=True).to(bias.dtype) if short else dbias

    def _tensors(self, dout: Tensor, lse2: Tensor, delta: Tensor) -> tuple[Tensor | None, ...]:
        terms = (self.bias, self.key_mask, self.slopes, self.seed)
        return (self.q, self.k, self.v, *terms, dout, lse2, delta)
