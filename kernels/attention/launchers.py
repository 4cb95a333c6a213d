"""Starts the attention kernels: what they share is gathered once in an `AttentionCall`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trilith.kernels._runtime.launch import launch
from trilith.kernels._runtime.plan import planned
from trilith.kernels._runtime.sizes import cdiv, next_power_of_2
from trilith.kernels.attention.backward import attention_bwd_dkdv_kernel, attention_delta_kernel
from trilith.kernels.attention.backward_bias import attention_bwd_dbias_kernel, sequence_sum_kernel
from trilith.kernels.attention.backward_queries import attention_bwd_dq_kernel
from trilith.kernels.attention.config import has_parts, heads_together, tiles_for
from trilith.kernels.attention.forward import attention_fwd_kernel
from trilith.kernels.attention.reference import diagonal_of
from trilith.plugins import BackwardContext, registry


def attention_out(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse, and the lse in base 2 that backward reads.

    out lies in memory as (B, T, H, Dv), so that merging the heads is a view.
    """
    B, H, T, _ = q.shape
    out = q.new_empty((B, T, H, v.shape[3])).transpose(1, 2)
    lse, lse2 = (q.new_empty(q.shape[:3], dtype=torch.float32) for _ in range(2))
    return out, lse, lse2


@planned
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
    score_mod: str = "",
    precision: str = "ieee",
) -> tuple[Tensor, Tensor, Tensor]:
    rest = (scale, softcap, p, alignment, left, right, score_mod, precision)
    out, lse, lse2 = attention_out(q, v)
    AttentionCall(q, k, v, bias, key_mask, slopes, seed, *rest).forward(sinks, out, lse, lse2)
    return out, lse, lse2


@planned
def attention_bwd(
    ctx: BackwardContext, dout: Tensor | None, dlse: Tensor | None
) -> tuple[Tensor | None, ...]:
    q, k, v, *rest = ctx.inputs
    kept = (*ctx.outputs, *ctx.aux)
    return attention_gradients((q, k, v), rest, kept, dout, dlse, ctx.needs_input_grad)


def attention_gradients(
    heads: tuple[Tensor, Tensor, Tensor],
    rest: Sequence[Any],
    kept: tuple[Tensor, ...],
    dout: Tensor | None,
    dlse: Tensor | None,
    needs: Sequence[bool],
    into: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor | None, ...]:
    """Those of `heads` (q, k, v), which may go `into` tensors that are given, and of what follows.

    rest: the op's other arguments. kept: out, and the lse in base 2. needs: of all arguments.
    """
    bias, key_mask, slopes, sinks, seed, *scalars = rest
    out, lse2 = kept
    needs_q, needs_k, needs_v, needs_bias, _, needs_slopes, needs_sinks = needs[:7]
    call = AttentionCall(*heads, bias, key_mask, slopes, seed, *scalars, into=into)
    upstream = call.upstream(out, lse2, dout, dlse)
    dq = dk = dv = dbias = dslopes = dsinks = None
    if needs_q or needs_slopes:
        dq, dslopes = call.query_gradients(upstream, slopes if needs_slopes else None)
    if needs_k or needs_v:
        dk, dv = call.key_gradients(upstream)
    if needs_bias:
        dbias = call.bias_gradient(bias, upstream)
    if needs_sinks:
        dsinks = sink_gradient(sinks, lse2, upstream.delta)
    return dq, dk, dv, dbias, None, dslopes, dsinks


def sink_gradient(sinks: Tensor, lse2: Tensor, delta: Tensor) -> Tensor:
    share = torch.exp(sinks.float()[:, None] - lse2 * math.log(2))
    return -torch.where(lse2 == torch.inf, 0.0, share * delta).sum((0, 2)).to(sinks.dtype)


class Packed(NamedTuple):
    """Where sequences begin in the rows of q and k: (B + 1,) each, from 0 to the number of rows."""

    cu_q: Tensor
    cu_k: Tensor


class Upstream(NamedTuple):
    """What every backward kernel reads besides the inputs."""

    dout: Tensor
    lse2: Tensor
    delta: Tensor


class AttentionCall:
    """One call's tensors, strides, sizes and scalars, in the order of every kernel's arguments.

    Packed sequences come as one batch entry (1, H, total, D), beside where each begins. The
    gradients of q, k and v go `into` these tensors, or into new ones.
    """

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
        score_mod: str = "",
        precision: str = "ieee",
        *,
        packed: Packed | None = None,
        into: tuple[Tensor, ...] | None = None,
    ) -> None:
        B, H, self.T, D = q.shape
        Hkv, self.S, DV = v.shape[1:]
        self.BH, self.HKV = B * H, Hkv
        self.q, self.k, self.v, self.key_mask = q, k, v, key_mask
        self.packed, self.into = packed, into
        self.B = B if packed is None else packed.cu_q.shape[0] - 1
        rows, cols = (self.T, self.S) if packed is None or bias is None else bias.shape[2:]
        self.bias_sizes = (rows, cols)
        self.bias = None if bias is None else bias.expand(self.B, H, rows, cols)
        self.slopes = None if slopes is None else slopes.expand(self.B, H)
        self.seed = seed if p > 0 else None
        self.sizes = (H, H // Hkv, self.T, self.S, D, DV)
        diagonal = 0 if packed else diagonal_of(alignment, self.T, self.S)
        keep_scale = 0.0 if p >= 1 else 1 / (1 - p)
        self.scalars = (
            *(diagonal - left, diagonal + right, diagonal),
            *(scale, softcap, p, keep_scale),
        )
        self.strides = (
            *(self._strides(t) for t in (q, k, v)),
            (0, 0, 0, 0) if self.bias is None else self.bias.stride(),
            (0, 0) if key_mask is None else key_mask.stride(),
            (0, 0) if self.slopes is None else self.slopes.stride(),
        )
        laden = (bias, key_mask, slopes, self.seed)
        self._is_plain = softcap == 0 and not score_mod and all(t is None for t in laden)
        self._score_mod = registry.score_mod(score_mod) if score_mod else None
        self._precision = precision if q.dtype == torch.float32 else "ieee"
        per_sequence = packed is not None and alignment == "bottom_right"
        self._flags = (left >= 0, right >= 0, slopes is not None, softcap > 0, per_sequence)

    def _strides(self, tensor: Tensor) -> tuple[int, ...]:
        """Of (B, H, rows, D); packed sequences are told apart by rows, not by a batch stride."""
        return (0, *tensor.stride()[1:]) if self.packed else tensor.stride()

    def _tiles(self, rows: int, block: int) -> int:
        return rows // block + self.B + 1 if self.packed else cdiv(rows, block)

    def _gradient(self, which: int) -> Tensor:
        """Room for that of q, k or v; of packed ones it lies as (rows, H, D)."""
        if self.into is not None:
            return self.into[which]
        tensor = (self.q, self.k, self.v)[which]
        B, H, rows, D = tensor.shape
        if self.packed:
            return tensor.new_empty((B, rows, H, D)).transpose(1, 2)
        return tensor.new_empty(tensor.shape)

    def forward(self, sinks: Tensor | None, out: Tensor, lse: Tensor, lse2: Tensor) -> None:
        options = self.options("fwd")
        launch(
            attention_fwd_kernel,
            (self.BH * self._tiles(self.T, options["BLOCK_M"]), self._chunks(options)[1]),
            *(self.q, self.k, self.v, self.bias, self.key_mask, self.slopes, sinks, self.seed),
            *(*self._starts(), out, lse, lse2),
            *self.strides,
            0 if sinks is None else sinks.stride(0),
            self._strides(out),
            *(self.BH, *self.sizes, heads_together(self.k, self.v), self.B, *self.bias_sizes),
            *self.scalars,
            NEGATIVE_SCALE=self.scalars[3] < 0,
            **options,
        )

    def options(self, kernel: str) -> dict[str, Any]:
        """The constexprs and launch options of fwd, dkdv, dk, dv, dq or dbias."""
        D, DV = self.sizes[4:]
        block_d, block_dv = (max(16, next_power_of_2(n)) for n in (D, DV))
        tiles = tiles_for(kernel, self.q, self._precision, max(block_d, block_dv), self._is_plain)
        special: dict[str, Any] = {}
        if kernel != "dbias":
            special["BLOCK_MASKED"] = tiles.block_masked
        if self._precision != "ieee":
            special["PRECISION"] = self._precision
        if self._score_mod is not None:
            special["SCORE_MOD"] = self._score_mod.forward
            if kernel != "fwd":
                special["DSCORE_MOD"] = self._score_mod.derivative
        block_d, block_dv = (min(n, tiles.chunk) for n in (block_d, block_dv))
        chunks = (cdiv(D, block_d), cdiv(DV, block_dv))
        if max(chunks) > 1:
            special["CHUNKS"] = chunks
        return {
            **special,
            "BLOCK_M": tiles.block_m,
            "BLOCK_N": tiles.block_n,
            "BLOCK_D": block_d,
            "BLOCK_DV": block_dv,
            "PAD_D": D % block_d != 0,
            "PAD_DV": DV % block_dv != 0,
            "num_warps": tiles.num_warps,
            "num_stages": tiles.num_stages,
            "FLAGS": self._flags,
        }

    def _chunks(self, options: dict[str, Any]) -> tuple[int, int]:
        return options.get("CHUNKS", (1, 1))

    def upstream(
        self, out: Tensor, lse2: Tensor, dout: Tensor | None, dlse: Tensor | None
    ) -> Upstream:
        if dout is None:
            dout = out.new_zeros(()).expand(out.shape)
        block_dv = max(16, next_power_of_2(out.shape[3]))
        block_m = max(16, 2048 // block_dv)
        delta = out.new_empty(out.shape[:3], dtype=torch.float32)
        launch(
            attention_delta_kernel,
            (self.BH * cdiv(self.T, block_m),),
            *(out, dout, dlse, delta, out.stride(), dout.stride()),
            (0, 0, 0) if dlse is None else dlse.stride(),
            *(self.sizes[0], self.T, self.sizes[5]),
            BLOCK_M=block_m,
            BLOCK_DV=block_dv,
            num_warps=4,
        )
        return Upstream(dout, lse2, delta)

    def query_gradients(
        self, upstream: Upstream, slopes: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """dq, and where `slopes` are given their gradient, summed over the rows here."""
        dq = self._gradient(0)
        dslopes = None if slopes is None else torch.empty_like(upstream.delta)
        options = self.options("dq")
        launch(
            attention_bwd_dq_kernel,
            (self.BH * self._tiles(self.T, options["BLOCK_M"]), self._chunks(options)[0]),
            *self._tensors(upstream),
            *(dq, dslopes),
            *(*self.strides, self._strides(upstream.dout), self._strides(dq)),
            *(self.BH, *self.sizes, heads_together(self.k, self.v), self.B, *self.bias_sizes),
            *self.scalars,
            **options,
        )
        if slopes is not None and dslopes is not None:
            sums = self._sequence_sums(dslopes) if self.packed else dslopes.sum(2)
            dslopes = sums.sum_to_size(slopes.shape).to(slopes.dtype)
        return dq, dslopes

    def _sequence_sums(self, rows: Tensor) -> Tensor:
        """(1, H, total) -> (B, H)."""
        assert self.packed is not None
        sums = rows.new_empty((self.B, self.BH))
        launch(
            sequence_sum_kernel,
            (self.B * self.BH,),
            *(rows, self.packed.cu_q, sums, self.BH, self.T),
            BLOCK=1024,
            num_warps=4,
        )
        return sums

    def key_gradients(self, upstream: Upstream) -> tuple[Tensor, Tensor]:
        dk, dv = self._gradient(1), self._gradient(2)
        if self._owns_parts():
            self.key_sums("dk", upstream, dk, None)
            self.key_sums("dv", upstream, None, dv)
        else:
            self.key_sums("dkdv", upstream, dk, dv)
        return dk, dv

    def _owns_parts(self) -> bool:
        """Whether dk and dv are quicker each by itself; the table has entries for them then."""
        wider = max(16, *(next_power_of_2(n) for n in self.sizes[4:]))
        return self._is_plain and has_parts(self.q, wider)

    def key_sums(
        self, kernel: str, upstream: Upstream, dk: Tensor | None, dv: Tensor | None
    ) -> None:
        """Those that are given, with the tiles of `kernel` (dkdv, dk, dv)."""
        options = self.options(kernel)
        programs = self.BH // self.sizes[1] * self._tiles(self.S, options["BLOCK_N"])
        launch(
            attention_bwd_dkdv_kernel,
            (programs, max(self._chunks(options))),
            *self._tensors(upstream),
            *(dk, dv),
            *(*self.strides, self._strides(upstream.dout)),
            *((0, 0, 0, 0) if t is None else self._strides(t) for t in (dk, dv)),
            *(self.BH, *self.sizes, heads_together(self.q, upstream.dout, self.sizes[1])),
            *(self.B, *self.bias_sizes),
            *self.scalars,
            **options,
        )

    def bias_gradient(self, bias: Tensor, upstream: Upstream) -> Tensor:
        """Summed over the sharing batches and heads by the kernel, over T or S of 1 here."""
        H = self.q.shape[1]
        bias_b, bias_h = bias.shape[:2]
        shape = (bias_b, bias_h, *self.bias_sizes)
        short = [i for i in (2, 3) if bias.shape[i] != shape[i]]
        dbias = bias.new_empty(shape, dtype=torch.float32 if short else bias.dtype)
        options = self.options("dbias")
        tiles = cdiv(shape[2], options["BLOCK_M"]) * cdiv(shape[3], options["BLOCK_N"])
        launch(
            attention_bwd_dbias_kernel,
            (bias_b * bias_h * tiles,),
            *self._tensors(upstream),
            dbias,
            *(*self.strides, self._strides(upstream.dout), dbias.stride()),
            *(bias_h, self.B // bias_b, H // bias_h, *self.sizes, *self.bias_sizes),
            *self.scalars,
            **options,
        )
        return dbias.sum(short, keepdim=True).to(bias.dtype) if short else dbias

    def _starts(self) -> tuple[Tensor | None, Tensor | None]:
        return self.packed or (None, None)

    def _tensors(self, upstream: Upstream) -> tuple[Tensor | None, ...]:
        terms = (self.bias, self.key_mask, self.slopes, self.seed)
        return (self.q, self.k, self.v, *terms, *self._starts(), *upstream)
