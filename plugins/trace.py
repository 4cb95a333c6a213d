"""What ran: an event for each run of an implementation or reference, while someone listens.

Outside `trace()` nothing is checked or counted: entering it puts other callables in the ops'
places, leaving it puts the originals back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trilith.plugins import op as op_module
from trilith.plugins import selection
from trilith.plugins.op import Op
from trilith.plugins.spec import BackwardContext, Implementation


@dataclass(frozen=True)
class OpCalled:
    """One run. `shapes` and `dtypes` are those of the tensors that forward takes (of the outputs'
    gradients when `direction` is "backward"), None where a tensor is left out."""

    op: str
    provider: str
    direction: str
    shapes: tuple[tuple[int, ...] | None, ...]
    dtypes: tuple[torch.dtype | None, ...]


Listener = Callable[[OpCalled], None]

_listeners: list[Listener] = []
_lock = threading.Lock()


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Every op reports to `listener`, whatever thread it runs in."""
    with _lock:
        if not _listeners:
            for op in op_module.defined().values():
                _wire(op)
        _listeners.append(listener)
    try:
        yield
    finally:
        with _lock:
            _listeners.remove(listener)
            if not _listeners:
                for op in op_module.defined().values():
                    op.unwire()


def _wire(op: Op) -> None:
    op.wire({i.provider: _traced(op, i) for i in op.implementations}, _traced_reference(op))


def _traced(op: Op, implementation: Implementation) -> Implementation:
    name, provider, own_backward = op.spec.name, implementation.provider, implementation.backward

    def forward(*args: Any) -> Any:
        _tell(name, provider, "forward", op.tensors_of(args))
        return implementation.forward(*args)

    if own_backward is None:
        return replace(implementation, forward=forward)

    def backward(ctx: BackwardContext, *grads: Tensor | None) -> Any:
        _tell(name, provider, "backward", grads)
        return own_backward(ctx, *grads)

    return replace(implementation, forward=forward, backward=backward)


def _traced_reference(op: Op) -> Callable[..., Any]:
    def reference(*args: Any) -> Any:
        if not torch.compiler.is_compiling():
            _tell(op.spec.name, selection.REFERENCE, "forward", op.tensors_of(args))
        return op.spec.reference(*args)

    return reference


def _tell(op: str, provider: str, direction: str, tensors: Sequence[Tensor | None]) -> None:
    event = OpCalled(
        op,
        provider,
        direction,
        tuple(None if t is None else tuple(t.shape) for t in tensors),
        tuple(None if t is None else t.dtype for t in tensors),
    )
    for listener in tuple(_listeners):
        listener(event)
