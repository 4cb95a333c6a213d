"""torch.nn's losses."""

from __future__ import annotations

from torch import Tensor, nn

from trilith.kernels import CROSS_ENTROPY, SOFT_CROSS_ENTROPY, cross_entropy


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss, of class indices or class probabilities."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        op = SOFT_CROSS_ENTROPY if target.is_floating_point() else CROSS_ENTROPY
        if input.is_cpu and op.is_reference_on_cpu:
            return super().forward(input, target)
        return cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )
