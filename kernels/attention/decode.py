"""Decoding: attention of the newest queries over a cache of keys and values.

    pos(t) = length - T + t;  query t sees the keys n <= pos(t), and n >= pos(t) - left in a window
    score = cap(scale q . k_n) - slope (pos(t) - n),  out = softmax(score) v

Keys are split over programs, each with a softmax of its own in fp32, and merged by the kernel of
`merge_attention`. Numerics as `attention`, and the parts are not rounded before they are merged.

Source: Dao et al., "Flash-Decoding for long-context inference", 2023; Kwon et al., "Efficient
memory management for large language model serving with PagedAttention", SOSP 2023.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from trilith.kernels._runtime.checks import (
    require,
    require_floating_if_given,
    require_same_device,
    require_shape,
)
from trilith.kernels._runtime.device import multiprocessors
from trilith.kernels._runtime.launch import launch
from trilith.kernels._runtime.plan import planned
from trilith.kernels._runtime.sizes import cdiv, next_power_of_2
from trilith.kernels.attention import sharding
from trilith.kernels.attention.arguments import (
    known_softcap,
    require_axes,
    require_groups,
    require_head_dim,
    require_indices,
    require_one_dtype,
    sides,
    slopes_by_head,
)
from trilith.kernels.attention.config import tiles_for
from trilith.kernels.attention.decode_kernel import attention_decode_kernel
from trilith.kernels.attention.decode_reference import (
    decode_reference,
    host_lengths,
    of_full_rows,
    until,
)
from trilith.kernels.attention.merge import merge_partials
from trilith.plugins import Cost, Op, OpSpec, Sample

_NAME = "decode_attention"
_PROGRAMS_PER_MULTIPROCESSOR = 2
_STEPS_PER_SPLIT, _MOST_SPLITS = 2, 128


def _tiles(q: Tensor, head_dim: int, rows: int) -> dict[str, int]:
    tiles = tiles_for("decode", q, "ieee", head_dim, False)
    return {
        "BLOCK_M": min(max(16, next_power_of_2(rows)), tiles.block_m),
        "BLOCK_N": tiles.block_masked,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


def _splits(device: torch.device, programs: int, capacity: int, block_n: int) -> int:
    """How many programs share a sequence's keys: of shapes and device alone, never of lengths."""
    wanted = cdiv(_PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(device), programs)
    return max(1, min(wanted, cdiv(capacity, _STEPS_PER_SPLIT * block_n), _MOST_SPLITS))


def _decode_out(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    shape = q.shape[:3]
    return q.new_empty((*shape, v.shape[3])), q.new_empty(shape, dtype=torch.float32)


@planned
def _decode_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    table: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    left: int,
) -> tuple[Tensor, Tensor]:
    require_one_dtype(_NAME, q=q, k_cache=k, v_cache=v)
    (B, H, T, D), (N, L, Hkv, DV) = q.shape, v.shape
    capacity = L if table is None else L * table.shape[1]
    block_d, block_dv = _padded(D), _padded(DV)
    blocks = {"BLOCK_D": block_d, "BLOCK_DV": block_dv}
    tiles = _tiles(q, max(block_d, block_dv), H // Hkv * T)
    programs = B * Hkv * cdiv(H // Hkv * T, tiles["BLOCK_M"])
    splits = _splits(q.device, programs, capacity, tiles["BLOCK_N"])
    out, lse = _decode_out(q, v)
    parts, lses = out, lse
    if splits > 1:
        parts = q.new_empty((splits, *out.shape), dtype=torch.float32)
        lses = q.new_empty((splits, *lse.shape), dtype=torch.float32)
    launch(
        attention_decode_kernel,
        (programs, splits),
        *(q, k, v, lengths, table, slopes, sinks, parts, lses),
        *(q.stride(), k.stride(), v.stride(), lengths.stride(0)),
        (0, 0) if table is None else table.stride(),
        (0, 0) if slopes is None else slopes.expand(B, H).stride(),
        0 if sinks is None else sinks.stride(0),
        *(B, H, H // Hkv, T, D, DV, N, L, capacity, splits, max(left, 0), scale, softcap),
        HAS_WINDOW=left >= 0,
        HAS_SOFTCAP=softcap > 0,
        **blocks,
        **tiles,
    )
    if splits > 1:
        merge_partials(parts, lses, out, lse)
    return out, lse


def _padded(dim: int) -> int:
    return max(16, next_power_of_2(dim))


def _cost(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    table: Tensor | None,
) -> Cost:
    """For full caches."""
    (B, H, T, D), (N, L, Hkv, DV) = q.shape, v.shape
    keys = N * L if table is None else table.numel() * L
    indices = sum(t.numel() * t.element_size() for t in (lengths, table) if t is not None)
    moved = q.numel() + B * H * T * DV + keys * Hkv * (D + DV)
    return Cost(
        forward_bytes=moved * q.element_size() + 4 * B * H * T + indices,
        backward_bytes=0,
        forward_flops=2 * H * T * keys * (D + DV),
    )


def _samples(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    def sample(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], **given: Any) -> Sample:
        defaults: dict[str, Any] = dict.fromkeys(("table", "slopes", "sinks"))
        defaults |= {"scale": 0.3, "softcap": 0.0, "left": -1}
        counts = torch.tensor(lengths, dtype=torch.int32, device=device)
        return Sample(q, k, v, counts, **(defaults | given))

    table = torch.tensor([[4, 0, 2], [1, 3, -7]], dtype=torch.int32, device=device)
    yield sample(
        *(randn(2, 2, 3, 8), randn(5, 16, 1, 8), randn(5, 16, 1, 12), [41, 0]),
        table=table,
        slopes=randn(2, 2).abs(),
        sinks=randn(2),
    )
    yield sample(randn(2, 4, 1, 16), randn(2, 70, 2, 16), randn(2, 70, 2, 16), [70, 33])
    yield sample(
        *(randn(2, 6, 2, 16), randn(2, 40, 2, 16), randn(2, 40, 2, 16), [1, 39]),
        left=9,
        softcap=2.0,
        slopes=randn(2, 6).abs(),
    )


DECODE_ATTENTION = Op(
    OpSpec(
        name="trilith::decode_attention",
        forward=_decode_fwd,
        backward=None,
        reference=decode_reference,
        samples=_samples,
        outputs=2,
        save_outputs=False,
        fake=_decode_out,
        cost=_cost,
        sharding=sharding.cached,
        autocast="low",
    )
)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    *,
    block_table: Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention of each sequence's last T tokens over its cache, for inference.

    The T queries stand at the end of their sequence: query t is at position length - T + t, and
    sees the keys up to its own, which are in the cache already.

    Args:
        q: (B, H, T, D), T small: 1, or a few where tokens are guessed ahead. D from 1 to 512.
        k_cache: (B, Hkv, S, D), S the room for keys, q's dtype; any strides, so that a cache
            (B, S, Hkv, D) is given as its transpose(1, 2). With a block_table
            (blocks, block_size, Hkv, D). Hkv divides H.
        v_cache: the same with Dv in place of D.
        cache_lengths: (B,) int32 or int64, how many keys each sequence has, these T included. It
            is read on the device. More than there is room for counts as all of it.
        block_table: (B, most blocks) int32 or int64: position n of sequence b lies in block
            block_table[b, n // block_size]. Entries past a sequence's length are not read. A block
            that does not exist makes the output NaN; nothing outside the cache is read.
        window: (left, right), how many keys before its own a query sees; None for any number.
            `right` has no effect.
        softcap, alibi_slopes, sinks, scale, return_lse: as `attention`.

    Returns:
        (B, H, T, Dv) in q's dtype; with `return_lse` also (B, H, T) in fp32, natural logarithm. A
        query that sees no key, as in a sequence of length 0, has output 0 and lse -inf.

    Raises:
        NotImplementedError: a gradient is wanted; a head dim above 512 where kernels run.
        TypeError: a dtype that does not fit.
        ValueError: shapes that do not fit.

    Numerics: sums in fp32; probabilities rounded to v's dtype; deterministic. On a CPU lengths are
        looked at, and the room beyond the longest costs nothing. How many programs
        share a sequence's keys depends on shapes and device, never on lengths, so a captured CUDA
        graph is right for all lengths.

    Source: Dao et al., "Flash-Decoding", 2023; Kwon et al., "PagedAttention", SOSP 2023.

    Example:
        >>> q, k, v = torch.randn(2, 8, 1, 64), *torch.randn(2, 2, 2, 512, 64)
        >>> decode_attention(q, k, v, torch.tensor([512, 37])).shape
        torch.Size([2, 8, 1, 64])
    """
    _check(q, k_cache, v_cache, cache_lengths, block_table, sinks)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k_cache, v_cache)):
        raise NotImplementedError(
            f"{_NAME}: there is no gradient; call it under torch.no_grad(), or use attention"
        )
    cap = known_softcap(_NAME, softcap)
    left, _ = sides(_NAME, window)
    slopes = slopes_by_head(_NAME, q, alibi_slopes, *q.shape[:2])
    if block_table is None:
        k_cache, v_cache = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    scale = 1 / math.sqrt(max(1, q.shape[3])) if scale is None else scale
    rest = (scale, cap, left)
    tensors = (q, k_cache, v_cache, cache_lengths, block_table, slopes, sinks)
    provider = DECODE_ATTENTION.choose(*tensors, *rest)
    if provider is not None:
        require_head_dim(_NAME, q, v_cache)
    elif (lengths := host_lengths(cache_lengths)) is not None:
        k, v, table = until(max(lengths, default=0), k_cache, v_cache, block_table)
        same = table is None and set(lengths) == {k.shape[1]} and k.shape[1] >= q.shape[2]
        if same and slopes is sinks is None and rest[1:] == (0.0, -1) and not return_lse:
            return of_full_rows(q, k.transpose(1, 2), v.transpose(1, 2), scale)
        tensors = (q, k, v, cache_lengths, table, slopes, sinks)
    out, lse = DECODE_ATTENTION.run(provider, *tensors, *rest)
    return (out, lse) if return_lse else out


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    table: Tensor | None,
    sinks: Tensor | None,
) -> None:
    cache = ("batch", "heads", "room") if table is None else ("blocks", "block_size", "heads")
    require_axes(_NAME, "batch", "heads", "length", "dim", q=q)
    require_axes(_NAME, *cache, "dim", k_cache=k, v_cache=v)
    require_one_dtype(_NAME, q=q, k_cache=k, v_cache=v)
    require_indices(_NAME, cache_lengths=lengths)
    if table is not None:
        require_indices(_NAME, block_table=table)
    require_floating_if_given(_NAME, sinks=sinks)
    rest = {"cache_lengths": lengths, "block_table": table, "sinks": sinks}
    require_same_device(_NAME, q, k_cache=k, **rest)
    B, H, _, D = q.shape
    require_shape(_NAME, "cache_lengths", lengths, (B,))
    Hkv = k.shape[1 if table is None else 2]
    if table is None:
        require_shape(_NAME, "k_cache", k, (B, Hkv, k.shape[2], D))
    else:
        require_shape(_NAME, "k_cache", k, (*k.shape[:3], D))
        fits = table.ndim == 2 and table.shape[0] == B
        require(fits, _NAME, "block_table", f"be (B = {B}, blocks)", tuple(table.shape))
        require(k.shape[0] > 0, _NAME, "k_cache", "have at least one block", 0)
    require_shape(_NAME, "v_cache", v, (*k.shape[:3], v.shape[3]))
    require_groups(_NAME, H, Hkv)
    require_shape(_NAME, "sinks", sinks, (H,))
