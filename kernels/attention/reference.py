"""Attention in plain PyTorch: what the kernels mean."""

from __future__ import annotations

import torch
from torch import Tensor

from trilith.kernels._runtime.random import reference_keep_mask
from trilith.plugins import registry


def diagonal_of(alignment: str, queries: int, keys: int) -> int:
    """The key position that query 0 sits at."""
    return keys - queries if alignment == "bottom_right" else 0


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    scale: float,
    softcap: float,
    p: float,
    alignment: str,
    left: int,
    right: int,
    score_mod: str = "",
    precision: str = "ieee",
) -> tuple[Tensor, Tensor]:
    """(softmax(scores) v, log-sum-exp of the scores), in float32, or in float64 for float64.

    scores = cap(mod(scale q k^T)) + bias - slope |distance|, -inf where a key takes no part; a sink
    is one more score per head, without a value.
    """
    shape = (*q.shape[:3], k.shape[2])
    kept = reference_keep_mask(seed, shape, p) if seed is not None and p > 0 else None
    terms = (bias, key_mask, slopes, sinks, kept)
    return attend(q, k, v, *terms, scale, softcap, p, alignment, left, right, score_mod)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    kept: Tensor | None,
    scale: float,
    softcap: float,
    p: float,
    alignment: str,
    left: int,
    right: int,
    score_mod: str = "",
    batch: int = 0,
) -> tuple[Tensor, Tensor]:
    """The same, of which dropout keeps the weights `kept`, or random ones.

    `batch` is the number of the first batch entry, as a score mod sees it.
    """
    (B, H, T, D), (Hkv, S, Dv) = q.shape, v.shape[1:]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    wide_q, wide_k, wide_v = q.to(wide), k.to(wide), v.to(wide)
    grouped = wide_q.reshape(B, Hkv, H // max(Hkv, 1) * T, D)
    scores = (grouped @ wide_k.transpose(-1, -2)).reshape(B, H, T, S) * scale
    if score_mod:
        scores = modified(scores, score_mod, batch)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    scores = add_terms(scores, bias, key_mask, slopes, alignment, left, right)
    top = scores.detach().amax(-1, keepdim=True) if S else scores.new_full((B, H, T, 1), -torch.inf)
    if sinks is not None:
        sink = sinks.to(wide)[:, None, None]
        top = torch.maximum(top, sink.detach())
    top = torch.where(top == -torch.inf, 0.0, top)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sink - top)
    dead = total == 0
    total = torch.where(dead, 1.0, total)
    lse = torch.where(dead, -torch.inf, top + torch.log(total)).squeeze(-1)
    weights = weights / total
    if p > 0:
        weights = _dropped(weights, kept, p)
    out = (weights.reshape(B, Hkv, H // max(Hkv, 1) * T, S) @ wide_v).reshape(B, H, T, Dv)
    return out.to(q.dtype), lse


def modified(scores: Tensor, score_mod: str, batch: int = 0) -> Tensor:
    """Scores (B, H, T, S) as a registered ScoreMod's reference changes them."""
    b, h, q, k = (
        torch.arange(n, device=scores.device).view(-1, *(1,) * (3 - i))
        for i, n in enumerate(scores.shape)
    )
    return registry.score_mod(score_mod).reference(scores, b + batch, h, q, k)


def add_terms(
    scores: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    slopes: Tensor | None,
    alignment: str,
    left: int,
    right: int,
) -> Tensor:
    """Scores (B, H, T, S) with what is added to them, and -inf where a key takes no part."""
    T, S = scores.shape[-2:]
    banded = left >= 0 or right >= 0
    if slopes is not None or banded:
        rows = torch.arange(T, device=scores.device)[:, None] + diagonal_of(alignment, T, S)
        distance = torch.arange(S, device=scores.device) - rows
    if slopes is not None:
        scores = scores - slopes.to(scores.dtype)[..., None, None] * distance.abs()
    if bias is not None and bias.dtype != torch.bool:
        scores = scores + bias.to(scores.dtype)
    elif bias is not None:
        scores = scores.masked_fill(~bias, -torch.inf)
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, :], -torch.inf)
    if left >= 0:
        scores = scores.masked_fill(distance < -left, -torch.inf)
    if right >= 0:
        scores = scores.masked_fill(distance > right, -torch.inf)
    return scores


def _dropped(weights: Tensor, kept: Tensor | None, p: float) -> Tensor:
    if kept is None:
        return torch.nn.functional.dropout(weights, p)
    return torch.where(kept, weights * (0.0 if p >= 1 else 1 / (1 - p)), 0.0)
