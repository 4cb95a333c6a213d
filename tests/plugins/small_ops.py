"""An op without Triton, which notes what ran, for tests of what makes an op of an OpSpec."""

import torch
from torch import Tensor

from tests.support.devices import DEVICE
from trilith.plugins import OpSpec, Sample

EVERYWHERE = ("cpu", "cuda")

calls: list[str] = []


def forward(x: Tensor, scale: float = 1.0) -> tuple[Tensor, ...]:
    calls.append("forward")
    return (torch.relu(x).square() * scale,)


def backward(ctx, dy):
    calls.append("backward")
    x, scale = ctx.inputs
    return (2 * torch.relu(x) * scale * dy,)


def reference(x, scale=1.0):
    """relu(x) squared."""
    calls.append("reference")
    return torch.relu(x).square() * scale


def samples(device, dtype):
    yield Sample(torch.randn(7, 33, device=device, dtype=dtype), scale=2.0)


RELU2 = OpSpec(
    name="test_op::relu2",
    forward=forward,
    backward=backward,
    reference=reference,
    samples=samples,
    devices=EVERYWHERE,
)


def randn(*shape, dtype=torch.float32, grad=True):
    return torch.randn(*shape, dtype=dtype, device=DEVICE).requires_grad_(grad)
