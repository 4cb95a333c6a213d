"""torch.nn's losses on Trilith's kernels."""

from __future__ import annotations

from torch import Tensor, nn

from trilith.kernels import (
    BCE_WITH_LOGITS,
    CROSS_ENTROPY,
    MSE_LOSS,
    SOFT_CROSS_ENTROPY,
    binary_cross_entropy_with_logits,
    cross_entropy,
    mse_loss,
)


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


class BCEWithLogitsLoss(nn.BCEWithLogitsLoss):
    """torch.nn.BCEWithLogitsLoss."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if input.is_cpu and BCE_WITH_LOGITS.is_reference_on_cpu:
            return super().forward(input, target)
        return binary_cross_entropy_with_logits(
            input, target, self.weight, reduction=self.reduction, pos_weight=self.pos_weight
        )


class MSELoss(nn.MSELoss):
    """torch.nn.MSELoss."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if input.is_cpu and MSE_LOSS.is_reference_on_cpu:
            return super().forward(input, target)
        return mse_loss(input, target, reduction=self.reduction)
