"""Ops over floats of 8 bits, which are stored data: one writes them, one reads them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trilith.plugins import OpSpec, Sample

EVERYWHERE = ("cpu", "cuda")
LARGEST = torch.finfo(torch.float8_e4m3fn).max


def _scaled(x: Tensor, inside: torch.dtype) -> tuple[Tensor, Tensor]:
    amax = x.abs().amax().to(inside)
    scale = torch.where(amax > 0, LARGEST / amax, 1.0)
    return (x.to(inside) * scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), 1.0 / scale


def quantized(x: Tensor) -> tuple[Tensor, ...]:
    return _scaled(x, torch.float32)


def quantized_reference(x: Tensor) -> tuple[Tensor, ...]:
    return _scaled(x.detach(), torch.promote_types(torch.float32, x.dtype))


def quantized_samples(device: torch.device, dtype: torch.dtype) -> Any:
    yield Sample(torch.randn(6, 5, device=device, dtype=dtype))


def times_stored(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return ((x.float() * weight.float()).to(x.dtype).contiguous(),)


def times_stored_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.inputs
    return (dy.float() * weight.float()).to(x.dtype).contiguous(), None


def times_stored_reference(x: Tensor, weight: Tensor) -> Tensor:
    inside = torch.promote_types(torch.float32, x.dtype)
    return (x.to(inside) * weight.to(inside)).to(x.dtype)


def times_stored_samples(device: torch.device, dtype: torch.dtype) -> Any:
    weight = torch.randn(6, 5, device=device).to(torch.float8_e5m2)
    yield Sample(torch.randn(6, 5, device=device, dtype=dtype), weight)


QUANTIZED = OpSpec(
    name="unusual::quantized",
    forward=quantized,
    backward=None,
    reference=quantized_reference,
    samples=quantized_samples,
    outputs=2,
    devices=EVERYWHERE,
)
TIMES_STORED = OpSpec(
    name="unusual::times_stored",
    forward=times_stored,
    backward=times_stored_backward,
    reference=times_stored_reference,
    samples=times_stored_samples,
    devices=EVERYWHERE,
)


def quantized_by_half_the_scale(x: Tensor) -> tuple[Tensor, ...]:
    y, inverse = quantized(x)
    return (y.float() / 2).to(y.dtype), inverse


def quantized_last_column_dropped(x: Tensor) -> tuple[Tensor, ...]:
    y, inverse = quantized(x)
    out = torch.empty_like(y)
    out[:, :-1] = y[:, :-1]
    return out, inverse


def quantized_beyond_its_output(x: Tensor) -> tuple[Tensor, ...]:
    y, inverse = quantized(x)
    out = torch.empty_like(y)
    out.as_strided((y.numel() + 1,), (1,))[-1] = 1.0
    return out.copy_(y), inverse


def weight_is_written(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    result = times_stored(x, weight)
    weight.view(torch.uint8).add_(1)
    return result


def weight_read_as_dense(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return times_stored(x, weight.as_strided(weight.shape, (weight.shape[1], 1)))


FAULTS_OF_8_BITS = {
    f.__name__: (replace(spec, forward=f), check)
    for spec, f, check in (
        (QUANTIZED, quantized_by_half_the_scale, "forward_matches_reference"),
        (QUANTIZED, quantized_last_column_dropped, "every_element_is_written"),
        (QUANTIZED, quantized_beyond_its_output, "guard_bands"),
        (TIMES_STORED, weight_is_written, "nothing_is_written_to"),
        (TIMES_STORED, weight_read_as_dense, "input_layouts"),
    )
}
