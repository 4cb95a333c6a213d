"""layer_norm and rms_norm against torch's own functions in float64."""

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.test_norms import scales
from tests.support import strategies as draw
from tests.support.compare import assert_one_rounding
from trilith.kernels import layer_norm, rms_norm

TORCH = {layer_norm: F.layer_norm, rms_norm: F.rms_norm}


def check(call, function, shape, dims, dtype, parameter_dtype, count, eps):
    x = call.randn(*shape, dtype=dtype)
    normalized = shape[-dims:]
    parameters = [call.randn(*normalized, dtype=parameter_dtype) for _ in range(count)]
    y = function(x, normalized, *parameters, eps=eps)
    dy = call.upstream(y)
    found = [y.detach(), *draw.gradients(y, [x, *parameters], dy)]

    x64, parameters64 = draw.doubled(x), [draw.doubled(p) for p in parameters]
    y64 = TORCH[function](x64, normalized, *parameters64, eps=eps)
    expected = [y64.detach(), *draw.gradients(y64, [x64, *parameters64], dy)]

    assert (y.dtype, y.shape, y.is_contiguous()) == (dtype, x.shape, True)
    flat, rows = x64.detach().flatten(-dims), x.numel() // max(1, x[(0,) * (x.ndim - dims)].numel())
    ones, zeros = (
        torch.ones_like(flat.reshape(rows, -1)[0]),
        torch.zeros_like(flat.reshape(rows, -1)[0]),
    )
    wide = [p.detach().flatten() for p in parameters64] + [ones, zeros][count:]
    bounds = scales(function, flat.reshape(rows, -1), wide, dy.double().reshape(rows, -1), eps)
    for a, e, scale, terms in zip(found, expected, bounds, (1, 1, rows, rows), strict=False):
        assert a.dtype in (dtype, parameter_dtype)
        by_row = scale.expand(a.numel() // scale.shape[-1], -1) if scale.ndim == 1 else scale
        assert_one_rounding(a, e, scale=by_row.reshape(a.shape), terms=terms)


@st.composite
def cases(draw_, most_parameters):
    shape = draw_(draw.shapes())
    dtype = draw_(draw.dtypes)
    return {
        "call": draw_(draw.calls),
        "shape": shape,
        "dims": draw_(st.integers(1, min(2, len(shape)))),
        "dtype": dtype,
        "parameter_dtype": draw_(st.sampled_from((dtype, torch.float32))),
        "count": draw_(st.integers(0, most_parameters)),
        "eps": draw_(st.sampled_from((1e-5, 1e-3, 0.5))),
    }


@draw.bounded()
@given(case=cases(2))
def test_layer_norm(case):
    check(function=layer_norm, **case)


@draw.bounded()
@given(case=cases(1))
def test_rms_norm(case):
    check(function=rms_norm, **case)
