"""Residual sums with norms; norms and activations with a linear layer: any shape and layout."""

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.test_add_norm import check as check_add_norm
from tests.support import strategies as draw
from tests.support.compare import assert_fair
from tests.support.devices import DTYPES
from trilith.kernels import (
    add_layer_norm,
    add_rms_norm,
    bias_act_linear,
    gated_act_linear,
    layer_norm_linear,
    rms_norm_linear,
)

EPS = 1e-5
ACTIVATIONS = {"gelu": F.gelu, "silu": F.silu, "relu": F.relu, "sigmoid": torch.sigmoid}


def check(call, fused, plain, given, dtype):
    """Outputs and gradients as near to float64 as eager's, in the given layouts."""
    given = [None if t is None else call.randn(*t, dtype=dtype) for t in given]
    found = _tuple(fused(*given))
    above = [call.upstream(out) for out in found]
    results = [[out.detach() for out in found]]
    results[0] += torch.autograd.grad(found, draw.given(*given), above)
    for leaves in ([draw.doubled(t) for t in given], given):
        outputs = _tuple(plain(*leaves))
        up = [g.to(out.dtype) for g, out in zip(above, outputs, strict=True)]
        gradients = torch.autograd.grad(outputs, draw.given(*leaves), up)
        results.append([*(out.detach() for out in outputs), *gradients])
    rows = given[0].numel() // given[0].shape[-1]
    for ours, exact, eager in zip(*results, strict=True):
        assert_fair(ours, exact, eager, rows)


def _tuple(value):
    return value if isinstance(value, tuple) else (value,)


def normed(x, weight, bias, centred):
    if centred:
        return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)
    return F.rms_norm(x, x.shape[-1:], weight, EPS)


dtypes = st.sampled_from(DTYPES)


@draw.bounded()
@given(
    call=draw.calls,
    shape=draw.shapes(),
    dtype=dtypes,
    p=st.sampled_from((0.0, 0.3)),
    rms=st.booleans(),
)
def test_add_norm(call, shape, dtype, p, rms):
    function = add_rms_norm if rms else add_layer_norm
    x, residual = call.randn(*shape, dtype=dtype), call.randn(*shape, dtype=dtype)
    parameters = [call.randn(shape[-1], dtype=dtype) for _ in range(1 if rms else 2)]
    check_add_norm(function, x, residual, parameters, p)


@draw.bounded()
@given(
    call=draw.calls,
    shape=draw.shapes(),
    dtype=dtypes,
    outputs=draw.few,
    added=st.booleans(),
    rms=st.booleans(),
)
def test_norm_linear(call, shape, dtype, outputs, added, rms):
    n = shape[-1]

    def plain(x, residual, norm_weight, norm_bias, weight, bias):
        total = x if residual is None else residual + x
        y = F.linear(normed(total, norm_weight, norm_bias, not rms), weight, bias)
        return (y, total) if added else y

    def fused(x, residual, norm_weight, norm_bias, weight, bias):
        options = {"eps": EPS, "residual": residual}
        if rms:
            return rms_norm_linear(x, norm_weight, weight, bias, **options)
        return layer_norm_linear(x, norm_weight, norm_bias, weight, bias, **options)

    given = (shape, shape if added else None, (n,), None if rms else (n,), (outputs, n), (outputs,))
    check(call, fused, plain, given, dtype)


@draw.bounded()
@given(
    call=draw.calls,
    shape=draw.shapes(),
    dtype=dtypes,
    outputs=draw.few,
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    gated=st.booleans(),
)
def test_act_linear(call, shape, dtype, outputs, activation, gated):
    n, act = shape[-1], ACTIVATIONS[activation]

    def plain(x, other, weight, bias):
        hidden = act(x) * other if gated else act(x + other)
        return F.linear(hidden, weight, bias)

    def fused(x, other, weight, bias):
        if gated:
            return gated_act_linear(x, other, weight, bias, activation)
        return bias_act_linear(x, other, weight, bias, activation)

    given = (shape, shape if gated else (n,), (outputs, n), (outputs,))
    check(call, fused, plain, given, dtype)
