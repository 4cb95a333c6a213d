"""Decoding in plain PyTorch: what the kernel means, and how it is done on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def decode_reference(
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
    """(softmax(scores) v over the keys each query sees, log-sum-exp of the scores)."""
    (B, H, T, D), Hkv = q.shape, k.shape[2]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    missing = None
    if table is not None:
        missing = ((table < 0) | (table >= k.shape[0])).repeat_interleave(k.shape[1], 1)
        pages = table.long().clamp(0, max(0, k.shape[0] - 1))
        k, v = k[pages].flatten(1, 2), v[pages].flatten(1, 2)
    S = k.shape[1]
    lengths = lengths.long().clamp(0, S)
    keys = torch.arange(S, device=q.device)
    filled = (keys < lengths[:, None])[:, :, None, None]
    k, v = (torch.where(filled, c.to(wide), 0.0).transpose(1, 2) for c in (k, v))
    position = lengths[:, None] - T + torch.arange(T, device=q.device)
    distance = (position[..., None] - keys)[:, None]
    grouped = q.to(wide).reshape(B, Hkv, H // max(1, Hkv) * T, D)
    scores = (grouped @ k.mT).reshape(B, H, T, S) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes is not None:
        scores = scores - slopes.to(wide)[..., None, None] * distance.abs()
    if missing is not None:
        scores = scores.masked_fill(missing[:, None, None], torch.nan)
    unseen = (distance < 0) | (distance > left) if left >= 0 else distance < 0
    scores = scores.masked_fill(unseen, -torch.inf)
    sink = scores.new_full((1, H, 1, 1), -torch.inf)
    if sinks is not None:
        sink = sinks.to(wide)[None, :, None, None]
    logits = torch.cat([scores, sink.expand(B, H, T, 1)], -1)
    top = logits.amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, 0.0, top)
    weights = torch.exp(logits - top)
    total = weights.sum(-1, keepdim=True)
    lse = (top + torch.log(total)).squeeze(-1)
    weights = weights[..., :-1] / torch.where(total == 0, 1.0, total)
    grouped = weights.reshape(B, Hkv, H // max(1, Hkv) * T, S)
    return (grouped @ v).reshape(B, H, T, v.shape[3]).to(q.dtype), lse


def host_lengths(lengths: Tensor) -> list[int] | None:
    """The lengths, where one may look at them: not on a device, nor while a program is recorded."""
    plain = type(lengths) is Tensor and lengths.is_cpu
    recorded = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return lengths.tolist() if plain and not recorded else None


def until(
    longest: int, k: Tensor, v: Tensor, table: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Caches (or the table of their pages) of no more keys than the longest sequence has."""
    longest = max(0, longest)
    if table is None:
        return k[:, :longest], v[:, :longest], None
    return k, v, table[:, : -(-longest // max(1, k.shape[1]))]


def of_full_rows(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Where each sequence fills its row and nothing alters the scores, torch's own function."""
    T, S = q.shape[2], k.shape[2]
    seen = None if T == 1 else torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=gqa)
