"""What the forward and backward kernels share: tile ranges, loads, scores, dropout.

A tile of scores has any orientation: `rows` and `cols` are the query and key positions of its
elements, shaped to broadcast against it, as [BLOCK_M, 1] and [1, BLOCK_N] or the transposed.
Scores are kept in base 2, that is times log2(e), so that probabilities are plain exp2.
"""

from __future__ import annotations

from trilith.kernels._runtime.functors import ACTIVATIONS
from trilith.kernels._runtime.language import tl, triton
from trilith.kernels._runtime.random import keep_mask

# Arguments whose value should not make another binary; a kernel without one of them ignores it.
NOT_SPECIALIZED = ("BH", "H", "heads_together", "low", "high", "diagonal", "sequences")
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
_tanh = ACTIVATIONS["tanh"].f


@triton.jit
def tile_of_program(num_tiles, num_heads, heads_together, LONGEST_LAST: tl.constexpr):
    """(tile, head) of this program: tiles of a few heads at a time, the longest first.

    `heads_together` heads have keys and values that stay in the last-level cache.
    """
    pid = tl.program_id(0)
    section = pid // (num_tiles * heads_together)
    within = pid - section * num_tiles * heads_together
    heads = tl.minimum(heads_together, num_heads - section * heads_together)
    tile = within // heads
    head = section * heads_together + within - tile * heads
    if LONGEST_LAST:
        tile = num_tiles - 1 - tile
    return tile, head.to(tl.int64)


@triton.jit
def tile_count(length, cu_ptr, sequences, BLOCK: tl.constexpr):
    """Tiles of `length` rows; of packed sequences a tile more for each, one for rows past them."""
    if cu_ptr is None:
        return tl.cdiv(length, BLOCK)
    else:
        return length // BLOCK + sequences + 1


@triton.jit
def extent(cu_ptr, b, length):
    """(first row, rows) of batch entry b, or of sequence b where sequences are packed."""
    if cu_ptr is None:
        return b * 0, length
    else:
        first = tl.load(cu_ptr + b).to(tl.int32)
        rows = tl.load(cu_ptr + b + 1).to(tl.int32) - first
        return first.to(tl.int64), rows


@triton.jit
def bias_extent(extent, length, cu_ptr):
    """Rows or columns of the bias that a sequence meets; all of them where nothing is packed."""
    if cu_ptr is None:
        return length
    else:
        return tl.minimum(extent, length)


@triton.jit
def sequence_of_tile(tile, b, own_ptr, other_ptr, own, other, sequences, BLOCK: tl.constexpr):
    """(tile, sequence, first own row, own rows, first other row, other rows) of a program.

    Sequence n has its tiles from cu[n] // BLOCK + n on, as many as it needs or one more; to a tile
    that is one too many the other side has no rows. Nor has it to the rows past the last sequence,
    which count as one more, so that every row is stored. What is not packed has b for a sequence.
    """
    if own_ptr is None:
        return tile, b, b * 0, own, b * 0, other
    else:
        found = tl.full((), 0, tl.int32)
        stop = sequences + 1
        while stop - found > 1:
            middle = (found + stop) // 2
            before = tl.load(own_ptr + middle).to(tl.int32) // BLOCK + middle <= tile
            found = tl.where(before, middle, found)
            stop = tl.where(before, stop, middle)
        tile -= tl.load(own_ptr + found).to(tl.int32) // BLOCK + found
        first_own = tl.load(own_ptr + found).to(tl.int32)
        first_other = tl.load(other_ptr + found).to(tl.int32)
        after = tl.minimum(found + 1, sequences)
        own_rows = tl.where(found == after, own, tl.load(own_ptr + after).to(tl.int32)) - first_own
        other_rows = tl.load(other_ptr + after).to(tl.int32) - first_other
        other_rows = tl.where(tile * BLOCK < own_rows, other_rows, 0)
        sequence = tl.maximum(after - 1, 0).to(tl.int64)
        first_own, first_other = first_own.to(tl.int64), first_other.to(tl.int64)
        return tile, sequence, first_own, own_rows, first_other, other_rows


@triton.jit
def band_of(low, high, diagonal, T, S, FLAGS: tl.constexpr):
    """The band of a sequence, whose diagonal may end at its last key."""
    if FLAGS[4]:
        return low + S - T, high + S - T, diagonal + S - T
    else:
        return low, high, diagonal


@triton.jit
def band_range(
    start,
    stop,
    limit,
    low,
    high,
    HAS_LOW: tl.constexpr,
    HAS_HIGH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Where the positions [start, stop) meet those of the other side, of which there are `limit`.

    Position i meets j if i + low <= j <= i + high. Returns begin <= full_begin <= full_end <= end,
    begin and full_end on tile borders where they start a loop: outside of [begin, end) nothing
    meets, every tile in [full_begin, full_end) meets wholly.
    """
    begin = 0
    full_begin = 0
    end = limit
    full_end = limit // BLOCK * BLOCK
    if HAS_LOW:
        begin = tl.minimum(tl.maximum(start + low, 0), limit) // BLOCK * BLOCK
        full_begin = tl.cdiv(tl.maximum(stop - 1 + low, 0), BLOCK) * BLOCK
    if HAS_HIGH:
        end = tl.minimum(tl.maximum(stop + high, 0), limit)
        full_end = tl.minimum(tl.maximum(start + high + 1, 0), limit) // BLOCK * BLOCK
    if HAS_LOW:
        end = tl.where(start + low < limit, end, begin)
    full_begin = tl.minimum(full_begin, end)
    full_end = tl.maximum(full_end, full_begin)
    return begin, full_begin, full_end, end


@triton.jit
def kept_range(key_mask_ptr, stride, S):
    """[first, end) from the first to the last key that a mask keeps; (S, 0) where it keeps none."""
    first = tl.full((), 0, tl.int32) + S
    end = tl.full((), 0, tl.int32)
    for start in range(0, S, 1024):
        cols = start + tl.arange(0, 1024)
        kept = tl.load(key_mask_ptr + cols.to(tl.int64) * stride, mask=cols < S, other=0)
        first = tl.minimum(first, tl.min(tl.where(kept, cols, S), 0))
        end = tl.maximum(end, tl.max(tl.where(kept, cols + 1, 0), 0))
    return first, end


@triton.jit
def range_from(first, begin, full_begin, full_end, BLOCK: tl.constexpr):
    """The starts of a `band_range`, and its full_end, without the tiles before `first`."""
    first = first // BLOCK * BLOCK
    full_begin = tl.maximum(full_begin, first)
    return (
        tl.minimum(tl.maximum(begin, first), full_begin),
        full_begin,
        tl.maximum(full_end, full_begin),
    )


@triton.jit
def load_rows(ptr, strides, rows, cols, M, N, CHECK_ROWS: tl.constexpr, CHECK_COLS: tl.constexpr):
    """[rows, cols] of an (M, N) matrix; zeros outside of it."""
    ptrs = ptr + rows.to(tl.int64)[:, None] * strides[2] + cols.to(tl.int64)[None, :] * strides[3]
    if CHECK_ROWS and CHECK_COLS:
        return tl.load(ptrs, mask=(rows < M)[:, None] & (cols < N)[None, :], other=0.0)
    elif CHECK_ROWS:
        return tl.load(ptrs, mask=(rows < M)[:, None], other=0.0)
    elif CHECK_COLS:
        return tl.load(ptrs, mask=(cols < N)[None, :], other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def store_rows(ptr, strides, rows, cols, M, N, value):
    ptrs = ptr + rows.to(tl.int64)[:, None] * strides[2] + cols.to(tl.int64)[None, :] * strides[3]
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    tl.store(ptrs, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def add_products(
    dots,
    a_ptr,
    a_strides,
    a_rows,
    a_limit,
    b_ptr,
    b_strides,
    b_rows,
    b_limit,
    N,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    PAD: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """dots + a b^T over the columns after the first BLOCK, of N, in chunks.

    All programs that make the same scores add the chunks in this one order. The chunks differ in
    where they begin, a scalar, so that they share the registers of their offsets.
    """
    cols = tl.arange(0, BLOCK)
    for chunk in tl.static_range(1, CHUNKS):
        first = tl.full((), chunk * BLOCK, tl.int64)
        rest = N - chunk * BLOCK
        a_chunk, b_chunk = a_ptr + first * a_strides[3], b_ptr + first * b_strides[3]
        a = load_rows(a_chunk, a_strides, a_rows, cols, a_limit, rest, True, PAD)
        b = load_rows(b_chunk, b_strides, b_rows, cols, b_limit, rest, MASKED, PAD)
        dots = tl.dot(a, tl.trans(b), dots, input_precision=PRECISION)
    return dots


@triton.jit
def head_terms(pointers, strides, b, h):
    """Where the bias and key mask of one batch entry and head begin, its slope, and which it is.

    Offsets, for Triton 3.6 returns no tuple with a pointer that is None.
    """
    slope = b.to(tl.float32) * 0.0
    if pointers[2] is not None:
        slope = tl.load(pointers[2] + b * strides[2][0] + h * strides[2][1]).to(tl.float32)
    return b * strides[0][0] + h * strides[0][1], b * strides[1][0], slope, b, h


@triton.jit
def in_base_2(dots, scale, zero, EXACT: tl.constexpr):
    """dots * scale / ln 2, rounded before the lse is subtracted from it if EXACT.

    The lse was made of rounded scores. A GPU fuses the product with the subtraction of the lse, and
    near 1e4 a probability of 1 would be off by 3e-4, which float32 has the digits for. `zero` is 0
    in each call, unknown to the compiler: it is what the product is fused with then.
    """
    x = dots * (scale * LOG2E)
    if EXACT:
        x += zero
    return x


@triton.jit
def scores(
    dots,
    rows,
    cols,
    pointers,
    terms,
    strides,
    sizes,
    band,
    scalars,
    FLAGS: tl.constexpr,
    SCORE_MOD: tl.constexpr,
    DSCORE_MOD: tl.constexpr,
    MASKED: tl.constexpr,
    EXACT: tl.constexpr,
):
    """(scores in base 2, d score / d (scale * dot)) of a tile of dot products q . k.

    Only a MASKED tile looks at the band and at the end of the keys. `pointers` and `strides` are
    those of bias, key mask and slopes, `terms` comes from `head_terms`; `sizes` is (T, S, D, DV,
    row length of the dropout mask, rows and columns of the bias), `band` (low, high, diagonal),
    `scalars` (scale, softcap, p, 1 / (1 - p)), FLAGS (HAS_LOW, HAS_HIGH, HAS_SLOPE, HAS_SOFTCAP,
    whether the band is moved to the end of a sequence's keys). SCORE_MOD changes the scaled dots
    before all else; forward needs no derivative of it.
    """
    bias_ptr, key_mask_ptr, slopes_ptr = pointers
    bias_start, key_mask_start, slope, b, h = terms
    bias_strides, key_mask_strides, slopes_strides = strides
    T, S, D, DV, mask_cols, bias_rows, bias_cols = sizes
    low, high, diagonal = band
    slope_of_cap = 1.0
    scale = scalars[0]
    if SCORE_MOD is not None:
        scaled = dots * scale
        dots = SCORE_MOD(scaled, b, h, rows, cols)
        scale = 1.0
        if DSCORE_MOD is not None:
            slope_of_cap = DSCORE_MOD(scaled, b, h, rows, cols)
    if FLAGS[3]:
        t = _tanh(dots * (scale / scalars[1]))
        x = t * (scalars[1] * LOG2E)
        slope_of_cap *= 1.0 - t * t
    else:
        bare: tl.constexpr = not MASKED and not FLAGS[2] and bias_ptr is None
        x = in_base_2(dots, scale, scalars[1], EXACT and bare and key_mask_ptr is None)
    if FLAGS[2]:
        x -= (slope * LOG2E) * tl.abs(rows + diagonal - cols).to(tl.float32)
    if bias_ptr is not None:
        offsets = rows.to(tl.int64) * bias_strides[2] + cols.to(tl.int64) * bias_strides[3]
        inside = (rows < bias_rows) & (cols < bias_cols)
        bias = tl.load(bias_ptr + bias_start + offsets, mask=inside, other=0)
        if bias_ptr.dtype.element_ty == tl.int1:
            x = tl.where(bias, x, -float("inf"))
        else:
            x += bias.to(tl.float32) * LOG2E
    if key_mask_ptr is not None:
        kept = tl.load(
            key_mask_ptr + key_mask_start + cols.to(tl.int64) * key_mask_strides[1],
            mask=cols < S,
            other=0,
        )
        x = tl.where(kept, x, -float("inf"))
    if MASKED:
        meets = cols < S
        if FLAGS[0]:
            meets &= cols >= rows + low
        if FLAGS[1]:
            meets &= cols <= rows + high
        x = tl.where(meets, x, -float("inf"))
    return x, slope_of_cap


@triton.jit
def kept_by_dropout(seed_ptr, row_offset, rows, first_col, S, p, BLOCK_N: tl.constexpr):
    """[rows, BLOCK_N] of the mask over (B * H * T, S); `row_offset` is the first row's index.

    Packed sequences share a mask over (H * total queries, total keys), each from column 0 on.
    """
    quads_per_row = tl.cdiv(S, 4)
    quads = first_col // 4 + tl.arange(0, BLOCK_N // 4)
    positions = (row_offset + rows.to(tl.int64))[:, None] * quads_per_row + quads[None, :]
    return keep_mask(seed_ptr, positions, p)


@triton.jit
def load_lse2(ptr, offs_m, T, CHECK: tl.constexpr):
    """lse of rows in base 2; +inf for rows that are none, so that their probabilities are 0."""
    if CHECK:
        return tl.load(ptr + offs_m, mask=offs_m < T, other=float("inf"))
    else:
        return tl.load(ptr + offs_m)
