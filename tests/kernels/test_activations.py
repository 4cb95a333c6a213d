import math

import pytest
import torch

from tests.support.compare import assert_one_rounding
from tests.support.devices import DEVICE, DTYPES, dtype_name
from trilith.kernels import activations as family
from trilith.kernels._runtime import launch as launching
from trilith.kernels._runtime.functors import ACTIVATIONS
from trilith.kernels.activations import bias_act, gated_act

NAMES = list(ACTIVATIONS)
SELECTING = ("identity", "relu", "leaky_relu")  # they pick the gradient, and never scale it by 0
INF, NAN = math.inf, math.nan
SPECIAL = (NAN, INF, -INF, 0.0, -0.0, 1.0, -1.0, 20.0, -20.0, 6e4, -6e4)
HUGE = (1e30, -1e30, 3e38, -3e38, 1e-30, -1e-30)


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def regimes(dtype, n=45):
    """Rows: ordinary, tiny, small, around 1e4, a ramp through saturation, large, constant."""
    ramp = torch.linspace(-30, 30, n, device=DEVICE)
    rows = [randn(n), 1e-4 * randn(n), 0.3 * randn(n), 1e4 + randn(n), ramp, 2000 * ramp]
    return torch.stack([*rows, torch.full((n,), 0.7, device=DEVICE)]).to(dtype)


def specials(dtype):
    values = SPECIAL if dtype == torch.float16 else SPECIAL + HUGE
    return torch.tensor(values, device=DEVICE).to(dtype)


def oracle(op, args, dy):
    """Output and gradients of the reference in float64."""
    wide = [
        a.detach().double().requires_grad_(a.requires_grad)
        if isinstance(a, torch.Tensor) and a.is_floating_point()
        else a
        for a in args
    ]
    y = op.spec.reference(*wide)
    wanted = [a for a in wide if isinstance(a, torch.Tensor) and a.requires_grad]
    return y.detach(), torch.autograd.grad(y, wanted, dy.double())


def launched(call):
    names = []

    def observe(kernel, grid, args, options):
        names.append(kernel.__name__)

    launching.observers.append(observe)
    try:
        result = call()
    finally:
        launching.observers.remove(observe)
    return result, names


def output_scale(activation, z):
    size = z.double().abs()
    return {"sigmoid": 1.0, "relu2": size.square()}.get(activation, size)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("activation", NAMES)
def test_bias_act_without_a_bias_is_the_activation_in_every_regime(activation, dtype):
    x = regimes(dtype).requires_grad_()
    dy = randn(*x.shape, dtype=dtype)
    y = bias_act(x, activation=activation)
    y64, (dx64,) = oracle(family.BIAS_ACT, (x, None, None, activation, 0.0), dy)
    assert_one_rounding(y, y64, scale=output_scale(activation, x))
    (dx,) = torch.autograd.grad(y, x, dy)
    assert_one_rounding(dx, dx64, scale=dy.double().abs())


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("activation", NAMES)
def test_infinities_nan_and_extremes_come_out_as_torch_has_them(activation, dtype):
    x = specials(dtype)
    x = (x[1:] if activation == "elu" else x).requires_grad_()  # torch's elu' of NaN varies
    y = bias_act(x, activation=activation)
    for g in (1.0, INF) if activation in SELECTING else (1.0,):
        dy = torch.full_like(x, g)
        y64, (dx64,) = oracle(family.BIAS_ACT, (x, None, None, activation, 0.0), dy)
        (dx,) = torch.autograd.grad(y, x, dy, retain_graph=True)
        assert_one_rounding(dx, dx64, scale=1.0)
    finite = x.double().abs().nan_to_num(1.0, 1.0)
    assert_one_rounding(y, y64, scale=finite)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("activation", NAMES)
def test_plain_pytorch_rounds_once_too(activation, dtype):
    x = randn(7, 45, dtype=dtype)
    y = family.BIAS_ACT.spec.reference(x, None, None, activation, 0.0)
    y64 = family.BIAS_ACT.spec.reference(x.double(), None, None, activation, 0.0)
    assert_one_rounding(y, y64, scale=output_scale(activation, x))


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu", "silu", "tanh", "elu"])
def test_tiny_arguments_keep_their_digits(activation):
    x = torch.logspace(-30, -1, 200, device=DEVICE)
    x = torch.cat([x, -x])
    y = bias_act(x, activation=activation)
    y64, _ = oracle(family.BIAS_ACT, (x.clone().requires_grad_(), None, None, activation, 0.0), y)
    assert ((y.double() - y64) / y64).abs().max() < 8 * 2.0**-24


@pytest.mark.parametrize("bias_dtype", [None, torch.float32], ids=["same", "fp32-bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu", "relu", "silu", "tanh"])
def test_bias_act_adds_the_bias_before_the_activation(activation, dtype, bias_dtype):
    x = regimes(dtype).requires_grad_()
    bias = randn(x.shape[-1], dtype=bias_dtype or dtype).requires_grad_()
    dy = randn(*x.shape, dtype=dtype)
    y = bias_act(x, bias, activation)
    y64, (dx64, db64) = oracle(family.BIAS_ACT, (x, bias, None, activation, 0.0), dy)
    z = x.detach().double().abs() + bias.detach().double().abs()
    assert_one_rounding(y, y64, scale=z)
    dx, db = torch.autograd.grad(y, (x, bias), dy)
    scale = dy.double().abs() * (1 + z.clamp_max(30))
    assert_one_rounding(dx, dx64, scale=scale)
    assert_one_rounding(db, db64, scale=scale.amax(0), terms=x.shape[0])
    assert (dx.dtype, db.dtype) == (x.dtype, bias.dtype)


@pytest.mark.parametrize("n", [1, 15, 127, 128, 129, 520])
@pytest.mark.parametrize("m", [1, 15, 17, 65])
def test_the_bias_gradient_sums_every_row_once(m, n):
    x = randn(m, n).requires_grad_()
    bias = randn(n).requires_grad_()
    dy = randn(m, n)
    y = bias_act(x, bias, "silu")
    y64, (dx64, db64) = oracle(family.BIAS_ACT, (x, bias, None, "silu", 0.0), dy)
    dx, db = torch.autograd.grad(y, (x, bias), dy)
    z = x.detach().double().abs() + bias.detach().double().abs()
    assert_one_rounding(y, y64, scale=z)
    assert_one_rounding(dx, dx64, scale=dy.double().abs() * (1 + z))
    assert_one_rounding(db, db64, scale=(dy.double().abs() * (1 + z)).amax(0), terms=m)


def test_programs_that_own_several_tiles_of_rows_sum_all_of_them(monkeypatch):
    from trilith.kernels._runtime import elementwise

    monkeypatch.setattr(elementwise, "multiprocessors", lambda device: 1)
    x, bias = randn(600, 20).requires_grad_(), randn(20).requires_grad_()
    dy = randn(600, 20)
    y = bias_act(x, bias)
    _, (dx64, db64) = oracle(family.BIAS_ACT, (x, bias, None, "gelu", 0.0), dy)
    dx, db = torch.autograd.grad(y, (x, bias), dy)
    assert_one_rounding(dx, dx64, scale=8 * dy.double().abs())
    assert_one_rounding(db, db64, scale=8 * dy.double().abs().amax(0), terms=600)


def test_a_nan_in_one_element_stays_in_its_row_and_column():
    x, bias = randn(20, 130), randn(130)
    x[3, 7] = NAN
    x.requires_grad_()
    bias.requires_grad_()
    y = bias_act(x, bias)
    dx, db = torch.autograd.grad(y.sum(), (x, bias))
    assert y.isnan().nonzero().tolist() == [[3, 7]]
    assert dx.isnan().nonzero().tolist() == [[3, 7]]
    assert db.isnan().nonzero().tolist() == [[7]]


@pytest.mark.parametrize("frozen", ["x", "bias"])
def test_a_frozen_input_gets_no_gradient_and_costs_none(frozen):
    x, bias = randn(40, 24), randn(24)
    (bias if frozen == "x" else x).requires_grad_()
    y = bias_act(x, bias)
    _, names = launched(lambda: y.sum().backward())
    assert (x.grad is None) == (frozen == "x") and (bias.grad is None) == (frozen == "bias")
    sums = ["_column_sum_kernel"] if frozen == "x" else []
    assert names == ["_bias_act_bwd_kernel", *sums]


def test_only_inputs_are_saved_for_backward():
    x, bias = randn(8, 24).requires_grad_(), randn(24).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        bias_act(x, bias, p=0.5)
        gated_act(x, x.detach().clone().requires_grad_())
    elements = sum(t.numel() for t in saved)
    assert elements == x.numel() + bias.numel() + 1 + 2 * x.numel()


@pytest.mark.parametrize("with_bias", [False, True], ids=["flat", "rows"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_dropout_inside_drops_the_same_elements_both_ways(dtype, with_bias):
    x = regimes(dtype, n=44).requires_grad_()
    bias = randn(44, dtype=dtype).requires_grad_() if with_bias else None
    seed = torch.tensor([77], device=DEVICE)
    dy = randn(*x.shape, dtype=dtype)
    args = (x, bias, seed, "gelu", 0.4)
    y = family.BIAS_ACT(*args)
    inputs = [x] if bias is None else [x, bias]
    grads = torch.autograd.grad(y, inputs, dy)
    y64, grads64 = oracle(family.BIAS_ACT, args, dy)
    assert torch.equal(y64 == 0, y == 0) or (y64[y == 0].abs() < 1e-7).all()
    z = x.detach().double().abs() + (0 if bias is None else bias.detach().double().abs())
    scale = 2 * dy.double().abs() * (1 + z.clamp_max(30))
    assert_one_rounding(y, y64, scale=2 * z)
    assert_one_rounding(grads[0], grads64[0], scale=scale)
    if bias is not None:
        assert_one_rounding(grads[1], grads64[1], scale=scale.amax(0), terms=7)


def test_dropout_inside_is_off_in_evaluation_and_total_at_one():
    x, bias = randn(6, 33), randn(33)
    x[0, 0] = INF
    plain = bias_act(x, bias, "silu")
    assert torch.equal(bias_act(x, bias, "silu", p=0.5, training=False), plain)
    assert torch.equal(bias_act(x, bias, "silu", p=1.0), torch.zeros_like(x))


def test_a_dropped_infinity_is_zero():
    x = torch.full((64, 64), INF, device=DEVICE)
    y = bias_act(x, activation="relu", p=0.5)
    assert set(y.unique().tolist()) == {0.0, INF}


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("activation", NAMES)
def test_gated_act_and_its_gradients(activation, dtype):
    gate = regimes(dtype).requires_grad_()
    up = randn(*gate.shape, dtype=dtype).requires_grad_()
    dy = randn(*gate.shape, dtype=dtype)
    y = gated_act(gate, up, activation)
    y64, (dgate64, dup64) = oracle(family.GATED_ACT, (gate, up, activation), dy)
    dgate, dup = torch.autograd.grad(y, (gate, up), dy)
    a, b, g = (t.detach().double().abs() for t in (gate, up, dy))
    size = 1.0 if activation == "sigmoid" else a
    assert_one_rounding(y, y64, scale=size * b)
    assert_one_rounding(dup, dup64, scale=size * g)
    assert_one_rounding(dgate, dgate64, scale=b * g)


@pytest.mark.parametrize("activation", NAMES)
def test_gated_act_with_infinities_and_nan(activation):
    gate = specials(torch.float32)
    gate = (gate[1:] if activation == "elu" else gate).requires_grad_()
    up = torch.full_like(gate, 0.5).requires_grad_()
    dy = torch.full_like(gate, -2.0)
    y = gated_act(gate, up, activation)
    y64, (dgate64, dup64) = oracle(family.GATED_ACT, (gate, up, activation), dy)
    dgate, dup = torch.autograd.grad(y, (gate, up), dy)
    scale = gate.detach().double().abs().nan_to_num(1.0, 1.0)
    assert_one_rounding(y, y64, scale=scale)
    assert_one_rounding(dup, dup64, scale=2 * scale)
    assert_one_rounding(dgate, dgate64, scale=1.0)


def test_halves_of_a_packed_projection_are_read_in_place():
    packed = randn(2, 5, 96)
    gate, up = packed.chunk(2, dim=-1)
    pointers = []

    def observe(kernel, grid, args, options):
        pointers.extend(a.data_ptr() for a in args if isinstance(a, torch.Tensor))

    launching.observers.append(observe)
    try:
        y = gated_act(gate, up)
    finally:
        launching.observers.remove(observe)
    assert pointers[:2] == [gate.data_ptr(), up.data_ptr()]
    assert torch.equal(y, gated_act(gate.contiguous(), up.contiguous()))


@pytest.mark.parametrize("which", ["gate", "up"])
def test_gate_and_up_of_different_strides(which):
    gate, up, dy = (randn(6, 40) for _ in range(3))
    expected = [t.requires_grad_() for t in (gate.clone(), up.clone())]
    y = gated_act(*expected)
    moved = {"gate": gate, "up": up}
    moved[which] = moved[which].mT.contiguous().mT
    moved = [t.requires_grad_() for t in moved.values()]
    assert torch.equal(gated_act(*moved), y)
    found = torch.autograd.grad(gated_act(*moved), moved, dy)
    for actual, plain in zip(found, torch.autograd.grad(y, expected, dy), strict=True):
        assert torch.equal(actual, plain)


def test_gradients_of_packed_halves_are_contiguous():
    packed = randn(3, 64)
    gate, up = (t.detach().requires_grad_() for t in packed.chunk(2, dim=-1))
    dgate, dup = torch.autograd.grad(gated_act(gate, up).sum(), (gate, up))
    assert dgate.is_contiguous() and dup.is_contiguous()


@pytest.mark.parametrize("frozen", ["gate", "up"])
def test_gated_act_computes_only_the_gradient_that_is_wanted(frozen):
    gate, up = randn(4, 24), randn(4, 24)
    (up if frozen == "gate" else gate).requires_grad_()
    gated_act(gate, up).sum().backward()
    assert (gate.grad is None) == (frozen == "gate")
    wanted, other = (up, gate) if frozen == "gate" else (gate, up)
    assert wanted.grad.abs().sum() > 0 and other.grad is None


def test_a_scalar_and_a_vector_are_accepted():
    x = torch.tensor(1.5, device=DEVICE)
    assert torch.allclose(bias_act(x, activation="tanh"), x.tanh())
    assert bias_act(x, activation="tanh", p=0.5).shape == ()
    assert bias_act(randn(5), randn(5)).shape == (5,)


def test_the_identity_is_a_copy():
    x = randn(4, 8)
    assert bias_act(x, activation="identity").data_ptr() != x.data_ptr()
    assert family.BIAS_ACT.spec.reference(x, None, None, "identity", 0.0) is not x


@pytest.mark.parametrize("function", [bias_act, gated_act])
def test_an_unknown_activation_is_answered_with_the_names(function):
    x = randn(2, 8)
    args = (x, x) if function is gated_act else (x,)
    with pytest.raises(ValueError, match=r"one of identity, relu, .*silu, got 'swish'"):
        function(*args, activation="swish")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: bias_act(x, x[0, :3]), ValueError, r"bias must have shape \(8,\), got \(3,\)"),
        (lambda x: bias_act(x, p=1.5), ValueError, "p must be a probability"),
        (lambda x: bias_act(x.int()), TypeError, "x must be a floating-point tensor"),
        (lambda x: gated_act(x, x[:1]), ValueError, r"up must have shape \(2, 8\), got \(1, 8\)"),
        (lambda x: gated_act(x, x.int()), TypeError, "up must be a floating-point tensor"),
        (
            lambda x: family.BIAS_ACT(x, None, None, "gelu", 0.5),
            ValueError,
            "seed must be given where p > 0",
        ),
    ],
    ids=["bias-shape", "p", "dtype", "up-shape", "up-dtype", "no-seed"],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(randn(2, 8))
