import pytest
import torch
import torch.nn.functional as F

from tests.kernels.test_norms import scales
from tests.support.compare import assert_one_rounding
from tests.support.devices import DEVICE, DTYPES, dtype_name
from trilith.kernels import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from trilith.kernels._runtime.launch import observers
from trilith.kernels._runtime.random import draw_seed, reference_keep_mask

LENGTHS = (1, 3, 33, 129, 1000, 4097, 8195, 16387)
EPS = 1e-5
TORCH = {add_layer_norm: (layer_norm, F.layer_norm), add_rms_norm: (rms_norm, F.rms_norm)}

functions = pytest.mark.parametrize("function", TORCH)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def leaf(values):
    return values.detach().requires_grad_()


def parameters_of(function, n, dtype=torch.float32):
    return [randn(n, dtype=dtype) for _ in range(2 if function is add_layer_norm else 1)]


def factor_of(shape, p, seed=7):
    """What dropout multiplies by, given the generator's state; float64."""
    if p == 0:
        return torch.ones(shape, dtype=torch.float64, device=DEVICE)
    torch.manual_seed(seed)
    kept = reference_keep_mask(draw_seed(torch.empty(0, device=DEVICE)), shape, p)
    return kept.double() / (1 - p)


def check(function, x, residual, parameters, p=0.0):
    dnormed, dsummed = randn(*x.shape, dtype=residual.dtype), randn(*x.shape, dtype=residual.dtype)
    inputs = [leaf(x), leaf(residual), *map(leaf, parameters)]
    torch.manual_seed(7)
    normed, summed = function(*inputs, eps=EPS, p=p)
    found = torch.autograd.grad((normed, summed), inputs, (dnormed, dsummed))
    factor = factor_of(tuple(x.shape), p)
    total = residual.double() + factor * x.double()
    size = residual.double().abs() + factor * x.double().abs()
    assert_one_rounding(summed.detach(), total, scale=size)

    ours, theirs = TORCH[function]
    wide = [leaf(summed.double()), *(leaf(q.double()) for q in parameters)]
    expected = theirs(wide[0], x.shape[-1:], *wide[1:], eps=EPS)
    dtotal, *dparameters = torch.autograd.grad(expected, wide, dnormed.double())
    dtotal = dtotal + dsummed.double()
    flat = [t.detach().double().reshape(-1, x.shape[-1]) for t in (summed, dnormed)]
    bounds = scales(ours, flat[0], [q.detach() for q in wide[1:]], flat[1], EPS)
    by_norm, dx_bound = (b.reshape(x.shape) for b in bounds[:2])
    dx_bound = dx_bound + dsummed.double().abs()
    assert_one_rounding(normed.detach(), expected.detach(), scale=by_norm)
    assert_one_rounding(found[0], factor * dtotal, scale=factor * dx_bound)
    assert_one_rounding(found[1], dtotal, scale=dx_bound)
    rows = len(flat[0])
    for actual, e, scale in zip(found[2:], dparameters, bounds[2:], strict=False):
        assert_one_rounding(actual, e, scale=scale, terms=rows)


@functions
@dtypes
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("n", LENGTHS)
def test_agrees_with_float64_at_every_row_length(function, n, p, dtype, poison):
    x, residual = randn(3, n, dtype=dtype), randn(3, n, dtype=dtype)
    check(function, x, residual, parameters_of(function, n, dtype), p)


@functions
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_name)
def test_a_wider_residual_keeps_its_precision(function, dtype, p):
    x, residual = randn(9, 40, dtype=dtype), randn(9, 40)
    check(function, x, residual, parameters_of(function, 40), p)


@functions
@pytest.mark.parametrize("n", [33, 16387])
def test_any_strides(function, n):
    x, residual = randn(2, 3, n).transpose(0, 1), randn(3, 2, 2 * n)[..., ::2]
    check(function, x, residual, parameters_of(function, n), 0.25)


@functions
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_either_output_may_be_unused(function, p):
    x, residual, g = randn(4, 20), randn(4, 20), randn(4, 20)
    both = []
    for used in (0, 1):
        inputs = [leaf(x), leaf(residual)]
        torch.manual_seed(3)
        both.append(torch.autograd.grad(function(*inputs, p=p)[used], inputs, g))
    inputs = [leaf(x), leaf(residual)]
    torch.manual_seed(3)
    full = torch.autograd.grad(function(*inputs, p=p), inputs, (g, g))
    for a, b, c in zip(*both, full, strict=True):
        torch.testing.assert_close(a + b, c, rtol=1e-5, atol=1e-6)
    assert torch.equal(both[1][1], g)  # the sum's own gradient reaches the residual as it is


@functions
def test_the_sum_is_kept_and_its_inputs_are_not(function):
    inputs = [leaf(randn(6, 65)), leaf(randn(6, 65)), *map(leaf, parameters_of(function, 65))]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        _, summed = function(*inputs, p=0.1)
    assert not {t.data_ptr() for t in saved} & {t.data_ptr() for t in inputs[:2]}
    large = [t for t in saved if t.numel() >= summed.numel()]
    assert [t.data_ptr() for t in large] == [summed.data_ptr()]


@functions
def test_forward_is_one_launch_and_backward_two(function):
    launched = []
    observers.append(lambda kernel, *_: launched.append(kernel.__name__))
    try:
        inputs = [leaf(randn(4, 64)), leaf(randn(4, 64)), *map(leaf, parameters_of(function, 64))]
        outputs = function(*inputs)
        assert launched == ["_norm_fwd_kernel"]
        torch.autograd.grad(outputs, inputs, [torch.ones_like(o) for o in outputs])
    finally:
        observers.pop()
    assert launched[1:] == ["_norm_bwd_kernel", "_column_sum_kernel"]


@functions
def test_second_derivatives_flow_through_the_sum(function):
    x, residual = leaf(randn(3, 8)), leaf(randn(3, 8))
    weight = torch.ones(8, device=DEVICE)

    def second(f, *inputs):
        normed, summed = f(*inputs)
        (g,) = torch.autograd.grad((normed * summed).square().sum(), inputs[0], create_graph=True)
        return torch.autograd.grad(g.square().sum(), inputs)

    def plain(x, residual):
        summed = residual + x
        return TORCH[function][1](summed, (8,), weight.to(x.dtype), eps=EPS), summed

    found = second(lambda x, r: function(x, r, weight, eps=EPS), x, residual)
    expected = second(plain, leaf(x.double()), leaf(residual.double()))
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-3, atol=1e-3 * e.abs().max().item())


@functions
def test_not_training_drops_nothing(function):
    x, residual = randn(4, 12), randn(4, 12)
    for a, b in zip(
        function(x, residual, p=0.5, training=False), function(x, residual), strict=True
    ):
        assert torch.equal(a, b)


@functions
def test_errors_name_what_is_wrong(function):
    name, x = function.__name__, randn(4, 6)
    with pytest.raises(ValueError, match=rf"{name}: residual must have shape \(4, 6\)"):
        function(x, randn(4, 5))
    with pytest.raises(ValueError, match=rf"{name}: weight must have shape \(6,\)"):
        function(x, x, randn(5))
    with pytest.raises(ValueError, match=rf"{name}: p must be a probability"):
        function(x, x, p=1.5)
    with pytest.raises(TypeError, match=rf"{name}: x must be a floating-point tensor"):
        function(x.long(), x)
