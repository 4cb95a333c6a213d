"""Rotary position embedding of one projection's output qkv (B, T, H + 2 Hkv, D), in one pass.

The heads of q and k are turned as in rotary.py, those of v copied: what comes out may be kept for
backward in place of what went in. Backward turns them back. Saved for backward: cos and sin.

Formula, numerics and source as in rotary.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from trilith.kernels._runtime.plan import planned
from trilith.kernels._runtime.sharding import Strategy, split
from trilith.kernels.attention.arguments import as_qkv
from trilith.kernels.rotary import ROTARY, require_tables, rotary_reference, rotate
from trilith.plugins import BackwardContext, Cost, Op, OpSpec, Sample

_NAME = "rotary_qkvpacked"


@planned
def _forward(
    qkv: Tensor, cos: Tensor, sin: Tensor, turned: int, interleaved: bool
) -> tuple[Tensor]:
    y = _out(qkv)
    rotate(qkv.transpose(1, 2), cos, sin, interleaved, y.transpose(1, 2), turned=turned)
    return (y,)


@planned
def _backward(ctx: BackwardContext, dy: Tensor) -> tuple[Tensor]:
    _, cos, sin, turned, interleaved = ctx.inputs
    dx = _out(dy)
    heads = dy.transpose(1, 2), dx.transpose(1, 2)
    rotate(heads[0], cos, sin, interleaved, heads[1], inverse=True, turned=turned)
    return (dx,)


def _out(qkv: Tensor) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _reference(qkv: Tensor, cos: Tensor, sin: Tensor, turned: int, interleaved: bool) -> Tensor:
    """The first `turned` heads rotated, the others as they are."""
    first, rest = qkv.split((turned, qkv.shape[2] - turned), dim=2)
    y = rotary_reference(first.transpose(1, 2), cos, sin, interleaved)
    return torch.cat((y.transpose(1, 2), rest), dim=2)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    def tables(*shape: int) -> tuple[Tensor, Tensor]:
        angle = 3 * torch.rand(shape, device=device)
        return angle.cos(), angle.sin()

    yield Sample(draw(2, 5, 4, 8), *tables(5, 4), 3, False)
    yield Sample(draw(2, 7, 9, 10), *tables(2, 7, 3), 6, True)
    yield Sample(draw(1, 17, 6, 6), *(t.to(dtype) for t in tables(17, 2)), 4, False)


def _cost(qkv: Tensor, cos: Tensor, turned: int) -> Cost:
    moved = 2 * qkv.numel() * qkv.element_size() + 2 * cos.numel() * cos.element_size()
    flops = 6 * cos.shape[-1] * qkv.shape[0] * qkv.shape[1] * turned
    return Cost(moved, moved, flops, flops)


def _sharding(qkv: Tensor, cos: Tensor) -> list[Strategy]:
    """Batch, or positions."""
    batch, position = (0, 1) if cos.dim() == 3 else (None, 0)
    return [split([dim], [dim, of, of]) for dim, of in ((0, batch), (1, position))]


ROTARY_QKVPACKED = Op(
    OpSpec(
        name="trilith::rotary_qkvpacked",
        forward=_forward,
        backward=_backward,
        reference=_reference,
        samples=_samples,
        fake=_out,
        cost=_cost,
        sharding=_sharding,
        save_inputs=("cos", "sin"),
        save_outputs=False,
        parts=(ROTARY.spec.name,),
    )
)


def rotary_qkvpacked(
    qkv: Tensor, cos: Tensor, sin: Tensor, n_heads: int | None = None, *, interleaved: bool = False
) -> Tensor:
    """`rotary` of the heads of q and k where q, k and v lie in one tensor.

    Args:
        qkv: (B, T, H + 2 Hkv, D), the heads of q, then of k, then of v, or (B, T, 3, H, D);
            floating-point, any strides.
        cos, sin, interleaved: as in `rotary`.
        n_heads: H; None where q, k and v have equally many.

    Returns:
        (B, T, H + 2 Hkv, D), contiguous, in qkv's dtype: q and k rotated, v as it was.

    Raises:
        ValueError: shapes don't fit, or a table requires a gradient.
        TypeError: a tensor is not floating-point.

    Numerics and source: as `rotary`.

    Example:
        >>> qkv = rotary_qkvpacked(qkv, cos, sin, n_heads)
        >>> y = attention_qkvpacked(qkv, n_heads, causal=True)
    """
    qkv, heads = as_qkv(_NAME, qkv, n_heads)
    require_tables(_NAME, qkv.transpose(1, 2), cos, sin)
    return ROTARY_QKVPACKED(qkv, cos, sin, (qkv.shape[2] + heads) // 2, interleaved)
