import pytest
import torch
import torch.nn.functional as F

from perf.meters.launches import launches
from tests.kernels.test_add_norm import factor_of, leaf, randn
from tests.support.compare import assert_like_eager
from tests.support.devices import DEVICE, DTYPES, INTERPRETING, dtype_name
from trilith.kernels import bias_act_linear, gated_act_linear
from trilith.kernels._runtime.launch import observers

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
ACTIVATIONS = {"gelu": F.gelu, "silu": F.silu, "relu": F.relu, "tanh": torch.tanh}
ACTIVATIONS["relu2"] = lambda z: F.relu(z).square()


def results(function, given, dy):
    leaves = [None if t is None else leaf(t) for t in given]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], dy)]


def check(fused, plain, given, dy):
    torch.manual_seed(7)
    actual = results(fused, given, dy)
    wide = [None if t is None else t.double() for t in given]
    expected, eager = results(plain, wide, dy.double()), results(plain, given, dy)
    for a, e, y in zip(actual, expected, eager, strict=True):
        assert_like_eager(a, e, y)


@dtypes
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("biased", [True, False])
def test_bias_act_linear_is_as_near_to_float64_as_eager(activation, p, biased, dtype, poison):
    given = [randn(3, 5, 36), randn(36) if biased else None, 0.2 * randn(24, 36)]
    given += [randn(24) if biased else None]
    given = [None if t is None else t.to(dtype) for t in given]
    factor = factor_of((3, 5, 36), p)

    def plain(x, bias, weight, out_bias):
        hidden = ACTIVATIONS[activation](x if bias is None else x + bias)
        return F.linear(hidden * factor.to(x.dtype), weight, out_bias)

    def fused(*given):
        return bias_act_linear(*given, activation, p=p)

    check(fused, plain, given, randn(3, 5, 24, dtype=dtype))


@dtypes
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("packed", [True, False])
def test_gated_act_linear_is_as_near_to_float64_as_eager(activation, packed, dtype, poison):
    gate, up = (
        randn(150, 72, dtype=dtype).chunk(2, -1) if packed else randn(2, 150, 36, dtype=dtype)
    )
    given = [gate, up, (0.2 * randn(24, 36)).to(dtype), randn(24, dtype=dtype)]

    def plain(gate, up, weight, bias):
        return F.linear(ACTIVATIONS[activation](gate) * up, weight, bias)

    def fused(*given):
        return gated_act_linear(*given, activation)

    check(fused, plain, given, randn(150, 24, dtype=dtype))


def test_the_activated_tensor_is_not_kept():
    x, gate, up = leaf(randn(6, 40)), leaf(randn(6, 40)), leaf(randn(6, 40))
    bias, weight = leaf(randn(40)), leaf(randn(8, 40))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        bias_act_linear(x, bias, weight, p=0.1)
        gated_act_linear(gate, up, weight)
    given = {t.data_ptr() for t in (x, gate, up, bias, weight)}
    assert [t.numel() for t in saved if t.data_ptr() not in given] == [1]  # the seed


def test_backward_makes_it_again_in_the_activations_own_pass():
    x, bias, weight = leaf(randn(6, 40)), leaf(randn(40)), leaf(randn(8, 40))
    gate, up = leaf(randn(6, 40)), leaf(randn(6, 40))
    outputs = [bias_act_linear(x, bias, weight), gated_act_linear(gate, up, weight)]
    launched = []
    observers.append(lambda kernel, *_: launched.append(kernel.__name__))
    try:
        for y in outputs:
            y.sum().backward()
    finally:
        observers.pop()
    expected = ["_bias_act_bwd_kernel", "_column_sum_kernel", "_gated_act_bwd_kernel"]
    assert launched == expected


def test_only_the_weight_wants_a_gradient():
    x, gate, weight = randn(6, 40), randn(6, 40), leaf(randn(8, 40))
    for y, hidden in (
        (bias_act_linear(x, None, weight), F.gelu(x)),
        (gated_act_linear(gate, x, weight), F.silu(gate) * x),
    ):
        (dweight,) = torch.autograd.grad(y.sum(), weight)
        torch.testing.assert_close(dweight, hidden.sum(0).expand(8, 40), rtol=1e-5, atol=1e-5)


def test_autocast_lowers_the_product():
    x, weight = leaf(randn(6, 40)), leaf(randn(8, 40))
    with torch.autocast(DEVICE, torch.bfloat16):
        y, z = bias_act_linear(x, None, weight), gated_act_linear(x, x, weight)
    assert (y.dtype, z.dtype) == (torch.bfloat16, torch.bfloat16)


def test_errors_name_what_is_wrong():
    x, weight = randn(4, 6), randn(3, 6)
    with pytest.raises(ValueError, match=r"bias_act_linear: weight must have shape \(K, 6\)"):
        bias_act_linear(x, None, randn(3, 5))
    with pytest.raises(ValueError, match=r"bias_act_linear: weight must have the input's dtype"):
        bias_act_linear(x, None, weight.half())
    with pytest.raises(ValueError, match=r"gated_act_linear: up must have shape \(4, 6\)"):
        gated_act_linear(x, randn(4, 5), weight)
    with pytest.raises(ValueError, match=r"gated_act_linear: activation"):
        gated_act_linear(x, x, weight, activation="sine")


@pytest.mark.skipif(not INTERPRETING, reason="counts in Triton's interpreter")
def test_an_upstream_gradient_of_no_matrix_is_copied_once_for_all_parameters():
    """And once for x, whose gradient is made elsewhere."""
    given = [leaf(t) for t in (randn(3, 5, 36), randn(36), randn(24, 36), randn(24))]
    y = bias_act_linear(given[0], given[1], *given[2:])
    dy = randn(5, 3, 24).transpose(0, 1)
    with launches() as counts:
        torch.autograd.grad(y, given, dy)
    assert counts["aten::clone"] == 2
