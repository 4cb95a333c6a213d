"""The one place where a Triton kernel is started."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

Grid = tuple[int, ...]
Observer = Callable[[Any, Grid, tuple[Any, ...], dict[str, Any]], None]

observers: list[Observer] = []


def launch(kernel: Any, grid: Grid, *args: Any, **options: Any) -> None:
    """Start `kernel` on the device of its first tensor argument.

    Does nothing for an empty grid, and nothing on fake tensors, so that a launcher run on them
    gives its outputs' shapes and strides. `options`: constexprs by keyword, num_warps, num_stages.
    """
    first = next(a for a in args if isinstance(a, Tensor))
    if 0 in grid:
        return
    for observe in observers:
        observe(kernel, grid, args, options)
    if isinstance(first, FakeTensor):
        return
    if first.is_cuda and first.device.index != torch.cuda.current_device():
        with torch.cuda.device(first.device):
            kernel[grid](*args, **options)
    else:
        kernel[grid](*args, **options)
