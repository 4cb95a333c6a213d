"""What is patched in Triton's interpreter to make it quicker changes nothing else; threads."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.support.devices import INTERPRETING
from trilith.kernels._runtime.language import tl, triton

pytestmark = pytest.mark.skipif(not INTERPRETING, reason="is about the interpreter")


@triton.jit
def _twice(x):
    return x + x


@triton.jit
def _sum_of_powers(x):
    return tl.sum(_twice(_twice(x)), axis=0) + tl.max(_twice(x), axis=0)


@triton.jit
def _kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))
    tl.store(y_ptr + tl.program_id(0), _sum_of_powers(x))


@triton.jit
def _kernel_that_fails(x_ptr):
    tl.store(x_ptr, _twice(x_ptr))


@triton.jit
def _copy(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets))


@triton.jit
def _cast(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets).to(y_ptr.dtype.element_ty))


@triton.jit
def _product(a_ptr, b_ptr, y_ptr, PRECISION: tl.constexpr):
    rows, cols = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    a, b = tl.load(a_ptr + 16 * rows + cols), tl.load(b_ptr + 16 * rows + cols)
    tl.store(y_ptr + 16 * rows + cols, tl.dot(a, b, input_precision=PRECISION))


def to_tf32(x):
    """To ten bits of mantissa behind the leading one."""
    step = torch.exp2(torch.floor(torch.log2(x.abs())) - 10)
    return torch.round(x / step) * step


@pytest.mark.parametrize(("precision", "factor"), [("tf32", to_tf32), ("ieee", lambda x: x)])
def test_factors_of_a_product_are_rounded_as_it_says(precision, factor):
    a, b = torch.randn(2, 16, 16)
    y = torch.empty(16, 16)
    _product[(1,)](a, b, y, PRECISION=precision)
    expected = factor(a.double()) @ factor(b.double())
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_casts_are_torchs(source, target):
    after = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])  # half-way, and next to it
    bits = (torch.arange(-(2**15), 2**15)[:, None] << 16) + after
    x = bits.to(torch.int32).view(torch.float32).flatten().to(source)
    y = torch.empty_like(x, dtype=target)
    _cast[(len(x) // 2**15,)](x, y, BLOCK=2**15)
    torch.testing.assert_close(y, x.to(target), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("other", [torch.int32, torch.uint8, torch.float64], ids=str)
def test_bfloat16_is_cast_to_and_from_other_widths(other):
    x = torch.tensor([0, 1, 2, 100, 128, 129, 254, 255]).to(other)  # bfloat16 has all of them
    y, again = x.to(torch.bfloat16), torch.empty_like(x)
    made = torch.empty_like(y)
    _cast[(1,)](x, made, BLOCK=8)
    _cast[(1,)](y, again, BLOCK=8)
    assert torch.equal(made, y) and torch.equal(again, x)


def run(rows):
    x, y = torch.randn(rows, 8), torch.empty(rows)
    _kernel[(rows,)](x, y, BLOCK=8)
    torch.testing.assert_close(y, 4 * x.sum(1) + 2 * x.max(1).values)


def test_the_language_is_patched_as_often_for_many_calls_as_for_few(monkeypatch):
    from triton.runtime import interpreter

    patches = []
    patch = interpreter._patch_lang
    monkeypatch.setattr(interpreter, "_patch_lang", lambda fn: patches.append(fn) or patch(fn))
    run(rows=1)
    few = len(patches)
    patches.clear()
    run(rows=16)
    assert 1 <= len(patches) <= few


def test_a_launch_leaves_the_language_as_it_was():
    before = tl.load, tl.dot, tl.tensor.__add__
    run(rows=2)
    assert (tl.load, tl.dot, tl.tensor.__add__) == before


def test_a_launch_after_one_that_failed_is_right():
    before = tl.load
    with pytest.raises(Exception, match="InterpreterError"):
        _kernel_that_fails[(1,)](torch.randn(4))
    assert tl.load is before
    run(rows=3)


def test_threads_launch_one_after_another():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(run, [3, 5, 7, 9] * 3))
    finally:
        sys.setswitchinterval(before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64, torch.bool, torch.uint8])
def test_dtypes_are_those_that_they_were(dtype):
    x = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0], dtype=dtype)
    y = torch.empty_like(x)
    _copy[(1,)](x, y, BLOCK=8)
    assert torch.equal(x, y)
