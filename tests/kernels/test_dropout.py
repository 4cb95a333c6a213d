import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from tests.support.compare import assert_one_rounding
from tests.support.devices import DEVICE, DTYPES, dtype_name
from trilith.kernels import bias_act, bias_dropout_add, dropout
from trilith.kernels._runtime import launch as launching
from trilith.kernels._runtime.random import draw_seed, reference_keep_mask
from trilith.plugins import OpSpec, registry
from trilith.plugins.op import Op

DROPOUT = registry.op("trilith::dropout")
BIAS_DROPOUT_ADD = registry.op("trilith::bias_dropout_add")
INF, NAN = math.inf, math.nan


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def seed_of(value):
    return torch.tensor([value], device=DEVICE)


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


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_elements_are_kept_with_probability_1_minus_p(p):
    n = 64 * 1024
    kept = (dropout(torch.ones(64, 1024, device=DEVICE), p) != 0).double()
    sigma = math.sqrt(p * (1 - p) / n)
    assert abs(kept.mean().item() - (1 - p)) < 5 * sigma
    for dim, length in ((0, 64), (1, 1024)):
        spread = (kept.mean(dim) - (1 - p)).abs().max().item()
        assert spread < 6 * math.sqrt(p * (1 - p) / length)


def test_neighbours_are_dropped_independently():
    n = 64 * 1024
    kept = (dropout(torch.ones(64, 1024, device=DEVICE)) != 0).double().flatten()
    for distance in (1, 2, 3, 4, 8, 1024):
        both = (kept[:-distance] * kept[distance:]).mean().item()
        assert abs(both - 0.25) < 5 * math.sqrt(0.25 * 0.75 / n)


def test_what_is_kept_is_divided_by_the_probability_of_keeping():
    assert set(dropout(torch.ones(64, 64, device=DEVICE), 0.75).unique().tolist()) == {0.0, 4.0}


def test_two_calls_differ_and_the_generator_repeats_them():
    x = torch.ones(32, 64, device=DEVICE)
    torch.manual_seed(5)
    first, second = dropout(x), dropout(x)
    torch.manual_seed(5)
    again = dropout(x)
    assert not torch.equal(first, second)
    assert torch.equal(first, again)


def test_every_function_makes_the_same_mask_from_the_same_generator_state():
    x = torch.ones(9, 44, device=DEVICE)
    results = []
    for call in (
        lambda: dropout(x, 0.3),
        lambda: bias_act(x, activation="identity", p=0.3),
        lambda: bias_act(x, torch.zeros(44, device=DEVICE), "identity", p=0.3),
        lambda: bias_dropout_add(x, torch.zeros_like(x), None, 0.3),
        lambda: bias_dropout_add(x, torch.zeros_like(x), torch.zeros(44, device=DEVICE), 0.3),
    ):
        torch.manual_seed(3)
        results.append(call())
    assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize("shape", [(), (5,), (6, 33), (3, 4, 44), (2, 700)])
def test_the_mask_depends_on_position_alone(shape):
    x = torch.ones(shape, device=DEVICE)
    seed = seed_of(-(2**40) - 3)
    keep = reference_keep_mask(seed, shape or (1,), 0.5).reshape(shape)
    assert torch.equal(DROPOUT(x, seed, 0.5) != 0, keep)
    if x.ndim >= 2:
        transposed = x.transpose(-1, -2).contiguous().transpose(-1, -2)
        padded = torch.ones(*shape[:-1], shape[-1] + 3, device=DEVICE)[..., : shape[-1]]
        for other in (transposed, padded, x[..., :1].expand(shape)):
            assert torch.equal(DROPOUT(other, seed, 0.5) != 0, keep)


def test_a_tile_of_another_size_makes_the_same_mask(monkeypatch):
    from trilith.kernels._runtime import elementwise

    x, seed = torch.ones(8, 96, device=DEVICE), seed_of(9)
    expected = DROPOUT(x, seed, 0.4)
    for columns in (16, 64):
        monkeypatch.setattr(elementwise, "_FLAT_COLUMNS", columns)
        assert torch.equal(DROPOUT(x, seed, 0.4), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("n", [33, 64])
def test_backward_drops_what_forward_dropped(n, dtype):
    x = randn(7, n, dtype=dtype).requires_grad_()
    dy = randn(7, n, dtype=dtype)
    args = (x, seed_of(4), 0.3)
    y = DROPOUT(*args)
    (dx,) = torch.autograd.grad(y, x, dy)
    y64, (dx64,) = oracle(DROPOUT, args, dy)
    assert_one_rounding(y, y64, scale=0.0)
    assert_one_rounding(dx, dx64, scale=0.0)
    assert torch.equal(y == 0, dx == 0)


def test_dropout_of_half_precision_extremes_infinity_and_nan():
    x = torch.tensor([6e4, -6e4, INF, -INF, NAN] * 40, device=DEVICE, dtype=torch.float16)
    seed = seed_of(1)
    y = DROPOUT(x, seed, 0.5)
    assert_one_rounding(y, DROPOUT.spec.reference(x.double(), seed, 0.5), scale=0.0)
    assert (y[~reference_keep_mask(seed, x.shape, 0.5)] == 0).all()


def test_nothing_is_dropped_at_0_or_in_evaluation_and_all_at_1():
    x = randn(5, 33)
    x[0, 0] = INF
    assert dropout(x, 0.0) is x and dropout(x, 0.5, training=False) is x
    x.requires_grad_()
    y = dropout(x, 1.0)
    (dx,) = torch.autograd.grad(y, x, torch.full_like(x, INF))
    assert torch.equal(y, torch.zeros_like(y)) and torch.equal(dx, torch.zeros_like(dx))


def test_float64_takes_torchs_own_dropout():
    x = torch.ones(64, 64, dtype=torch.float64, device=DEVICE)
    ours, theirs = (torch.manual_seed(3) and f(x, 0.5) for f in (dropout, F.dropout))
    assert torch.equal(ours, theirs)
    assert not dropout(torch.full((9,), INF, dtype=torch.float64, device=DEVICE), 1.0).any()


def test_nothing_is_saved_but_the_seed():
    x = randn(8, 24).requires_grad_()
    residual, bias = randn(8, 24).requires_grad_(), randn(24).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        dropout(x)
        bias_dropout_add(x, residual, bias, 0.5)
    assert sum(t.numel() for t in saved) == 1 + bias.numel() + 1


def test_a_checkpointed_region_recomputes_the_same_mask():
    x, bias = randn(6, 40).requires_grad_(), randn(40).requires_grad_()

    def region(x, bias):
        return bias_dropout_add(dropout(x, 0.3).sin(), x, bias, 0.5)

    torch.manual_seed(11)
    plain = region(x, bias)
    expected = torch.autograd.grad(plain.square().sum(), (x, bias))
    torch.manual_seed(11)
    y = checkpoint(region, x, bias, use_reentrant=False)
    gradients = torch.autograd.grad(y.square().sum(), (x, bias))
    assert torch.equal(y, plain)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtypes", ["same", "wide"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("m", [1, 17, 70])
def test_bias_dropout_add_and_its_gradients(m, dtype, dtypes, p):
    wide = torch.float32 if dtypes == "wide" else dtype
    x = randn(m, 130, dtype=dtype).requires_grad_()
    residual = randn(m, 130, dtype=wide).requires_grad_()
    bias = randn(130, dtype=wide).requires_grad_()
    dy = randn(m, 130, dtype=wide)
    args = (x, residual, bias, seed_of(6) if p else None, p, dtype)
    y = BIAS_DROPOUT_ADD(*args)
    grads = torch.autograd.grad(y, (x, residual, bias), dy)
    y64, grads64 = oracle(BIAS_DROPOUT_ADD, args, dy)
    scale = 2 * (x.detach().double().abs() + bias.detach().double().abs())
    assert_one_rounding(y, y64, scale=scale + residual.detach().double().abs())
    assert_one_rounding(grads[0], grads64[0], scale=0.0)
    assert torch.equal(grads[1], dy)
    assert_one_rounding(grads[2], grads64[2], scale=2 * dy.double().abs().amax(0), terms=m)
    assert [g.dtype for g in grads] == [dtype, wide, wide] and y.dtype == wide


def test_bias_dropout_add_in_evaluation_is_a_sum():
    x, residual, bias = randn(5, 40), randn(5, 40), randn(40)
    expected = residual + (x + bias)
    assert torch.equal(bias_dropout_add(x, residual, bias, 0.5, training=False), expected)
    assert torch.equal(bias_dropout_add(x, residual, p=1.0), residual)


def test_the_residuals_gradient_is_the_incoming_one_and_costs_nothing():
    x, residual = randn(4, 24).requires_grad_(), randn(4, 24).requires_grad_()
    dy = randn(4, 24)
    y = bias_dropout_add(x, residual, p=0.5)
    (dx, dresidual), names = launched(lambda: torch.autograd.grad(y, (x, residual), dy))
    assert names == ["_dropout_kernel"]
    assert dresidual.data_ptr() == dy.data_ptr() != dx.data_ptr()
    frozen = bias_dropout_add(x.detach(), residual, p=0.5)
    _, names = launched(lambda: torch.autograd.grad(frozen, residual, dy))
    assert names == []


def test_without_dropout_both_gradients_are_the_incoming_one():
    x, residual, bias = (randn(*s).requires_grad_() for s in ((4, 24), (4, 24), (24,)))
    dy = randn(4, 24)
    y = bias_dropout_add(x, residual, bias)
    grads, names = launched(lambda: torch.autograd.grad(y, (x, residual, bias), dy))
    assert names == ["_dropout_bwd_kernel", "_column_sum_kernel"]
    assert torch.equal(grads[0], dy) and torch.equal(grads[1], dy)
    assert_one_rounding(grads[2], dy.double().sum(0), scale=dy.double().abs().amax(0), terms=4)


def test_accumulated_gradients_do_not_write_through_the_shared_tensor():
    x, residual = randn(4, 24).requires_grad_(), randn(4, 24).requires_grad_()
    dy = randn(4, 24)
    before = dy.clone()
    for _ in range(2):
        bias_dropout_add(x, residual).backward(dy)
    assert torch.equal(dy, before)
    assert torch.equal(x.grad, 2 * dy) and torch.equal(residual.grad, 2 * dy)
    assert x.grad.data_ptr() != residual.grad.data_ptr()


@pytest.fixture
def mirrored():
    """An op y = a + 2 b + 2 c: a's gradient is y's, and c's is b's."""
    asked = []

    def forward(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (a + 2 * b + 2 * c,)

    def backward(ctx, dy):
        asked.append(ctx.needs_input_grad)
        return None, 2 * dy, None

    op = Op(
        OpSpec(
            name="trilith_test::mirrored",
            forward=forward,
            backward=backward,
            reference=lambda a, b, c: a + 2 * b + 2 * c,
            samples=lambda device, dtype: (),
            save_inputs=(),
            shared_gradients=lambda *_: {"a": 0, "c": "b"},
            devices=("cpu", "cuda"),
        )
    )
    yield op, asked
    op.destroy()


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (0, 1, 2)], ids=str)
def test_shared_gradients_are_found_for_every_subset_of_inputs(mirrored, wanted):
    op, asked = mirrored
    inputs = [randn(3).requires_grad_(i in wanted) for i in range(3)]
    dy = randn(3)
    grads = torch.autograd.grad(op(*inputs), [inputs[i] for i in wanted], dy)
    for i, grad in zip(wanted, grads, strict=True):
        assert torch.equal(grad, dy if i == 0 else 2 * dy)
    assert asked == ([] if wanted == (0,) else [(False, True, False)])


def test_gradients_of_shared_gradients_are_right(mirrored):
    op, _ = mirrored
    a, b, c = (randn(3).double().float().requires_grad_() for _ in range(3))
    (da,) = torch.autograd.grad(op(a, b, c).square().sum(), a, create_graph=True)
    second = torch.autograd.grad(da.sum(), (a, b, c))
    assert [g.unique().tolist() for g in second] == [[2.0], [4.0], [4.0]]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: dropout(x, 1.5), ValueError, "dropout: p must be a probability between 0 and 1"),
        (lambda x: dropout(x.int()), TypeError, "input must be a floating-point tensor"),
        (lambda x: DROPOUT(x, None, 0.5), ValueError, "seed must be given where p > 0"),
        (lambda x: bias_dropout_add(x.int(), x), TypeError, "x must be a floating-point tensor"),
        (lambda x: bias_dropout_add(x, x[:1]), ValueError, r"residual must have shape \(2, 8\)"),
        (lambda x: bias_dropout_add(x, x, x), ValueError, r"bias must have shape \(8,\)"),
        (lambda x: bias_dropout_add(x, x, p=-0.1), ValueError, "p must be a probability"),
    ],
    ids=["p", "dtype", "no-seed", "sum-dtype", "residual", "bias", "negative-p"],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(randn(2, 8))


def test_a_seed_lives_where_the_tensor_does():
    seed = draw_seed(randn(3))
    assert seed.shape == (1,) and seed.dtype == torch.int64 and seed.device.type == DEVICE
