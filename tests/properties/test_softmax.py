"""softmax and log_softmax for any shape, dimension, layout and dtype, against float64."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support import strategies as draw
from tests.support.compare import assert_one_rounding
from trilith.kernels import log_softmax, softmax


@draw.bounded()
@given(
    call=draw.calls,
    shape=draw.shapes(),
    dtype=draw.dtypes,
    which=st.integers(0, 3),
    log=st.booleans(),
)
def test_softmax(call, shape, dtype, which, log):
    dim = which % len(shape)
    x = call.randn(*shape, dtype=dtype)
    y = log_softmax(x, dim) if log else softmax(x, dim)
    dy = call.upstream(y)
    (dx,) = draw.gradients(y, [x], dy)
    x64 = draw.doubled(x)
    y64 = torch.log_softmax(x64, dim) if log else torch.softmax(x64, dim)
    (dx64,) = draw.gradients(y64, [x64], dy)
    p, up = torch.softmax(x64.detach(), dim), dy.double().abs()
    wide = x64.detach()
    spread = 1 + (wide - wide.amax(dim, keepdim=True)).abs() + math.log(shape[dim])
    assert_one_rounding(y.detach(), y64.detach(), scale=spread if log else p * spread)
    sums = (up if log else up * p).sum(dim, keepdim=True)
    scale = up + p * sums * spread if log else p * (up + sums) * spread
    assert_one_rounding(dx, dx64, scale=scale)
