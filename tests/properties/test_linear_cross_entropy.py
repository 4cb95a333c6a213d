"""linear_cross_entropy: the gradients and the loss of the two functions that it is made of."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tests.support import strategies as draw
from tests.support.compare import assert_like_eager
from tests.support.devices import DEVICE
from trilith.kernels import _linear_cross_entropy_chunks as chunks
from trilith.kernels import cross_entropy, linear_cross_entropy


@pytest.fixture(scope="module", autouse=True)
def short_chunks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK_TOKENS", 7)
        yield


@draw.bounded(24)
@given(
    call=draw.calls,
    classes=draw.sizes,
    width=draw.sizes,
    lead=st.sampled_from(((1,), (6,), (3, 5), (2, 1, 11))),
    biased=st.booleans(),
    reduction=st.sampled_from(("none", "sum", "mean")),
    ignored=st.sampled_from((0.0, 0.3)),
    label_smoothing=st.sampled_from((0.0, 0.2)),
    z_loss=st.sampled_from((0.0, 1e-2)),
    softcap=st.sampled_from((None, 5.0)),
)
def test_loss_and_gradients(call, classes, width, lead, biased, reduction, ignored, **options):
    x, head = call.randn(*lead, width), call.randn(classes, width)
    bias = call.randn(classes) if biased else None
    target = torch.randint(0, classes, lead, generator=call.generator)
    dropped = torch.rand(lead, generator=call.generator) < ignored
    target = torch.where(dropped, -100, target).to(DEVICE)
    target.view(-1)[0] = 0  # one at least is counted
    options = {"reduction": reduction, **options}
    loss = linear_cross_entropy(x, head, target, linear_bias=bias, **options)
    upstream = call.upstream(loss)

    results = [(loss.detach(), *draw.gradients(loss, draw.given(x, head, bias), upstream))]
    for leaves in ([draw.doubled(t) for t in (x, head, bias)], [x, head, bias]):
        logits = F.linear(*leaves).reshape(-1, classes)
        unfused = cross_entropy(logits, target.reshape(-1), **options).reshape(loss.shape)
        found = draw.gradients(unfused, draw.given(*leaves), upstream)
        results.append((unfused.detach(), *found))
    for ours, exact, eager in zip(*results, strict=True):
        assert_like_eager(ours, exact, eager)
