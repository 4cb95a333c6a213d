"""Every two choices of attention's features in one call, against the reference in float64.

Dense and packed calls have an array of their own. Rows of a batch or sequences that see no key,
single queries, no keys and no queries are choices like any other.
"""

import zlib

import pytest
import torch

from tests.kernels.attention_factors import (
    DENSE,
    DTYPES,
    PACKED,
    dense_arguments,
    packed_arguments,
    randn,
)
from tests.kernels.eager_attention import eager, eager_packed
from tests.support.compare import assert_fair
from tests.support.covering import pairwise
from trilith.kernels.attention.op import ATTENTION
from trilith.kernels.attention.varlen import VARLEN_ATTENTION

ROWS = {"dense": pairwise(DENSE), "packed": pairwise(PACKED)}


def by_row(kind):
    return pytest.mark.parametrize("row", ROWS[kind], ids=lambda row: "-".join(row.values()))


def check(op, yardstick, row, make):
    torch.manual_seed(zlib.crc32("".join(row.values()).encode()))
    args = make(row)
    precision = DTYPES[row["dtype"]][1]
    q, v = args[0], args[2]
    out_shape = (*q.shape[:-1], v.shape[-1])
    dout = randn(*out_shape, dtype=q.dtype)
    dlse = randn(*(q.shape[:3] if q.ndim == 4 else (q.shape[1], q.shape[0])))
    dlse *= row["lse"] == "both"
    actual = gradients(lambda *a: op(*a, "", precision), args, dout, dlse)
    expected = gradients(op.spec.reference, doubled(args), dout.double(), dlse.double())
    fair = yardstick(args, dout, dlse, precision)
    for a, e, f in zip(actual, expected, fair, strict=True):
        assert_fair(a, e, f, rows=dlse.numel())


def gradients(function, args, dout, dlse):
    """[out, lse, gradients...] of a function of the op's arguments."""
    leaves = [a.detach().requires_grad_() if is_differentiable(a) else a for a in args]
    outputs = function(*leaves)
    wanted = [a for a in leaves if is_differentiable(a)]
    found = torch.autograd.grad(outputs, wanted, [dout, dlse], materialize_grads=True)
    return [*(o.detach() for o in outputs), *found]


def is_differentiable(a):
    return isinstance(a, torch.Tensor) and a.is_floating_point()


def doubled(args):
    return [a.double() if is_differentiable(a) else a for a in args]


@by_row("dense")
def test_dense_pairs(row):
    check(ATTENTION, eager, row, dense_arguments)


@by_row("packed")
def test_packed_pairs(row):
    check(VARLEN_ATTENTION, eager_packed, row, packed_arguments)


@pytest.mark.parametrize(("kind", "factors"), [("dense", DENSE), ("packed", PACKED)])
def test_no_pair_is_left_out(kind, factors):
    pairs = {(a, x, b, y) for row in ROWS[kind] for a, x in row.items() for b, y in row.items()}
    for a, one in factors.items():
        for b, other in factors.items():
            if a != b:
                assert {(a, x, b, y) for x in one for y in other} <= pairs
