"""Which ops, implementations and modules exist, and which implementation a call takes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from trilith.plugins.op import Op
from trilith.plugins.spec import Implementation, ModuleSpec, OpSpec


class Registry:
    """Ops and modules by name."""

    def __init__(self) -> None:
        self._ops: dict[str, Op] = {}
        self._modules: dict[tuple[str, str], ModuleSpec] = {}

    def add_op(self, spec: OpSpec) -> Op:
        if spec.name in self._ops:
            raise ValueError(
                f"{spec.name}: an op of this name exists; add an Implementation instead"
            )
        op = Op(spec)
        self._ops[spec.name] = op
        return op

    def remove_op(self, name: str) -> None:
        self._ops.pop(name).destroy()

    def add_implementation(self, implementation: Implementation) -> None:
        self.op(implementation.op).add_implementation(implementation)

    def add_module(self, spec: ModuleSpec) -> None:
        key = (spec.slot, spec.name)
        if key in self._modules:
            raise ValueError(f"{spec.slot} {spec.name!r} exists already; choose another name")
        self._modules[key] = spec

    def op(self, name: str) -> Op:
        try:
            return self._ops[name]
        except KeyError:
            raise KeyError(f"no op {name!r}; there are: {', '.join(self.op_names())}") from None

    def op_names(self) -> list[str]:
        return sorted(self._ops)

    def ops(self) -> Iterable[Op]:
        return [self._ops[name] for name in self.op_names()]

    def build_module(self, slot: str, name: str, config: Any) -> torch.nn.Module:
        spec = self._modules.get((slot, name))
        if spec is None:
            raise KeyError(f"no {slot} {name!r}; there are: {', '.join(self.module_names(slot))}")
        return spec.build(config)

    def module_names(self, slot: str) -> list[str]:
        return sorted(name for s, name in self._modules if s == slot)

    def explain(self, name: str, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> str:
        """Which implementation a call of the op would take on this device and dtype, and why."""
        op = self.op(name)
        lines = [f"{name} on {device}, {dtype}:"]
        for implementation in op.implementations:
            verdict = implementation.refusal(torch.device(device), dtype) or "can run"
            lines.append(
                f"  {implementation.provider} (priority {implementation.priority}): {verdict}"
            )
        chosen = op.candidates(torch.device(device), dtype)
        lines.append(
            f"  takes: {chosen[0].provider if chosen else 'the reference (plain PyTorch)'}"
        )
        return "\n".join(lines)


registry = Registry()
