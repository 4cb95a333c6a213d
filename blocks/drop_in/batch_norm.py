"""torch.nn.BatchNorm1d on Trilith's kernels."""

from __future__ import annotations

from torch import Tensor, nn

from trilith.kernels import BATCH_NORM, BATCH_NORM_GIVEN, batch_norm


class BatchNorm1d(nn.BatchNorm1d):
    """torch.nn.BatchNorm1d: x (N, C) or (N, C, L) normalised in each channel.

    With momentum None the running statistics are the mean over all batches so far.
    """

    def forward(self, input: Tensor) -> Tensor:
        by_batch = self.training or (self.running_mean is None and self.running_var is None)
        op = BATCH_NORM if by_batch else BATCH_NORM_GIVEN
        if input.is_cpu and op.is_reference_on_cpu:
            return super().forward(input)
        self._check_input_dim(input)
        momentum: float | Tensor = 0.0 if self.momentum is None else self.momentum
        tracks = self.training and self.track_running_stats
        if tracks and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # a tensor, so that the host need not wait for it
                momentum = 1.0 / self.num_batches_tracked
        keep = not self.training or self.track_running_stats
        return batch_norm(
            input,
            self.running_mean if keep else None,
            self.running_var if keep else None,
            self.weight,
            self.bias,
            by_batch,
            momentum,
            self.eps,
        )
