"""The one place where a Triton kernel is started."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from trilith.kernels._runtime.keys import settle_keys
from trilith.plugins.spec import INTERPRETING

Grid = tuple[int, ...]
Observer = Callable[[Any, Grid, tuple[Any, ...], dict[str, Any]], None]

observers: list[Observer] = []


class Recorder(Protocol):
    """Is told how each launch of its thread, and each call `as_one`, can be done again."""

    busy: bool

    def note(self, start: Callable[..., Any], args: tuple[Any, ...], made: Any = None) -> None: ...


class _Here(threading.local):
    recorder: Recorder | None = None


here = _Here()


def launch(kernel: Any, grid: Grid, *args: Any, **options: Any) -> None:
    """Start a Triton kernel on the device of its first tensor argument.

    Does nothing for an empty grid, and nothing on fake tensors, so that a launcher run on them
    gives its outputs' shapes and strides.

    Args:
        kernel: what `triton.jit` made.
        grid: one to three counts of programs.
        args: the kernel's arguments in order: tensors, None for one left out, numbers, and tuples.
        options: constexprs by keyword, num_warps, num_stages.

    Raises:
        TypeError: the grid is no tuple, or no argument is a tensor.

    Example:
        >>> launch(kernel, (triton.cdiv(x.numel(), 1024),), x, y, x.numel(), BLOCK=1024)
    """
    if not isinstance(grid, tuple):
        raise TypeError(f"launch: grid must be a tuple of counts, got {grid!r}")
    first = next((a for a in args if isinstance(a, Tensor)), None)
    if first is None:
        raise TypeError(f"launch: {kernel} must be given a tensor, whose device it runs on")
    if 0 in grid:
        return
    for observe in observers:
        observe(kernel, grid, args, options)
    if isinstance(first, FakeTensor):
        return
    settle_keys((kernel, *options.values()))
    recorder = here.recorder
    if recorder is not None:
        recorder.busy = True
    if first.is_cuda and first.device.index != torch.cuda.current_device():
        with torch.cuda.device(first.device):
            binary = kernel[grid](*args, **options)
    else:
        binary = kernel[grid](*args, **options)
    if recorder is not None:
        recorder.busy = False
        recorder.note(*_again(kernel, binary, grid, args, options))


def _again(
    kernel: Any, binary: Any, grid: Grid, args: tuple[Any, ...], options: dict[str, Any]
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The same launch without Triton's binding and specialising of arguments."""
    if INTERPRETING:
        return partial(kernel[grid], **options), args
    rest = kernel.params[len(args) :]
    return binary[(*grid, 1, 1)[:3]], (*args, *(options.get(p.name, p.default) for p in rest))
