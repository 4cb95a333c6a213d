"""bias_act and gated_act, for any shape, layout, dtype and option, against float64."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support import strategies as draw
from tests.support.compare import assert_one_rounding
from trilith.kernels import bias_act, gated_act
from trilith.kernels._runtime.functors import ACTIVATIONS
from trilith.kernels._runtime.random import draw_seed, reference_keep_mask

activations = st.sampled_from(list(ACTIVATIONS))


@draw.bounded()
@given(
    call=draw.calls,
    shape=draw.shapes(),
    dtype=draw.dtypes,
    bias_dtype=st.none() | draw.dtypes,
    activation=activations,
    p=st.sampled_from((0.0, 0.0, 0.3, 1.0)),
)
def test_bias_act(call, shape, dtype, bias_dtype, activation, p):
    x = call.randn(*shape, dtype=dtype)
    bias = None if bias_dtype is None else call.randn(shape[-1], dtype=bias_dtype)
    torch.manual_seed(call.seed)
    y = bias_act(x, bias, activation, p=p)
    dy = call.upstream(y)
    found = draw.gradients(y, draw.given(x, bias), dy)

    torch.manual_seed(call.seed)
    kept = reference_keep_mask(draw_seed(x), shape, p) if p else torch.ones_like(y)
    kept = kept * (0.0 if p == 1 else 1 / (1 - p))
    x64, bias64 = draw.doubled(x), draw.doubled(bias)
    z = x64 if bias64 is None else x64 + bias64
    y64 = ACTIVATIONS[activation].torch(z) * kept.double()
    expected = draw.gradients(y64, draw.given(x64, bias64), dy)

    assert (y.dtype, y.shape, y.is_contiguous()) == (dtype, x.shape, True)
    size = x64.detach().abs() + (0 if bias64 is None else bias64.detach().abs())
    assert_one_rounding(y.detach(), y64.detach(), scale=(1 + size) * kept)
    scale = dy.double().abs() * (1 + size) * kept
    assert_one_rounding(found[0], expected[0], scale=scale)
    if bias is not None:
        rows = max(1, x.numel() // shape[-1])
        worst = scale.reshape(rows, -1).amax(0)
        assert_one_rounding(found[1], expected[1], scale=worst, terms=rows)


@draw.bounded()
@given(call=draw.calls, shape=draw.shapes(), dtype=draw.dtypes, activation=activations)
def test_gated_act(call, shape, dtype, activation):
    gate, up = call.randn(*shape, dtype=dtype), call.randn(*shape, dtype=dtype)
    y = gated_act(gate, up, activation)
    dy = call.upstream(y)
    gate64, up64 = draw.doubled(gate), draw.doubled(up)
    y64 = ACTIVATIONS[activation].torch(gate64) * up64

    assert (y.dtype, y.shape, y.is_contiguous()) == (dtype, gate.shape, True)
    size = 1 + gate64.detach().abs()
    assert_one_rounding(y.detach(), y64.detach(), scale=size * up64.detach().abs())
    dgate, dup = draw.gradients(y, [gate, up], dy)
    dgate64, dup64 = draw.gradients(y64, [gate64, up64], dy)
    assert_one_rounding(dgate, dgate64, scale=dy.double().abs() * size * up64.detach().abs())
    assert_one_rounding(dup, dup64, scale=dy.double().abs() * size)
