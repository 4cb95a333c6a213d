"""PyTorch's own operators, one by one, also those that an op of ours calls inside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Observe = Callable[[str, tuple[Any, ...], dict[str, Any], Any], None]

_BODY = torch._C.DispatchKey.CompositeExplicitAutograd
_NO_LAUNCH = {
    "aten::detach",
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::lift_fresh",
    "aten::_unsafe_view",
}
_READS = "aten::_local_scalar_dense"  # a number, by the host
_SYNCS = {
    _READS,
    "aten::allclose",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::bincount",
}
_READERS = ("tolist", "numpy", "cpu")  # of a tensor: no operator is called for them on a CPU
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_"}


@contextmanager
def operators(observe: Observe) -> Iterator[None]:
    """Calls `observe(name, args, kwargs, result)` after each operator that starts a kernel.

    Views and allocations start none. An op written in Python is looked into instead: a copy or a
    fill inside it is seen. What Triton's interpreter does to run a kernel is not.
    """

    def launched(name: str, *call: Any) -> None:
        if name != _READS:
            observe(name, *call)

    with _observed(launched):
        yield


@contextmanager
def _observed(observe: Observe) -> Iterator[_Operators]:
    mode = _Operators(observe)
    with ExitStack() as stack:
        _hide_the_interpreter(mode, stack)
        stack.enter_context(mode)
        yield mode


@contextmanager
def syncs() -> Iterator[Counter[str]]:
    """Counts, by operator, where the host would wait for a device: it reads numbers, or what comes
    out has a size that only the data tell."""
    counts: Counter[str] = Counter()

    def observe(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if name in _SYNCS or _size_is_data(name, args, kwargs) or _brings_to_the_host(args, result):
            counts[name] += 1

    def counted(name: str) -> Callable[..., Any]:
        read = getattr(Tensor, name)

        def method(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            counts[name] += not mode.hidden
            return read(tensor, *args, **kwargs)

        return method

    with _observed(observe) as mode, ExitStack() as patches:
        for name in _READERS:
            patches.enter_context(patch.object(Tensor, name, counted(name)))
        yield counts


def _size_is_data(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if name in _INDEXING:
        return any(index is not None and index.dtype == torch.bool for index in args[1])
    return name == "aten::repeat_interleave" and kwargs.get("output_size") is None


def _brings_to_the_host(args: tuple[Any, ...], result: Any) -> bool:
    """A copy of a device's tensor is on the host."""
    given = [t for t in args if isinstance(t, Tensor)]
    there = any(not t.is_cpu and t.numel() > 0 for t in given)
    return there and isinstance(result, Tensor) and result.is_cpu


def _hide_the_interpreter(mode: _Operators, stack: ExitStack) -> None:
    try:
        from triton.runtime.interpreter import GridExecutor
    except ImportError:
        return
    run = GridExecutor.__call__

    def call(executor: Any, *args: Any, **kwargs: Any) -> Any:
        before, mode.hidden = mode.hidden, True
        try:
            return run(executor, *args, **kwargs)
        finally:
            mode.hidden = before

    stack.enter_context(patch.object(GridExecutor, "__call__", call))


class _Operators(TorchDispatchMode):
    def __init__(self, observe: Observe) -> None:
        super().__init__()
        self._observe = observe
        self.hidden = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # what a fake tensor is asked for its device by
            return func(*args, **kwargs)
        with self:
            result = func.decompose(*args, **kwargs)
            ours = func.namespace != "aten" and func.has_kernel_for_dispatch_key(_BODY)
            if ours and result is NotImplemented:
                return func._op_dk(_BODY, *args, **kwargs)
        if result is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        name = func._schema.name
        views = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if name not in _NO_LAUNCH and not views and not self.hidden:
            self._observe(name, args, kwargs, result)
        return result
