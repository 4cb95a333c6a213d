"""torch.nn's dropout."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from trilith.blocks.drop_in.layouts import elementwise
from trilith.kernels import DROPOUT, dropout


class Dropout(nn.Dropout):
    """torch.nn.Dropout; the mask is made again in backward instead of being kept.

    On a GPU the mask is another one than torch draws from the same seed. In place, and on numbers
    that are not floating-point, it is torch's own.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return input
        takes = input.is_floating_point() and not self.inplace
        if not takes or input.is_cpu and DROPOUT.is_reference_on_cpu:
            return F.dropout(input, self.p, True, self.inplace)
        return elementwise(self._drop, input)

    def _drop(self, x: Tensor) -> Tensor:
        return dropout(x, self.p)
