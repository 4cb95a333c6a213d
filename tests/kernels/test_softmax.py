"""softmax and log_softmax over any dimension against float64, and torch's special cases."""

import math

import pytest
import torch

from tests.support.compare import assert_one_rounding
from tests.support.devices import DEVICE, DTYPES, dtype_name
from tests.support.inputs import REGIMES, huge
from trilith.kernels import log_softmax, softmax

INF, NAN = float("inf"), float("nan")
FUNCTIONS = {
    "softmax": (softmax, torch.softmax),
    "log_softmax": (log_softmax, torch.log_softmax),
}
SHAPES = [(1, 1), (5, 33), (3, 130), (1030, 2), (2, 4100), (2, 8193), (1, 16385), (1, 131073)]


def check(name, x, dim=-1):
    ours, theirs = FUNCTIONS[name]
    x = x.detach().requires_grad_()
    x64 = x.detach().double().requires_grad_()
    y, y64 = ours(x, dim), theirs(x64, dim)
    dy = torch.randn(x.shape, device=DEVICE).to(x.dtype)
    (dx,), (dx64,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(y64, x64, dy.double())
    assert (y.shape, y.dtype, y.is_contiguous()) == (x.shape, x.dtype, True)
    wide = x64.detach().nan_to_num(0, 0, 0)
    spread = 1 + (wide - wide.amax(dim, keepdim=True)).abs() + math.log(x.shape[dim])
    log = name == "log_softmax"
    p = torch.softmax(x64.detach(), dim).nan_to_num(0)
    assert_one_rounding(y.detach(), y64.detach(), scale=(spread if log else p * spread))
    up = dy.double().abs()
    sums = up.sum(dim, keepdim=True) if log else (up * p).sum(dim, keepdim=True)
    scale = up + p * sums * spread if log else p * (up + sums) * spread
    assert_one_rounding(dx, dx64, scale=scale)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_rows_match_float64(name, dtype, shape, poison):
    check(name, (3 * torch.randn(shape)).to(DEVICE, dtype))


@pytest.mark.parametrize("dim", [0, 1, 2, 3, -2])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2), (1, 0, 2, 3)], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_any_dimension_of_any_strides_matches_float64(name, order, dim):
    x = torch.randn(3, 67, 2, 70, device=DEVICE).permute(order)
    check(name, x, dim)
    check(name, x[..., ::2], dim)


@pytest.mark.parametrize("regime", REGIMES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("n", [45, 17000])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_regimes(name, n, regime):
    check(name, regime(3, n))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_ends_of_float16(name):
    check(name, huge(4, 130))


@pytest.mark.parametrize("n", [5, 17000])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_infinities_come_out_as_in_torch(name, n):
    x = torch.randn(4, n, device=DEVICE)
    x[0] = -INF
    x[1, 3] = -INF
    x[2, 2] = INF
    x[3, : n - 1] = -INF
    ours, theirs = FUNCTIONS[name]
    torch.testing.assert_close(ours(x), theirs(x, -1), equal_nan=True)
    assert ours(x)[0].isnan().all()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_dtype_converts_first(name):
    ours, theirs = FUNCTIONS[name]
    x = torch.randn(4, 9, device=DEVICE)
    for source, dtype in (
        (x.bfloat16(), torch.float32),
        (x, torch.float16),
        (x, torch.float64),
        (x.long(), torch.float32),
        (x.double(), torch.float32),
    ):
        y, expected = ours(source, 0, dtype), theirs(source, 0, dtype=dtype)
        assert y.dtype == dtype
        torch.testing.assert_close(y, expected)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert ours(x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("name", FUNCTIONS)
def test_scalars_empty_tensors_and_errors(name):
    ours, theirs = FUNCTIONS[name]
    assert torch.equal(ours(torch.tensor(3.0)), theirs(torch.tensor(3.0), -1))
    assert ours(torch.empty(0, 3)).shape == (0, 3)
    for function in (ours, theirs):
        with pytest.raises(IndexError, match="2"):
            function(torch.randn(2, 2), 2)
    with pytest.raises(TypeError, match="floating-point"):
        ours(torch.arange(3))
