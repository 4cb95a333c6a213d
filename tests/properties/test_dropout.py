"""dropout and bias_dropout_add: the mask is a function of seed and position, for any layout."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support import strategies as draw
from tests.support.compare import assert_one_rounding
from trilith.kernels import bias_dropout_add, dropout
from trilith.kernels._runtime.random import draw_seed, reference_keep_mask

probabilities = st.sampled_from((0.1, 0.5, 0.75, 1.0))


def mask(call, x, p):
    """What elements of x are multiplied by, given the generator's state; float64."""
    torch.manual_seed(call.seed)
    kept = reference_keep_mask(draw_seed(x), tuple(x.shape), p)
    return kept.double() * (0.0 if p == 1 else 1 / (1 - p))


@draw.bounded()
@given(call=draw.calls, shape=draw.shapes(), dtype=draw.dtypes, p=probabilities)
def test_dropout(call, shape, dtype, p):
    x = call.randn(*shape, dtype=dtype)
    torch.manual_seed(call.seed)
    y = dropout(x, p)
    dy = call.upstream(y)
    (dx,) = draw.gradients(y, [x], dy)
    factor = mask(call, x, p)
    assert (y.dtype, y.shape, y.is_contiguous()) == (dtype, x.shape, True)
    for result, source in ((y, x), (dx, dy)):
        assert_one_rounding(result.detach(), source.detach().double() * factor, scale=0.0)


@draw.bounded()
@given(
    call=draw.calls,
    shape=draw.shapes(),
    dtype=draw.dtypes,
    wide_residual=st.booleans(),
    bias_dtype=st.none() | draw.dtypes,
    p=st.just(0.0) | probabilities,
    training=st.booleans(),
)
def test_bias_dropout_add(call, shape, dtype, wide_residual, bias_dtype, p, training):
    x = call.randn(*shape, dtype=dtype)
    residual = call.randn(*shape, dtype=torch.float32 if wide_residual else dtype)
    bias = None if bias_dtype is None else call.randn(shape[-1], dtype=bias_dtype)
    torch.manual_seed(call.seed)
    y = bias_dropout_add(x, residual, bias, p, training)
    dy = call.upstream(y)
    found = draw.gradients(y, draw.given(x, residual, bias), dy)

    factor = mask(call, x, p) if p and training else torch.ones(shape, dtype=torch.float64)
    factor = factor.to(x.device)
    x64, residual64, bias64 = (draw.doubled(t) for t in (x, residual, bias))
    y64 = residual64 + factor * (x64 if bias64 is None else x64 + bias64)
    expected = draw.gradients(y64, draw.given(x64, residual64, bias64), dy)

    assert (y.dtype, y.shape) == (residual.dtype, x.shape)
    size = residual64.abs() + factor * (x64.abs() + (0 if bias64 is None else bias64.abs()))
    assert_one_rounding(y.detach(), y64.detach(), scale=size.detach())
    for actual, e in zip(found[:2], expected[:2], strict=True):
        assert_one_rounding(actual, e, scale=0.0)
    if bias is not None:
        rows = x.numel() // shape[-1]
        worst = (factor * dy.double().abs()).reshape(rows, -1).amax(0)
        assert_one_rounding(found[2], expected[2], scale=worst, terms=rows)
