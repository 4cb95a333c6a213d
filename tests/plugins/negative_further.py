"""Further ops that are wrong: in dtypes that mix, in their reference, in the kind of a tensor."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tests.plugins.negative import SOUND, centred_samples, forward
from trilith.plugins import OpSpec, Sample

FURTHER: dict[str, tuple[OpSpec, str]] = {}


def weight_rounded_to_the_dtype_of_x(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return forward(x, weight.to(x.dtype))


def samples_of_many(device: torch.device, dtype: torch.dtype) -> Any:
    """Enough elements for a mean error to tell one rounding from two."""
    x = torch.randn(40, 16, device=device, dtype=dtype)
    yield Sample(x, torch.randn(16, device=device, dtype=dtype))


FURTHER["weight_rounded_to_the_dtype_of_x"] = (
    replace(
        SOUND,
        name="negative::weight_rounded_to_the_dtype_of_x",
        forward=weight_rounded_to_the_dtype_of_x,
        samples=samples_of_many,
    ),
    "mixed_dtypes",
)


def complex_output(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    y = (x * weight).float()
    return (torch.complex(y, y),)


FURTHER["complex_output"] = (
    replace(
        SOUND,
        name="negative::complex_output",
        forward=complex_output,
        reference=lambda x, weight: complex_output(x, weight)[0],
        fake=lambda x, weight: (x.new_empty(x.shape, dtype=torch.complex64),),
    ),
    "forward_matches_reference",
)


def narrow(x: Tensor) -> tuple[Tensor, ...]:
    return (x[:, :3].contiguous(),)


def narrow_backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
    x = ctx.inputs[0]
    dx = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    dx[:, :3] = dy
    return (dx,)


FURTHER["reference_that_returns_a_view"] = (
    replace(
        SOUND,
        name="negative::reference_that_returns_a_view",
        forward=narrow,
        backward=narrow_backward,
        reference=lambda x: x[:, :3],
        samples=centred_samples,
        fake=lambda x: (x.new_empty(x.shape[0], 3),),
    ),
    "fakes_are_exact",
)
