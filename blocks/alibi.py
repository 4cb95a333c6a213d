"""Attention with linear biases: a score loses in proportion to the distance."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Alibi(nn.Module):
    """Slopes (H,) of -slope * |i - j|, which attention adds to the scores (`alibi_slopes`).

    Head h of H has slope 2^(-8 (h + 1) / H); where H is no power of 2, those of the power below,
    then every other one of twice that power. Called without arguments, it gives them in float32.

    Source: Press et al., "Train Short, Test Long", 2022.
    """

    acts_on = "scores"
    slopes: Tensor

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        if n_heads < 1:
            raise ValueError(f"Alibi: n_heads must be at least 1, got {n_heads}")
        self.n_heads = n_heads
        self.register_buffer("slopes", torch.empty(n_heads), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        power = 2 ** int(math.log2(self.n_heads))
        values = [2 ** (-8 * (h + 1) / power) for h in range(power)]
        values += [2 ** (-4 * (h + 1) / power) for h in range(0, 2 * power, 2)]
        self.slopes = torch.tensor(values[: self.n_heads], device=self.slopes.device)

    def forward(self) -> Tensor:
        return self.slopes

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.reset_parameters()  # float32 in a bfloat16 model, and whole after to_empty
        return self

    def extra_repr(self) -> str:
        return f"{self.n_heads}"
