"""Cross-entropy against class probabilities: loss and both gradients, against float64."""

import pytest
import torch
import torch.nn.functional as F

from tests.support.compare import assert_one_rounding
from tests.support.devices import DEVICE, DTYPES, dtype_name
from trilith.kernels import cross_entropy
from trilith.kernels._runtime.launch import observers
from trilith.plugins import registry

OP = registry.op("trilith::soft_cross_entropy")
SHAPES = ((1, 1), (9, 7), (5, 130), (3, 2048), (2, 2049), (1, 5001), (2, 7, 19), (3, 130, 5))
OPTIONS = {
    "plain": (False, 0.0, 0.0, None),
    "weight": (True, 0.0, 0.0, None),
    "smoothing-weight": (True, 0.3, 0.0, None),
    "z": (False, 0.0, 1e-2, None),
    "all": (True, 0.2, 1e-2, 5.0),
}
INF, NAN = float("inf"), float("nan")


def draw(*shape, dtype=torch.float32):
    x = 2 * torch.randn(shape)
    return x.to(DEVICE, dtype), torch.randn(shape).softmax(1).to(DEVICE, dtype)


def run(x, target, *options, dloss=None):
    """Per-row loss, dx and dt, by the kernels and by the reference in float64."""
    rows = (x.shape[0], *x.shape[2:])
    dloss = torch.ones(rows, device=x.device) if dloss is None else dloss
    results = []
    for dtype in (None, torch.float64):
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, target)]
        loss = OP(*leaves, *options)
        gradients = torch.autograd.grad(loss, leaves, dloss.to(loss.dtype))
        results.append((loss.detach(), *gradients))
    return results


def check(x, target, weight=None, smoothing=0.0, z_loss=0.0, softcap=None, dloss=None):
    """The kernels against float64 by the one-rounding rule; returns what the kernels gave."""
    options = (weight, smoothing, z_loss, softcap)
    actual, expected = run(x, target, *options, dloss=dloss)
    logits = x.double() if softcap is None else softcap * torch.tanh(x.double() / softcap)
    lse = torch.logsumexp(logits, 1, keepdim=True)
    heaviest = 1.0 if weight is None else weight.double().max()
    total = target.double().abs().sum(1, keepdim=True).clamp_min(1) * heaviest
    rounding = 1.0 if softcap is None else 1.0 + softcap / 8
    far = (lse - logits).abs()
    upstream = 1.0 if dloss is None else dloss.double().abs().unsqueeze(1)
    z = z_loss * lse.abs() * (1 + lse.abs())
    loss_scale = total * rounding * far.amax(1, keepdim=True).clamp_min(1) + z
    scales = (loss_scale.squeeze(1), upstream * rounding * (total + z), upstream * heaviest * far)
    scales = (*scales[:2], scales[2] + upstream * heaviest * rounding)
    for a, e, scale in zip(actual, expected, scales, strict=True):
        assert_one_rounding(a, e, scale=scale * torch.ones_like(e))
    return actual


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_loss_and_gradients_match_float64(dtype, shape, name, poison):
    x, target = draw(*shape, dtype=dtype)
    weighted, *options = OPTIONS[name]
    weight = torch.rand(shape[1], device=DEVICE) + 0.5 if weighted else None
    dloss = torch.randn(shape[0], *shape[2:], device=DEVICE)
    loss, dx, dtarget = check(x, target, weight, *options, dloss=dloss)
    assert loss.dtype == torch.float32 and dx.dtype == dtarget.dtype == dtype


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_probabilities_need_not_add_up_to_one_nor_be_positive(smoothing):
    x, _ = draw(4, 130)
    check(x, torch.randn(4, 130, device=DEVICE), None, smoothing)


@pytest.mark.parametrize("n", [33, 5000])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_logits_far_from_zero_and_nearly_constant(dtype, n):
    x, target = draw(3, n, dtype=dtype)
    check((x.float() + 1e4).to(dtype), target)
    check(x * 1e-4, target, None, 0.1)
    check(torch.full_like(x, -7.0), target)


@pytest.mark.parametrize("place", [0, 2049])
@pytest.mark.parametrize("lead", [1.0, 12.0, 30.0, 1e4])
@pytest.mark.parametrize("missing", [0.0, 1e-6, 0.3])
def test_sure_rows_keep_their_digits(missing, lead, place):
    """The granted error is that of the terms, which have one sign, never of the numbers near 1.

    A term's is also that of exp: a GPU rounds x * log2(e), so exp(x) is off by |x| * 2**-24 of it.
    """
    x = torch.zeros(2, 2050, device=DEVICE)
    x[0, place], x[1, place] = lead, lead - 5e3
    x[1] += torch.linspace(-1, 0, 2050, device=DEVICE)
    target = torch.full_like(x, missing / 2049)
    target[:, place] = 1 - missing
    leaf = x.clone().requires_grad_()
    loss = OP(leaf, target, None, 0.0, 0.0, None)
    (dx,) = torch.autograd.grad(loss.sum(), leaf)

    q, peak = target.double(), x.argmax(1, keepdim=True)
    below = x.double().gather(1, peak) - x.double()
    others = torch.exp(-below).scatter(1, peak, 0.0)
    log_sum = torch.log1p(others.sum(1, keepdim=True))
    expected = q.sum(1) * log_sum[:, 0] + (q * below).sum(1)
    by_exp = 1 + min(lead, 100) / 16
    assert_one_rounding(loss.detach(), expected, scale=expected * by_exp)
    p = torch.exp(-below - log_sum)
    over = p * q.sum(1, keepdim=True)
    over.scatter_(1, peak, p.gather(1, peak) * q.scatter(1, peak, 0.0).sum(1, keepdim=True))
    under = q.clone()
    under.scatter_(1, peak, q.gather(1, peak) * -torch.expm1(-log_sum))
    assert_one_rounding(
        dx, over - under, scale=(over + under * by_exp) * (1 + below.clamp(max=100))
    )


def test_the_largest_logit_comes_last():
    x, target = draw(2, 4500)
    x[0, 4499] = x[1, 2048] = 20.0
    check(x, target)


@pytest.mark.parametrize("n", [5, 2100])
@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("value", [INF, -INF, NAN], ids=str)
def test_special_logits_are_torchs(value, share, n):
    x, target = draw(3, n)
    x[0, 3] = x[2, n - 1] = value
    x[1] = -INF
    target[0, 3] = target[2, n - 1] = share
    ours = cross_entropy(x, target, reduction="none")
    torch.testing.assert_close(ours, F.cross_entropy(x, target, reduction="none"), equal_nan=True)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (2, 5, 0), (0,)], ids=str)
def test_empty_logits_are_torchs(shape, reduction):
    x, target = torch.empty(shape, device=DEVICE), torch.empty(shape, device=DEVICE)
    ours = cross_entropy(x, target, reduction=reduction)
    theirs = F.cross_entropy(x, target, reduction=reduction)
    torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("wanted", [(True, False), (False, True)], ids=["logits", "target"])
def test_only_what_is_wanted_is_computed(wanted):
    x, target = draw(4, 9)
    seen = []
    observers.append(lambda kernel, grid, args, options: seen.append(args))
    try:
        for leaf, needs in zip((x, target), wanted, strict=True):
            leaf.requires_grad_(needs)
        cross_entropy(x, target).backward()
    finally:
        observers.pop()
    assert tuple(a is not None for a in seen[-1][8:10]) == wanted
    assert (x.grad is not None, target.grad is not None) == wanted


@pytest.mark.parametrize("channels_last", [False, True])
def test_classes_in_the_middle_are_read_where_they_lie(channels_last):
    x, target = draw(2, 130, 5, 3)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    seen = []
    observers.append(lambda kernel, grid, args, options: seen.append(args))
    try:
        cross_entropy(x, target)
    finally:
        observers.pop()
    assert [a.data_ptr() for a in seen[0][:2]] == [x.data_ptr(), target.data_ptr()]


def test_labels_are_their_one_hot_probabilities():
    x, _ = draw(6, 130)
    target = torch.randint(0, 130, (6,), device=DEVICE)
    one_hot = F.one_hot(target, 130).float()
    options = {"reduction": "none", "label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 5.0}
    torch.testing.assert_close(
        cross_entropy(x, one_hot, **options), cross_entropy(x, target, **options)
    )
