"""Memory layouts of torch.nn's inputs that kernels don't see: nested, and channels last."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def elementwise(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), for one that gives contiguous results; channels stay last if they are."""
    if x.is_nested:
        return each(function, x)
    if x.dim() > 2 and not x.is_contiguous():
        last = x.movedim(1, -1)
        if last.is_contiguous():
            return function(last).movedim(-1, 1)
    return function(x)


def each(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function of each of a nested tensor's parts."""
    return torch.nested.as_nested_tensor([function(part) for part in x.unbind()], layout=x.layout)


def padded(x: Tensor) -> tuple[Tensor, Tensor]:
    """A nested (B, T*, E) as (B, T, E) with zeros, and a mask (B, T), True where those are."""
    lengths = torch.tensor([len(part) for part in x.unbind()], device=x.device)
    dense = torch.nested.to_padded_tensor(x, 0.0)
    return dense, torch.arange(dense.shape[1], device=x.device) >= lengths[:, None]


def nested(dense: Tensor, padding: Tensor, layout: torch.layout) -> Tensor:
    """What `padded` came from."""
    lengths = (~padding).sum(1).tolist()
    parts = [row[:length] for row, length in zip(dense, lengths, strict=True)]
    return torch.nested.as_nested_tensor(parts, layout=layout)
