"""Attention backward for what is added to the scores.

    dbias = sum of ds over the dims it broadcasts in

Letters, formulas and source as in backward.py.
"""

from __future__ import annotations

from trilith.kernels._runtime.language import tl, triton
from trilith.kernels.attention.backward_queries import score_gradient
from trilith.kernels.attention.tiles import (
    NOT_SPECIALIZED,
    band_of,
    bias_extent,
    extent,
    head_terms,
    load_lse2,
    load_rows,
    store_rows,
)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def attention_bwd_dbias_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    key_mask_ptr,
    slopes_ptr,
    seed_ptr,
    cu_q_ptr,
    cu_k_ptr,
    dout_ptr,
    lse2_ptr,
    delta_ptr,
    dbias_ptr,
    q_strides,
    k_strides,
    v_strides,
    bias_strides,
    key_mask_strides,
    slopes_strides,
    dout_strides,
    dbias_strides,
    BIAS_H,
    SHARING_BATCHES,
    SHARING_HEADS,
    H,
    G,
    T,
    S,
    D,
    DV,
    bias_rows,
    bias_cols,
    low,
    high,
    diagonal,
    scale,
    softcap,
    p_drop,
    keep_scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PAD_D: tl.constexpr,
    PAD_DV: tl.constexpr,
    FLAGS: tl.constexpr,
    CHUNKS: tl.constexpr = (1, 1),
    PRECISION: tl.constexpr = "ieee",
    SCORE_MOD: tl.constexpr = None,
    DSCORE_MOD: tl.constexpr = None,
):
    """One program owns dbias [BLOCK_M, BLOCK_N] of one bias matrix, whoever shares it."""
    scalars = (
        tl.cast(scale, tl.float32),
        tl.cast(softcap, tl.float32),
        tl.cast(p_drop, tl.float32),
        tl.cast(keep_scale, tl.float32),
    )
    term_ptrs = (bias_ptr, key_mask_ptr, slopes_ptr)
    term_strides = (bias_strides, key_mask_strides, slopes_strides)
    tiles_n = tl.cdiv(bias_cols, BLOCK_N)
    tiles = tl.cdiv(bias_rows, BLOCK_M) * tiles_n
    pid = tl.program_id(0)
    matrix = (pid // tiles).to(tl.int64)
    tile = pid % tiles
    first_b = matrix // BIAS_H
    first_h = matrix - first_b * BIAS_H
    start_n = (tile % tiles_n) * BLOCK_N
    offs_m = (tile // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for sharer in range(SHARING_BATCHES * SHARING_HEADS):
        b = first_b + sharer // SHARING_HEADS
        h = first_h + sharer % SHARING_HEADS
        hkv = h // G
        first_row = (b * H + h if cu_q_ptr is None else h) * T
        first_q, rows = extent(cu_q_ptr, b, T)
        first_k, cols = extent(cu_k_ptr, b, S)
        first_row += first_q
        sizes = (
            rows,
            cols,
            D,
            DV,
            S,
            bias_extent(bias_rows, rows, cu_q_ptr),
            bias_extent(bias_cols, cols, cu_k_ptr),
        )
        terms = head_terms(term_ptrs, term_strides, b, h)
        head_q_ptr = q_ptr + b * q_strides[0] + h * q_strides[1] + first_q * q_strides[2]
        head_k_ptr = k_ptr + b * k_strides[0] + hkv * k_strides[1] + first_k * k_strides[2]
        head_v_ptr = v_ptr + b * v_strides[0] + hkv * v_strides[1] + first_k * v_strides[2]
        head_dout_ptr = dout_ptr + b * dout_strides[0] + h * dout_strides[1]
        head_dout_ptr += first_q * dout_strides[2]
        ds, slope_of_cap = score_gradient(
            load_rows(head_q_ptr, q_strides, offs_m, offs_d, rows, D, True, PAD_D),
            load_rows(head_k_ptr, k_strides, offs_n, offs_d, cols, D, True, PAD_D),
            load_rows(head_v_ptr, v_strides, offs_n, offs_dv, cols, DV, True, PAD_DV),
            load_rows(head_dout_ptr, dout_strides, offs_m, offs_dv, rows, DV, True, PAD_DV),
            (head_q_ptr, head_k_ptr, head_v_ptr, head_dout_ptr),
            (q_strides, k_strides, v_strides, dout_strides),
            load_lse2(lse2_ptr + first_row, offs_m, rows, True),
            tl.load(delta_ptr + first_row + offs_m, mask=offs_m < rows, other=0.0),
            offs_m,
            offs_n,
            start_n,
            first_row,
            seed_ptr,
            term_ptrs,
            terms,
            term_strides,
            sizes,
            band_of(low, high, diagonal, rows, cols, FLAGS),
            scalars,
            BLOCK_N,
            BLOCK_D,
            BLOCK_DV,
            PAD_D,
            PAD_DV,
            FLAGS,
            CHUNKS,
            PRECISION,
            SCORE_MOD,
            DSCORE_MOD,
            True,
        )
        dbias += ds
    dbias_ptr += first_b * dbias_strides[0] + first_h * dbias_strides[1]
    store_rows(dbias_ptr, dbias_strides, offs_m, offs_n, bias_rows, bias_cols, dbias)


@triton.jit
def sequence_sum_kernel(rows_ptr, cu_ptr, sums_ptr, H, total, BLOCK: tl.constexpr):
    """One program owns the sum over one sequence of a head's rows, of (H, total)."""
    pid = tl.program_id(0).to(tl.int64)
    b = pid // H
    first, length = extent(cu_ptr, b, total)
    rows_ptr += (pid - b * H) * total + first
    acc = tl.zeros([BLOCK], tl.float32)
    for start in range(0, length, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        acc += tl.load(rows_ptr + offs, mask=offs < length, other=0.0)
    tl.store(sums_ptr + pid, tl.sum(acc, 0))
