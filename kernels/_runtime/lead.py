"""The tensor that decides who runs a call: an op's first."""

from __future__ import annotations

import torch
from torch import Tensor


def as_lead(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x, in float64 where the result is: kernels compute in float32, the reference in float64."""
    return x.double() if dtype == torch.float64 else x
