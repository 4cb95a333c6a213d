"""What torch.compile would keep for backward: its partitioner's choice, without generating code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch._inductor.compile_fx import compile_fx


def partitioned(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as torch.compile splits it into forward and backward, run operator by operator."""

    def backend(module: torch.fx.GraphModule, examples: Sequence[Any]) -> Any:
        return compile_fx(module, list(examples), inner_compile=_as_it_is)

    return torch.compile(function, backend=backend, dynamic=False)


def _as_it_is(module: torch.fx.GraphModule, *_: Any, **__: Any) -> Any:
    return make_boxed_func(module.forward)
