"""Activations as pairs of functors on fp32 tiles, for kernels that take them as constexprs.

    f(z) = act(z)        df(z, g) = g * act'(z)

df takes the incoming gradient g, because relu and its kin and elu select it rather than scale it:
an infinite g times a zero slope stays 0 there. Infinities and NaN come out where torch has them.

Numerics: act' of a sigmoid-like function is s * (1 - s). Near saturation 1 - s loses every digit,
so s(z) and s(-z) are computed side by side from exp(-|z|), which neither overflows nor cancels.
tanh is a polynomial below 0.55 and (1 - e) / (1 + e), e = exp(-2 |z|), above: within 4 roundings.
The normal distribution's tail is exp(-z^2 / 2) times a polynomial of u / (1 + u), u = 0.28 |z|:
half of erf's instructions, no cancellation for negative z, and the density's exponential besides.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trilith.kernels._runtime.elementary import exp, exp_of_minus, expm1
from trilith.kernels._runtime.language import tl, triton


@triton.jit
def sigmoid_pair(z):
    """sigmoid(z) and sigmoid(-z)."""
    e = exp_of_minus(tl.abs(z))
    large = 1.0 / (1.0 + e)
    small = e * large
    return tl.where(z >= 0, large, small), tl.where(z >= 0, small, large)


@triton.jit
def _identity(z):
    return z


@triton.jit
def _identity_grad(z, g):
    return g


@triton.jit
def _relu(z):
    return tl.where(z <= 0, 0.0, z)


@triton.jit
def _relu_grad(z, g):
    return tl.where(z <= 0, 0.0, g)


@triton.jit
def _relu2(z):
    return tl.where(z <= 0, 0.0, z * z)


@triton.jit
def _relu2_grad(z, g):
    return tl.where(z <= 0, 0.0, g * (2.0 * z))


@triton.jit
def _leaky_relu(z):
    return tl.where(z > 0, z, 0.01 * z)


@triton.jit
def _leaky_relu_grad(z, g):
    return tl.where(z > 0, g, 0.01 * g)


@triton.jit
def _elu(z):
    return tl.where(z > 0, z, expm1(z))


@triton.jit
def _elu_grad(z, g):
    return tl.where(z > 0, g, g * exp(z))


@triton.jit
def _sigmoid(z):
    s, _ = sigmoid_pair(z)
    return s


@triton.jit
def _sigmoid_grad(z, g):
    s, c = sigmoid_pair(z)
    return g * (s * c)


@triton.jit
def _tanh(z):
    e = tl.exp2(tl.abs(z) * -2.885390081777927)  # exp(-2 |z|)
    large = (1.0 - e) / (1.0 + e)
    square = z * z
    series = -6.274653598666191e-3  # least squares in Chebyshev nodes on [0, 0.55], error 3e-9
    series = series * square + 2.1071862429380417e-2
    series = series * square - 5.385231226682663e-2
    series = series * square + 0.13332585990428925
    series = series * square - 0.33333316445350647
    return tl.where(tl.abs(z) < 0.55, z + z * (square * series), tl.where(z < 0, -large, large))


@triton.jit
def _tanh_grad(z, g):
    s, c = sigmoid_pair(2.0 * z)
    return g * (4.0 * s * c)


@triton.jit
def _normal(z):
    """The normal distribution's cumulated probability, and exp(-z^2 / 2)."""
    bell = tl.exp2(z * z * -0.7213475204444817)
    u = 0.2757716476917267 * tl.minimum(tl.abs(z), 16.0)  # beyond it the bell is 0
    root = tl.rsqrt(1.0 + u)
    u = u * (root * root)  # u / (1 + u) in three instructions less
    series = -0.11851271856599448  # least worst error of the tail: 8e-9
    series = series * u + 0.24413444604958393
    series = series * u + 0.19062971883136476
    series = series * u - 1.211634732143709
    series = series * u + 1.8406056156667836
    series = series * u - 1.4466386975470324
    series = series * u + 0.5
    tail = bell * series
    return tl.where(z >= 0, 1.0 - tail, tail), bell


@triton.jit
def _gelu(z):
    below, _ = _normal(z)
    return z * below


@triton.jit
def _gelu_grad(z, g):
    below, bell = _normal(z)
    return g * (below + z * (0.3989422804014327 * bell))


@triton.jit
def _gelu_tanh(z):
    # 0.5 * (1 + tanh(u)) = sigmoid(2 u). Beyond |z| = 20 it is 0 or 1, and z**3 might overflow.
    v = tl.minimum(tl.maximum(z, -20.0), 20.0)
    s, _ = sigmoid_pair(1.5957691216057308 * (v + 0.044715 * v * v * v))
    return z * s


@triton.jit
def _gelu_tanh_grad(z, g):
    v = tl.minimum(tl.maximum(z, -20.0), 20.0)
    s, c = sigmoid_pair(1.5957691216057308 * (v + 0.044715 * v * v * v))
    slope = 1.5957691216057308 * (1.0 + 0.134145 * v * v)
    return g * (s + z * (s * c * slope))


@triton.jit
def _silu(z):
    s, _ = sigmoid_pair(z)
    return z * s


@triton.jit
def _silu_grad(z, g):
    s, c = sigmoid_pair(z)
    return g * (s + z * (s * c))


@triton.jit
def _quick_gelu(z):
    s, _ = sigmoid_pair(1.702 * z)
    return z * s


@triton.jit
def _quick_gelu_grad(z, g):
    s, c = sigmoid_pair(1.702 * z)
    return g * (s + z * (s * c * 1.702))


def _squared_relu(z: Tensor) -> Tensor:
    return F.relu(z).square()


def _one_rounding_quick_gelu(z: Tensor) -> Tensor:
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    y = wide * torch.sigmoid(1.702 * wide)
    return y.to(z.dtype) if z.is_floating_point() else y


class Activation(NamedTuple):
    """f and df are kernel functors; `torch` is the same function in plain PyTorch."""

    f: Any
    df: Any
    torch: Callable[[Tensor], Tensor]


ACTIVATIONS = {
    "identity": Activation(_identity, _identity_grad, torch.clone),
    "relu": Activation(_relu, _relu_grad, F.relu),
    "relu2": Activation(_relu2, _relu2_grad, _squared_relu),
    "leaky_relu": Activation(_leaky_relu, _leaky_relu_grad, F.leaky_relu),
    "elu": Activation(_elu, _elu_grad, F.elu),
    "sigmoid": Activation(_sigmoid, _sigmoid_grad, torch.sigmoid),
    "tanh": Activation(_tanh, _tanh_grad, torch.tanh),
    "gelu": Activation(_gelu, _gelu_grad, F.gelu),
    "gelu_tanh": Activation(_gelu_tanh, _gelu_tanh_grad, partial(F.gelu, approximate="tanh")),
    "quick_gelu": Activation(_quick_gelu, _quick_gelu_grad, _one_rounding_quick_gelu),
    "silu": Activation(_silu, _silu_grad, F.silu),
}


def require_activation(op: str, name: str) -> None:
    if name not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
