"""The kernel of decoding: a few queries against a long cache, the keys shared out over programs.

B sequences, H query heads, G query heads per key head, T queries, D and DV head dims. The cache is
(N, L, Hkv, D): N = B rows of L positions, or N pages of L positions that a table assigns to the
sequences. The G * T queries that read one key head are the rows of one tile, so that each key is
loaded once for all of them.

A sequence's own length is split, not the cache's, so all programs work on short sequences too; how
many splits there are depends on shapes alone, so that a CUDA graph stays right as lengths grow.
"""

from __future__ import annotations

from trilith.kernels._runtime.functors import ACTIVATIONS
from trilith.kernels._runtime.language import tl, triton
from trilith.kernels.attention.tiles import LN2, LOG2E

_tanh = ACTIVATIONS["tanh"].f
_NOT_SPECIALIZED = ("H", "N", "capacity", "splits", "left")


@triton.jit
def _share_of(split, splits, length, T, left, HAS_WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """The keys [first, last) that a split takes of those that some query sees."""
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(length - T - left, 0) // BLOCK_N * BLOCK_N
    share = tl.cdiv(tl.cdiv(length - begin, BLOCK_N), splits) * BLOCK_N
    first = begin + split * share
    return first, tl.minimum(first + share, length)


@triton.jit
def _slots(table_ptr, table_strides, b, offs_n, length, N, L):
    """(page, position in it, whether it may be read) of a sequence's positions."""
    inside = offs_n < length
    if table_ptr is None:
        return b + offs_n.to(tl.int64) * 0, offs_n.to(tl.int64), inside
    else:
        entry = table_ptr + b * table_strides[0] + (offs_n // L).to(tl.int64) * table_strides[1]
        page = tl.load(entry, mask=inside, other=0).to(tl.int64)
        return page, (offs_n % L).to(tl.int64), inside & (page >= 0) & (page < N)


@triton.jit
def _scores(
    dots, position, offs_n, readable, slope, length, left, scale, softcap,
    HAS_WINDOW: tl.constexpr, HAS_SLOPE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Scores in base 2 of a tile; -inf where a key is not seen, NaN where its page is none."""
    if HAS_SOFTCAP:
        x = _tanh(dots * (scale / softcap)) * (softcap * LOG2E)
    else:
        x = dots * (scale * LOG2E)
    distance = position[:, None] - offs_n[None, :]
    if HAS_SLOPE:
        x -= (slope * LOG2E)[:, None] * tl.abs(distance).to(tl.float32)
    seen = (distance >= 0) & (offs_n < length)[None, :]
    if HAS_WINDOW:
        seen &= distance <= left
    x = tl.where(readable[None, :], x, float("nan"))
    return tl.where(seen, x, -float("inf"))


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def attention_decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    lengths_ptr,
    table_ptr,
    slopes_ptr,
    sinks_ptr,
    out_ptr,
    lse_ptr,
    q_strides,
    k_strides,
    v_strides,
    lengths_stride,
    table_strides,
    slopes_strides,
    sinks_stride,
    B,
    H,
    G,
    T,
    D,
    DV,
    N,
    L,
    capacity,
    splits,
    left,
    scale,
    softcap,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """One program owns one split's share of the outputs [BLOCK_M, DV] of one key head."""
    tiles = tl.cdiv(G * T, BLOCK_M)
    pid = tl.program_id(0)
    split = tl.program_id(1)
    b = (pid // (tiles * (H // G))).to(tl.int64)
    hkv = (pid // tiles % (H // G)).to(tl.int64)
    rows = pid % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = rows < G * T
    heads = hkv * G + (rows // T).to(tl.int64)
    queries = (rows % T).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    offs_dv = tl.arange(0, BLOCK_DV).to(tl.int64)
    scale = tl.cast(scale, tl.float32)
    softcap = tl.cast(softcap, tl.float32)

    length = tl.load(lengths_ptr + b * lengths_stride)
    length = tl.minimum(tl.maximum(length, 0), capacity).to(tl.int32)
    position = length - T + (rows % T)
    first, last = _share_of(split, splits, length, T, left, HAS_WINDOW, BLOCK_N)

    q_ptrs = q_ptr + b * q_strides[0] + heads[:, None] * q_strides[1]
    q_ptrs += queries[:, None] * q_strides[2] + offs_d[None, :] * q_strides[3]
    q = tl.load(q_ptrs, mask=mask_m[:, None] & (offs_d < D)[None, :], other=0.0)
    slope = tl.zeros([BLOCK_M], tl.float32)
    if slopes_ptr is not None:
        at = slopes_ptr + b * slopes_strides[0] + heads * slopes_strides[1]
        slope = tl.load(at, mask=mask_m, other=0.0).to(tl.float32)
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + heads * sinks_stride, mask=mask_m, other=0.0).to(tl.float32)
        m = tl.where(split == 0, sink * LOG2E, m)
        total = tl.where(m == -float("inf"), 0.0, 1.0)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    k_ptr += hkv * k_strides[2]
    v_ptr += hkv * v_strides[2]
    for start_n in range(first, last, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        page, slot, readable = _slots(table_ptr, table_strides, b, offs_n, length, N, L)
        k_ptrs = k_ptr + (page * k_strides[0] + slot * k_strides[1])[:, None]
        k_ptrs += offs_d[None, :] * k_strides[3]
        k = tl.load(k_ptrs, mask=readable[:, None] & (offs_d < D)[None, :], other=0.0)
        v_ptrs = v_ptr + (page * v_strides[0] + slot * v_strides[1])[:, None]
        v_ptrs += offs_dv[None, :] * v_strides[3]
        v = tl.load(v_ptrs, mask=readable[:, None] & (offs_dv < DV)[None, :], other=0.0)
        dots = tl.dot(q, tl.trans(k), input_precision="ieee")
        x = _scores(
            dots, position, offs_n, readable, slope, length, left, scale, softcap,
            HAS_WINDOW, slopes_ptr is not None, HAS_SOFTCAP,
        )  # fmt: skip
        m_new = tl.maximum(m, tl.max(x, 1))
        safe = tl.where(m_new == -float("inf"), 0.0, m_new)
        p = tl.exp2(x - safe[:, None])
        shrink = tl.exp2(m - safe)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        m = m_new

    safe_total = tl.where(total == 0.0, 1.0, total)
    at = ((split * B + b) * H + heads) * T + queries
    lse = tl.where(total == 0.0, -float("inf"), (m + tl.log2(safe_total)) * LN2)
    tl.store(lse_ptr + at, lse, mask=mask_m)
    # a split without keys says so by its lse, and its output is not read
    mask = (mask_m & ((first < last) | (split == 0)))[:, None] & (offs_dv < DV)[None, :]
    out = (acc / safe_total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at[:, None] * DV + offs_dv[None, :], out, mask=mask)
