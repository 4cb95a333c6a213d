"""torch.nn's dropout."""

from __future__ import annotations

from torch import Tensor, nn

from trilith.blocks.drop_in.layouts import elementwise
from trilith.blocks.linear import kernels_run
from trilith.kernels import dropout


class Dropout(nn.Dropout):
    """torch.nn.Dropout; the mask is made again in backward instead of being kept.

    On a GPU the mask is another one than torch draws from the same seed. In place, and on numbers
    that are not floating-point, it is torch's own.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return input
        if self.inplace or not (kernels_run(input) and input.is_floating_point()):
            return super().forward(input)
        return elementwise(self._drop, input)

    def _drop(self, x: Tensor) -> Tensor:
        return dropout(x, self.p)
