"""Attention forward: one pass over the keys with a running softmax.

out = softmax(score) v, lse = log sum exp score, score = cap(scale q . k) + bias - slope |distance|
    m' = max(m, max_j x_j),  l' = l 2^(m - m') + sum_j 2^(x_j - m'),  o' = o 2^(m - m') + 2^(x - m') v

B batch, H query heads, G query heads per key head, T queries, S keys, D and DV head dims.
Numerics: scores, probabilities' sums and outputs accumulate in fp32; probabilities are rounded to
v's dtype for the second product. A row that sees no key gives output 0 and lse -inf.

Source: Milakov & Gimelshein, "Online normalizer calculation for softmax", 2018; Dao et al.,
"FlashAttention", NeurIPS 2022, and its sequel of 2023.
"""

# ruff: noqa: ANN001, ANN201, ANN202

from __future__ import annotations

from trilith.kernels._runtime.language import tl, triton
from trilith.kernels.attention.tiles import (
    LN2,
    LOG2E,
    band_range,
    kept_by_dropout,
    load_rows,
    scores,
    store_rows,
    tile_of_program,
)


@triton.jit
def _forward_loop(
    acc,
    m,
    l,
    q,
    k_ptr,
    v_ptr,
    bias_ptr,
    key_mask_ptr,
    seed_ptr,
    k_strides,
    v_strides,
    bias_strides,
    key_mask_strides,
    offs_m,
    begin,
    end,
    row_offset,
    slope,
    T,
    S,
    D,
    DV,
    low,
    high,
    diagonal,
    scale,
    softcap,
    p_drop,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PAD_D: tl.constexpr,
    PAD_DV: tl.constexpr,
    HAS_LOW: tl.constexpr,
    HAS_HIGH: tl.constexpr,
    HAS_SLOPE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEGATIVE_SCALE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Take the keys [begin, end) into the running softmax of a tile of queries."""
    PLAIN: tl.constexpr = (
        not MASKED
        and not HAS_SLOPE
        and not HAS_SOFTCAP
        and not NEGATIVE_SCALE
        and bias_ptr is None
        and key_mask_ptr is None
    )
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    for start_n in range(begin, end, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, k_strides, offs_n, offs_d, S, D, MASKED, PAD_D)
        dots = tl.dot(q, tl.trans(k), input_precision="ieee")
        if PLAIN:
            m_new = tl.maximum(m, tl.max(dots, 1) * (scale * LOG2E))
            m_safe = m_new
            p = tl.exp2(dots * (scale * LOG2E) - m_safe[:, None])
        else:
            x, _ = scores(
                dots,
                offs_m[:, None],
                offs_n[None, :],
                bias_ptr,
                bias_strides,
                key_mask_ptr,
                key_mask_strides,
                slope,
                T,
                S,
                low,
                high,
                diagonal,
                scale,
                softcap,
                HAS_LOW,
                HAS_HIGH,
                HAS_SLOPE,
                HAS_SOFTCAP,
                MASKED,
            )
            m_new = tl.maximum(m, tl.max(x, 1))
            m_safe = tl.where(m_new == -float("inf"), 0.0, m_new)
            p = tl.exp2(x - m_safe[:, None])
        shrink = tl.exp2(m - m_safe)
        l = l * shrink + tl.sum(p, 1)
        m = m_new
        if seed_ptr is not None:
            kept = kept_by_dropout(seed_ptr, row_offset, offs_m, start_n, S, p_drop, BLOCK_N)
            p = tl.where(kept, p, 0.0)
        v = load_rows(v_ptr, v_strides, offs_n, offs_dv, S, DV, MASKED, PAD_DV)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, m, l


@triton.jit
def attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    key_mask_ptr,
    slopes_ptr,
    sinks_ptr,
    seed_ptr,
    out_ptr,
    lse_ptr,
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
    HAS_LOW: tl.constexpr,
    HAS_HIGH: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEGATIVE_SCALE: tl.constexpr,
):
    """One program owns the outputs [BLOCK_M, DV] of one head."""
    HAS_SLOPE: tl.constexpr = slopes_ptr is not None
    scale = tl.cast(scale, tl.float32)
    softcap = tl.cast(softcap, tl.float32)
    tile, bh = tile_of_program(tl.cdiv(T, BLOCK_M), BH, heads_together, HAS_HIGH)
    b = bh // H
    h = bh - b * H
    hkv = h // G
    q_ptr += b * q_strides[0] + h * q_strides[1]
    k_ptr += b * k_strides[0] + hkv * k_strides[1]
    v_ptr += b * v_strides[0] + hkv * v_strides[1]
    out_ptr += b * out_strides[0] + h * out_strides[1]
    if bias_ptr is not None:
        bias_ptr += b * bias_strides[0] + h * bias_strides[1]
    if key_mask_ptr is not None:
        key_mask_ptr += b * key_mask_strides[0]
    slope = 0.0
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + b * slopes_strides[0] + h * slopes_strides[1]).to(tl.float32)

    start_m = tile * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    q = load_rows(q_ptr, q_strides, offs_m, offs_d, T, D, True, PAD_D)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + h * sinks_stride).to(tl.float32)
        m = tl.zeros([BLOCK_M], tl.float32) + sink * LOG2E
        l += tl.where(sink == -float("inf"), 0.0, 1.0)

    begin, full_begin, full_end, end = band_range(
        start_m, tl.minimum(start_m + BLOCK_M, T), S, low, high, HAS_LOW, HAS_HIGH, BLOCK_N
    )
    for phase in tl.static_range(3):
        if phase != 0 or HAS_LOW:
            acc, m, l = _forward_loop(
                acc,
                m,
                l,
                q,
                k_ptr,
                v_ptr,
                bias_ptr,
                key_mask_ptr,
                seed_ptr,
                k_strides,
                v_strides,
                bias_strides,
                key_mask_strides,
                offs_m,
                begin if phase == 0 else (full_begin if phase == 1 else full_end),
                full_begin if phase == 0 else (full_end if phase == 1 else end),
                bh * T,
                slope,
                T,
                S,
                D,
                DV,
                low,
                high,
                diagonal,
                scale,
                softcap,
                p_drop,
                BLOCK_N,
                BLOCK_D,
                BLOCK_DV,
                PAD_D,
                PAD_DV,
                HAS_LOW,
                HAS_HIGH,
                HAS_SLOPE,
                HAS_SOFTCAP,
                NEGATIVE_SCALE,
                phase != 1,
            )

    safe = tl.where(l == 0.0, 1.0, l)
    out = acc * (keep_scale / safe)[:, None]
    offs_dv = tl.arange(0, BLOCK_DV)
    store_rows(out_ptr, out_strides, offs_m, offs_dv, T, DV, out)
    lse = tl.where(l == 0.0, -float("inf"), (m + tl.log2(safe)) * LN2)
    tl.store(lse_ptr + bh * T + offs_m, lse, mask=offs_m < T)
