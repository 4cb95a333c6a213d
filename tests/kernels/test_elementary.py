"""How many roundings the functions that kernels are made of are off, everywhere on a dense grid.

In the interpreter alone, which rounds each step as IEEE 754 does: what is left is the formula's.
An op's own tests grant what a GPU's approximations may add, and a digit of a coefficient with it.
"""

from importlib.util import find_spec

import pytest
import torch

from tests.support.devices import INTERPRETING
from trilith.kernels._runtime import elementary
from trilith.kernels._runtime.functors import ACTIVATIONS
from trilith.kernels._runtime.language import tl, triton
from trilith.kernels._runtime.launch import launch

pytestmark = pytest.mark.skipif(
    not INTERPRETING or find_spec("triton") is None, reason="counts roundings of the interpreter"
)

POINTS = 1 << 14
ROUNDINGS = 4


@triton.jit
def _value_kernel(x_ptr, y_ptr, F: tl.constexpr, BLOCK: tl.constexpr):
    """One program owns all of x."""
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, F(tl.load(x_ptr + at)))


@triton.jit
def _slope_kernel(x_ptr, y_ptr, F: tl.constexpr, BLOCK: tl.constexpr):
    """The same of a functor that takes an incoming gradient too, here 1."""
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, F(tl.load(x_ptr + at), tl.full((BLOCK,), 1.0, tl.float32)))


def roundings(kernel, functor, x, expected, scale):
    """The most that an element is off, in 2**-24 of its scale."""
    y = torch.empty_like(x)
    launch(kernel, (1,), x, y, F=functor, BLOCK=len(x))
    assert y.isfinite().all()
    return ((y.double() - expected).abs() / scale).max().item() * 2**24


def between(low, high):
    return torch.linspace(low, high, POINTS)


def decades(low, high):
    return torch.logspace(low, high, POINTS)


def tail(x):
    return torch.log1p(torch.exp(-x.abs()))


@pytest.mark.parametrize(
    ("name", "function", "x"),
    [
        ("exp", torch.exp, between(-80, 80)),
        ("exp_of_minus", lambda x: torch.exp(-x), between(-80, 80)),
        ("log1p", torch.log1p, decades(-30, 0)),
        ("log1p", torch.log1p, between(0.01, 2)),
        ("log1p", torch.log1p, decades(0, 30)),
        ("expm1", torch.expm1, -decades(-30, 0)),
        ("expm1", torch.expm1, between(-80, -0.01)),
        ("softplus_tail", tail, between(-80, 80)),
    ],
)
def test_elementary_functions_keep_their_digits_everywhere(name, function, x):
    expected = function(x.double())
    scale = expected.abs() * (1 if "1" in name else 1 + x.abs())  # exp's argument is rounded
    assert roundings(_value_kernel, getattr(elementary, name), x, expected, scale) < ROUNDINGS


WITHOUT_A_DIFFERENCE = {  # torch's 1 + erf and 1 + tanh have no digits left far to the left
    "gelu": lambda z: z * torch.erfc(z * -(0.5**0.5)) / 2,
    "gelu_tanh": lambda z: z * torch.sigmoid((8 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)),
}


@pytest.mark.parametrize("x", [between(-9, 9), between(-0.7, 0.7)], ids=["all", "near 0"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_and_their_slopes_keep_their_digits_everywhere(name, x):
    functors = ACTIVATIONS[name]
    wide = x.double().requires_grad_()
    y = WITHOUT_A_DIFFERENCE.get(name, functors.torch)(wide)
    (slope,) = torch.autograd.grad(y.sum(), wide)
    # Far to the left an exponential is left, of z or of z^2: its argument is rounded.
    rise = 1 + x.double().abs() * (x.abs() if name.startswith("gelu") else 1)
    scale = y.detach().abs() * rise + 1e-37  # relu's zeros
    most = 13 if name == "gelu" and x.min() < -1 else ROUNDINGS  # its tail's polynomial nears 0
    assert roundings(_value_kernel, functors.f, x, y.detach(), scale) < most
    assert roundings(_slope_kernel, functors.df, x, slope, 1 + slope.abs()) < ROUNDINGS
