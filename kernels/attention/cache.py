"""Appending to a cache of keys and values, in place: `trilith::cache_append`.

The cache is (N, L, Hkv, D) as in decoding: rows of L positions, or pages that a table assigns.
Token t of sequence b goes to position lengths[b] + t. Nothing is stored of tokens from counts[b]
on, past the sequence's room, or in a page that does not exist.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trilith.kernels._runtime.language import tl, triton
from trilith.kernels._runtime.launch import launch
from trilith.kernels._runtime.sizes import cdiv, next_power_of_2
from trilith.kernels.attention.decode_reference import host_lengths
from trilith.plugins.mutation import MutatingOp

_MOST_ELEMENTS = 1024


@triton.jit
def _copied(cache_ptr, new_ptr, cache_at, new_at, cache_strides, new_strides, h, d, mask):
    at = new_ptr + new_at + h * new_strides[1] + d * new_strides[3]
    to = cache_ptr + cache_at + h * cache_strides[2] + d * cache_strides[3]
    tl.store(to, tl.load(at, mask=mask).to(cache_ptr.dtype.element_ty), mask=mask)


@triton.jit
def cache_append_kernel(
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    lengths_ptr,
    counts_ptr,
    table_ptr,
    k_strides,
    v_strides,
    k_cache_strides,
    v_cache_strides,
    table_strides,
    T,
    HKV,
    D,
    DV,
    N,
    L,
    capacity,
    BLOCK: tl.constexpr,
):
    """One program owns BLOCK elements of the heads of one token."""
    b = tl.program_id(0).to(tl.int64) // T
    t = tl.program_id(0).to(tl.int64) % T
    position = tl.load(lengths_ptr + b).to(tl.int64) + t
    stored = (position >= 0) & (position < capacity)
    if counts_ptr is not None:
        stored &= t < tl.load(counts_ptr + b)
    page, slot = b, position
    if table_ptr is not None:
        entry = table_ptr + b * table_strides[0] + position // L * table_strides[1]
        page = tl.load(entry, mask=stored, other=0).to(tl.int64)
        slot = position % L
        stored &= (page >= 0) & (page < N)
    offs = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    k_at = page * k_cache_strides[0] + slot * k_cache_strides[1]
    v_at = page * v_cache_strides[0] + slot * v_cache_strides[1]
    _copied(
        k_cache_ptr, k_ptr, k_at, b * k_strides[0] + t * k_strides[2], k_cache_strides, k_strides,
        offs // D, offs % D, stored & (offs < HKV * D),
    )  # fmt: skip
    _copied(
        v_cache_ptr, v_ptr, v_at, b * v_strides[0] + t * v_strides[2], v_cache_strides, v_strides,
        offs // DV, offs % DV, stored & (offs < HKV * DV),
    )  # fmt: skip


def _append(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    counts: Tensor | None,
    table: Tensor | None,
) -> None:
    (B, Hkv, T, D), (N, L, _, DV) = k.shape, v_cache.shape
    elements = Hkv * max(D, DV)
    block = min(_MOST_ELEMENTS, next_power_of_2(elements))
    launch(
        cache_append_kernel,
        (B * T, cdiv(elements, block)),
        *(k, v, k_cache, v_cache, lengths.contiguous()),
        *(None if counts is None else counts.contiguous(), table),
        *(k.stride(), v.stride(), k_cache.stride(), v_cache.stride()),
        (0, 0) if table is None else table.stride(),
        *(T, Hkv, D, DV, N, L, L if table is None else L * table.shape[1]),
        BLOCK=block,
        num_warps=4,
    )


def _append_reference(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    counts: Tensor | None,
    table: Tensor | None,
) -> None:
    T, (N, L) = k.shape[2], k_cache.shape[:2]
    starts = set(host_lengths(lengths) or ())
    if table is None and counts is None and len(starts) == 1 and 0 <= min(starts) <= L - T:
        rows = slice(min(starts), min(starts) + T)
        k_cache[:, rows], v_cache[:, rows] = k.transpose(1, 2), v.transpose(1, 2)
        return
    t = torch.arange(T, device=k.device)
    position = lengths.long()[:, None] + t
    stored = (position >= 0) & (position < (L if table is None else L * table.shape[1]))
    if counts is not None:
        stored &= t < counts[:, None]
    page = torch.arange(len(lengths), device=k.device)[:, None].expand_as(position)
    if table is not None:
        page = table.long().gather(1, (position // L).clamp(0, table.shape[1] - 1))
        stored &= (page >= 0) & (page < N)
    b, t = stored.nonzero(as_tuple=True)
    at = (page[b, t], position[b, t] % L if table is not None else position[b, t])
    k_cache[at] = k[b, :, t].to(k_cache.dtype)
    v_cache[at] = v[b, :, t].to(v_cache.dtype)


# k_cache, v_cache (N, L, Hkv, D), k, v (B, Hkv, T, D), lengths (B,), counts (B,), table (B, pages)
CACHE_APPEND = MutatingOp(
    "trilith::cache_append",
    launcher=_append,
    reference=_append_reference,
    mutates=("k_cache", "v_cache"),
)
