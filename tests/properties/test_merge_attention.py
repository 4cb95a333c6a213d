"""merge_attention of drawn parts against its reference in float64."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support import strategies as draw
from tests.support.compare import assert_one_rounding
from trilith.kernels import merge_attention
from trilith.kernels.attention.merge import MERGE_ATTENTION as OP


@draw.bounded()
@given(
    call=draw.calls,
    dtype=draw.dtypes,
    shape=draw.shapes(2, 4),
    parts=st.integers(1, 4),
    blind=st.sampled_from((0.0, 0.3, 1.0)),
)
def test_merge_attention(call, dtype, shape, parts, blind):
    outs = call.randn(parts, *shape, dtype=dtype)
    values = 3 * torch.randn(parts, *shape[:-1], generator=call.generator)
    unseen = torch.rand(values.shape, generator=call.generator) < blind
    lses = call.constant(values.masked_fill(unseen, -torch.inf)).requires_grad_()
    out, lse = merge_attention(outs, lses)
    upstream = [call.upstream(t) for t in (out, lse)]
    found = torch.autograd.grad([out, lse], [outs, lses], upstream)

    wide = [draw.doubled(t) for t in (outs, lses)]
    expected = OP.spec.reference(*wide)
    wanted = torch.autograd.grad(expected, wide, [t.double() for t in upstream])
    dout, dlse = (t.double() for t in upstream)
    largest = outs.detach().double().abs().amax((0, -1))
    scales = (
        16 * largest[..., None],
        16,
        16 * dout.abs().expand_as(outs),
        16 * (largest * dout.abs().sum(-1) + dlse.abs()).expand_as(lses),
    )
    for actual, e, scale in zip([out, lse, *found], [*expected, *wanted], scales, strict=True):
        assert_one_rounding(actual.detach(), e.detach(), scale=scale, terms=parts)
