"""Ops whose implementations differ in a number that they add: it tells which of them ran."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trilith.plugins import Implementation, Manager, OpSpec, Sample, hookimpl


def tagged(tag: float) -> tuple[Any, Any]:
    """A forward that adds `tag` to twice x, and a backward that gives `tag`."""

    def forward(x: Tensor) -> tuple[Tensor, ...]:
        return (2 * x + tag,)

    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        return (torch.full_like(dy, tag),)

    return forward, backward


def spec_of(name: str, **options: Any) -> OpSpec:
    forward, backward = tagged(1.0)
    options = {"devices": ("cpu", "cuda"), **options}
    return OpSpec(
        name=name,
        forward=forward,
        backward=backward,
        reference=lambda x: 2 * x,
        samples=lambda device, dtype: [Sample(torch.randn(3, device=device, dtype=dtype))],
        **options,
    )


def rival(op: str, provider: str = "other", tag: float = 2.0, **options: Any) -> Implementation:
    forward, backward = tagged(tag)
    options = {"devices": ("cpu", "cuda"), "priority": -1, **options}
    return Implementation(op, provider, forward, backward, **options)


class Plugin:
    def __init__(self, ops: Any = (), implementations: Any = (), select: Any = None) -> None:
        self._ops, self._implementations, self._select = ops, implementations, select
        self.asked: list[Any] = []

    @hookimpl
    def trilith_register_ops(self) -> Any:
        return self._ops

    @hookimpl
    def trilith_register_implementations(self) -> Any:
        return self._implementations

    @hookimpl
    def trilith_select_implementation(self, op: str, key: Any, candidates: Any) -> Any:
        self.asked.append((op, key, [c.provider for c in candidates]))
        return self._select(op, key, candidates) if callable(self._select) else self._select


def plug_in(manager: Manager, name: str = "acme:sel", **brings: Any) -> Plugin:
    plugin = Plugin(**brings)
    assert manager.add(name, lambda: plugin), manager.failures
    return plugin


def op_of(manager: Manager, *implementations: Implementation, select: Any = None, **options: Any):
    name = implementations[0].op if implementations else "acme_sel::op"
    plug_in(manager, ops=[spec_of(name, **options)], implementations=implementations, select=select)
    return manager.registry.op(name)


def tag_of(op: Any) -> float:
    """Which implementation ran: 0 is the reference."""
    return op(torch.zeros(3))[0].item()
