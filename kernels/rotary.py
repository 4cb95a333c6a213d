"""Rotary position embedding of heads x (B, H, T, D) by tables cos and sin (T, R/2) or (B, T, R/2).

Pair i of the first R channels, (i, i + R/2) or, interleaved, (2i, 2i + 1), is turned by its angle:

    y1 = x1 * cos - x2 * sin        y2 = x2 * cos + x1 * sin

and the other D - R channels are copied. Backward is the same map with sin negated, whatever cos and
sin hold: the transpose of forward. Saved for backward: cos and sin. They are constants.

Numerics: fp32, one rounding.

Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from trilith.kernels._runtime.checks import require, require_floating, require_same_device
from trilith.kernels._runtime.device import multiprocessors
from trilith.kernels._runtime.language import tl, triton
from trilith.kernels._runtime.launch import launch
from trilith.kernels._runtime.plan import planned
from trilith.kernels._runtime.sharding import Strategy, split
from trilith.kernels._runtime.sizes import cdiv, next_power_of_2
from trilith.plugins import BackwardContext, Cost, Op, OpSpec, Sample

_TILE = 2048  # elements of one head
_MOST_HEADS = 16
_PROGRAMS_PER_MULTIPROCESSOR = 8


@triton.jit
def _rotary_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    y_ptr,
    x_strides,
    cos_strides,
    sin_strides,
    y_strides,
    H,
    T,
    turned,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """One program owns HEADS heads of BLOCK_T positions, and reads cos and sin once.

    Heads from `turned` on are copied; none is where that is None.
    """
    n_t, n_h = tl.cdiv(T, BLOCK_T), tl.cdiv(H, HEADS)
    pid = tl.program_id(0)
    t = (pid % n_t).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    b = (pid // n_t // n_h).to(tl.int64)
    first_head = (pid // n_t % n_h).to(tl.int64) * HEADS
    pair = tl.arange(0, BLOCK_P)
    mask_t, mask_p = t < T, pair < PAIRS
    mask = mask_t[:, None] & mask_p[None, :]
    cos = tl.load(
        cos_ptr + b * cos_strides[0] + _offsets(t, pair, cos_strides), mask=mask, other=0.0
    ).to(tl.float32)
    sin = tl.load(
        sin_ptr + b * sin_strides[0] + _offsets(t, pair, sin_strides), mask=mask, other=0.0
    ).to(tl.float32)
    if INVERSE:
        sin = -sin
    x_ptr += b * x_strides[0]
    y_ptr += b * y_strides[0]
    for i in range(HEADS):
        h = first_head + i
        x_head = x_ptr + h * x_strides[1]
        y_head = y_ptr + h * y_strides[1]
        inside = mask_t & (h < H)
        if INTERLEAVED:
            channel = tl.arange(0, 2 * BLOCK_P)
            both = inside[:, None] & (channel < 2 * PAIRS)[None, :]
            x = tl.load(x_head + _offsets(t, channel, x_strides[1:]), mask=both, other=0.0)
            x1, x2 = tl.split(tl.reshape(x.to(tl.float32), (BLOCK_T, BLOCK_P, 2)))
            y1, y2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
            if turned is not None:
                y1, y2 = tl.where(h < turned, y1, x1), tl.where(h < turned, y2, x2)
            y = tl.reshape(tl.join(y1, y2), (BLOCK_T, 2 * BLOCK_P)).to(y_ptr.dtype.element_ty)
            tl.store(y_head + _offsets(t, channel, y_strides[1:]), y, mask=both)
        else:
            half = inside[:, None] & mask_p[None, :]
            x1 = tl.load(x_head + _offsets(t, pair, x_strides[1:]), mask=half, other=0.0)
            x2 = tl.load(x_head + _offsets(t, pair + PAIRS, x_strides[1:]), mask=half, other=0.0)
            x1, x2 = x1.to(tl.float32), x2.to(tl.float32)
            y1, y2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
            if turned is not None:
                y1, y2 = tl.where(h < turned, y1, x1), tl.where(h < turned, y2, x2)
            y_half = y_head + _offsets(t, pair, y_strides[1:])
            tl.store(y_half, y1.to(y_ptr.dtype.element_ty), mask=half)
            tl.store(y_half + PAIRS * y_strides[3], y2.to(y_ptr.dtype.element_ty), mask=half)
        if BLOCK_REST > 0:
            channel = 2 * PAIRS + tl.arange(0, BLOCK_REST)
            rest = inside[:, None] & (channel < D)[None, :]
            x = tl.load(x_head + _offsets(t, channel, x_strides[1:]), mask=rest)
            tl.store(y_head + _offsets(t, channel, y_strides[1:]), x, mask=rest)


@triton.jit
def _offsets(rows, cols, strides):
    """Where the elements [rows, cols] lie by the second and third of the strides."""
    return rows[:, None] * strides[1] + (cols.to(tl.int64) * strides[2])[None, :]


def _rotary_out(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@planned
def _rotary_fwd(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor]:
    y = _rotary_out(x)
    rotate(x, cos, sin, interleaved, y)
    return (y,)


@planned
def _rotary_bwd(ctx: BackwardContext, dy: Tensor) -> tuple[Tensor]:
    _, cos, sin, interleaved = ctx.inputs
    dx = _rotary_out(dy)
    rotate(dy, cos, sin, interleaved, dx, inverse=True)
    return (dx,)


def rotate(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    y: Tensor,
    *,
    inverse: bool = False,
    turned: int | None = None,
) -> None:
    """x (B, H, T, D) goes into y, its first `turned` heads rotated; all where that is None."""
    b, h, t, d = x.shape
    pairs = cos.shape[-1]
    block_p = next_power_of_2(pairs)
    block_t = max(1, min(_TILE // (2 * block_p), next_power_of_2(t)))
    tiles = b * cdiv(t, block_t)
    heads = min(_MOST_HEADS, next_power_of_2(h))
    wanted = _PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(x.device)
    while heads > 1 and tiles * cdiv(h, heads) < wanted:
        heads //= 2
    launch(
        _rotary_kernel,
        (tiles * cdiv(h, heads),),
        x,
        cos,
        sin,
        y,
        x.stride(),
        _table_strides(cos),
        _table_strides(sin),
        y.stride(),
        h,
        t,
        turned,
        D=d,
        PAIRS=pairs,
        INTERLEAVED=interleaved,
        INVERSE=inverse,
        HEADS=heads,
        BLOCK_T=block_t,
        BLOCK_P=block_p,
        BLOCK_REST=next_power_of_2(d - 2 * pairs) if d > 2 * pairs else 0,
        num_warps=4 if block_t * block_p >= 512 else 1,
    )


def _table_strides(table: Tensor) -> tuple[int, ...]:
    """Strides over (B, T, R/2); 0 over B if the batch shares the table."""
    return table.stride() if table.dim() == 3 else (0, *table.stride())


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotary position embedding; cos and sin are constants."""
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (table.detach().to(wide) for table in (cos, sin))
    if cos.dim() == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    width = 2 * cos.shape[-1]
    # split, not sliced: the gradients of a split's parts are one concatenation
    rotated, rest = x.split((width, x.shape[-1] - width), dim=-1) if x.shape[-1] > width else (x, x)
    if interleaved:
        x1, x2 = rotated.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
        y = torch.stack((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).flatten(-2)
    else:
        x1, x2 = rotated.to(wide).chunk(2, dim=-1)
        y = torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)
    y = y.to(x.dtype)
    return torch.cat((y, rest), dim=-1) if x.shape[-1] > width else y


def _rotary_samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    def tables(*shape: int) -> tuple[Tensor, Tensor]:
        angle = 3 * torch.rand(shape, device=device)
        return angle.cos(), angle.sin()

    yield Sample(draw(2, 3, 5, 8), *tables(5, 4), False)
    yield Sample(draw(2, 3, 5, 8), *tables(2, 5, 4), True)
    yield Sample(draw(1, 2, 17, 10), *(t.to(dtype) for t in tables(17, 3)), False)
    packed = draw(2, 7, 3, 5, 6)
    yield Sample(packed[:, :, 1].transpose(1, 2), *tables(2, 7, 2), True)
    yield Sample(draw(2, 1, 1, 2), *tables(1, 1), False)


def _rotary_cost(x: Tensor, cos: Tensor) -> Cost:
    moved = 2 * x.numel() * x.element_size() + 2 * cos.numel() * cos.element_size()
    flops = 6 * cos.shape[-1] * x.shape[0] * x.shape[1] * x.shape[2]
    return Cost(moved, moved, flops, flops)


def _rotary_sharding(x: Tensor, cos: Tensor) -> list[Strategy]:
    """Batch, heads, or positions."""
    batch, position = (0, 1) if cos.dim() == 3 else (None, 0)
    return [split([dim], [dim, of, of]) for dim, of in ((0, batch), (1, None), (2, position))]


ROTARY = Op(
    OpSpec(
        name="trilith::rotary",
        forward=_rotary_fwd,
        backward=_rotary_bwd,
        reference=rotary_reference,
        samples=_rotary_samples,
        fake=_rotary_out,
        cost=_rotary_cost,
        sharding=_rotary_sharding,
        save_inputs=("cos", "sin"),
        save_outputs=False,
    )
)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotates channel pairs of queries or keys by position-dependent angles (RoPE).

    Args:
        x: (B, H, T, D) floating-point, any strides: a transposed (B, T, H, D) or a slice of a
            packed projection is read in place.
        cos, sin: (T, R/2), or (B, T, R/2) where positions differ within the batch; floating-point,
            any dtype; 2 <= R <= D. Channels from R on are copied. Tables are constants.
        interleaved: whether pair i is the channels (2i, 2i + 1), or (i, i + R/2).

    Returns:
        (B, H, T, D), contiguous, in x's dtype.

    Raises:
        ValueError: shapes don't fit, or a table requires a gradient.
        TypeError: a tensor is not floating-point.

    Numerics: fp32, one rounding. The gradient is exactly as accurate: the inverse rotation.

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.

    Example:
        >>> angles = torch.outer(torch.arange(T), 10000 ** -(torch.arange(0, D, 2) / D))
        >>> q = rotary(q, angles.cos(), angles.sin())  # q (B, H, T, D)
    """
    require_tables("rotary", x, cos, sin)
    return ROTARY(x, cos, sin, interleaved)


def require_tables(op: str, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """That they are of x (B, H, T, D)."""
    require_floating(op, x=x, cos=cos, sin=sin)
    require(x.dim() == 4, op, "x", "have shape (B, H, T, D)", tuple(x.shape))
    shape = tuple(cos.shape)
    require(cos.dim() in (2, 3), op, "cos", "have shape (T, R/2) or (B, T, R/2)", shape)
    require(sin.shape == cos.shape, op, "sin", f"have cos's shape {shape}", tuple(sin.shape))
    if shape[-2] != x.shape[2]:
        raise ValueError(
            f"{op}: cos and sin must have x's T = {x.shape[2]} positions, got {shape[-2]}; "
            "slice the tables to the positions of x"
        )
    if cos.dim() == 3:
        require(shape[0] == x.shape[0], op, "cos", f"have x's batch size {x.shape[0]}", shape)
    pairs = f"at most {x.shape[3]} / 2 columns, half of x's channels"
    require(2 * shape[-1] <= x.shape[3], op, "cos", f"have {pairs}", shape[-1])
    require_same_device(op, x, cos=cos, sin=sin)
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        raise ValueError(f"{op}: cos and sin must not require a gradient; detach them")
