"""Attention from one sequence to another."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from trilith.blocks.alibi import Alibi
from trilith.blocks.linear import reset, reset_linear
from trilith.kernels import attention


class CrossAttention(nn.Module):
    """out(softmax(q k^T / sqrt(D)) v) with q = q(x) and k, v = kv(memory).

    x is (B, T, dim), memory (B, S, dim of memory).

    Args:
        q: linear layer dim -> n_heads * D.
        kv: linear layer dim of memory -> 2 * n_kv_heads * D, heads of k first, then v.
        out: linear layer n_heads * D -> dim.
        n_heads: query heads.
        n_kv_heads: key and value heads, a divisor of n_heads; None for as many as queries.
        position: `Alibi`, or None.
        dropout: probability, applied to the attention weights.
        gain: scales `out`'s initial weights; 1 / sqrt(2 * layers) where it ends in a residual.
    """

    def __init__(
        self,
        *,
        q: nn.Module,
        kv: nn.Module,
        out: nn.Module,
        n_heads: int,
        n_kv_heads: int | None = None,
        position: Alibi | None = None,
        dropout: float = 0.0,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        if n_kv_heads < 1 or n_heads % n_kv_heads:
            raise ValueError(
                f"CrossAttention: n_kv_heads must divide n_heads={n_heads}, got {n_kv_heads}"
            )
        self.q = q
        self.kv = kv
        self.out = out
        self.position = position
        self.n_heads = n_heads
        self.n_kv_heads = n_kv_heads
        self.dropout = dropout
        self.gain = gain

    def reset_parameters(self) -> None:
        reset_linear(self.q)
        reset_linear(self.kv)
        reset_linear(self.out, self.gain)
        reset(self.position)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
        packed_BHSD = self.kv(memory).unflatten(-1, (2 * self.n_kv_heads, -1)).transpose(1, 2)
        k, v = packed_BHSD.chunk(2, dim=1)
        slopes = None if self.position is None else self.position()
        p = self.dropout if self.training else 0.0
        mixed_BHTD = cast(Tensor, attention(q, k, v, alibi_slopes=slopes, dropout_p=p))
        return self.out(mixed_BHTD.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        return f"n_heads={self.n_heads}, n_kv_heads={self.n_kv_heads}"
