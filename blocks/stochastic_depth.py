"""Stochastic depth: whole branches left out, sample by sample."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class StochasticDepth(nn.Module):
    """x * keep / (1 - p) with keep of 0 or 1 for each sample of x (B, ...); x itself in eval mode.

    As `inner` of a `Residual`, z = x + inner(f(x)): samples pass the branch by with probability p.
    The gradient is dy * keep / (1 - p). Drawn on x's device from torch's generator, which
    checkpointing restores.

    Args:
        p: probability that a sample is dropped, from 0 to 1.

    Source: Huang et al., "Deep Networks with Stochastic Depth", 2016.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"StochasticDepth: p must be from 0 to 1, got {p}")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        drawn = torch.rand(x.shape[:1] + (1,) * (x.ndim - 1), device=x.device)
        # selected, not scaled by 0: an infinity in a dropped sample is gone too
        return torch.where(drawn < self.p, 0.0, x / (1.0 - self.p) if self.p < 1.0 else x)

    def extra_repr(self) -> str:
        return f"p={self.p}"
