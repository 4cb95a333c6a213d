"""torch.nn's norms; where no kernel runs, torch's own functions at once."""

from __future__ import annotations

from functools import wraps
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from trilith.blocks.drop_in.layouts import each
from trilith.blocks.drop_in.swap import keep_called
from trilith.kernels import LAYER_NORM, RMS_NORM, layer_norm, rms_norm


class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm: (x - mean) / sqrt(variance + eps) * weight + bias."""

    passed_over_by_torch = True

    @wraps(nn.LayerNorm.__init__)
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
