"""torch.nn's Softmax and LogSoftmax on Trilith's kernels."""

from __future__ import annotations

from torch import Tensor, nn

from trilith.kernels import log_softmax, softmax


class Softmax(nn.Softmax):
    """torch.nn.Softmax."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if self.dim is None else softmax(input, self.dim)


class LogSoftmax(nn.LogSoftmax):
    """torch.nn.LogSoftmax."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if self.dim is None else log_softmax(input, self.dim)
