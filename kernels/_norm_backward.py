"""Backward of layer_norm and rms_norm: a null `mean_ptr` is the RMS norm's.

M rows of N elements. With g = dy * weight and x_hat = (x - mean) * rstd,

    dx = rstd * (g - mean(g) - x_hat * mean(g * x_hat))
    dweight = sum(dy * x_hat)    dbias = sum(dy)

where rms_norm has neither mean nor mean(g). A row that fits on chip is read once; a longer one for
mean(g) and mean(g * x_hat), then again, a block of columns at a time. Weight gradients are summed
per program, then over programs, without atomics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from trilith.kernels._norm_forward import QUAD, affine, stride_of
from trilith.kernels._runtime.device import architecture, shared_bytes
from trilith.kernels._runtime.elementwise import drop, keep_scale
from trilith.kernels._runtime.language import tl, triton
from trilith.kernels._runtime.launch import launch
from trilith.kernels._runtime.plan import as_one
from trilith.kernels._runtime.reduce import column_sum, column_sum_pair
from trilith.kernels._runtime.rows import (
    RowTile,
    as_rows,
    persistent_programs,
    row_offsets,
    row_sums,
    row_tile,
)
from trilith.kernels._runtime.sizes import cdiv, next_power_of_2

_RESIDENT_N = 8192  # 16 elements a thread in 16 warps, beside two accumulators
_DROPPING_RESIDENT_N = 4096  # with 8192 the random numbers spill up to 64 bytes on sm_90
_SHARED_BYTES = 96 * 1024  # more would leave too few programs a multiprocessor
_EXCHANGED_BYTES = 32 * 1024  # through which threads hand each other a row, at most
_SPLIT_N, _SPLIT_WARPS = 4096, 8
_unbind = as_one(Tensor.unbind)


@triton.jit
def _norm_bwd_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    sums_ptr,
    dx_ptr,
    dweight_ptr,
    dbias_ptr,
    dy_strides,
    x_strides,
    weight_stride,
    M,
    N,
    inner,
    dsum_ptr,
    bias_ptr,
    seed_ptr,
    dbranch_ptr,
    y_ptr,
    dsum_strides,
    bias_stride,
    p,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SHARES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One of P programs owns [BLOCK_M, BLOCK_N] of every P-th tile of rows.

    Where BLOCK_N < N, `sums_ptr` (2, M) has the rows' means of g and g * x_hat. dweight and dbias
    are partial sums (P, N), of which a program keeps SHARES, 1 or BLOCK_M, until its end.
    `dsum_ptr` is added to the norm's gradient; what of that passes the dropout goes to
    `dbranch_ptr`. `y_ptr` takes the norm's output, made again.
    """
    programs = tl.num_programs(0).to(tl.int64)
    pid = tl.program_id(0).to(tl.int64)
    cols = (tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    weight = 1.0
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + cols * weight_stride, mask=cols < N, other=0.0).to(tl.float32)
    dweight = tl.zeros((SHARES, BLOCK_N), tl.float32)
    dbias = tl.zeros((SHARES, BLOCK_N), tl.float32)
    # the next STAGES - 1 tiles of rows are fetched while this one is worked on
    for start in tl.range(pid * BLOCK_M, M, programs * BLOCK_M, num_stages=STAGES):
        rows = start + tl.arange(0, BLOCK_M)
        mask = (rows < M)[:, None] & (cols < N)
        dy_tile = dy_ptr + row_offsets(rows, inner, dy_strides)[:, None] + cols * dy_strides[2]
        x_tile = x_ptr + row_offsets(rows, inner, x_strides)[:, None] + cols * x_strides[2]
        dy = tl.load(dy_tile, mask=mask, other=0.0).to(tl.float32)
        x_hat = tl.load(x_tile, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)[:, None]
        mean = 0.0
        if mean_ptr is not None:
            mean = tl.load(mean_ptr + rows, mask=rows < M, other=0.0)[:, None]
        x_hat = (x_hat - mean) * rstd
        if y_ptr is not None:
            y = x_hat * weight
            y = affine(y, None, bias_ptr, cols, 0, bias_stride, N)
            y_tile = y_ptr + rows[:, None] * N + cols
            tl.store(y_tile, y.to(y_ptr.dtype.element_ty), mask=mask)
        if (dx_ptr is not None) or (dbranch_ptr is not None):
            g = dy * weight
            mean_g = 0.0
            if sums_ptr is None:
                if mean_ptr is not None:
                    sum_gx, sum_g = row_sums(g * x_hat, g)
                    mean_g = sum_g / N
                else:
                    sum_gx = tl.sum(g * x_hat, axis=1, keep_dims=True)
                mean_gx = sum_gx / N
            else:
                mean_gx = tl.load(sums_ptr + M + rows, mask=rows < M, other=0.0)[:, None]
                if mean_ptr is not None:
                    mean_g = tl.load(sums_ptr + rows, mask=rows < M, other=0.0)[:, None]
            dx = (g - mean_g - x_hat * mean_gx) * rstd
            if dsum_ptr is not None:
                dsum = dsum_ptr + row_offsets(rows, inner, dsum_strides)[:, None]
                dsum = tl.load(dsum + cols * dsum_strides[2], mask=mask, other=0.0)
                dx += dsum.to(tl.float32)
            if dx_ptr is not None:
                dx_tile = dx_ptr + rows[:, None] * N + cols
                tl.store(dx_tile, dx.to(dx_ptr.dtype.element_ty), mask=mask)
            if dbranch_ptr is not None:
                if seed_ptr is not None:
                    first_col = tl.program_id(1).to(tl.int64) * BLOCK_N
                    dx = drop(dx, seed_ptr, rows, first_col, N, p, scale)
                dx_tile = dbranch_ptr + rows[:, None] * N + cols
                tl.store(dx_tile, dx.to(dbranch_ptr.dtype.element_ty), mask=mask)
        if dweight_ptr is not None:
            dweight += _share(dy * x_hat, SHARES)
        if dbias_ptr is not None:
            dbias += _share(dy, SHARES)
    offsets = pid * N + cols
    if dweight_ptr is not None:
        tl.store(dweight_ptr + offsets, tl.sum(dweight, axis=0, keep_dims=True), mask=cols < N)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + offsets, tl.sum(dbias, axis=0, keep_dims=True), mask=cols < N)


@triton.jit
def _share(tile, SHARES: tl.constexpr):
    if tile.shape[0] > SHARES:
        tile = tl.sum(tile, axis=0, keep_dims=True)
    return tile


@triton.jit
def _norm_bwd_sums_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    sums_ptr,
    dy_strides,
    x_strides,
    weight_stride,
    M,
    N,
    inner,
    BLOCK_N: tl.constexpr,
):
    """One program owns one row, and writes its means of g and of g * x_hat."""
    row = tl.program_id(0).to(tl.int64)
    dy_ptr += row_offsets(row, inner, dy_strides)
    x_ptr += row_offsets(row, inner, x_strides)
    mean = 0.0
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + row)
    rstd = tl.load(rstd_ptr + row)
    sum_g = tl.zeros((BLOCK_N,), tl.float32)
    sum_gx = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, N, BLOCK_N):
        cols = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        mask = cols < N
        g = tl.load(dy_ptr + cols * dy_strides[2], mask=mask, other=0.0).to(tl.float32)
        g = affine(g, weight_ptr, None, cols, weight_stride, 0, N)
        x = tl.load(x_ptr + cols * x_strides[2], mask=mask, other=0.0).to(tl.float32)
        sum_gx += g * ((x - mean) * rstd)
        sum_g += g
    if mean_ptr is not None:
        tl.store(sums_ptr + row, tl.sum(sum_g) / N)
    tl.store(sums_ptr + M + row, tl.sum(sum_gx) / N)


@dataclass(frozen=True)
class AddedGradients:
    """What a norm's backward takes and gives besides, for a sum made first or an output made again.

    dsum: gradient of the sum from elsewhere, added to the norm's. dbranch: takes the gradient of
    what went through dropout. y: takes the norm's output. Those left out are None.
    """

    dsum: Tensor | None = None
    seed: Tensor | None = None
    p: float = 0.0
    dbranch: Tensor | None = None
    y: Tensor | None = None


_NOTHING = AddedGradients()


def norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    needs: Sequence[bool],
    more: AddedGradients = _NOTHING,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weight and bias, those of them that are needed."""
    n = x.shape[-1]
    m = x.numel() // n
    rows = as_rows(dy, x) if more.dsum is None else as_rows(dy, x, more.dsum)
    inputs = (*rows.tensors[:2], weight, mean, rstd)
    strides_and_sizes = (*rows.strides[:2], stride_of(weight), m, n, rows.inner)
    dx = x.new_empty(x.shape) if needs[0] else None
    sums = None
    tile, resident, stages = _tile(n, rows.tensors, dropping=more.p > 0)
    if n > tile.block_n and (needs[0] or more.dbranch is not None):
        sums = rstd.new_empty((2, m))
        options = {"BLOCK_N": _SPLIT_N, "num_warps": _SPLIT_WARPS}
        launch(_norm_bwd_sums_kernel, (m,), *inputs, sums, *strides_and_sizes, **options)
    splits = cdiv(n, tile.block_n)
    own_columns = 8 * (64 if architecture(x.device) == "gfx942" else 32)  # each thread has its own
    programs = persistent_programs(m, tile, resident, x.device, splits)
    pairs = zip((weight, bias), needs[1:], strict=True)
    dtypes = [p.dtype for p, needed in pairs if p is not None and needed]
    partials = rstd.new_empty((len(dtypes), programs, n))
    shares = _unbind(partials)
    launch(
        _norm_bwd_kernel,
        (programs, splits),
        *inputs,
        sums,
        dx,
        shares[0] if needs[1] else None,
        shares[-1] if needs[2] else None,
        *strides_and_sizes,
        None if more.dsum is None else rows.tensors[2],
        bias if more.y is not None else None,
        more.seed,
        more.dbranch,
        more.y,
        rows.strides[-1],
        stride_of(bias),
        more.p,
        keep_scale(more.p),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        SHARES=1 if tile.block_n >= own_columns * tile.num_warps else tile.block_m,
        STAGES=stages,
        num_warps=tile.num_warps,
    )
    if not dtypes:
        return dx, None, None
    if len(dtypes) == 2:
        return dx, *column_sum_pair(partials, *dtypes)
    total = column_sum(shares[0], *dtypes)
    return dx, total if needs[1] else None, total if needs[2] else None


def _tile(n: int, inputs: Sequence[Tensor], *, dropping: bool) -> tuple[RowTile, int, int]:
    """The tile of rows of n, or of a split of them; programs a multiprocessor runs; stages.

    Measured on an H200 in bf16. Rows of up to 4096 do best with 32 elements a thread and 8 warps on
    a multiprocessor: several rows a tile, whose sums are taken together, and few partial sums.
    Longer rows, and dropout, leave registers for 16 elements in 16 warps. Three stages hold two
    tiles of the inputs in shared memory, two hold one; with dropout three spill 16 bytes on sm_90.
    256 columns a warp give each thread 8 of its own.
    """
    block_n = next_power_of_2(max(n, QUAD if dropping else 1))
    if n > (_DROPPING_RESIDENT_N if dropping else _RESIDENT_N):
        return RowTile(1, _SPLIT_N, _SPLIT_WARPS), 16 // _SPLIT_WARPS, 2
    if block_n < 256:
        return row_tile(block_n, per_thread=16, max_warps=16), 8, 3
    warps = min(block_n // 256, max(4, block_n // 512))
    stages, per_thread, all_warps = 2, 16, 16
    there_is = shared_bytes(inputs[0].device) - _EXCHANGED_BYTES
    room = min(_SHARED_BYTES, there_is)
    if not dropping and block_n <= 4096 and _held(2, 32 * warps * 32, inputs) <= room:
        stages, per_thread, all_warps = 3, 32, 8
    elif not dropping and _held(2, 32 * warps * 16, inputs) <= room:
        stages = 3
    elif _held(1, 32 * warps * 16, inputs) > there_is:
        stages = 1
    return RowTile(32 * warps * per_thread // block_n, block_n, warps), all_warps // warps, stages


def _held(tiles: int, elements: int, inputs: Sequence[Tensor]) -> int:
    """Bytes of shared memory for tiles of the inputs; threads exchange those of mixed types."""
    sizes = [t.element_size() for t in inputs]
    return elements * (tiles * sum(sizes) + (0 if min(sizes) == max(sizes) else 8))
