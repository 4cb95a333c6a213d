"""Modules of the activations that torch.nn has none of: each is the formula it says."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.support.devices import DEVICE
from trilith import blocks

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
UNITS = {
    "GLU": torch.sigmoid,
    "SwiGLU": F.silu,
    "GeGLU": F.gelu,
    "ReGLU": F.relu,
    "GatedActivation": F.silu,
}


def assert_values_and_gradients(ours, theirs, *inputs):
    """Of `ours`, against plain PyTorch in float64 on the same numbers."""
    given = [x.to(DEVICE).requires_grad_() for x in inputs]
    wide = [x.double().requires_grad_() for x in inputs]
    y, expected = ours(*given), theirs(*wide)
    dy = torch.randn(y.shape, dtype=y.dtype)
    grads = torch.autograd.grad(y, given, dy.to(DEVICE))
    wanted = torch.autograd.grad(expected, wide, dy.double())
    for actual, right in zip((y, *grads), (expected, *wanted), strict=True):
        assert actual.dtype == inputs[0].dtype
        torch.testing.assert_close(actual.cpu(), right.to(actual.dtype))


@DTYPES
def test_relu2(dtype):
    x = torch.randn(3, 5, 9, dtype=dtype)
    assert_values_and_gradients(blocks.ReLU2(), lambda x: F.relu(x).square(), x)


@DTYPES
@pytest.mark.parametrize("name", UNITS)
def test_gated_units_of_two_tensors(name, dtype):
    act = UNITS[name]
    pair = torch.randn(2, 3, 9, dtype=dtype).unbind()
    unit = getattr(blocks, name)()
    assert_values_and_gradients(unit, lambda gate, up: act(gate) * up, *pair)


@DTYPES
@pytest.mark.parametrize("name", UNITS)
def test_gated_units_of_the_halves_of_one(name, dtype):
    def plain(x):
        up, gate = x.chunk(2, dim=-1)
        return UNITS[name](gate) * up

    unit = getattr(blocks, name)()
    assert_values_and_gradients(unit, plain, torch.randn(3, 5, 18, dtype=dtype))


def test_glu_is_torch_glu():
    x = torch.randn(4, 10, device=DEVICE)
    torch.testing.assert_close(blocks.GLU()(x), nn.GLU()(x))


def test_any_activation_gates():
    gate, up = torch.randn(2, 3, 9, device=DEVICE)
    unit = blocks.GatedActivation("relu2")
    torch.testing.assert_close(unit(gate, up), F.relu(gate).square() * up)
    assert str(unit) == "GatedActivation(activation='relu2')"


def test_halves_of_an_odd_dimension_are_refused():
    with pytest.raises(ValueError, match=r"SwiGLU: the last dimension of x must be even.*\(2, 7\)"):
        blocks.SwiGLU()(torch.randn(2, 7, device=DEVICE))
