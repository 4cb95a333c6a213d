"""Elementary functions: exponentials, and what keeps its digits near 0."""

from __future__ import annotations

from trilith.kernels._runtime.language import tl, triton


@triton.jit
def exp(x):
    """e^x, and 0 below 2^-126: `tl.exp` spends three instructions more on what lies there."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def exp_of_minus(x):
    """e^-x: the sign is the factor's."""
    return tl.exp2(x * -1.4426950408889634)


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, to full relative precision near 0."""
    z = x / (2.0 + x)
    zz = z * z
    series = 2.0 * z * (1.0 + zz * (1 / 3 + zz * (1 / 5 + zz * (1 / 7 + zz * (1 / 9)))))
    return tl.where(x < 0.5, series, tl.log(1.0 + x))


@triton.jit
def softplus_tail(x):
    """log(1 + exp(-|x|)), to full relative precision where that is small."""
    e = exp_of_minus(tl.abs(x))
    series = -3.2440179493278265e-3  # least worst error of log(1 + e) / e on [0, 1]: 5e-9
    series = series * e + 1.9851429387927055e-2
    series = series * e - 5.6959472596645355e-2
    series = series * e + 0.1060364842414856
    series = series * e - 0.15305589139461517
    series = series * e + 0.19675937294960022
    series = series * e - 0.24954132735729218
    series = series * e + 0.3332996368408203
    series = series * e - 0.4999990165233612
    return e * (series * e + 1.0)


@triton.jit
def expm1(x):
    """exp(x) - 1 for x <= 0, to full relative precision near 0."""
    series = 1.0 + x * (1 / 6) * (1.0 + x * (1 / 7))
    series = 1.0 + x * (1 / 3) * (1.0 + x * (1 / 4) * (1.0 + x * (1 / 5) * series))
    return tl.where(x > -0.35, x * (1.0 + x * 0.5 * series), exp(x) - 1.0)
