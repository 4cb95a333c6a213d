import pytest
import torch

from tests.support.compare import assert_one_rounding
from tests.support.devices import DEVICE, DTYPES, dtype_name
from trilith.kernels._runtime.reduce import column_sum, column_sum_pair


@pytest.mark.parametrize(("p", "n"), [(1, 1), (3, 7), (64, 64), (65, 129), (257, 1000)])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_sums_columns_and_rounds_once(p, n, dtype, poison):
    partials = torch.randn(p, n, device=DEVICE)
    total = column_sum(partials, dtype)
    expected = partials.double().sum(0)
    assert total.dtype == dtype
    assert_one_rounding(total, expected, scale=partials.abs().max().item(), terms=p)


def test_a_pair_is_two_sums(poison):
    partials = torch.randn(2, 70, 300, device=DEVICE)
    dtypes = torch.float32, torch.bfloat16
    sums = column_sum_pair(partials, *dtypes)
    for total, terms, dtype in zip(sums, partials, dtypes, strict=True):
        assert total.dtype == dtype
        assert_one_rounding(total, terms.double().sum(0), scale=terms.abs().max().item(), terms=70)
