"""torch.nn's losses of one prediction against one target on Trilith's kernels."""

from __future__ import annotations

from torch import Tensor, nn

from trilith.kernels import (
    BCE_WITH_LOGITS,
    MSE_LOSS,
    binary_cross_entropy_with_logits,
    mse_loss,
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
