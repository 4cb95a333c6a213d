import pytest
import torch
import torch.nn.functional as F

from tests.support.compare import assert_one_rounding
from tests.support.devices import DEVICE, DTYPES, dtype_name
from trilith.kernels._runtime.launch import observers
from trilith.kernels.norms import layer_norm, rms_norm

LENGTHS = (1, 2, 3, 17, 64, 127, 128, 129, 1000, 1024, 4097, 8193, 16387, 131072)
RESIDENT, SPLIT, LOOPED = 129, 8195, 16387
EPS = 1e-5

norms = pytest.mark.parametrize("norm", [layer_norm, rms_norm])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def leaf(values):
    return values.detach().requires_grad_()


def wide(values):
    """For the oracle: in float64, on the CPU, as torch's rms_norm of an inf is NaN on a GPU."""
    return values.detach().double().cpu()


def parameters_of(norm, n, dtype=torch.float32):
    return [randn(n, dtype=dtype) for _ in range(2 if norm is layer_norm else 1)]


def run(norm, x, parameters, dy, eps=EPS):
    """y, dx, dweight, dbias; in float64 of torch's own function."""
    function = norm
    if x.dtype == torch.float64:
        function = F.layer_norm if norm is layer_norm else F.rms_norm
    x, parameters = leaf(x), [leaf(p) for p in parameters]
    y = function(x, x.shape[-1:], *parameters, eps=eps)
    return y.detach(), *torch.autograd.grad(y, (x, *parameters), dy)


def scales(norm, x, parameters, dy, eps):
    """The magnitudes that are subtracted from each other on the way to each result."""
    weight = parameters[0]
    mean = x.mean(-1, keepdim=True) if norm is layer_norm else torch.zeros_like(x[..., :1])
    rstd = ((x - mean).square().mean(-1, keepdim=True) + eps).rsqrt()
    x_hat = (x - mean) * rstd
    raw = x.abs().amax(-1, keepdim=True) * rstd if norm is layer_norm else x_hat.abs()
    g = (dy * weight).abs()
    mean_gx = (dy * weight * x_hat).mean(-1, keepdim=True).abs()
    mean_raw = (g * raw).mean(-1, keepdim=True)
    dx = g + g.mean(-1, keepdim=True) + raw * mean_gx + x_hat.abs() * mean_raw
    y = raw * weight.abs() + (parameters[1].abs() if norm is layer_norm else 0)
    rows = tuple(range(x.ndim - 1))
    return y, rstd * dx, (dy.abs() * raw).amax(rows), dy.abs().amax(rows)


def expectations(norm, x, parameters, dy, eps=EPS):
    """Of y, dx, dweight, dbias: the value in float64, and the scale and length of its sums."""
    given = wide(x), [wide(p) for p in parameters], wide(dy)
    rows = x.numel() // x.shape[-1]
    return zip(run(norm, *given, eps), scales(norm, *given, eps), (1, 1, rows, rows), strict=False)


def check(norm, x, parameters, dy, eps=EPS):
    actual = run(norm, x, parameters, dy, eps)
    expected = list(expectations(norm, x, parameters, dy, eps))
    for a, (e, scale, terms) in zip(actual, expected, strict=True):
        assert_one_rounding(a, e, scale=scale, terms=terms)
    return actual


@norms
@dtypes
@pytest.mark.parametrize("n", LENGTHS)
def test_agrees_with_torch_in_float64_at_every_row_length(norm, n, dtype, poison):
    x, dy = randn(5, n, dtype=dtype), randn(5, n, dtype=dtype)
    check(norm, x, parameters_of(norm, n, dtype), dy)


@norms
@pytest.mark.parametrize(("m", "n"), [(1100, 33), (70, 1000), (40, 4096), (3, 3)])
def test_programs_that_take_several_tiles_of_rows_sum_all_of_them(norm, m, n, poison):
    check(norm, randn(m, n), parameters_of(norm, n), randn(m, n))


REGIMES = {
    "mean-1e4": lambda x: x + 1e4,
    "std-1e-4": lambda x: x * 1e-4,
    "constant": lambda x: torch.full_like(x, 3.3),
    "constant-1e4": lambda x: torch.full_like(x, 12345.678),
    "zero": torch.zeros_like,
    "first-1e4": lambda x: torch.cat([torch.full_like(x[:, :1], 1e4), x[:, 1:]], 1),
    "spread-1e-6-to-1e6": lambda x: x * torch.logspace(-6, 6, x.shape[1], device=x.device),
}


@norms
@pytest.mark.parametrize("n", [RESIDENT, LOOPED])
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_hard_rows(norm, regime, n, dtype):
    x = REGIMES[regime](randn(3, n)).to(dtype)
    check(norm, x, parameters_of(norm, n, dtype), randn(3, n, dtype=dtype))


@norms
@pytest.mark.parametrize("n", [RESIDENT, LOOPED])
def test_largest_half_precision_values_do_not_overflow(norm, n):
    x = torch.where(randn(3, n) > 0, 6e4, -6e4).half()
    check(norm, x, parameters_of(norm, n, torch.half), randn(3, n, dtype=torch.half))


@norms
@pytest.mark.parametrize("n", [RESIDENT, SPLIT, LOOPED])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_value_spoils_its_row_and_no_other(norm, n, bad):
    x, dy, parameters = randn(4, n), randn(4, n), parameters_of(norm, n)
    good = run(norm, x, parameters, dy)
    spoilt = x.clone()
    spoilt[1, n // 2] = bad
    y, dx, *_ = run(norm, spoilt, parameters, dy)
    expected = run(norm, wide(spoilt), [wide(p) for p in parameters], wide(dy))
    assert torch.equal(y[1].isnan().cpu(), expected[0][1].isnan())
    assert torch.equal(dx[1].isnan().cpu(), expected[1][1].isnan())
    others = [0, 2, 3]
    assert torch.equal(y[others], good[0][others]) and torch.equal(dx[others], good[1][others])


@norms
@pytest.mark.parametrize("n", [RESIDENT, LOOPED])
@pytest.mark.parametrize("eps", [0.0, 1e-12, 0.5])
def test_eps_enters_under_the_root(norm, n, eps):
    check(norm, randn(3, n) * 0.5, parameters_of(norm, n), randn(3, n), eps)


@dtypes
def test_rms_norm_takes_eps_none_as_torch_does(dtype):
    x, weight = randn(4, 65, dtype=dtype) * 1e-4, randn(65, dtype=dtype)
    eps = torch.finfo(torch.float32).eps
    assert torch.equal(rms_norm(x, (65,), weight), rms_norm(x, (65,), weight, eps))
    theirs = F.rms_norm(x, (65,), weight)
    assert (rms_norm(x, (65,), weight) - theirs).abs().max() <= 0.01 * theirs.abs().max()


@pytest.mark.parametrize("given", ["neither", "weight", "bias"])
@pytest.mark.parametrize("n", [RESIDENT, SPLIT, LOOPED])
def test_weight_and_bias_are_optional(given, n):
    x, dy = randn(3, n), randn(3, n)
    parameters = {"weight": randn(n), "bias": randn(n)}
    given = {k: v for k, v in parameters.items() if k == given}
    inputs, inputs64 = ([leaf(t) for t in ts] for ts in ((x, *given.values()),) * 2)
    inputs64 = [leaf(t.double()) for t in inputs64]
    y = layer_norm(inputs[0], (n,), **dict(zip(given, inputs[1:], strict=True)))
    y64 = F.layer_norm(inputs64[0], (n,), **dict(zip(given, inputs64[1:], strict=True)))
    assert_one_rounding(y.detach(), y64, scale=8)
    actual = torch.autograd.grad(y, inputs, dy)
    for a, e in zip(actual, torch.autograd.grad(y64, inputs64, dy.double()), strict=True):
        assert_one_rounding(a, e, scale=16, terms=3)


@norms
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("n", [RESIDENT, SPLIT, LOOPED])
def test_single_precision_parameters_with_half_precision_input(norm, n, dtype):
    m = 40 if n == RESIDENT else 3
    x, dy, parameters = randn(m, n, dtype=dtype), randn(m, n, dtype=dtype), parameters_of(norm, n)
    y, dx, *gradients = run(norm, x, parameters, dy)
    assert (y.dtype, dx.dtype) == (dtype, dtype)
    assert all(g.dtype == torch.float32 for g in gradients)
    check(norm, x, parameters, dy)


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every-second-column": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "padded-rows": lambda x: F.pad(x, (3, 5))[..., 3:-5],
    "columns-first": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "same-row": lambda x: x[:1, :1].expand(x.shape),
    "four-dimensions-permuted": lambda x: x.unflatten(0, (2, 2)).permute(1, 2, 0, 3),
}


@norms
@pytest.mark.parametrize(
    ("layout", "n"),
    [
        *((layout, RESIDENT) for layout in LAYOUTS),
        ("transposed", LOOPED),
        ("columns-first", LOOPED),
    ],
)
def test_any_strides_of_input_and_gradient(norm, layout, n):
    x, parameters = LAYOUTS[layout](randn(4, 2, n)), parameters_of(norm, n)
    dy = LAYOUTS[layout](randn(4, 2, n))
    assert all(a.is_contiguous() for a in check(norm, x, parameters, dy))


@norms
def test_strided_parameters(norm):
    parameters = [p[::2] for p in parameters_of(norm, 130)]
    check(norm, randn(4, 65), parameters, randn(4, 65))


@norms
def test_several_normalised_dimensions_are_one(norm):
    x = leaf(randn(2, 3, 4, 5))
    parameters = [leaf(p.reshape(4, 5)) for p in parameters_of(norm, 20)]
    y = norm(x, [4, 5], *parameters, eps=EPS)
    flat = norm(x.flatten(2), (20,), *(p.flatten() for p in parameters), eps=EPS)
    assert torch.equal(y, flat.unflatten(-1, (4, 5)))
    gradients = torch.autograd.grad(y.sum(), parameters)
    assert [g.shape for g in gradients] == [p.shape for p in parameters]


@norms
def test_one_dimensional_input(norm):
    check(norm, randn(77), parameters_of(norm, 77), randn(77))


@norms
@pytest.mark.parametrize("n", [RESIDENT, SPLIT])
def test_backward_does_only_what_is_needed(norm, n):
    x, parameters, dy = randn(3, n), parameters_of(norm, n), randn(3, n)
    expected = list(expectations(norm, x, parameters, dy))[1:]
    for wanted, (value, scale, terms) in enumerate(expected):
        inputs = [x.clone(), *(p.clone() for p in parameters)]
        inputs[wanted].requires_grad_()
        y = norm(inputs[0], (n,), *inputs[1:], eps=EPS)
        launched = []
        observers.append(lambda kernel, *_, seen=launched: seen.append(kernel.__name__))
        try:
            (gradient,) = torch.autograd.grad(y, inputs[wanted], dy)
        finally:
            observers.pop()
        assert_one_rounding(gradient, value, scale=scale, terms=terms)
        assert ("_column_sum_kernel" in launched) == (wanted > 0)
        assert ("_norm_bwd_sums_kernel" in launched) == (wanted == 0 and n == SPLIT)


@norms
def test_saves_its_inputs_and_one_number_a_row_and_statistic(norm):
    x, parameters = leaf(randn(6, 65)), [leaf(p) for p in parameters_of(norm, 65)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        norm(x, (65,), *parameters, eps=EPS)
    given = {t.data_ptr() for t in (x, *parameters)}
    own = [t for t in saved if t.data_ptr() not in given]
    assert [(t.shape, t.dtype) for t in own] == [((6,), torch.float32)] * len(parameters)


@norms
@pytest.mark.parametrize("n", [RESIDENT, SPLIT, LOOPED])
def test_repeats_are_equal_to_the_bit(norm, n):
    m = 66 if n == RESIDENT else 3
    x, dy, parameters = randn(m, n), randn(m, n), parameters_of(norm, n)
    first = run(norm, x, parameters, dy)
    for _ in range(3 if DEVICE == "cpu" else 50):
        assert all(map(torch.equal, run(norm, x, parameters, dy), first))


@norms
def test_errors_name_what_is_wrong(norm):
    name, x = norm.__name__, randn(4, 6)
    with pytest.raises(RuntimeError, match=rf"{name}: normalized_shape must have at least one"):
        norm(x, ())
    with pytest.raises(RuntimeError, match=rf"{name}: input must have shape \(\*, 5\).*\(4, 6\)"):
        norm(x, (5,))
    with pytest.raises(RuntimeError, match=rf"{name}: input must have shape \(\*, 2, 4, 6\)"):
        norm(x, (2, 4, 6))
    with pytest.raises(RuntimeError, match=rf"{name}: weight must have normalized_shape \(6,\)"):
        norm(x, (6,), randn(5))
    with pytest.raises(TypeError):
        norm(x, 6)
    with pytest.raises(TypeError, match=rf"{name}: input must be a floating-point tensor"):
        norm(x.long(), (6,))
    with pytest.raises(ValueError, match=rf"{name}: weight must be on the input's device"):
        norm(x, (6,), torch.ones(6, device="meta"))


def test_bias_of_another_shape_is_an_error():
    with pytest.raises(RuntimeError, match=r"layer_norm: bias must have normalized_shape \(6,\)"):
        layer_norm(randn(4, 6), (6,), None, randn(1))
