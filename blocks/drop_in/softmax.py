"""torch.nn's Softmax and LogSoftmax on Trilith's kernels."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from trilith.kernels import LOG_SOFTMAX, SOFTMAX, log_softmax, softmax


class Softmax(nn.Softmax):
    """torch.nn.Softmax."""

    def forward(self, input: Tensor) -> Tensor:
        if self.dim is None or input.is_nested or input.is_cpu and SOFTMAX.is_reference_on_cpu:
            return F.softmax(input, self.dim, _stacklevel=5)
        return softmax(input, self.dim)


class LogSoftmax(nn.LogSoftmax):
    """torch.nn.LogSoftmax."""

    def forward(self, input: Tensor) -> Tensor:
        if self.dim is None or input.is_nested or input.is_cpu and LOG_SOFTMAX.is_reference_on_cpu:
            return F.log_softmax(input, self.dim, _stacklevel=5)
        return log_softmax(input, self.dim)
