"""Cross-entropy: every option and row length against float64, and torch's semantics."""

import importlib

import pytest
import torch
import torch.nn.functional as F

from tests.support.compare import assert_one_rounding
from tests.support.devices import DEVICE, DTYPES, dtype_name
from trilith.kernels._runtime.launch import observers
from trilith.kernels.cross_entropy import cross_entropy
from trilith.plugins import registry
from trilith.plugins.conformance.compare import assert_same

OP = registry.op("trilith::cross_entropy")
SHAPES = ((1, 1), (3, 2), (9, 7), (5, 130), (2, 1024), (3, 1025), (1, 4096), (2, 4097), (1, 9001))
OPTIONS = {
    "plain": {},
    "weight": {"weight": True},
    "smoothing": {"label_smoothing": 0.1},
    "smoothing-weight": {"label_smoothing": 0.3, "weight": True},
    "z": {"z_loss": 1e-2},
    "softcap": {"softcap": 5.0},
    "all": {"weight": True, "label_smoothing": 0.2, "z_loss": 1e-2, "softcap": 30.0},
}
INF, NAN = float("inf"), float("nan")


def logits_and_labels(m, n, dtype=torch.float32):
    x = (2 * torch.randn(m, n)).to(DEVICE, dtype)
    return x, torch.randint(0, n, (m,), device=DEVICE)


def run(x, target, weight=None, dloss=None, *, ignore_index=-100, **options):
    """Per-row loss and dx, by the kernels and by the reference in float64."""
    constants = [options.get(k, v) for k, v in DEFAULTS.items()]
    dloss = torch.ones(x.shape[0], device=x.device) if dloss is None else dloss
    results = []
    for leaf in (x.detach(), x.detach().double()):
        leaf = leaf.requires_grad_()
        loss = OP(leaf, target, weight, ignore_index, *constants)
        (dx,) = torch.autograd.grad(loss, leaf, dloss.to(loss.dtype))
        results.append((loss.detach(), dx))
    return results


DEFAULTS = {"label_smoothing": 0.0, "z_loss": 0.0, "softcap": None}


def check(x, target, weight=None, dloss=None, *, loss_scale=None, **options):
    """The kernels against float64, by the one-rounding rule; returns the kernels' loss and dx."""
    (loss, dx), (loss64, dx64) = run(x, target, weight, dloss, **options)
    z, softcap = options.get("z_loss", 0.0), options.get("softcap")
    heaviest = 1.0 if weight is None else weight.max().item()
    logits = x.double() if softcap is None else softcap * torch.tanh(x.double() / softcap)
    lse = torch.logsumexp(logits, dim=1).abs().nan_to_num(0, 0, 0)
    rounding = 1.0 if softcap is None else 1.0 + softcap / 8
    scale = heaviest * rounding * (1 + z * lse * (1 + lse))
    assert loss.dtype == torch.float32 and dx.dtype == x.dtype
    assert_one_rounding(loss, loss64, scale=scale if loss_scale is None else loss_scale)
    upstream = 1.0 if dloss is None else dloss.double().abs().nan_to_num(0, 0, 0)[:, None]
    assert_one_rounding(dx, dx64, scale=scale[:, None] * upstream)
    return loss, dx


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("m, n", SHAPES, ids=lambda v: str(v))
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_loss_and_gradient_match_float64(dtype, m, n, name, poison):
    x, target = logits_and_labels(m, n, dtype)
    target[::3] = -100 if m > 1 else target[0].item()
    options = dict(OPTIONS[name])
    weight = torch.rand(n, device=DEVICE) + 0.5 if options.pop("weight", False) else None
    check(x, target, weight, torch.randn(m, device=DEVICE), **options)


def test_the_largest_vocabulary_is_read_to_its_last_column():
    x, target = logits_and_labels(2, 262144, torch.bfloat16)
    target[0] = 262143
    x[1, 262143] = 12.0
    check(x, target, label_smoothing=0.1)


def test_many_rows_share_a_program():
    x, target = logits_and_labels(1027, 3)
    check(x, target)


@pytest.mark.parametrize("n", [2, 130, 5000])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_confident_rows(dtype, n):
    x, target = logits_and_labels(4, n, dtype)
    x[torch.arange(4), target] = 16.0
    check(x, target)
    check(x, target, label_smoothing=0.1, z_loss=1e-3)


@pytest.mark.parametrize("lead", [4.0, 16.0])
def test_confident_loss_and_label_gradient_keep_their_relative_precision(lead):
    x, target = logits_and_labels(6, 33)
    x = x.clamp(-3, 3)
    x[torch.arange(6), target] = lead
    (loss, dx), (loss64, dx64) = run(x, target)
    torch.testing.assert_close(loss.double(), loss64, rtol=4e-6, atol=0)
    torch.testing.assert_close(dx.double(), dx64, rtol=4e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("n", [33, 5000])
def test_logits_far_from_zero(dtype, n):
    x, target = logits_and_labels(3, n)
    x = (x + 1e4).to(dtype)
    check(x, target)
    check(x, target, torch.rand(n, device=DEVICE), label_smoothing=0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("value, spread", [(0.0, 1e-4), (0.0, 0.0), (-7.0, 0.0)])
def test_nearly_constant_rows(dtype, value, spread):
    x = (value + spread * torch.randn(3, 130)).to(DEVICE, dtype)
    target = torch.tensor([0, 64, 129], device=DEVICE)
    for options in ({}, {"label_smoothing": 0.1}, {"softcap": 5.0}):
        check(x, target, **options)


def test_the_ends_of_float16():
    x = (6e4 * torch.randn(4, 130).sign()).to(DEVICE, torch.float16)
    x[3] = 6e4
    target = torch.tensor([0, 1, 2, 3], device=DEVICE)
    for options in ({}, {"label_smoothing": 0.1}, {"softcap": 30.0}):
        check(x, target, loss_scale=6e4, **options)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("n", [5, 4100])
@pytest.mark.parametrize("value", [INF, -INF, NAN], ids=str)
def test_a_special_logit_off_and_on_the_label(value, n, smoothing):
    x, target = logits_and_labels(4, n)
    target[:] = 1
    x[0, 3] = x[1, 1] = x[2, n - 1] = value
    (loss, dx), _ = run(x, target, label_smoothing=smoothing)
    check(x, target, label_smoothing=smoothing)
    if value == -INF and not smoothing:
        assert loss.isinf().tolist() == [False, True, False, False]
        assert dx[0, 3] == 0 and dx.isfinite().all()


@pytest.mark.parametrize("value", [INF, -INF], ids=str)
def test_infinite_logits_under_a_softcap_are_finite(value):
    x, target = logits_and_labels(2, 9)
    x[0, 3] = x[1, 1] = value
    target[:] = 1
    loss, dx = check(x, target, softcap=4.0)
    assert loss.isfinite().all() and dx[0, 3] == 0 and dx[1, 1] == 0


def test_a_vocabulary_masked_up_to_the_label():
    x, target = logits_and_labels(3, 4200)
    keep = torch.zeros_like(x, dtype=torch.bool).scatter_(1, target[:, None], True)
    loss, dx = check(x.masked_fill(~keep, -INF), target)
    assert (loss == 0).all() and (dx == 0).all()
    check(torch.full_like(x, -INF), target)


def test_one_class_costs_nothing():
    x, target = logits_and_labels(5, 1)
    loss, dx = check(x, target)
    assert (loss == 0).all() and (dx == 0).all()


@pytest.mark.parametrize("upstream", [0.0, INF, NAN], ids=str)
@pytest.mark.parametrize("n", [7, 5000])
def test_ignored_rows_are_exactly_zero(upstream, n):
    x, target = logits_and_labels(4, n)
    target[1] = target[3] = 5
    x[1] = NAN
    dloss = torch.tensor([1.0, upstream, 1.0, upstream], device=DEVICE)
    (loss, dx), _ = run(x, target, torch.ones(n, device=DEVICE), dloss, ignore_index=5, z_loss=0.1)
    assert (loss[[1, 3]] == 0).all() and (dx[[1, 3]] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_mean_over_no_rows_is_nan_and_its_gradient_zero(options, dtype):
    options = dict(options)
    weight = torch.ones(6, device=DEVICE) if options.pop("weight", False) else None
    x = torch.randn(3, 6, device=DEVICE, dtype=dtype, requires_grad=True)
    loss = cross_entropy(x, torch.full((3,), -100, device=DEVICE), weight, **options)
    loss.backward()
    assert loss.isnan() and (x.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
@pytest.mark.parametrize("label", [7, -1, 2**40])
def test_a_label_out_of_range_is_an_index_error_on_cpu(label, dtype):
    with pytest.raises(IndexError, match=str(label)):
        cross_entropy(torch.randn(2, 7, dtype=dtype), torch.tensor([3, label]))


@pytest.mark.parametrize("label", [7, -1, 2**40, -(2**62)])
def test_a_label_out_of_range_is_nan_in_the_kernel(label, monkeypatch):
    module = importlib.import_module("trilith.kernels.cross_entropy")
    monkeypatch.setattr(module, "require_labels", lambda *_: None)
    x = torch.randn(3, 7, device=DEVICE, requires_grad=True)
    target = torch.tensor([3, label, -100], device=DEVICE)
    loss = cross_entropy(x, target, torch.ones(7, device=DEVICE), reduction="none")
    loss.sum().backward()
    assert loss.isnan().tolist() == [False, True, False]
    assert x.grad.isnan().all(dim=1).tolist() == [False, True, False]
    assert cross_entropy(x, target, torch.ones(7, device=DEVICE)).isnan()


LAYOUTS = {
    "N-C": ((6, 5), (6,)),
    "C": ((5,), ()),
    "N-C-d": ((2, 5, 3), (2, 3)),
    "N-C-d-d": ((2, 5, 3, 2), (2, 3, 2)),
}


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
def test_layouts_and_reductions_are_torchs(dtype, layout, weighted, smoothing, reduction):
    shape, target_shape = LAYOUTS[layout]
    x = torch.randn(shape, device=DEVICE, dtype=dtype, requires_grad=True)
    target = torch.randint(0, 5, target_shape, device=DEVICE)
    if target.dim():
        target[-1] = -100
    weight = torch.rand(5, device=DEVICE, dtype=dtype) if weighted else None
    options = {"reduction": reduction, "label_smoothing": smoothing}
    ours = cross_entropy(x, target, weight, **options)
    theirs = F.cross_entropy(x, target, weight, **options)
    torch.testing.assert_close(ours, theirs)
    upstream = torch.randn_like(theirs)
    found = [torch.autograd.grad(loss, x, upstream)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("channels_last", [False, True])
def test_classes_in_the_middle_are_read_where_they_lie(channels_last):
    x = torch.randn(2, 130, 5, 7, device=DEVICE)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    target = torch.randint(0, 130, (2, 5, 7), device=DEVICE)
    seen = []
    observers.append(lambda kernel, grid, args, options: seen.append(args))
    try:
        loss = cross_entropy(x.requires_grad_(), target, label_smoothing=0.1)
        (dx,) = torch.autograd.grad(loss, x)
    finally:
        observers.pop()
    assert [a.data_ptr() for a in (seen[0][0], seen[1][1])] == [x.data_ptr()] * 2
    expected = F.cross_entropy(x, target, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(dx, torch.autograd.grad(expected, x)[0])


def test_the_loss_adds_terms_as_documented():
    x, target = logits_and_labels(6, 9, torch.float64)
    target[2] = -100
    weight = torch.rand(9, device=DEVICE, dtype=torch.float64)
    capped = 5 * torch.tanh(x / 5)
    z = 0.1 * torch.logsumexp(capped, 1).square().masked_fill(target == -100, 0)
    plain = F.cross_entropy(capped, target, reduction="none")
    options = {"z_loss": 0.1, "softcap": 5.0}
    for reduction, expected in (
        ("none", plain + z),
        ("sum", (plain + z).sum()),
        ("mean", (plain + z).sum() / 5),
    ):
        ours = cross_entropy(x, target, reduction=reduction, **options)
        torch.testing.assert_close(ours, expected)
    w = weight[target.clamp_min(0)].masked_fill(target == -100, 0)
    ours = cross_entropy(x, target, weight, **options)
    torch.testing.assert_close(ours, (w * (plain + z)).sum() / w.sum())


def test_the_result_has_the_inputs_dtype_but_under_autocast():
    x, target = logits_and_labels(4, 9, torch.bfloat16)
    for targets in (target, torch.full((4, 9), 1 / 9, device=DEVICE)):
        assert cross_entropy(x, targets).dtype == torch.bfloat16
        assert cross_entropy(x, targets, reduction="none").dtype == torch.bfloat16
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            assert cross_entropy(x, targets).dtype == torch.float32


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("soft", [False, True], ids=["labels", "probabilities"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_name)
def test_the_loss_of_16_bit_logits_is_float32_where_that_is_asked_for(dtype, soft, reduction):
    x, target = logits_and_labels(6, 33, dtype)
    target = torch.randn(6, 33, device=DEVICE).softmax(1) if soft else target
    x, x64 = x.requires_grad_(), x.detach().double().requires_grad_()
    loss = cross_entropy(x, target, reduction=reduction, dtype=torch.float32)
    loss64 = F.cross_entropy(x64, target.double() if soft else target, reduction=reduction)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), loss64, rtol=2e-6, atol=0)
    upstream = torch.rand(loss.shape, device=DEVICE)
    (dx,) = torch.autograd.grad(loss, x, upstream)
    (dx64,) = torch.autograd.grad(loss64, x64, upstream.double())
    assert dx.dtype == dtype
    assert_one_rounding(dx, dx64, scale=upstream.max().item())
    narrow = cross_entropy(x, target, reduction=reduction)
    assert torch.equal(narrow, loss.to(dtype)) and not torch.equal(narrow.float(), loss)
    with torch.autocast(DEVICE, dtype):
        assert torch.equal(cross_entropy(x, target, reduction=reduction, dtype=dtype), narrow)


def test_a_weight_may_require_a_gradient_where_none_is_recorded():
    x, target = logits_and_labels(4, 3)
    weight = torch.rand(3, device=DEVICE, requires_grad=True)
    with torch.no_grad():
        actual, expected = (f(x, target, weight) for f in (cross_entropy, F.cross_entropy))
    torch.testing.assert_close(actual, expected)


def test_byte_labels_are_taken():
    x, target = logits_and_labels(4, 9)
    weight = torch.rand(9, device=DEVICE)
    expected = cross_entropy(x, target, weight)
    assert_same("of bytes", cross_entropy(x, target.to(torch.uint8), weight), expected)


def test_the_gradient_of_a_mean_is_read_by_stride():
    seen = []
    x, target = logits_and_labels(64, 9)
    observers.append(lambda kernel, grid, args, options: seen.append(args))
    try:
        cross_entropy(x.requires_grad_(), target).backward()
    finally:
        observers.pop()
    dloss, dloss_stride = seen[-1][0], seen[-1][9]
    assert dloss.shape == (64,) and dloss.stride() == (0,) and dloss_stride == 0


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("shape", [(4, 5), (5,), (2, 5, 3)], ids=str)
def test_class_probabilities(shape, weighted, reduction):
    x = torch.randn(shape, device=DEVICE, requires_grad=True)
    dim = min(len(shape) - 1, 1)
    target = torch.randn(shape, device=DEVICE).softmax(dim)
    weight = torch.rand(5, device=DEVICE) if weighted else None
    ours = cross_entropy(x, target, weight, reduction=reduction, label_smoothing=0.1)
    theirs = F.cross_entropy(x, target, weight, reduction=reduction, label_smoothing=0.1)
    torch.testing.assert_close(ours, theirs)
    with_z = cross_entropy(x, target, reduction=reduction, z_loss=0.1, softcap=3.0)
    capped = 3 * torch.tanh(x / 3)
    z = 0.1 * torch.logsumexp(capped, dim).square()
    z = z if reduction == "none" else getattr(z, reduction)()
    torch.testing.assert_close(with_z, F.cross_entropy(capped, target, reduction=reduction) + z)
    with_z.sum().backward()
    assert x.grad.isfinite().all() and (x.grad != 0).any()


X, T = torch.randn(3, 5), torch.tensor([0, 1, 2])
ERRORS = {
    "int32": (RuntimeError, "int32", (X, T.int()), {}),
    "bool": (RuntimeError, "bool", (X, T.bool()), {}),
    "rows": (ValueError, r"\(3,\), got \(4,\)", (X, torch.zeros(4, dtype=torch.int64)), {}),
    "column": (RuntimeError, r"\(3,\), got \(3, 1\)", (X, T[:, None]), {}),
    "scalar": (ValueError, "class dimension", (X[0, 0], T[0]), {}),
    "weight": (RuntimeError, r"\(5,\), got \(4,\)", (X, T, torch.ones(4)), {}),
    "integers": (TypeError, "floating-point", (T[:, None], T), {}),
    "reduction": (ValueError, "batchmean", (X, T), {"reduction": "batchmean"}),
    "smoothing": (RuntimeError, "label_smoothing", (X, T), {"label_smoothing": 1.5}),
    "softcap": (ValueError, "softcap", (X, T), {"softcap": 0.0}),
    "dtype": (ValueError, "dtype must be .*torch.int64", (X, T), {"dtype": torch.int64}),
    "grad": (RuntimeError, "detach", (X, T, torch.ones(5, requires_grad=True)), {}),
    "probabilities": (RuntimeError, r"\(3, 5\), got \(3, 4\)", (X, torch.rand(3, 4)), {}),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_argument_and_value(name):
    error, match, args, options = ERRORS[name]
    with pytest.raises(error, match=match):
        cross_entropy(*args, **options)


@pytest.mark.parametrize("name", ["int32", "bool", "grad"])
def test_error_types_are_torchs(name):
    error, _, args, _ = ERRORS[name]
    with pytest.raises(error):
        F.cross_entropy(*args)
