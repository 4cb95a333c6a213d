"""rotary against complex multiplication in float64."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support import strategies as draw
from tests.support.compare import assert_one_rounding
from trilith.kernels import rotary


def turned(x, cos, sin, interleaved):
    pairs = cos.shape[-1]
    turn = torch.complex(cos, sin)
    turn = turn if turn.ndim == 2 else turn[:, None]
    width = 2 * pairs
    ends = (slice(0, width, 2), slice(1, width, 2)) if interleaved else None
    first, second = ends or (slice(0, pairs), slice(pairs, width))
    y = torch.complex(x[..., first], x[..., second]) * turn
    parts = torch.stack((y.real, y.imag), -1) if interleaved else torch.cat((y.real, y.imag), -1)
    return torch.cat((parts.flatten(-2) if interleaved else parts, x[..., width:]), -1)


@draw.bounded(16)
@given(
    call=draw.calls,
    batch=draw.few,
    heads=draw.few,
    length=st.sampled_from((1, 2, 5, 17, 33)),
    pairs=st.sampled_from((1, 2, 3, 4, 8, 13, 32)),
    copied=st.sampled_from((0, 0, 1, 2, 5)),
    per_batch=st.booleans(),
    interleaved=st.booleans(),
    dtype=draw.dtypes,
    table_dtype=draw.dtypes,
)
def test_rotary(
    call, batch, heads, length, pairs, copied, per_batch, interleaved, dtype, table_dtype
):
    x = call.randn(batch, heads, length, 2 * pairs + copied, dtype=dtype)
    shape = (batch, length, pairs) if per_batch else (length, pairs)
    angle = 7 * torch.rand(shape, generator=call.generator)
    cos, sin = call.constant(angle.cos(), table_dtype), call.constant(angle.sin(), table_dtype)
    y = rotary(x, cos, sin, interleaved=interleaved)
    dy = call.upstream(y)
    (dx,) = draw.gradients(y, [x], dy)
    x64 = draw.doubled(x)
    y64 = turned(x64, cos.double(), sin.double(), interleaved)
    (dx64,) = draw.gradients(y64, [x64], dy)
    assert (y.dtype, y.shape, y.is_contiguous()) == (dtype, x.shape, True)
    for actual, expected, source in ((y, y64, x), (dx, dx64, dy)):
        scale = 2 * source.detach().double().abs().amax(-1, keepdim=True)
        assert_one_rounding(actual.detach(), expected.detach(), scale=scale)
