"""torch.nn's norms; where no kernel runs, torch's own functions at once."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional as F

from trilith.blocks.drop_in.layouts import each
from trilith.blocks.drop_in.swap import constructed_like, keep_called, unhooked
from trilith.blocks.linear import kernels_run
from trilith.kernels import (
    LAYER_NORM,
    NORM_LINEAR,
    RMS_NORM,
    layer_norm,
    layer_norm_linear,
    rms_norm,
    rms_norm_linear,
)
from trilith.plugins import may_fuse
from trilith.plugins.autocast import autocasts


class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm: (x - mean) / sqrt(variance + eps) * weight + bias."""

    passed_over_by_torch = True

    @constructed_like(nn.LayerNorm)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        keep_called(self)

    def forward(self, input: Tensor) -> Tensor:
        if input.is_cpu and LAYER_NORM.is_reference_on_cpu:
            return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
        if input.is_nested:
            return each(self.forward, input)
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """torch.nn.RMSNorm: x / sqrt(mean(x^2) + eps) * weight."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cpu and RMS_NORM.is_reference_on_cpu:
            return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
        if x.is_nested:
            return each(self.forward, x)
        return rms_norm(x, self.normalized_shape, self.weight, self.eps)


def plain_norm(module: nn.Module) -> bool:
    """Whether reading the parameters of a norm over the last dimension is calling it."""
    kinds = (nn.LayerNorm, LayerNorm, nn.RMSNorm, RMSNorm)
    return type(module) in kinds and unhooked(module) and len(module.normalized_shape) == 1  # type: ignore[arg-type]


def may_join_linear(x: Tensor, weight: Tensor, norm: nn.Module) -> bool:
    """Whether the norm of x and its product with `weight` may be one call."""
    op = LAYER_NORM if isinstance(norm, nn.LayerNorm) else RMS_NORM
    as_torch = x.dtype == weight.dtype or autocasts(x)
    return kernels_run(x) and as_torch and not x.is_nested and may_fuse(NORM_LINEAR, x, op)


def norm_linear(
    norm: nn.LayerNorm | nn.RMSNorm, x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """F.linear(norm(x), weight, bias); what the norm gives is not kept."""
    if isinstance(norm, nn.LayerNorm):
        y = layer_norm_linear(x, norm.weight, norm.bias, weight, bias, norm.eps)
    else:
        y = rms_norm_linear(x, norm.weight, weight, bias, norm.eps)
    return cast(Tensor, y)
