"""Dropout's random bits: Philox-4x32-7, keyed by a 64-bit seed and an element's position.

A call draws one seed from torch's generator; forward and backward make the same mask from it, and
no mask is stored. Positions are counted in quads, four consecutive elements of a row, because one
Philox call gives four numbers: element `col` of row `row` of an (M, N) tensor is lane `col % 4` of
quad `row * cdiv(N, 4) + col // 4`. Element and tile order do not enter.

A number, read as a signed integer, drops its element if it is one of the p * 2^32 smallest: one
comparison, where a uniform float would have to be made of it first.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trilith.kernels._runtime.language import tl, triton
from trilith.plugins import Op
from trilith.plugins.sharding import replicated

_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF
_ROUNDS = 7  # the fewest that pass every battery of statistical tests; each one costs time
ROUNDS = tl.constexpr(_ROUNDS)


def draw_seed(like: Tensor) -> Tensor:
    """A (1,) int64 seed on `like`'s device from torch's generator there; no synchronisation."""
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=like.device)
    return replicated(seed, like)


def run_seeded(op: Op, before: tuple[Any, ...], p: float, after: tuple[Any, ...]) -> Any:
    """Call an op whose parameters are `before`, a seed, and `after`.

    A seed is drawn where a kernel will drop elements; the reference draws its own mask.
    """
    if p == 0.0:
        return op(*before, None, *after)
    provider = op.choose(*before, None, *after)
    seed = None if provider is None else draw_seed(before[0])
    return op.run(provider, *before, seed, *after)


@triton.jit
def keep_mask(seed_ptr, quads, p):
    """Which elements stay: quads [..., Q] int64 -> bool [..., 4 * Q], each True with 1 - p."""
    dropped = tl.cast(tl.cast(p, tl.float32) * 4294967296.0, tl.int64)  # of 2^32 numbers
    last = tl.maximum(dropped - 2147483649, -2147483648).to(tl.int32)
    seed = tl.load(seed_ptr)
    low = (quads & 0xFFFFFFFF).to(tl.uint32)
    high = (quads >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    a, b, c, d = tl.philox(seed, low, high, zero, zero, n_rounds=ROUNDS)
    lanes = tl.join(tl.join(a, c), tl.join(b, d))
    numbers = tl.reshape(lanes, quads.shape[:-1] + (4 * quads.shape[-1],))
    return numbers.to(tl.int32, bitcast=True) > last


def reference_keep_mask(seed: Tensor, shape: tuple[int, ...], p: float) -> Tensor:
    """The same mask in plain PyTorch for a row-major tensor whose last dimension is the row."""
    n = shape[-1]
    rows = 1
    for size in shape[:-1]:
        rows *= size
    quads_per_row = -(-n // 4)
    quads = torch.arange(rows * quads_per_row, dtype=torch.int64, device=seed.device)
    lanes = torch.stack(_philox(seed, quads), dim=-1).reshape(rows, 4 * quads_per_row)[:, :n]
    dropped = (torch.tensor(p, dtype=torch.float32).double() * 2**32).long()
    return (_signed(lanes) > (dropped - 2**31 - 1).clamp(min=-(2**31))).reshape(shape)


def _philox(seed: Tensor, quads: Tensor) -> list[Tensor]:
    key_a, key_b = seed & _LOW, (seed >> 32) & _LOW
    c0, c1 = quads & _LOW, (quads >> 32) & _LOW
    c2 = c3 = torch.zeros_like(quads)
    for _ in range(_ROUNDS):
        product_a, product_b = c0 * _ROUND_A, c2 * _ROUND_B
        c0 = ((product_b >> 32) & _LOW) ^ c1 ^ key_a
        c2 = ((product_a >> 32) & _LOW) ^ c3 ^ key_b
        c1, c3 = product_b & _LOW, product_a & _LOW
        key_a, key_b = (key_a + _KEY_A) & _LOW, (key_b + _KEY_B) & _LOW
    return [c0, c1, c2, c3]


def _signed(bits: Tensor) -> Tensor:
    """uint32 -> int32, both in int64."""
    return torch.where(bits >= 2**31, bits - 2**32, bits)
