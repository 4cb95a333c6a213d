"""Where a token stands. `acts_on` says what a position module takes: "tokens" or "heads"; `Alibi`
acts on "scores".

While text is generated `offsets` (B,) holds where each sequence's first token stands; None is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trilith.kernels import rotary, rotary_qkvpacked


class Rotary(nn.Module):
    """Rotates pairs of each head's elements by angles proportional to the position.

    Args:
        head_dim: D of q and k (B, heads, T, D); even.
        max_len: longest T.
        base: the slowest pair turns by 1 / base of the fastest's angle, nearly.

    Raises:
        ValueError: head_dim is odd, or base not positive; called, T is more than max_len.
    """

    acts_on = "heads"
    offsets: Tensor | None = None
    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, max_len: int, *, base: float = 10000.0) -> None:
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"Rotary: head_dim must be even, got {head_dim}")
        if not base > 0:  # its powers would be NaN
            raise ValueError(f"Rotary: base must be positive, got {base}")
        self.head_dim = head_dim
        self.max_len = max_len
        self.base = base
        table = torch.empty(max_len, head_dim // 2, dtype=torch.float32)
        self.register_buffer("cos", table, persistent=False)
        self.register_buffer("sin", table.clone(), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.cos.is_meta:  # no values; and on "meta" torch's functions would import Dynamo
            self.cos, self.sin = self.cos.float(), self.sin.float()
            return
        angles = _angles(self.max_len, self.head_dim, self.base, self.cos.device)
        self.cos, self.sin = angles.cos().float(), angles.sin().float()

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self._tables(q.shape[-2])
        return rotary(q, cos, sin), rotary(k, cos, sin)

    def turn_packed(self, qkv: Tensor, n_heads: int) -> Tensor:
        """The same of q and k where they lie beside v: qkv (B, T, H + 2 Hkv, D)."""
        return rotary_qkvpacked(qkv, *self._tables(qkv.shape[1]), n_heads)

    def _tables(self, length: int) -> tuple[Tensor, Tensor]:
        _checked_length("Rotary", length, self.max_len)
        return _rows(self.cos, length, self.offsets), _rows(self.sin, length, self.offsets)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.reset_parameters()  # the tables stay float32 in a bfloat16 model
        return self

    def extra_repr(self) -> str:
        return f"{self.head_dim}, max_len={self.max_len}, base={self.base}"


class LearnedPosition(nn.Module):
    """x (B, T, dim) plus a learned vector for each position.

    Args:
        max_len: longest T.
        scale: the vectors' initial standard deviation.

    Raises:
        ValueError: called, T is more than max_len.
    """

    acts_on = "tokens"
    offsets: Tensor | None = None

    def __init__(self, max_len: int, dim: int, *, scale: float = 1.0) -> None:
        super().__init__()
        self.max_len = max_len
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(max_len, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.scale)

    def forward(self, x: Tensor) -> Tensor:
        length = _checked_length("LearnedPosition", x.shape[-2], self.max_len)
        return x + _rows(self.weight, length, self.offsets)

    def extra_repr(self) -> str:
        return f"{self.max_len}, {self.weight.shape[1]}, scale={self.scale}"


class SinusoidalPosition(nn.Module):
    """x (B, T, dim) plus `scale` times the sinusoidal table.

    PE(pos, 2i) = sin(pos / 10000^(2i / dim)) and PE(pos, 2i + 1) = cos of the same angle.

    Args:
        max_len: longest T.

    Raises:
        ValueError: dim is odd; called, T is more than max_len.

    Source: Vaswani et al., "Attention Is All You Need", 2017.
    """

    acts_on = "tokens"
    offsets: Tensor | None = None
    table: Tensor

    def __init__(self, max_len: int, dim: int, *, scale: float = 1.0) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"SinusoidalPosition: dim must be even, got {dim}")
        self.max_len = max_len
        self.scale = scale
        self.register_buffer("table", torch.empty(max_len, dim), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.table.is_meta:
            return
        angles = _angles(self.max_len, self.table.shape[1], 10000.0, self.table.device)
        table = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
        self.table = (table * self.scale).to(self.table.dtype)

    def forward(self, x: Tensor) -> Tensor:
        length = _checked_length("SinusoidalPosition", x.shape[-2], self.max_len)
        return x + _rows(self.table, length, self.offsets)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.reset_parameters()  # a table moved by to_empty holds nothing
        return self

    def extra_repr(self) -> str:
        return f"{self.max_len}, {self.table.shape[1]}, scale={self.scale}"


def _angles(length: int, dim: int, base: float, device: torch.device) -> Tensor:
    """position * base^(-2i / dim), (length, dim / 2) float64."""
    pair = torch.arange(0, dim, 2, dtype=torch.float64, device=device)
    return torch.arange(length, device=device)[:, None] * base ** (-pair / dim)


def _rows(table: Tensor, length: int, offsets: Tensor | None) -> Tensor:
    """A table's rows of `length` positions: (T, columns), or (B, T, columns) from offsets (B,)."""
    if offsets is None:
        return table[:length]
    return table[offsets[:, None] + torch.arange(length, device=offsets.device)]


def _checked_length(name: str, length: int, max_len: int) -> int:
    if length > max_len:
        raise ValueError(
            f"{name}: a sequence must have at most max_len={max_len} tokens, got {length}"
        )
    return length
