"""Normalisation over the last dimension."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trilith.kernels import (
    LAYER_NORM,
    RMS_NORM,
    add_layer_norm,
    add_rms_norm,
    layer_norm,
    layer_norm_linear,
    rms_norm,
    rms_norm_linear,
)
from trilith.plugins import Op


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * weight + bias, for x (..., dim) of any floating dtype.

    Args:
        dim: the last dimension's size.
        eps: added to the variance under the square root.
        bias: whether there is one. Weight and bias are (dim,), at first 1 and 0.
    """

    op: ClassVar[Op] = LAYER_NORM

    def __init__(self, dim: int, *, eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, (self.dim,), self.weight, self.bias, self.eps)

    def added(self, x: Tensor, residual: Tensor, p: float) -> tuple[Tensor, Tensor]:
        """(norm(total), total) of total = residual + dropout(x)."""
        return add_layer_norm(x, residual, self.weight, self.bias, self.eps, p=p)

    def linear(
        self, x: Tensor, weight: Any, bias: Any, residual: Tensor | None = None, p: float = 0.0
    ) -> Any:
        """Linear layers of the norm of x, or of residual + dropout(x), whose sum is given too."""
        norm = (self.weight, self.bias)
        return layer_norm_linear(x, *norm, weight, bias, self.eps, residual=residual, p=p)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}, bias={self.bias is not None}"


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, for x (..., dim) of any floating dtype.

    Args:
        dim: the last dimension's size; weight is (dim,), at first 1.
        eps: added to the mean square; None is the machine epsilon of the arithmetic, as in
            torch.nn.RMSNorm.
    """

    op: ClassVar[Op] = RMS_NORM

    def __init__(self, dim: int, *, eps: float | None = 1e-6) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, (self.dim,), self.weight, self.eps)

    def added(self, x: Tensor, residual: Tensor, p: float) -> tuple[Tensor, Tensor]:
        """(norm(total), total) of total = residual + dropout(x)."""
        return add_rms_norm(x, residual, self.weight, self.eps, p=p)

    def linear(
        self, x: Tensor, weight: Any, bias: Any, residual: Tensor | None = None, p: float = 0.0
    ) -> Any:
        """Linear layers of the norm of x, or of residual + dropout(x), whose sum is given too."""
        return rms_norm_linear(x, self.weight, weight, bias, self.eps, residual=residual, p=p)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}"
