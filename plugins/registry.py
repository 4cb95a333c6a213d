"""Which ops, implementations and modules exist, and which implementation a call takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from trilith.plugins.op import Op
from trilith.plugins.spec import Implementation, ModuleSpec, OpSpec


class Registry:
    """Ops and modules by name, and which plugin brought each."""

    def __init__(self) -> None:
        self._ops: dict[str, Op] = {}
        self._modules: dict[tuple[str, str], ModuleSpec] = {}
        self._owners: dict[Any, str] = {}

    def add_op(self, spec: OpSpec | Op, owner: str = "trilith") -> Op:
        name = spec.spec.name if isinstance(spec, Op) else spec.name
        if name in self._ops:
            raise ValueError(
                f"{name} is already defined by {self._owners[name]}; "
                "register an Implementation to replace how it runs"
            )
        op = spec if isinstance(spec, Op) else Op(spec)
        self._ops[name] = op
        self._owners[name] = owner
        return op

    def add_implementation(self, implementation: Implementation, owner: str = "trilith") -> None:
        self.op(implementation.op).add_implementation(implementation)
        self._owners[implementation.op, implementation.provider] = owner

    def add_module(self, spec: ModuleSpec, owner: str = "trilith") -> None:
        key = (spec.slot, spec.name)
        if key in self._modules:
            raise ValueError(
                f"{spec.slot} {spec.name!r} is already defined by {self._owners[key]}; "
                "choose another name"
            )
        self._modules[key] = spec
        self._owners[key] = owner

    def op(self, name: str) -> Op:
        if name not in self._ops:
            raise KeyError(f"no op {name!r}; there are: {', '.join(self.op_names())}")
        return self._ops[name]

    def op_names(self) -> list[str]:
        return sorted(self._ops)

    def ops(self) -> list[Op]:
        return [self._ops[name] for name in self.op_names()]

    def build_module(self, slot: str, name: str, config: Any) -> torch.nn.Module:
        spec = self._modules.get((slot, name))
        if spec is None:
            raise KeyError(f"no {slot} {name!r}; there are: {', '.join(self.module_names(slot))}")
        return spec.build(config)

    def module_names(self, slot: str) -> list[str]:
        return sorted(name for s, name in self._modules if s == slot)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """What is added inside is taken back if the block raises."""
        ops, modules, owners = dict(self._ops), dict(self._modules), dict(self._owners)
        implementations = {name: list(op.implementations) for name, op in ops.items()}
        try:
            yield
        except BaseException:
            for name in self._ops.keys() - ops.keys():
                self._ops[name].destroy()
            for name, kept in implementations.items():
                for implementation in [i for i in ops[name].implementations if i not in kept]:
                    ops[name].remove_implementation(implementation.provider)
            self._ops, self._modules, self._owners = ops, modules, owners
            raise

    def explain(self, name: str, device: torch.device, dtype: torch.dtype) -> str:
        op = self.op(name)
        lines = [f"{name} on {device}, {dtype}:"]
        for choice in op.implementations:
            verdict = choice.refusal(device, dtype) or "can run"
            lines.append(f"  {choice.provider} (priority {choice.priority}): {verdict}")
        chosen = op.candidates(device, dtype)
        lines.append(f"  takes: {chosen[0].provider if chosen else 'the reference (PyTorch)'}")
        return "\n".join(lines)


registry = Registry()
