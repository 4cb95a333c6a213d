"""torch.nn's norms; where no kernel runs, torch's own functions at once."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from trilith.blocks.drop_in.layouts import each
from trilith.blocks.drop_in.swap import keep_called
from trilith.blocks.linear import kernels_run
from trilith.kernels import layer_norm, rms_norm


class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm: (x - mean) / sqrt(variance + eps) * weight + bias."""

    passed_over_by_torch = True

    def __init__(
        self,
        normalized_shape: Any,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        keep_called(self)

    def forward(self, input: Tensor) -> Tensor:
        if not kernels_run(input):
            return super().forward(input)
        if input.is_nested:
            return each(self.forward, input)
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """torch.nn.RMSNorm: x / sqrt(mean(x^2) + eps) * weight."""

    def forward(self, x: Tensor) -> Tensor:
        if not kernels_run(x):
            return super().forward(x)
        if x.is_nested:
            return each(self.forward, x)
        return rms_norm(x, self.normalized_shape, self.weight, self.eps)
