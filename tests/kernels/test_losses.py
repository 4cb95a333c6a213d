"""Binary cross-entropy with logits and squared error against float64 and torch's semantics."""

import warnings

import pytest
import torch
import torch.nn.functional as F

from tests.support.compare import assert_one_rounding
from tests.support.devices import DEVICE, DTYPES, dtype_name
from trilith.kernels import binary_cross_entropy_with_logits, mse_loss

INF, NAN = float("inf"), float("nan")
REDUCTIONS = ("none", "sum", "mean")
FUNCTIONS = {
    "bce": (binary_cross_entropy_with_logits, F.binary_cross_entropy_with_logits),
    "mse": (mse_loss, F.mse_loss),
}


def draw(*shape, dtype=torch.float32, spread=3.0):
    x = (spread * torch.randn(shape)).to(DEVICE, dtype).requires_grad_()
    return x, torch.rand(shape).to(DEVICE, dtype).requires_grad_()


def doubled(*tensors):
    return [
        None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors
    ]


def check(name, x, target, reduction, scale, **weights):
    """Loss and gradients of input and target by the one-rounding rule."""
    ours, theirs = FUNCTIONS[name]
    loss = ours(x, target, reduction=reduction, **weights)
    x64, target64 = doubled(x, target)
    wide = dict(zip(weights, doubled(*weights.values()), strict=True))
    loss64 = theirs(x64, target64, reduction=reduction, **wide)
    count = 1 if reduction == "none" else x.numel()
    share = x.numel() if reduction == "mean" else 1
    whole = scale if reduction == "none" else scale.max().item() * count**0.5 / share
    assert_one_rounding(loss.detach(), loss64.detach(), scale=whole, terms=count)
    upstream = torch.randn_like(loss)
    found = torch.autograd.grad(loss, (x, target), upstream)
    expected = torch.autograd.grad(loss64, (x64, target64), upstream.double())
    for grad, grad64 in zip(found, expected, strict=True):
        assert grad.dtype == x.dtype
        assert_one_rounding(grad, grad64, scale=scale * upstream.double().abs() / share)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(), (1,), (7, 33), (3, 5, 130), (4, 1025), (9000,)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_loss_and_gradients_match_float64(name, dtype, shape, reduction, poison):
    x, target = draw(*shape, dtype=dtype)
    scale = 1 + (x.detach().double().abs() + 1) ** (2 if name == "mse" else 1)
    check(name, x, target, reduction, scale)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", [(6, 33), (33,), (6, 1), (1, 33), ()], ids=str)
def test_weights_broadcast_as_in_torch(shape, dtype, reduction):
    x, target = draw(6, 33, dtype=dtype)
    weights = {k: torch.rand(shape).to(DEVICE, dtype) for k in ("weight", "pos_weight")}
    scale = 4 * (2 + x.detach().double().abs())
    check("bce", x, target, reduction, scale, **weights)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
def test_weighted_squared_error_is_torchs_with_three_gradients(dtype, reduction):
    x, target = draw(6, 33, dtype=dtype)
    weight = torch.rand(6, 33, dtype=dtype, device=DEVICE).requires_grad_()
    found = []
    for function in FUNCTIONS["mse"]:
        loss = function(x, target, reduction=reduction, weight=weight)
        found.append((loss, *torch.autograd.grad(loss.sum(), (x, target, weight))))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("label", [0.0, 1.0])
@pytest.mark.parametrize("size", [1e-3, 4.0, 16.0, 80.0])
def test_confident_losses_keep_their_relative_precision(size, label):
    x = torch.tensor([size, -size], device=DEVICE, requires_grad=True)
    target = torch.full_like(x, label)
    loss = binary_cross_entropy_with_logits(x, target, reduction="none")
    x64 = x.detach().double().requires_grad_()
    sign = 1 - 2 * label
    loss64 = torch.where(
        sign * x64 > 0,
        (sign * x64).clamp_min(0) + (-x64.abs()).exp().log1p(),
        (-x64.abs()).exp().log1p(),
    )
    dx64 = sign * torch.sigmoid(sign * x64.detach())
    torch.testing.assert_close(loss.double(), loss64, rtol=2e-6, atol=1e-37)
    (dx,) = torch.autograd.grad(loss.sum(), x)
    torch.testing.assert_close(dx.double(), dx64, rtol=2e-6, atol=1e-37)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_infinite_and_huge_predictions_have_torchs_losses(name):
    values = torch.tensor([INF, -INF, NAN, 1e4, -1e4, 6e4, 0.0], device=DEVICE)
    for label in (0.0, 0.5, 1.0):
        ours, theirs = FUNCTIONS[name]
        target = torch.full_like(values, label)
        expected = theirs(values.double(), target.double(), reduction="none")
        assert_one_rounding(ours(values, target, reduction="none"), expected, scale=6e4)


def test_a_mean_of_many_programs_counts_every_element_once(monkeypatch):
    from trilith.kernels._runtime import elementwise

    monkeypatch.setattr(elementwise, "multiprocessors", lambda device: 1)
    x, target = draw(41, 1000)
    check("bce", x, target, "mean", 2 + x.detach().double().abs())
    check("mse", x.t(), target.t(), "sum", (2 + x.detach().double().abs().t()) ** 2)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_mean_over_nothing_is_nan_and_a_sum_zero(name):
    x, target = draw(0, 3)
    assert FUNCTIONS[name][0](x, target).isnan()
    assert FUNCTIONS[name][0](x, target, reduction="sum") == 0


def test_shapes_that_broadcast_are_warned_of():
    x, target = draw(4, 5)
    with pytest.warns(UserWarning, match="broadcast"):
        ours = mse_loss(x, target[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(ours, F.mse_loss(x, target[0]))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_old_spelling_of_reduction(name):
    x, target = draw(3, 4)
    ours, _ = FUNCTIONS[name]
    with pytest.warns(UserWarning, match="deprecated"):
        assert torch.equal(ours(x, target, reduce=False), ours(x, target, reduction="none"))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_dtypes_are_promoted_and_autocast_widens(name):
    x, target = draw(3, 4, dtype=torch.bfloat16)
    ours, _ = FUNCTIONS[name]
    assert ours(x, target).dtype == torch.bfloat16
    assert ours(x, target.float()).dtype == torch.float32
    assert ours(x, target.double()).dtype == torch.float64
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert ours(x, target).dtype == torch.float32


X, T = torch.randn(3, 5), torch.rand(3, 5)
ERRORS = {
    "target": ("bce", ValueError, r"\(3, 5\), got \(5,\)", (X, T[0]), {}),
    "weight": ("bce", RuntimeError, "", (X, T, torch.ones(4)), {}),
    "wide": ("bce", RuntimeError, "", (X, T, torch.ones(2, 3, 5)), {}),
    "gradient": ("bce", RuntimeError, "detach", (X, T, torch.ones(5, requires_grad=True)), {}),
    "reduction": ("bce", ValueError, "batchmean", (X, T), {"reduction": "batchmean"}),
    "mse-shapes": ("mse", RuntimeError, "", (X, torch.rand(4)), {}),
    "mse-weight": ("mse", ValueError, "weight", (X, T), {"weight": torch.ones(5)}),
    "mse-reduction": ("mse", ValueError, "batchmean", (X, T), {"reduction": "batchmean"}),
}


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.filterwarnings("ignore")
def test_errors_are_of_torchs_types(name):
    family, error, match, args, options = ERRORS[name]
    ours, theirs = FUNCTIONS[family]
    with pytest.raises(error, match=match):
        ours(*args, **options)
    with pytest.raises(error):
        theirs(*args, **options).sum().backward()


def test_labels_that_are_integers_are_refused_where_they_are_probabilities():
    with pytest.raises(TypeError, match="floating-point"):
        binary_cross_entropy_with_logits(X, torch.ones(3, 5, dtype=torch.int64))
