"""Merging of partial attention: softmaxes over disjoint keys become the softmax over all of them.

    lse = log sum_i exp(lse_i),  w_i = exp(lse_i - lse),  out = sum_i w_i out_i

    d out_i = w_i d out,  d lse_i = w_i (d out . (out_i - out) + d lse)

P partial results of M rows, DV elements each. A part that saw no key has lse_i = -inf and weight 0,
and its out_i is not read; a row that no part saw gives 0, lse -inf and gradients 0.
Numerics: fp32, one rounding at the store; backward makes lse and out again and saves neither.

Source: Rabe and Staats, "Self-attention does not need O(n^2) memory", 2021; Liu et al., "Ring
attention with blockwise transformers", 2023.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from trilith.kernels._runtime.checks import require, require_floating, require_same_device
from trilith.kernels._runtime.elementary import exp
from trilith.kernels._runtime.language import tl, triton
from trilith.kernels._runtime.launch import launch
from trilith.kernels._runtime.plan import planned
from trilith.kernels._runtime.rows import as_rows, row_offsets, row_tile
from trilith.kernels._runtime.sharding import Strategy, split
from trilith.kernels._runtime.sizes import cdiv
from trilith.plugins import BackwardContext, Cost, Op, OpSpec, Sample

_NAME = "merge_attention"


@triton.jit
def _merged_lse(lses_ptr, rows, M, P, mask):
    """(lse, -inf where no part saw a key; the largest of the parts' lses; 1 / the weights' sum)."""
    top = tl.full(rows.shape, -float("inf"), tl.float32)
    for part in range(P):
        lse = tl.load(lses_ptr + part * M + rows, mask=mask, other=-float("inf"))
        top = tl.maximum(top, lse.to(tl.float32), propagate_nan=tl.PropagateNan.ALL)
    top = tl.where(top == -float("inf"), 0.0, top)
    total = tl.zeros(rows.shape, tl.float32)
    for part in range(P):
        lse = tl.load(lses_ptr + part * M + rows, mask=mask, other=-float("inf"))
        total += exp(lse.to(tl.float32) - top)
    some = tl.where(total == 0.0, 1.0, total)
    return tl.where(total == 0.0, -float("inf"), top + tl.log(some)), top, 1.0 / some


@triton.jit
def _part(outs_ptr, lses_ptr, strides, inner, part, rows, cols, M, DV, mask, top):
    """(out_i, w_i times the weights' sum) of one part: [BLOCK_M, BLOCK_D] and [BLOCK_M].

    The difference comes before any product: of lse * log2(e) - top * log2(e) a GPU makes a fused
    multiply-add, and rounds the two products apart.
    """
    lse = tl.load(lses_ptr + part * M + rows, mask=mask, other=-float("inf")).to(tl.float32)
    seen = mask & (lse != -float("inf"))
    start = row_offsets(part * M + rows, inner, strides)
    ptrs = outs_ptr + start[:, None] + cols.to(tl.int64)[None, :] * strides[2]
    out = tl.load(ptrs, mask=seen[:, None] & (cols < DV)[None, :], other=0.0)
    return out.to(tl.float32), exp(lse - top)


@triton.jit
def attention_merge_kernel(
    outs_ptr,
    lses_ptr,
    out_ptr,
    lse_ptr,
    strides,
    inner,
    M,
    P,
    DV,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program owns [BLOCK_M, DV] of the merged output."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_D)
    mask = rows < M
    lse, top, share = _merged_lse(lses_ptr, rows, M, P, mask)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for part in range(P):
        out, weight = _part(outs_ptr, lses_ptr, strides, inner, part, rows, cols, M, DV, mask, top)
        acc += weight[:, None] * out
    acc *= share[:, None]
    ptrs = out_ptr + rows[:, None] * DV + cols[None, :]
    both = mask[:, None] & (cols < DV)[None, :]
    tl.store(ptrs, acc.to(out_ptr.dtype.element_ty), mask=both)
    if lse_ptr is not None:
        tl.store(lse_ptr + rows, lse, mask=mask)


@triton.jit
def attention_merge_bwd_kernel(
    outs_ptr,
    lses_ptr,
    dout_ptr,
    dlse_ptr,
    douts_ptr,
    dlses_ptr,
    strides,
    inner,
    dout_strides,
    dout_inner,
    M,
    P,
    DV,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program owns the gradients of [P, BLOCK_M, DV]; it reads its rows of outs twice."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_D)
    mask = rows < M
    both = mask[:, None] & (cols < DV)[None, :]
    start = row_offsets(rows, dout_inner, dout_strides)
    ptrs = dout_ptr + start[:, None] + cols.to(tl.int64)[None, :] * dout_strides[2]
    dout = tl.load(ptrs, mask=both, other=0.0).to(tl.float32)
    dlse = tl.load(dlse_ptr + rows, mask=mask, other=0.0).to(tl.float32)
    _, top, share = _merged_lse(lses_ptr, rows, M, P, mask)
    delta = tl.zeros([BLOCK_M], tl.float32)
    for part in range(P):
        out, weight = _part(outs_ptr, lses_ptr, strides, inner, part, rows, cols, M, DV, mask, top)
        delta += weight * share * tl.sum(dout * out, 1)
    for part in range(P):
        out, weight = _part(outs_ptr, lses_ptr, strides, inner, part, rows, cols, M, DV, mask, top)
        weight *= share
        dots = tl.sum(dout * out, 1) - delta + dlse
        dlses = tl.where(weight == 0.0, 0.0, weight * dots)
        douts = tl.where(weight[:, None] == 0.0, 0.0, weight[:, None] * dout)
        offsets = (part * M + rows)[:, None] * DV + cols[None, :]
        tl.store(douts_ptr + offsets, douts.to(douts_ptr.dtype.element_ty), mask=both)
        tl.store(dlses_ptr + part * M + rows, dlses.to(dlses_ptr.dtype.element_ty), mask=mask)


def merge_partials(outs: Tensor, lses: Tensor, out: Tensor, lse: Tensor | None) -> None:
    """outs (P, *, DV) and lses (P, *) contiguous -> out (*, DV) and lse (*), both contiguous."""
    rows, block_m, options = _tiles(outs)
    M = out.numel() // outs.shape[-1]
    launch(
        attention_merge_kernel,
        (cdiv(M, block_m),),
        *(*rows.tensors, lses, out, lse, *rows.strides, rows.inner),
        *(M, outs.shape[0], outs.shape[-1]),
        **options,
    )


def _tiles(outs: Tensor) -> tuple:
    tile = row_tile(outs.shape[-1], per_thread=8, max_warps=4)
    block = {"BLOCK_M": tile.block_m, "BLOCK_D": tile.block_n, "num_warps": tile.num_warps}
    return as_rows(outs), tile.block_m, block


def _merge_out(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    return outs.new_empty(outs.shape[1:]), lses.new_empty(lses.shape[1:], dtype=torch.float32)


@planned
def _merge_fwd(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = _merge_out(outs, lses)
    merge_partials(outs, lses.contiguous(), out, lse)
    return out, lse


@planned
def _merge_bwd(ctx: BackwardContext, dout: Tensor, dlse: Tensor) -> tuple[Tensor, Tensor]:
    outs, lses = ctx.inputs
    douts, dlses = outs.new_empty(outs.shape), lses.new_empty(lses.shape)
    rows, block_m, options = _tiles(outs)
    upstream = as_rows(dout)
    M = dout.numel() // outs.shape[-1]
    launch(
        attention_merge_bwd_kernel,
        (cdiv(M, block_m),),
        *(*rows.tensors, lses.contiguous(), *upstream.tensors, dlse.contiguous(), douts, dlses),
        *(*rows.strides, rows.inner, *upstream.strides, upstream.inner),
        *(M, outs.shape[0], outs.shape[-1]),
        **options,
    )
    return douts, dlses


def _merge_reference(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of exp(lses - lse) outs, lse = log of the sum of exp(lses)) over dimension 0."""
    wide = torch.float64 if outs.dtype == torch.float64 else torch.float32
    lses = lses.to(wide)
    unseen = lses == -torch.inf
    top = lses.detach().amax(0)
    top = torch.where(top == -torch.inf, 0.0, top)
    weights = torch.exp(lses - top)
    total = weights.sum(0)
    dead = total == 0
    total = torch.where(dead, 1.0, total)
    lse = torch.where(dead, -torch.inf, top + torch.log(total))
    parts = torch.where(unseen[..., None], 0.0, outs.to(wide))
    return ((weights / total)[..., None] * parts).sum(0).to(outs.dtype), lse


def _samples(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    def sample(*shape: int) -> tuple[Tensor, Tensor]:
        outs = torch.randn(shape, device=device, dtype=dtype)
        return outs, 3 * torch.randn(shape[:-1], device=device)

    yield Sample(*sample(2, 3, 17, 33))
    outs, lses = sample(3, 2, 2, 5, 16)
    lses[0, :, 1], lses[:, 1, 0, 2] = -torch.inf, -torch.inf
    yield Sample(outs, lses)
    yield Sample(*sample(1, 7, 130))


def _cost(outs: Tensor, lses: Tensor) -> Cost:
    data, statistics = outs.numel() * outs.element_size(), lses.numel() * lses.element_size()
    merged = (data + statistics) // max(1, outs.shape[0])
    return Cost(
        forward_bytes=data + statistics + merged,
        backward_bytes=2 * (data + statistics) + merged,
        forward_flops=3 * outs.numel(),
        backward_flops=6 * outs.numel(),
    )


def _sharding(outs: Tensor, lses: Tensor) -> list[Strategy]:
    return [split([dim - 1, dim - 1], [dim, dim]) for dim in range(1, lses.ndim)]


MERGE_ATTENTION = Op(
    OpSpec(
        name="trilith::merge_attention",
        forward=_merge_fwd,
        backward=_merge_bwd,
        reference=_merge_reference,
        samples=_samples,
        outputs=2,
        save_outputs=False,
        fake=_merge_out,
        cost=_cost,
        sharding=_sharding,
    )
)


def merge_attention(
    outputs: Sequence[Tensor] | Tensor, lses: Sequence[Tensor] | Tensor
) -> tuple[Tensor, Tensor]:
    """Attention over all keys, from attention over parts of them.

    For keys that come in turn (ring attention) or lie on several devices (context parallelism):
    `attention(q, k_i, v_i, return_lse=True)` of each part, then this.

    Args:
        outputs: P tensors (*, Dv) of one shape and floating dtype, or one tensor (P, *, Dv), which
            saves the copy that stacks them. At least one.
        lses: P tensors (*), or one (P, *), in natural logarithm, fp32. -inf marks a row of which
            a part saw no key; its output is then not read.

    Returns:
        out (*, Dv) in the outputs' dtype and lse (*) in fp32, both differentiable. A row that no
        part saw has output 0, lse -inf, and gradients 0.

    Raises:
        TypeError: a tensor is not floating point, or outputs differ in dtype.
        ValueError: no part is given, or shapes do not fit.

    Numerics: fp32, rounded once; the parts' own rounding remains. Any number of parts is merged
        in one pass, so nothing is rounded in between.

    Source: Liu et al., "Ring attention with blockwise transformers for near-infinite context",
        2023.

    Example:
        >>> q, k, v = torch.randn(3, 2, 8, 128, 64).unbind()
        >>> halves = zip(k.chunk(2, 2), v.chunk(2, 2))
        >>> parts = [attention(q, *kv, return_lse=True) for kv in halves]
        >>> merge_attention(*zip(*parts))[0].shape
        torch.Size([2, 8, 128, 64])
    """
    outs, lses = _stacked("outputs", outputs), _stacked("lses", lses)
    require_same_device(_NAME, outs, lses=lses)
    require(outs.ndim >= 2, _NAME, "outputs", "have a last dimension Dv", tuple(outs.shape[1:]))
    expected = tuple(outs.shape[:-1])
    require(
        tuple(lses.shape) == expected, _NAME, "lses", f"have shape {expected}", tuple(lses.shape)
    )
    require(outs.shape[0] > 0, _NAME, "outputs", "have at least one part", 0)
    return MERGE_ATTENTION(outs, lses)


def _stacked(name: str, parts: Sequence[Tensor] | Tensor) -> Tensor:
    if isinstance(parts, Tensor):
        require_floating(_NAME, **{name: parts})
        return parts
    if parts is None:
        raise TypeError(f"{_NAME}: {name} must be tensors, got None")
    parts = list(parts)
    require(len(parts) > 0, _NAME, name, "have at least one part", 0)
    require_floating(_NAME, **{f"{name}[{i}]": part for i, part in enumerate(parts)})
    shapes, dtypes = ({getattr(p, what) for p in parts} for what in ("shape", "dtype"))
    require(len(shapes) == 1, _NAME, name, "have one shape", sorted(map(tuple, shapes)))
    if len(dtypes) > 1:
        raise TypeError(f"{_NAME}: {name} must have one dtype, got {sorted(map(str, dtypes))}")
    return torch.stack(parts)
