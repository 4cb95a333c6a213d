"""batch_norm against float64: statistics, gradients, layouts, running statistics."""

import pytest
import torch
import torch.nn.functional as F

from tests.support.compare import assert_one_rounding
from tests.support.devices import DEVICE, DTYPES, dtype_name
from trilith.kernels import batch_norm

SHAPES = [(2, 1), (33, 7), (70, 130), (5, 18, 21), (3, 2, 1030), (2, 3, 4, 5)]


def draw(shape, dtype=torch.float32, mean=0.0):
    x = (torch.randn(shape) + mean).to(DEVICE, dtype).requires_grad_()
    weight, bias = torch.randn(2, shape[1]).to(DEVICE, dtype)
    return x, weight.requires_grad_(), bias.requires_grad_()


def check(x, weight, bias, training, running=(None, None)):
    given = [None if r is None else r.clone() for r in running]
    y = batch_norm(x, *given, weight, bias, training)
    leaves = [x, weight, bias]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    given64 = [None if r is None else r.double() for r in running]
    y64 = F.batch_norm(wide[0], *given64, *wide[1:], training)
    dims = [d for d in range(x.dim()) if d != 1]
    shape = (-1, *(1,) * (x.dim() - 2))
    x64 = wide[0].detach()
    mean = x64.mean(dims) if training else given64[0]
    var = x64.var(dims, correction=0) if training else given64[1]
    rstd = ((var + 1e-5) ** -0.5).reshape(shape)
    x_hat = (x64.abs() + mean.abs().reshape(shape)) * rstd  # before the subtraction
    w, b = (t.detach().double().abs().reshape(shape) for t in (weight, bias))
    assert (y.shape, y.dtype, y.is_contiguous()) == (x.shape, x.dtype, True)
    assert_one_rounding(y.detach(), y64.detach(), scale=(1 + x_hat) * w + b)
    dy = torch.randn(x.shape).to(DEVICE, x.dtype)
    dx, dw, db = torch.autograd.grad(y, leaves, dy)
    dx64, dw64, db64 = torch.autograd.grad(y64, wide, dy.double())
    up = dy.double().abs().amax(dims, keepdim=True)
    terms = x.numel() // x.shape[1]
    assert_one_rounding(dx, dx64, scale=w * rstd * up * (2 + x_hat) ** 2)
    worst = (up * (1 + x_hat)).amax(dims)
    assert_one_rounding(dw, dw64, scale=worst, terms=terms)
    assert_one_rounding(db, db64, scale=up.flatten(), terms=terms)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("training", [True, False], ids=["batch", "given"])
def test_output_and_gradients_match_float64(training, dtype, shape, poison):
    running = (torch.randn(shape[1], device=DEVICE), torch.rand(shape[1], device=DEVICE) + 0.5)
    check(*draw(shape, dtype), training, running)


@pytest.mark.parametrize("shape", [(40, 6), (6, 4, 50)], ids=str)
def test_any_strides_and_a_mean_far_from_zero(shape):
    x, weight, bias = draw(shape, mean=100.0)
    for view in (x, x.transpose(0, 1).contiguous().transpose(0, 1), x[::2]):
        check(view.detach().requires_grad_(), weight, bias, True)


@pytest.mark.parametrize("rest", [(64,), (2, 1000)], ids=str)
def test_programs_that_take_several_tiles_merge_all_of_them(rest, poison):
    """Rows drift, so that each tile's mean is another."""
    shares = 128 if DEVICE == "cuda" else 24  # the most there are, of 32 and of 1024 rows
    shape = (70 * shares, *rest) if len(rest) == 1 else (2 * shares + 1, *rest)
    x, weight, bias = draw(shape)
    drift = torch.linspace(-3, 5, shape[0], device=DEVICE).reshape(-1, *(1,) * (len(shape) - 1))
    check((x.detach() + drift).requires_grad_(), weight, bias, True)


def test_one_large_first_value_does_not_spoil_the_variance():
    x, weight, bias = draw((3000, 2))
    with torch.no_grad():
        x[0] = 1e3
    y = batch_norm(x, None, None, training=True)
    y64 = F.batch_norm(x.detach().double(), None, None, training=True)
    torch.testing.assert_close(y.double(), y64, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0])
def test_running_statistics_move_as_torchs(momentum):
    x, weight, bias = draw((9, 4, 3))
    ours = [torch.zeros(4, device=DEVICE), torch.ones(4, device=DEVICE)]
    theirs = [t.clone() for t in ours]
    batch_norm(x, *ours, weight, bias, True, momentum)
    F.batch_norm(x, *theirs, weight, bias, True, momentum)
    torch.testing.assert_close(ours, theirs)
    assert not ours[0].requires_grad


def test_compiles_whole_with_running_statistics():
    x, weight, bias = draw((9, 4))
    found = []
    for function in (batch_norm, torch.compile(batch_norm, backend="aot_eager", fullgraph=True)):
        running = [torch.zeros(4, device=DEVICE), torch.ones(4, device=DEVICE)]
        y = function(x, *running, weight, bias, True)
        found.append([y, *running, *torch.autograd.grad(y.square().sum(), (x, weight))])
    torch.testing.assert_close(*found)


def test_errors_are_torchs():
    x, weight, bias = draw((3, 4))
    running = (torch.zeros(4, device=DEVICE), torch.ones(4, device=DEVICE))
    for function in (batch_norm, F.batch_norm):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            function(x[:1], *running, training=True)
        with pytest.raises(RuntimeError, match="4 elements"):
            function(x, *running, weight[:2], bias)
        with pytest.raises(RuntimeError):
            function(x, None, None)
