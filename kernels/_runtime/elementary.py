"""Elementary functions that keep their digits near 0."""

from __future__ import annotations

from trilith.kernels._runtime.functors import exp
from trilith.kernels._runtime.language import tl, triton


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, to full relative precision near 0."""
    z = x / (2.0 + x)
    zz = z * z
    series = 2.0 * z * (1.0 + zz * (1 / 3 + zz * (1 / 5 + zz * (1 / 7 + zz * (1 / 9)))))
    return tl.where(x < 0.5, series, tl.log(1.0 + x))


@triton.jit
def expm1(x):
    """exp(x) - 1 for x <= 0, to full relative precision near 0."""
    series = 1.0 + x * (1 / 6) * (1.0 + x * (1 / 7))
    series = 1.0 + x * (1 / 3) * (1.0 + x * (1 / 4) * (1.0 + x * (1 / 5) * series))
    return tl.where(x > -0.35, x * (1.0 + x * 0.5 * series), exp(x) - 1.0)
