"""Self-attention with a packed projection."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from torch import Tensor, nn

from trilith.blocks.alibi import Alibi
from trilith.blocks.cache import KVCache, PagedKVCache
from trilith.blocks.linear import kernels_run, plain, plain_linear, reset, reset_linear
from trilith.blocks.positions import Rotary
from trilith.kernels import (
    ATTENTION,
    ATTENTION_QKVPACKED,
    ROTARY,
    ROTARY_QKVPACKED,
    attention,
    attention_qkvpacked,
    scaled_dot_product_attention,
)
from trilith.kernels.attention.config import LARGEST_HEAD_DIM
from trilith.plugins import may_fuse

if TYPE_CHECKING:
    from trilith.blocks.parallel.context import Ring


class SelfAttention(nn.Module):
    """out(softmax(q k^T / sqrt(D)) v) with q, k, v = qkv(x), for x (B, T, dim).

    Args:
        qkv: linear layer dim -> (n_heads + 2 * n_kv_heads) * D, heads of q first, then k, then v.
        out: linear layer n_heads * D -> dim.
        n_heads: query heads.
        n_kv_heads: key and value heads, a divisor of n_heads; None for as many as queries.
        position: called as `position(q, k) -> (q, k)` on (B, heads, T, D), such as `Rotary`;
            or `Alibi`, whose slopes the scores take (not with a cache).
        causal: whether a token sees only itself and what came before.
        dropout: probability, applied to the attention weights.
        gain: scales `out`'s initial weights; 1 / sqrt(2 * layers) where it ends in a residual.

    While text is generated `cache` keeps the keys and values of the tokens that came before. Where
    a sequence is spread over ranks `ring` attends to the keys of all (`context_parallel`).
    """

    cache: KVCache | PagedKVCache | None
    ring: Ring | None

    def __init__(
        self,
        *,
        qkv: nn.Module,
        out: nn.Module,
        n_heads: int,
        n_kv_heads: int | None = None,
        position: nn.Module | None = None,
        causal: bool = True,
        dropout: float = 0.0,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        if n_kv_heads < 1 or n_heads % n_kv_heads:
            raise ValueError(
                f"SelfAttention: n_kv_heads must divide n_heads={n_heads}, got {n_kv_heads}"
            )
        self.qkv = qkv
        self.out = out
        self.position = position
        self.heads = (n_heads, n_kv_heads, n_kv_heads)
        self.causal = causal
        self.dropout = dropout
        self.gain = gain
        self.cache = None
        self.ring = None

    def reset_parameters(self) -> None:
        reset_linear(self.qkv)
        reset_linear(self.out, self.gain)
        reset(self.position)

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(self.qkv(x))

    def first_layers(self) -> tuple[tuple[Tensor, Tensor | None], ...]:
        """What makes `finish`'s argument; nothing where `qkv` must be called."""
        return ((self.qkv.weight, self.qkv.bias),) if plain_linear(self.qkv) else ()

    def finish(self, packed: Tensor) -> Tensor:
        """The rest of forward, from qkv(x)."""
        if self._stays_packed(packed):
            mixed_BTHD = self._mix_packed(packed.unflatten(-1, (sum(self.heads), -1)))
        else:
            mixed_BTHD = self.mix(*self.heads_of(packed)).transpose(1, 2)
        return self.out(mixed_BTHD.flatten(2))

    def _stays_packed(self, packed: Tensor) -> bool:
        """Whether kernels that read q, k and v in one tensor do all there is to do."""
        own = type(self)
        is_own = own.mix is SelfAttention.mix and own.heads_of is SelfAttention.heads_of
        if not is_own or self.cache is not None or self.ring is not None or not kernels_run(packed):
            return False
        if packed.shape[-1] > sum(self.heads) * LARGEST_HEAD_DIM:
            return False
        if not may_fuse(ATTENTION_QKVPACKED, packed, ATTENTION):
            return False
        if self.position is None or isinstance(self.position, Alibi):
            return True
        return plain(self.position, Rotary) and may_fuse(ROTARY_QKVPACKED, packed, ROTARY)

    def _mix_packed(self, qkv: Tensor) -> Tensor:
        """Attention (B, T, H, D)."""
        n_heads, slopes = self.heads[0], None
        if isinstance(self.position, Alibi):
            slopes = self.position()
        elif self.position is not None:
            qkv = cast(Rotary, self.position).turn_packed(qkv, n_heads)
        p = self.dropout if self.training else 0.0
        mixed = attention_qkvpacked(
            qkv, n_heads, causal=self.causal, alibi_slopes=slopes, dropout_p=p
        )
        return cast(Tensor, mixed)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention (B, H, T, D) over these keys, or over those of a cache, these the last."""
        p = self.dropout if self.training else 0.0
        if isinstance(self.position, Alibi):
            if self.cache is not None:
                raise NotImplementedError("SelfAttention: cache must be None with Alibi, got one")
            slopes = self.position()
            mixed = attention(q, k, v, causal=self.causal, alibi_slopes=slopes, dropout_p=p)
            return cast(Tensor, mixed)
        if self.ring is not None:
            return self.ring.attend(q, k, v, causal=self.causal, dropout_p=p)
        if self.cache is not None:
            continued = any(self.cache.filled)
            self.cache.append(k, v)
            if continued:
                return self.cache.attend(q)
        return scaled_dot_product_attention(
            q, k, v, dropout_p=p, is_causal=self.causal, enable_gqa=True
        )

    def heads_of(self, packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, H, T, D), k and v (B, Hkv, T, D), q and k with their positions."""
        packed_BTHD = packed.unflatten(-1, (sum(self.heads), -1))
        q, k, v = (part.transpose(1, 2) for part in packed_BTHD.split(self.heads, dim=2))
        if self.position is None or isinstance(self.position, Alibi):
            return q, k, v
        q, k = self.position(q, k)
        # v as a view would keep the whole packed buffer for backward, beside the new q and k
        return q, k, v.contiguous()

    def extra_repr(self) -> str:
        n_heads, n_kv_heads, _ = self.heads
        return f"n_heads={n_heads}, n_kv_heads={n_kv_heads}, causal={self.causal}"
