"""Attention backward for the queries, dq = scale ds k, and dslope = - sum of ds |distance|.

Letters, formulas and source as in backward.py.
"""

from __future__ import annotations

from trilith.kernels._runtime.language import tl, triton
from trilith.kernels.attention.tiles import (
    NOT_SPECIALIZED,
    add_products,
    band_of,
    band_range,
    bias_extent,
    head_terms,
    kept_by_dropout,
    kept_range,
    load_lse2,
    load_rows,
    range_from,
    scores,
    sequence_of_tile,
    store_rows,
    tile_count,
    tile_of_program,
)


@triton.jit
def score_gradient(
    q,
    k,
    v,
    dout,
    pointers,
    strides,
    lse,
    delta,
    offs_m,
    offs_n,
    start_n,
    row_offset,
    seed_ptr,
    term_ptrs,
    terms,
    term_strides,
    sizes,
    band,
    scalars,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PAD_D: tl.constexpr,
    PAD_DV: tl.constexpr,
    FLAGS: tl.constexpr,
    CHUNKS: tl.constexpr,
    PRECISION: tl.constexpr,
    SCORE_MOD: tl.constexpr,
    DSCORE_MOD: tl.constexpr,
    MASKED: tl.constexpr,
):
    """(ds, d score / d (scale * dot)) of a tile [BLOCK_M, BLOCK_N].

    q, k, v and dout are the first chunks of the head dims; `pointers` and `strides`, in that order,
    lead to the others.
    """
    T, S, D, DV, mask_cols, bias_rows, bias_cols = sizes
    dots = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    dots = add_products(
        dots,
        pointers[0],
        strides[0],
        offs_m,
        T,
        pointers[1],
        strides[1],
        offs_n,
        S,
        D,
        BLOCK_D,
        CHUNKS[0],
        PAD_D,
        PRECISION,
        MASKED,
    )
    x, slope_of_cap = scores(
        dots,
        offs_m[:, None],
        offs_n[None, :],
        term_ptrs,
        terms,
        term_strides,
        sizes,
        band,
        scalars,
        FLAGS,
        SCORE_MOD,
        DSCORE_MOD,
        MASKED,
        q.dtype == tl.float32 and PRECISION == "ieee",
    )
    p = tl.exp2(x - lse[:, None])
    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    dp = add_products(
        dp,
        pointers[3],
        strides[3],
        offs_m,
        T,
        pointers[2],
        strides[2],
        offs_n,
        S,
        DV,
        BLOCK_DV,
        CHUNKS[1],
        PAD_DV,
        PRECISION,
        MASKED,
    )
    if seed_ptr is not None:
        kept = kept_by_dropout(seed_ptr, row_offset, offs_m, start_n, sizes[4], scalars[2], BLOCK_N)
        dp = tl.where(kept, dp * scalars[3], 0.0)
    return p * (dp - delta[:, None]), slope_of_cap


@triton.jit
def _queries_loop(
    dq,
    dslope,
    q,
    dout,
    lse,
    delta,
    pointers,
    seed_ptr,
    strides,
    offs_m,
    begin,
    end,
    row_offset,
    term_ptrs,
    terms,
    term_strides,
    sizes,
    band,
    scalars,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PAD_D: tl.constexpr,
    PAD_DV: tl.constexpr,
    FLAGS: tl.constexpr,
    CHUNKS: tl.constexpr,
    PRECISION: tl.constexpr,
    SCORE_MOD: tl.constexpr,
    DSCORE_MOD: tl.constexpr,
    WANTS_DSLOPE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add to dq and dslope of a tile of queries what the keys [begin, end) give."""
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    T, S, D, DV, mask_cols, bias_rows, bias_cols = sizes
    for start_n in range(begin, end, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k = load_rows(pointers[1], strides[1], offs_n, offs_d, S, D, MASKED, PAD_D)
        v = load_rows(pointers[2], strides[2], offs_n, offs_dv, S, DV, MASKED, PAD_DV)
        ds, slope_of_cap = score_gradient(
            q,
            k,
            v,
            dout,
            pointers,
            strides,
            lse,
            delta,
            offs_m,
            offs_n,
            start_n,
            row_offset,
            seed_ptr,
            term_ptrs,
            terms,
            term_strides,
            sizes,
            band,
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
            MASKED,
        )
        if CHUNKS[0] > 1:
            own = tl.program_id(1) * BLOCK_D + offs_d
            k = load_rows(pointers[1], strides[1], offs_n, own, S, D, MASKED, PAD_D)
        dq = tl.dot((ds * slope_of_cap).to(k.dtype), k, dq, input_precision=PRECISION)
        if WANTS_DSLOPE:
            distance = tl.abs(offs_m[:, None] + band[2] - offs_n[None, :])
            dslope -= tl.sum(ds * distance.to(tl.float32), 1)
    return dq, dslope


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def attention_bwd_dq_kernel(
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
    dq_ptr,
    dslope_ptr,
    q_strides,
    k_strides,
    v_strides,
    bias_strides,
    key_mask_strides,
    slopes_strides,
    dout_strides,
    dq_strides,
    BH,
    H,
    G,
    T,
    S,
    D,
    DV,
    heads_together,
    sequences,
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
    BLOCK_MASKED: tl.constexpr,
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
    """One program owns dq [BLOCK_M, BLOCK_D] of one query head, and its rows' parts of dslope."""
    scalars = (
        tl.cast(scale, tl.float32),
        tl.cast(softcap, tl.float32),
        tl.cast(p_drop, tl.float32),
        tl.cast(keep_scale, tl.float32),
    )
    term_ptrs = (bias_ptr, key_mask_ptr, slopes_ptr)
    term_strides = (bias_strides, key_mask_strides, slopes_strides)
    tiles = tile_count(T, cu_q_ptr, sequences, BLOCK_M)
    tile, bh = tile_of_program(tiles, BH, heads_together, FLAGS[1])
    b = bh // H
    h = bh - b * H
    hkv = h // G
    first_row, mask_cols = bh * T, S
    tile, sequence, first_q, T, first_k, S = sequence_of_tile(
        tile, b, cu_q_ptr, cu_k_ptr, T, S, sequences, BLOCK_M
    )
    first_row += first_q
    if key_mask_ptr is not None:
        first, S = kept_range(key_mask_ptr + b * key_mask_strides[0], key_mask_strides[1], S)
    sizes = (
        T,
        S,
        D,
        DV,
        mask_cols,
        bias_extent(bias_rows, T, cu_q_ptr),
        bias_extent(bias_cols, S, cu_k_ptr),
    )
    band = band_of(low, high, diagonal, T, S, FLAGS)
    q_ptr += b * q_strides[0] + h * q_strides[1] + first_q * q_strides[2]
    k_ptr += b * k_strides[0] + hkv * k_strides[1] + first_k * k_strides[2]
    v_ptr += b * v_strides[0] + hkv * v_strides[1] + first_k * v_strides[2]
    dout_ptr += b * dout_strides[0] + h * dout_strides[1] + first_q * dout_strides[2]
    dq_ptr += b * dq_strides[0] + h * dq_strides[1] + first_q * dq_strides[2]
    terms = head_terms(term_ptrs, term_strides, sequence, h)
    start_m = tile * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    q = load_rows(q_ptr, q_strides, offs_m, offs_d, T, D, True, PAD_D)
    dout = load_rows(dout_ptr, dout_strides, offs_m, offs_dv, T, DV, True, PAD_DV)
    lse = load_lse2(lse2_ptr + first_row, offs_m, T, True)
    delta = tl.load(delta_ptr + first_row + offs_m, mask=offs_m < T, other=0.0)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dslope = tl.zeros([BLOCK_M], tl.float32)
    begin, full_begin, full_end, end = band_range(
        start_m, tl.minimum(start_m + BLOCK_M, T), S, band[0], band[1], FLAGS[0], FLAGS[1], BLOCK_N
    )
    if key_mask_ptr is not None:
        begin, full_begin, full_end = range_from(first, begin, full_begin, full_end, BLOCK_N)
    for phase in tl.static_range(3):
        if phase != 0 or FLAGS[0]:
            dq, dslope = _queries_loop(
                dq,
                dslope,
                q,
                dout,
                lse,
                delta,
                (q_ptr, k_ptr, v_ptr, dout_ptr),
                seed_ptr,
                (q_strides, k_strides, v_strides, dout_strides),
                offs_m,
                begin if phase == 0 else (full_begin if phase == 1 else full_end),
                full_begin if phase == 0 else (full_end if phase == 1 else end),
                first_row,
                term_ptrs,
                terms,
                term_strides,
                sizes,
                band,
                scalars,
                BLOCK_N if phase == 1 else BLOCK_MASKED,
                BLOCK_D,
                BLOCK_DV,
                PAD_D,
                PAD_DV,
                FLAGS,
                CHUNKS,
                PRECISION,
                SCORE_MOD,
                DSCORE_MOD,
                dslope_ptr is not None,
                phase != 1,
            )
    own = tl.program_id(1)
    store_rows(dq_ptr, dq_strides, offs_m, own * BLOCK_D + offs_d, T, D, dq * scalars[0])
    if dslope_ptr is not None:
        mask = (offs_m < T) & (own == 0)
        tl.store(dslope_ptr + first_row + offs_m, dslope, mask=mask)
