"""Ops that are right, and unlike ours: what the conformance checks must let pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.plugins.ops_of_8_bits import QUANTIZED, TIMES_STORED
from trilith.plugins import OpSpec, Sample

EVERYWHERE = ("cpu", "cuda")


def _dtype_inside(*tensors: Tensor) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def prefixed(x: Tensor, prefix: Tensor) -> tuple[Tensor, ...]:
    """Of no rows of x the prefix is left, and has a gradient."""
    return (torch.cat([prefix, x]),)


def prefixed_backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
    x, prefix = ctx.inputs
    dprefix, dx = dy.split([prefix.shape[0], x.shape[0]])
    return dx.to(x.dtype, copy=True), dprefix.to(prefix.dtype, copy=True)


def prefixed_samples(device: torch.device, dtype: torch.dtype) -> Any:
    yield Sample(
        torch.randn(5, 4, device=device, dtype=dtype), torch.randn(2, 4, device=device, dtype=dtype)
    )


def with_amax(x: Tensor) -> tuple[Tensor, ...]:
    """A floating-point output that has no gradient, as the scale of a later quantisation."""
    wide = x.contiguous().float()
    return (2 * wide).to(x.dtype), wide.abs().amax()


def with_amax_backward(ctx: Any, dy: Tensor, damax: Tensor) -> tuple[Tensor, ...]:
    return ((2 * dy.float()).to(dy.dtype).contiguous(),)


def with_amax_reference(x: Tensor) -> tuple[Tensor, ...]:
    return 2 * x, x.detach().to(_dtype_inside(x)).abs().amax()


def with_amax_samples(device: torch.device, dtype: torch.dtype) -> Any:
    yield Sample(torch.randn(4, 6, device=device, dtype=dtype))


def scaled(scale: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """The first tensor has no dimension."""
    return ((scale.float() * x.float()).to(x.dtype).contiguous(),)


def scaled_backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
    scale, x = ctx.inputs
    dscale = (dy.float() * x.float()).sum()
    return dscale.to(scale.dtype), (dy.float() * scale.float()).to(x.dtype).contiguous()


def scaled_reference(scale: Tensor, x: Tensor) -> Tensor:
    inside = _dtype_inside(scale, x)
    return (scale.to(inside) * x.to(inside)).to(x.dtype)


def scaled_samples(device: torch.device, dtype: torch.dtype) -> Any:
    scale = torch.rand((), device=device, dtype=dtype) + 1
    yield Sample(scale, torch.randn(4, 6, device=device, dtype=dtype))


UNUSUAL = {
    spec.name.partition("::")[2]: spec
    for spec in (
        OpSpec(
            name="unusual::prefixed",
            forward=prefixed,
            backward=prefixed_backward,
            reference=lambda x, prefix: torch.cat([prefix, x]),
            samples=prefixed_samples,
            devices=EVERYWHERE,
        ),
        OpSpec(
            name="unusual::with_amax",
            forward=with_amax,
            backward=with_amax_backward,
            reference=with_amax_reference,
            samples=with_amax_samples,
            outputs=2,
            devices=EVERYWHERE,
        ),
        OpSpec(
            name="unusual::scaled",
            forward=scaled,
            backward=scaled_backward,
            reference=scaled_reference,
            samples=scaled_samples,
            devices=EVERYWHERE,
        ),
        QUANTIZED,
        TIMES_STORED,
    )
}
