"""Attention backward: probabilities are made again from lse, each gradient by the one who owns it.

    p = 2^(x - lse),  dp = do v^T,  ds = p (dp - delta),  delta = sum(do * out) - dlse
    dv = p^T do,  dk = scale ds^T q,  dq = scale ds k,  dbias = sum of ds over broadcast dims

One kernel owns tiles of keys and goes through the queries of every head that shares them, for dk,
dv or both (two launches where both sums leave no registers); one owns tiles of queries and goes
through the keys, one owns tiles of the bias: no atomics, so the result does not depend on the order
of programs. Under dropout p in dv and dp in ds carry the mask.

Letters and source as in forward.py. Numerics: fp32, but p and ds are rounded to the inputs' dtype
before their products.
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
    load_lse2,
    load_rows,
    scores,
    sequence_of_tile,
    store_rows,
    tile_count,
    tile_of_program,
)


@triton.jit
def attention_delta_kernel(
    out_ptr,
    dout_ptr,
    dlse2_ptr,
    delta_ptr,
    out_strides,
    dout_strides,
    dlse_strides,
    H,
    T,
    DV,
    BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """One program owns delta [BLOCK_M] of one head."""
    tiles = tl.cdiv(T, BLOCK_M)
    pid = tl.program_id(0)
    bh = (pid // tiles).to(tl.int64)
    offs_m = (pid % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_dv = tl.arange(0, BLOCK_DV)
    b = bh // H
    h = bh - b * H
    out_ptr += b * out_strides[0] + h * out_strides[1]
    dout_ptr += b * dout_strides[0] + h * dout_strides[1]
    out = load_rows(out_ptr, out_strides, offs_m, offs_dv, T, DV, True, True)
    dout = load_rows(dout_ptr, dout_strides, offs_m, offs_dv, T, DV, True, True)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    if dlse2_ptr is not None:
        dlse2_ptr += b * dlse_strides[0] + h * dlse_strides[1]
        dlse2_ptrs = dlse2_ptr + offs_m.to(tl.int64) * dlse_strides[2]
        delta -= tl.load(dlse2_ptrs, mask=offs_m < T, other=0.0)
    tl.store(delta_ptr + bh * T + offs_m, delta, mask=offs_m < T)


@triton.jit
def _keys_loop(
    dk,
    dv,
    k,
    v,
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse2_ptr,
    delta_ptr,
    seed_ptr,
    term_ptrs,
    q_strides,
    k_strides,
    v_strides,
    dout_strides,
    term_strides,
    start_n,
    begin,
    end,
    b,
    first_h,
    H,
    G,
    head_rows,
    first_q,
    sequence,
    sizes,
    band,
    scalars,
    BLOCK_M: tl.constexpr,
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
    WANTS_DK: tl.constexpr,
    WANTS_DV: tl.constexpr,
):
    """Add to dk and dv of a tile of keys what the queries [begin, end) of its heads give.

    One loop through the tiles of all G heads, so that loads run ahead from head to head. What is
    not wanted is returned as it came.
    """
    offs_n = start_n + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    own = tl.program_id(1)
    T, S, D, DV, mask_cols, bias_rows, bias_cols = sizes
    tiles = tl.cdiv(end - begin, BLOCK_M)
    for i in range(tiles * G):
        g = i // tiles
        h = first_h + g
        first_row = (b * H + h) * head_rows
        offs_m = begin + (i - g * tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
        terms = head_terms(term_ptrs, term_strides, sequence, h)
        head_q_ptr = q_ptr + b * q_strides[0] + h * q_strides[1]
        head_dout_ptr = dout_ptr + b * dout_strides[0] + h * dout_strides[1]
        q = load_rows(head_q_ptr, q_strides, offs_m, offs_d, T, D, MASKED, PAD_D)
        lse = load_lse2(lse2_ptr + first_row, offs_m, T, MASKED)
        dots = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        dots = add_products(
            dots,
            k_ptr,
            k_strides,
            offs_n,
            S,
            head_q_ptr,
            q_strides,
            offs_m,
            T,
            D,
            BLOCK_D,
            CHUNKS[0],
            PAD_D,
            PRECISION,
            MASKED,
        )
        x, slope_of_cap = scores(
            dots,
            offs_m[None, :],
            offs_n[:, None],
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
        p = tl.exp2(x - lse[None, :])
        dout = load_rows(head_dout_ptr, dout_strides, offs_m, offs_dv, T, DV, MASKED, PAD_DV)
        if WANTS_DK:
            dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
            dp = add_products(
                dp,
                v_ptr,
                v_strides,
                offs_n,
                S,
                head_dout_ptr,
                dout_strides,
                offs_m,
                T,
                DV,
                BLOCK_DV,
                CHUNKS[1],
                PAD_DV,
                PRECISION,
                MASKED,
            )
        if seed_ptr is not None:
            kept = kept_by_dropout(
                seed_ptr, first_row + first_q, offs_m, start_n, mask_cols, scalars[2], BLOCK_N
            )
            kept = tl.trans(kept)
            if WANTS_DK:
                dp = tl.where(kept, dp * scalars[3], 0.0)
            p_kept = tl.where(kept, p * scalars[3], 0.0)
        else:
            p_kept = p
        if CHUNKS[0] * CHUNKS[1] > 1:
            UNLIKE: tl.constexpr = CHUNKS[0] != CHUNKS[1]
            own_d, own_dv = own * BLOCK_D + offs_d, own * BLOCK_DV + offs_dv
            q = load_rows(head_q_ptr, q_strides, offs_m, own_d, T, D, MASKED, PAD_D or UNLIKE)
            dout = load_rows(
                head_dout_ptr, dout_strides, offs_m, own_dv, T, DV, MASKED, PAD_DV or UNLIKE
            )
        if WANTS_DV:
            dv = tl.dot(p_kept.to(dout.dtype), dout, dv, input_precision=PRECISION)
        if WANTS_DK:
            if MASKED:
                delta = tl.load(delta_ptr + first_row + offs_m, mask=offs_m < T, other=0.0)
            else:
                delta = tl.load(delta_ptr + first_row + offs_m)
            ds = p * (dp - delta[None, :]) * slope_of_cap
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def attention_bwd_dkdv_kernel(
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
    dk_ptr,
    dv_ptr,
    q_strides,
    k_strides,
    v_strides,
    bias_strides,
    key_mask_strides,
    slopes_strides,
    dout_strides,
    dk_strides,
    dv_strides,
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
    """One program owns dk [BLOCK_N, BLOCK_D] and dv [BLOCK_N, BLOCK_DV] of one key head.

    One of the two may be None.
    """
    scalars = (
        tl.cast(scale, tl.float32),
        tl.cast(softcap, tl.float32),
        tl.cast(p_drop, tl.float32),
        tl.cast(keep_scale, tl.float32),
    )
    term_ptrs = (bias_ptr, key_mask_ptr, slopes_ptr)
    term_strides = (bias_strides, key_mask_strides, slopes_strides)
    HKV = H // G
    tiles = tile_count(S, cu_k_ptr, sequences, BLOCK_N)
    tile, bhkv = tile_of_program(tiles, BH // G, heads_together, False)
    b = bhkv // HKV
    hkv = bhkv - b * HKV
    head_rows, mask_cols = T, S
    tile, sequence, first_k, S, first_q, T = sequence_of_tile(
        tile, b, cu_k_ptr, cu_q_ptr, S, T, sequences, BLOCK_N
    )
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
    q_ptr += first_q * q_strides[2]
    dout_ptr += first_q * dout_strides[2]
    lse2_ptr += first_q
    delta_ptr += first_q
    start_n = tile * BLOCK_N
    offs_n = start_n + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    k_ptr += b * k_strides[0] + hkv * k_strides[1] + first_k * k_strides[2]
    v_ptr += b * v_strides[0] + hkv * v_strides[1] + first_k * v_strides[2]
    k = load_rows(k_ptr, k_strides, offs_n, offs_d, S, D, True, PAD_D)
    v = load_rows(v_ptr, v_strides, offs_n, offs_dv, S, DV, True, PAD_DV)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    begin, full_begin, full_end, end = band_range(
        start_n,
        tl.minimum(start_n + BLOCK_N, S),
        T,
        -band[1],
        -band[0],
        FLAGS[1],
        FLAGS[0],
        BLOCK_M,
    )
    if key_mask_ptr is not None:
        key_mask_ptrs = key_mask_ptr + b * key_mask_strides[0]
        key_mask_ptrs += offs_n.to(tl.int64) * key_mask_strides[1]
        kept = tl.load(key_mask_ptrs, mask=offs_n < S, other=0).to(tl.int32)
        is_kept = tl.max(kept, 0) > 0
        end = tl.where(is_kept, end, begin)
        full_begin = tl.minimum(full_begin, end)
        full_end = tl.minimum(full_end, end)
    for phase in tl.static_range(3):
        if phase != 0 or FLAGS[1]:
            dk, dv = _keys_loop(
                dk,
                dv,
                k,
                v,
                q_ptr,
                k_ptr,
                v_ptr,
                dout_ptr,
                lse2_ptr,
                delta_ptr,
                seed_ptr,
                term_ptrs,
                q_strides,
                k_strides,
                v_strides,
                dout_strides,
                term_strides,
                start_n,
                begin if phase == 0 else (full_begin if phase == 1 else full_end),
                full_begin if phase == 0 else (full_end if phase == 1 else end),
                b,
                hkv * G,
                H,
                G,
                head_rows,
                first_q,
                sequence,
                sizes,
                band,
                scalars,
                BLOCK_M if phase == 1 else BLOCK_MASKED,
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
                phase != 1,
                dk_ptr is not None,
                dv_ptr is not None,
            )
    own = tl.program_id(1)
    if dk_ptr is not None:
        dk_ptr += b * dk_strides[0] + hkv * dk_strides[1] + first_k * dk_strides[2]
        store_rows(dk_ptr, dk_strides, offs_n, own * BLOCK_D + offs_d, S, D, dk * scalars[0])
    if dv_ptr is not None:
        dv_ptr += b * dv_strides[0] + hkv * dv_strides[1] + first_k * dv_strides[2]
        store_rows(dv_ptr, dv_strides, offs_n, own * BLOCK_DV + offs_dv, S, DV, dv)
