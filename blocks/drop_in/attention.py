"""torch.nn's multi-head attention.

Shapes: B batch, T queries, S keys, E = H heads of D.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trilith.blocks.drop_in.layouts import nested, padded
from trilith.blocks.drop_in.swap import constructed_like, keep_called
from trilith.blocks.linear import kernels_run
from trilith.kernels import (
    ATTENTION,
    ATTENTION_QKVPACKED,
    attention_qkvpacked,
    scaled_dot_product_attention,
)
from trilith.kernels.attention.config import LARGEST_HEAD_DIM
from trilith.plugins import may_fuse


class MultiheadAttention(nn.MultiheadAttention):
    """torch.nn.MultiheadAttention.

    Weights that are asked for (`need_weights=True`) have to exist in memory: those calls, and those
    that don't fit, run torch's own formula and raise its errors. A query that may look at no
    key has the output of zero weights, where torch gives NaN if it is asked for weights. Other
    calls that kernels run call `out_proj`, hooks and all, of which torch reads the weight.
    """

    passed_over_by_torch = True

    @constructed_like(nn.MultiheadAttention)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        keep_called(self)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        masks = (key_padding_mask, attn_mask)
        torchs_own = need_weights or query.is_cpu and ATTENTION.is_reference_on_cpu
        if not need_weights and query.is_nested and query is key is value and masks == (None, None):
            dense, padding = padded(query)
            out = self._attend(dense, dense, dense, padding, None, False)
            return nested(out, padding, query.layout), None
        if torchs_own or not self._fits(query, key, value, *masks, is_causal):
            return super().forward(
                *(query, key, value, key_padding_mask, need_weights, attn_mask),
                average_attn_weights,
                is_causal,
            )
        if query.dim() == 2:
            q, k, v = (t.unsqueeze(self._batch_dim) for t in (query, key, value))
            if query is key is value:
                k = v = q
            mask = None if key_padding_mask is None else key_padding_mask[None]
            out = self._attend(q, k, v, mask, attn_mask, is_causal)
            return out.squeeze(self._batch_dim), None
        return self._attend(query, key, value, key_padding_mask, attn_mask, is_causal), None

    @property
    def _batch_dim(self) -> int:
        return 0 if self.batch_first else 1

    def _fits(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        padding: Tensor | None,
        mask: Tensor | None,
        is_causal: bool,
    ) -> bool:
        """Whether torch would take the call."""
        tensors = (query, key, value)
        if any(t.is_nested or t.dim() != query.dim() for t in tensors) or query.dim() not in (2, 3):
            return False
        if is_causal and mask is None:
            return False
        widths = (self.embed_dim, self.kdim, self.vdim)
        if tuple(t.shape[-1] for t in tensors) != widths or key.shape[:-1] != value.shape[:-1]:
            return False
        batched = query.dim() == 3
        B = query.shape[self._batch_dim] if batched else 1
        if batched and key.shape[self._batch_dim] != B:
            return False
        length = 1 - self._batch_dim if batched else 0
        T, S = query.shape[length], key.shape[length]
        if padding is not None and padding.shape != ((B, S) if batched else (S,)):
            return False
        if mask is not None and mask.shape not in ((T, S), (B * self.num_heads, T, S)):
            return False
        given = [m for m in (padding, mask) if m is not None]
        return all(m.dtype == torch.bool or m.is_floating_point() for m in given)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        padding: Tensor | None,
        mask: Tensor | None,
        is_causal: bool,
    ) -> Tensor:
        is_causal = is_causal and padding is None
        mask = None if is_causal else self._merged(query, padding, mask)
        p = self.dropout if self.training else 0.0
        if query is key is value and self._stays_packed(query):
            packed = F.linear(query, self.in_proj_weight, self.in_proj_bias)
            heads = packed.unflatten(-1, (3 * self.num_heads, self.head_dim))
            heads = heads.transpose(0, self._batch_dim)
            mixed = attention_qkvpacked(heads, causal=is_causal, bias=mask, dropout_p=p)
            return self.out_proj(cast(Tensor, mixed).flatten(2).transpose(0, self._batch_dim))
        q, k, v = (self._heads(t) for t in self._project(query, key, value))
        k, v, mask = self._with_added_keys(k, v, mask)
        mixed_BHTD = scaled_dot_product_attention(q, k, v, mask, p, is_causal)
        order = (0, 2, 1, 3) if self.batch_first else (2, 0, 1, 3)
        return self.out_proj(mixed_BHTD.permute(order).flatten(2))

    def _stays_packed(self, x: Tensor) -> bool:
        """Whether a kernel reads q, k and v where one product has put them."""
        if self.in_proj_weight is None or self.bias_k is not None or self.add_zero_attn:
            return False
        if not kernels_run(x) or self.head_dim > LARGEST_HEAD_DIM:
            return False
        return may_fuse(ATTENTION_QKVPACKED, x, ATTENTION)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        bias = self.in_proj_bias
        if self.in_proj_weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None, None, None) if bias is None else bias.chunk(3)
            inputs = (query, key, value)
            return tuple(F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True))
        if query is key is value:
            return F.linear(query, self.in_proj_weight, bias).chunk(3, dim=-1)
        sizes = [self.embed_dim, 2 * self.embed_dim]
        w_q, w_kv = self.in_proj_weight.split(sizes)
        b_q, b_kv = (None, None) if bias is None else bias.split(sizes)
        q = F.linear(query, w_q, b_q)
        if key is value:
            return q, *F.linear(key, w_kv, b_kv).chunk(2, dim=-1)
        (w_k, w_v), (b_k, b_v) = w_kv.chunk(2), (None, None) if b_kv is None else b_kv.chunk(2)
        return q, F.linear(key, w_k, b_k), F.linear(value, w_v, b_v)

    def _heads(self, x: Tensor) -> Tensor:
        """(B, H, length, D) of a projected input."""
        order = (0, 2, 1, 3) if self.batch_first else (1, 2, 0, 3)
        return x.unflatten(-1, (self.num_heads, self.head_dim)).permute(order)

    def _merged(self, query: Tensor, padding: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """One mask that broadcasts to (B, H, T, S): True where a key takes part, or added."""
        if mask is not None:
            by_head = (query.shape[self._batch_dim], self.num_heads)
            mask = mask[None, None] if mask.dim() == 2 else mask.unflatten(0, by_head)
        if padding is not None:
            padding = padding[:, None, None]
        given = [m for m in (mask, padding) if m is not None]
        if not given:
            return None
        if all(m.dtype == torch.bool for m in given):
            return ~(given[0] | given[-1])
        return sum(_added(m, query.dtype) for m in given)  # type: ignore[return-value]

    def _with_added_keys(
        self, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """A learned key and value, and a zero one, after the others."""
        added = []
        if self.bias_k is not None and self.bias_v is not None:
            shape = (1, 1, self.num_heads, self.head_dim)
            added.append([b.view(shape).transpose(1, 2) for b in (self.bias_k, self.bias_v)])
        if self.add_zero_attn:
            added.append([k.new_zeros(1, 1, 1, self.head_dim)] * 2)
        for more_k, more_v in added:
            lead = (*k.shape[:2], 1, self.head_dim)
            k = torch.cat([k, more_k.expand(lead)], dim=2)
            v = torch.cat([v, more_v.expand(lead)], dim=2)
        if mask is not None and added:
            mask = F.pad(mask, (0, len(added)), value=mask.dtype == torch.bool)
        return k, v, mask


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)
