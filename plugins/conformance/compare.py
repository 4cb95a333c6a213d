"""How the conformance checks compare tensors, and how they make unwritten memory show."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# Called with the worst error as a share of its bound, at each comparison of numbers.
observers: list[Callable[[float], None]] = []

_FLOOR = 1e-5
_ONCE = 1.1
_VANISHING = 1e-20  # of a saturated function's slope, which the reference may give as 0
FEW = 32  # elements below which the reference's own worst error says little


def is_differentiable(tensor: Tensor) -> bool:
    """Whether it holds numbers to differentiate by: floats, but for those of 8 bits, which are
    stored data, as integers are; PyTorch does no arithmetic in them."""
    return tensor.is_floating_point() and tensor.itemsize > 1


def is_finite(tensor: Tensor) -> Tensor:
    return _widened(tensor).isfinite()


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor


def assert_near(
    what: str,
    actual: Tensor,
    expected: Tensor,
    *yardsticks: Tensor,
    rounds_once: bool = False,
    excused: Tensor | None = None,
) -> None:
    """Errors within twice those of the yardsticks (float32: ten times).

    Of an op that rounds once the mean error in 16 bits is that of the yardsticks, a tenth more: two
    roundings, or one too early, are within twice the worst. inf and NaN are where the reference has
    them once it is rounded. Nothing is asked of the elements that are `excused`: what overflowed on
    the way to them may leave NaN, inf or, divided by it, 0.
    """
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, not {expected.shape}"
    if not actual.is_floating_point():
        assert torch.equal(actual, expected.to(actual.dtype)), f"{what}: differs from the reference"
        return
    dtype = actual.dtype
    rounded = _widened(expected.to(dtype))
    actual, expected = _widened(actual), _widened(expected)
    yardsticks = tuple(map(_widened, yardsticks))
    limit = torch.finfo(dtype).max
    overflow = expected.isfinite() & (expected.abs() > 0.99 * limit)
    _assert_pattern(what, actual, rounded, overflow, excused)
    finite = actual.isfinite() & expected.isfinite()
    if excused is not None:
        finite &= ~excused
    if not finite.any():
        return
    error = torch.where(finite, (actual.double() - expected).abs(), 0)
    fair = torch.zeros_like(error)
    for yardstick in yardsticks:
        off = torch.where(finite & yardstick.isfinite(), (yardstick.double() - expected).abs(), 0)
        fair = torch.maximum(fair, off)
    size = torch.where(finite, expected.abs(), 0)
    factor = 10 if dtype == torch.float32 else 2
    floor = _FLOOR * min(1.0, size.max().item()) + _VANISHING
    unit = torch.finfo(dtype).eps * size
    bound = factor * fair.max() + floor + unit
    _observe(error, bound)
    worst = int((error - bound).argmax())
    assert (error <= bound).all(), (
        f"{what}: {_at(worst, actual)} is {actual.flatten()[worst].item():.6g}, the reference "
        f"gives {expected.flatten()[worst].item():.6g}; error {error.flatten()[worst].item():.2g}, "
        f"bound {bound.flatten()[worst].item():.2g}; {int((error > bound).sum())} of "
        f"{error.numel()} elements"
    )
    few = actual.numel() < FEW
    share = floor + unit.mean() if few else floor / 10 + unit.mean() / 2
    mean = factor * fair.mean() + share
    if rounds_once and actual.element_size() == 2 and not few:
        mean = _ONCE * fair.mean() + floor / 10 + unit.mean() / 50
    assert error.mean() <= mean, f"{what}: mean error {error.mean():.2g}, bound {mean:.2g}"


def _observe(error: Tensor, bound: Tensor) -> None:
    if observers:
        share = torch.where(error == 0, 0.0, error / bound).max().item()
        for observe in observers:
            observe(share)


def _assert_pattern(
    what: str,
    actual: Tensor,
    expected: Tensor,
    ignored: Tensor,
    excused: Tensor | None = None,
) -> None:
    wrong = (actual.isnan() != expected.isnan()) | (
        (actual.isinf() | expected.isinf()) & (actual != expected) & ~ignored
    )
    if excused is not None:
        wrong &= ~excused
    if wrong.any():
        first = int(wrong.flatten().int().argmax())
        raise AssertionError(
            f"{what}: NaN or inf differ in {int(wrong.sum())} elements; {_at(first, actual)} is "
            f"{actual.flatten()[first].item()}, expected {expected.flatten()[first].item()}"
        )


def _at(flat: int, tensor: Tensor) -> str:
    index = torch.unravel_index(torch.tensor(flat), tensor.shape)
    return f"element {[int(i) for i in index]} of {list(tensor.shape)}"


def assert_same(what: str, actual: Tensor, expected: Tensor, scale: float = 0.0) -> None:
    """Equal up to the order of fp32 sums, of terms up to `scale` that may cancel, and one rounding.

    Terms are taken to be no smaller than the largest expected value.
    """
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, not {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, not {expected.shape}"
    if not actual.is_floating_point():
        assert torch.equal(actual, expected), f"{what}: differs"
        return
    dtype, actual, expected = actual.dtype, _widened(actual), _widened(expected)
    _assert_pattern(what, actual, expected, torch.zeros_like(actual, dtype=torch.bool))
    finite = expected.isfinite()
    if not finite.any():
        return
    size = torch.where(finite, expected.double().abs(), 0)
    error = torch.where(finite, (actual.double() - expected.double()).abs(), 0)
    bound = 2 * torch.finfo(dtype).eps * size + 256 * 2.0**-24 * size.max().clamp(min=scale)
    _observe(error, bound)
    worst = int((error - bound).argmax())
    assert (error <= bound).all(), (
        f"{what}: {_at(worst, actual)} is {actual.flatten()[worst].item():.6g}, expected "
        f"{expected.flatten()[worst].item():.6g}"
    )


def assert_bits(what: str, actual: Tensor, expected: Tensor) -> None:
    actual, expected = _widened(actual), _widened(expected)
    same = torch.equal(actual.detach().nan_to_num(nan=0.5), expected.detach().nan_to_num(nan=0.5))
    assert same and torch.equal(actual.isnan(), expected.isnan()), f"{what} changed"


@contextmanager
def poisoned() -> Iterator[None]:
    """Uninitialised floating-point memory reads as NaN inside."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        settings.fill_uninitialized_memory = fill
