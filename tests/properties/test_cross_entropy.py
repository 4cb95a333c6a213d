"""cross_entropy against its definition in float64, for torch's layouts of logits and targets."""

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tests.support import strategies as draw
from tests.support.compare import assert_one_rounding
from tests.support.devices import DEVICE
from trilith.kernels import cross_entropy


def expected_loss(x, target, weight, ignore_index, reduction, label_smoothing, z_loss, softcap):
    """The loss, and the magnitude of each row's terms."""
    x = x if softcap is None else softcap * torch.tanh(x / softcap)
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    rows = F.cross_entropy(x, target, weight, reduction="none", **options)
    counted = target != ignore_index
    share = counted.double()
    if weight is not None:
        share = torch.where(counted, weight[target.clamp_min(0)], 0.0)
    lse = torch.logsumexp(x, min(x.ndim - 1, 1))
    rows = rows + z_loss * lse.square() * share
    size = (1 + z_loss * lse.detach().abs() * (1 + lse.detach().abs())) * counted
    if reduction == "none":
        return rows, size
    return rows.sum() / (share.sum() if reduction == "mean" else 1), size


@draw.bounded(24)
@given(
    call=draw.calls,
    classes=draw.sizes,
    lead=st.sampled_from((None, 1, 2, 5, 9)),
    trail=st.sampled_from(((), (), (1,), (3,), (2, 2))),
    dtype=draw.dtypes,
    weighted=st.booleans(),
    ignored=st.sampled_from((0.0, 0.3, 1.0)),
    ignore_index=st.sampled_from((-100, -1, 0)),
    reduction=st.sampled_from(("none", "mean", "sum")),
    label_smoothing=st.sampled_from((0.0, 0.1, 1.0)),
    z_loss=st.sampled_from((0.0, 1e-2)),
    softcap=st.sampled_from((None, 5.0)),
)
def test_cross_entropy(call, classes, lead, trail, dtype, weighted, ignored, **options):
    shape = (classes,) if lead is None else (lead, classes, *trail)
    x = call.randn(*shape, dtype=dtype)
    labels = () if lead is None else (lead, *trail)
    target = torch.randint(0, classes, labels, generator=call.generator)
    dropped = torch.rand(labels, generator=call.generator) < ignored
    target = torch.where(dropped, options["ignore_index"], target).to(DEVICE)
    weight = (
        call.constant(torch.rand(classes, generator=call.generator) + 0.5) if weighted else None
    )
    loss = cross_entropy(x, target, weight, **options)
    dloss = call.upstream(loss)
    (dx,) = draw.gradients(loss, [x], dloss)

    x64 = draw.doubled(x)
    loss64, size = expected_loss(x64, target, draw.doubled(weight), **options)
    assert loss.dtype == dtype and dx.is_contiguous()
    rounding = (1.5 if weight is not None else 1.0) * (1 + (options["softcap"] or 0) / 8)
    total = size.sum() if options["reduction"] == "sum" else size.amax()
    each = options["reduction"] == "none"
    scale = rounding * (size if each else total)
    assert_one_rounding(loss.detach(), loss64.detach(), scale=scale, terms=max(1, target.numel()))
    if loss64.isnan().any():
        assert (dx == 0).all()
        return
    (dx64,) = draw.gradients(loss64, [x64], dloss)
    upstream = dloss.double().abs() * rounding * size
    if lead is not None:
        upstream = upstream.expand(labels).unsqueeze(1)
    assert_one_rounding(dx, dx64, scale=upstream * torch.ones_like(dx64))


@draw.bounded(16)
@given(
    call=draw.calls,
    classes=draw.sizes,
    lead=st.sampled_from((None, 1, 2, 5)),
    trail=st.sampled_from(((), (), (1,), (3,), (2, 2))),
    dtype=draw.dtypes,
    weighted=st.booleans(),
    reduction=st.sampled_from(("none", "mean", "sum")),
    label_smoothing=st.sampled_from((0.0, 0.1, 1.0)),
)
def test_class_probabilities(call, classes, lead, trail, dtype, weighted, **options):
    shape = (classes,) if lead is None else (lead, classes, *trail)
    dim = min(len(shape) - 1, 1)
    x = call.randn(*shape, dtype=dtype)
    values = torch.randn(shape, generator=call.generator).softmax(dim)
    target = call.constant(values, dtype).requires_grad_()
    weight = None
    if weighted:
        weight = call.constant(torch.rand(classes, generator=call.generator) + 0.5)
    loss = cross_entropy(x, target, weight, **options)
    dloss = call.upstream(loss)
    gradients = draw.gradients(loss, [x, target], dloss)

    x64, target64 = draw.doubled(x), draw.doubled(target)
    loss64 = F.cross_entropy(x64, target64, draw.doubled(weight), **options)
    gradients64 = draw.gradients(loss64, [x64, target64], dloss)
    farthest = 1.5 * (1 + torch.log_softmax(x64.detach(), dim).abs().max())
    rows = max(1, x.numel() // classes)
    added = rows if options["reduction"] == "sum" else 1
    assert_one_rounding(loss.detach(), loss64.detach(), scale=farthest * added, terms=rows)
    upstream = dloss.double().abs().max()
    for actual, expected in zip(gradients, gradients64, strict=True):
        assert actual.is_contiguous()
        assert_one_rounding(actual, expected, scale=upstream * farthest)
