"""Elementwise losses for any shape, layout, dtype and reduction, against float64."""

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tests.support import strategies as draw
from tests.support.compare import assert_one_rounding
from trilith.kernels import binary_cross_entropy_with_logits, mse_loss

reductions = st.sampled_from(("none", "sum", "mean"))


@draw.bounded()
@given(
    call=draw.calls,
    shape=draw.shapes(),
    dtype=draw.dtypes,
    reduction=reductions,
    weighted=st.booleans(),
    squared=st.booleans(),
)
def test_losses(call, shape, dtype, reduction, weighted, squared):
    ours, theirs = (
        (mse_loss, F.mse_loss)
        if squared
        else (binary_cross_entropy_with_logits, F.binary_cross_entropy_with_logits)
    )
    x, target = call.randn(*shape, dtype=dtype), call.randn(*shape, dtype=dtype)
    weight = call.constant(torch.rand(shape) + 0.1, dtype) if weighted else None
    loss = ours(x, target, reduction=reduction, weight=weight)
    upstream = call.upstream(loss)
    dx, dtarget = draw.gradients(loss, [x, target], upstream)
    x64, target64 = draw.doubled(x), draw.doubled(target)
    weight64 = draw.doubled(weight)
    loss64 = theirs(x64, target64, reduction=reduction, weight=weight64)
    expected = draw.gradients(loss64, [x64, target64], upstream)

    size = 2 + x64.detach().abs() + target64.detach().abs()
    heaviest = 1.0 if weight64 is None else max(1.0, 1.0 / weight64.mean().item())
    scale = (1 + size * size) * heaviest * 1.2
    n = x.numel()
    share = n if reduction == "mean" else 1
    whole = scale if reduction == "none" else scale.max().item() * n**0.5 / share
    terms = 1 if reduction == "none" else n
    assert_one_rounding(loss.detach(), loss64.detach(), scale=whole, terms=terms)
    bound = scale * upstream.double().abs() / share
    assert_one_rounding(dx, expected[0], scale=bound)
    assert_one_rounding(dtarget, expected[1], scale=bound)
