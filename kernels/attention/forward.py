"""Attention forward: one pass over the keys with a running softmax.

    score = cap(scale q . k) + bias - slope |distance|,  out = softmax(score) v,  lse = log sum exp

and per tile of scores x in base 2, with the running maximum m, total l and output o

    m' = max(m, max x),  l' = l 2^(m - m') + sum 2^(x - m'),  o' = o 2^(m - m') + 2^(x - m') v

B batch, H query heads, G query heads per key head, T queries, S keys, D and DV head dims. Head
dims too wide for a tile come in CHUNKS: a program makes its scores of all of q's and k's, and owns
one of the output's.
Numerics: scores, probabilities' sums and outputs accumulate in fp32; probabilities are rounded to
v's dtype for the second product. A row that sees no key gives output 0 and lse -inf.
For backward lse is kept in base 2 as well, where a dominating score gives a probability of exactly
1, and as +inf for rows that saw no key, where every probability is then 0.

Source: Milakov & Gimelshein, "Online normalizer calculation for softmax", 2018; Dao et al.,
"FlashAttention", NeurIPS 2022, and its sequel of 2023.
"""

from __future__ import annotations

from trilith.kernels._runtime.language import tl, triton
from trilith.kernels.attention.tiles import (
    LN2,
    LOG2E,
    NOT_SPECIALIZED,
    add_products,
    band_of,
    band_range,
    bias_extent,
    head_terms,
    in_base_2,
    kept_by_dropout,
    kept_range,
    load_rows,
    range_from,
    scores,
    sequence_of_tile,
    store_rows,
    tile_count,
    tile_of_program,
)


@triton.jit
def _forward_loop(
    acc,
    m,
    total,
    q,
    q_ptr,
    k_ptr,
    v_ptr,
    seed_ptr,
    q_strides,
    k_strides,
    v_strides,
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
    NEGATIVE_SCALE: tl.constexpr,
    CHUNKS: tl.constexpr,
    PRECISION: tl.constexpr,
    SCORE_MOD: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Take the keys [begin, end) into the running softmax of a tile of queries."""
    PLAIN: tl.constexpr = (
        not MASKED
        and not NEGATIVE_SCALE
        and not FLAGS[2]
        and not FLAGS[3]
        and term_ptrs[0] is None
        and term_ptrs[1] is None
        and SCORE_MOD is None
    )
    EXACT: tl.constexpr = q.dtype == tl.float32 and PRECISION == "ieee"
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    T, S, D, DV, mask_cols, bias_rows, bias_cols = sizes
    for start_n in range(begin, end, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, k_strides, offs_n, offs_d, S, D, MASKED, PAD_D)
        dots = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        dots = add_products(
            dots,
            q_ptr,
            q_strides,
            offs_m,
            T,
            k_ptr,
            k_strides,
            offs_n,
            S,
            D,
            BLOCK_D,
            CHUNKS[0],
            PAD_D,
            PRECISION,
            MASKED,
        )
        if PLAIN:
            m_new = tl.maximum(m, tl.max(dots, 1) * (scalars[0] * LOG2E))
            m_safe = m_new
            p = tl.exp2(in_base_2(dots, scalars[0], scalars[1], EXACT) - m_safe[:, None])
        else:
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
                None,
                MASKED,
                EXACT,
            )
            m_new = tl.maximum(m, tl.max(x, 1))
            m_safe = tl.where(m_new == -float("inf"), 0.0, m_new)
            p = tl.exp2(x - m_safe[:, None])
        shrink = tl.exp2(m - m_safe)
        total = total * shrink + tl.sum(p, 1)
        m = m_new
        if seed_ptr is not None:
            kept = kept_by_dropout(
                seed_ptr, row_offset, offs_m, start_n, mask_cols, scalars[2], BLOCK_N
            )
            p = tl.where(kept, p, 0.0)
        v = load_rows(v_ptr, v_strides, offs_n, offs_dv, S, DV, MASKED, PAD_DV)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, m, total


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    key_mask_ptr,
    slopes_ptr,
    sinks_ptr,
    seed_ptr,
    cu_q_ptr,
    cu_k_ptr,
    out_ptr,
    lse_ptr,
    lse2_ptr,
    q_strides,
    k_strides,
    v_strides,
    bias_strides,
    key_mask_strides,
    slopes_strides,
    sinks_stride,
    out_strides,
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
    NEGATIVE_SCALE: tl.constexpr,
    CHUNKS: tl.constexpr = (1, 1),
    PRECISION: tl.constexpr = "ieee",
    SCORE_MOD: tl.constexpr = None,
):
    """One program owns the outputs [BLOCK_M, BLOCK_DV] of one head, DV split in CHUNKS[1]."""
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
    owns_lse = True
    if CHUNKS[1] > 1:
        own = tl.program_id(1) * BLOCK_DV
        owns_lse = own == 0
        DV -= own
        v_ptr += own.to(tl.int64) * v_strides[3]
        out_ptr += own.to(tl.int64) * out_strides[3]
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
    out_ptr += b * out_strides[0] + h * out_strides[1] + first_q * out_strides[2]
    terms = head_terms(term_ptrs, term_strides, sequence, h)

    start_m = tile * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    q = load_rows(q_ptr, q_strides, offs_m, offs_d, T, D, True, PAD_D)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + h * sinks_stride).to(tl.float32)
        if cu_q_ptr is not None:
            sink = tl.where(first_q < tl.load(cu_q_ptr + sequences), sink, -float("inf"))
        m = tl.zeros([BLOCK_M], tl.float32) + sink * LOG2E
        total += tl.where(sink == -float("inf"), 0.0, 1.0)

    begin, full_begin, full_end, end = band_range(
        start_m, tl.minimum(start_m + BLOCK_M, T), S, band[0], band[1], FLAGS[0], FLAGS[1], BLOCK_N
    )
    if key_mask_ptr is not None:
        begin, full_begin, full_end = range_from(first, begin, full_begin, full_end, BLOCK_N)
    for phase in tl.static_range(3):
        if phase != 0 or FLAGS[0]:
            acc, m, total = _forward_loop(
                acc,
                m,
                total,
                q,
                q_ptr,
                k_ptr,
                v_ptr,
                seed_ptr,
                q_strides,
                k_strides,
                v_strides,
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
                NEGATIVE_SCALE,
                CHUNKS,
                PRECISION,
                SCORE_MOD,
                phase != 1,
            )

    safe = tl.where(total == 0.0, 1.0, total)
    out = acc * (scalars[3] / safe)[:, None]
    offs_dv = tl.arange(0, BLOCK_DV)
    store_rows(out_ptr, out_strides, offs_m, offs_dv, T, DV, out)
    lse2 = m + tl.log2(safe)
    rows = first_row + offs_m
    mask = (offs_m < T) & owns_lse
    tl.store(lse_ptr + rows, tl.where(total == 0.0, -float("inf"), lse2 * LN2), mask=mask)
    tl.store(lse2_ptr + rows, tl.where(total == 0.0, float("inf"), lse2), mask=mask)
