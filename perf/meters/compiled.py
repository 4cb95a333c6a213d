"""What torch.compile makes of plain PyTorch: what it keeps for backward, and what it launches.

Neither generates code: the partitioner's choice is run operator by operator, and the scheduler is
asked for its kernels and stopped.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import torch
from functorch.compile import make_boxed_func
from torch._inductor import config, ir
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.scheduler import NopKernelSchedulerNode, Scheduler


def partitioned(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as torch.compile splits it into forward and backward, run operator by operator."""
    return torch.compile(function, backend=_backend(_as_it_is), dynamic=False)


def scheduled(function: Callable[..., Any], kernels: list[int]) -> Callable[..., Any]:
    """The same; each graph adds how many kernels Inductor would launch for it to `kernels`.

    As its scheduler fuses for this machine's CPU: a matrix product or an attention is one.
    """

    def count(module: torch.fx.GraphModule, examples: Sequence[Any], **options: Any) -> Any:
        kernels.append(_kernels(copy.deepcopy(module), examples, options))
        return make_boxed_func(module.forward)

    return torch.compile(function, backend=_backend(count), dynamic=False)


def _backend(inner: Callable[..., Any]) -> Callable[..., Any]:
    def backend(module: torch.fx.GraphModule, examples: Sequence[Any]) -> Any:
        return compile_fx(module, list(examples), inner_compile=inner)

    return backend


def _as_it_is(module: torch.fx.GraphModule, *_: Any, **__: Any) -> Any:
    return make_boxed_func(module.forward)


def _launches(node: Any) -> bool:
    """Whether the node starts a kernel: no buffer that others fill, nor one output of several."""
    return not (isinstance(node, NopKernelSchedulerNode) or isinstance(node.node, ir.MultiOutput))


class _Scheduled(BaseException):
    """Carries the number of kernels past Inductor's handling of errors."""


def _kernels(module: torch.fx.GraphModule, examples: Sequence[Any], options: dict[str, Any]) -> int:
    def codegen(scheduler: Scheduler) -> None:
        raise _Scheduled(sum(map(_launches, scheduler.nodes)))

    with (
        patch.object(Scheduler, "codegen", codegen),
        config.patch(force_disable_caches=True, compile_threads=1),
    ):
        try:
            compile_fx_inner(module, list(examples), **options)
        except _Scheduled as stopped:
            return stopped.args[0]
    return 0
