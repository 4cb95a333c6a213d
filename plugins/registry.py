"""Which ops, implementations, modules and score mods exist, who brought them, who runs a call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import torch

from trilith.plugins import fusion, selection
from trilith.plugins import op as op_module
from trilith.plugins.op import Op
from trilith.plugins.selection import SelectionKey, Vote
from trilith.plugins.spec import Implementation, ModuleSpec, OpSpec, ScoreMod

_WHEN_THE_REFERENCE_RUNS = "for empty tensors, torch.func transforms, double backward"


def _nothing() -> None: ...


def _owner(op: Op) -> str:
    return op.owner_of(op.spec.provider)


class UnknownOpError(KeyError):
    """No plugin has registered an op of this name so far."""


def _meant(name: str, known: Iterable[str]) -> str:
    """What to ask of someone who said rms_norm, or spelt trilith::rms_norm nearly right."""
    full = {n: n for n in known} | {n.partition("::")[2]: n for n in known}
    close = get_close_matches(name, full, n=1, cutoff=0.7)
    return f", did you mean {full[close[0]]}?" if close else ""


class Registry:
    """Ops and modules by name, and which plugin brought each.

    `before_lookup` runs before anything is looked up: the plugin manager loads plugins there.
    `example_config(slot, name)` is a small configuration that names a module: blocks say it, who
    know what a configuration is.
    """

    def __init__(self) -> None:
        self.example_config: Callable[[str, str], Any] | None = None
        self.vote: Vote | None = None
        self.before_lookup: Callable[[], None] = _nothing
        self._ops: dict[str, Op] = {}
        self._made: set[str] = set()  # the ops that were made here, of an OpSpec
        # Each with its owner, the plugin that brought it; an op knows its own.
        self._modules: dict[tuple[str, str], tuple[ModuleSpec, str]] = {}
        self._score_mods: dict[str, tuple[ScoreMod, str]] = {}

    def add_op(self, spec: OpSpec | Op, owner: str = "trilith") -> Op:
        name = spec.spec.name if isinstance(spec, Op) else spec.name
        if name in self._ops:
            raise ValueError(
                f"op {name} of {owner} is already defined by {_owner(self._ops[name])}; "
                "register an Implementation to replace how it runs"
            )
        if isinstance(spec, Op):
            op = spec
        else:
            op = Op(spec)
            self._made.add(name)
        op.adopt(owner, self.vote)
        self._ops[name] = op
        return op

    def add_implementation(self, implementation: Implementation, owner: str = "trilith") -> None:
        if implementation.op not in self._ops:
            raise UnknownOpError(self._unknown(implementation.op))
        self._ops[implementation.op].add_implementation(implementation, owner)

    def add_module(self, spec: ModuleSpec, owner: str = "trilith") -> None:
        key = (spec.slot, spec.name)
        if key in self._modules:
            raise ValueError(
                f"{spec.slot} {spec.name!r} of {owner} is already defined by "
                f"{self._modules[key][1]}; choose another name"
            )
        self._modules[key] = spec, owner

    def add_score_mod(self, spec: ScoreMod, owner: str = "trilith") -> None:
        if spec.name in self._score_mods:
            raise ValueError(
                f"score mod {spec.name} of {owner} is already defined by "
                f"{self._score_mods[spec.name][1]}; choose another name"
            )
        self._score_mods[spec.name] = spec, owner

    def require_parts(self, owner: str) -> None:
        """That there are the ops which those of a plugin name as their parts."""
        for op in self._ops.values():
            for part in op.spec.parts if _owner(op) == owner else ():
                if part not in self._ops:
                    raise UnknownOpError(f"{op.spec.name}: parts names {self._unknown(part)}")

    def remove(self, owner: str) -> None:
        """Take back all that a plugin brought, and the implementations of its ops by others.

        The ops stay whole, because somebody may hold them, but their names are free again.
        """
        for name in [name for name, op in self._ops.items() if _owner(op) == owner]:
            self._ops.pop(name).abandoned = True
            self._made.discard(name)
        self._modules = {key: own for key, own in self._modules.items() if own[1] != owner}
        self._score_mods = {key: own for key, own in self._score_mods.items() if own[1] != owner}
        for op in self._ops.values():
            for provider in [i.provider for i in op.implementations]:
                if op.owner_of(provider) == owner:
                    op.remove_implementation(provider)

    def score_mod(self, name: str) -> ScoreMod:
        if name not in self._score_mods:
            self.before_lookup()
        if name not in self._score_mods:
            known = ", ".join(sorted(self._score_mods)) or "none"
            raise KeyError(f"no score mod {name!r}; registered are: {known}")
        return self._score_mods[name][0]

    def score_mods(self) -> list[tuple[ScoreMod, str]]:
        """All of them, each with the plugin that brought it."""
        self.before_lookup()
        return [self._score_mods[name] for name in sorted(self._score_mods)]

    def score_mod_names(self, owner: str | None = None) -> list[str]:
        return [spec.name for spec, of in self.score_mods() if owner in (None, of)]

    def op(self, name: str | Op) -> Op:
        """The op of a name; an op itself is taken as it is, whoever made it."""
        if isinstance(name, Op):
            return name
        if not isinstance(name, str):
            raise TypeError(f"op must be a name like 'trilith::rms_norm', or an Op, got {name!r}")
        if name not in self._ops:
            self.before_lookup()
        if name not in self._ops:
            raise UnknownOpError(self._unknown(name))
        return self._ops[name]

    def _unknown(self, name: str) -> str:
        namespaces = {known.partition("::")[0] for known in self._ops}
        namespace = name.partition("::")[0]
        there = [known for known in self._ops if known.startswith(f"{namespace}::")]
        there = there or [f"{known}::*" for known in namespaces]
        return f"no op {name!r}{_meant(name, self._ops)}; there are: {', '.join(sorted(there))}"

    def op_names(self, owner: str | None = None) -> list[str]:
        self.before_lookup()
        return sorted(n for n, op in self._ops.items() if owner in (None, _owner(op)))

    def ops(self) -> list[Op]:
        return [self._ops[name] for name in self.op_names()]

    def build_module(self, slot: str, name: str, config: Any) -> torch.nn.Module:
        self.before_lookup()
        if (slot, name) not in self._modules:
            raise KeyError(f"no {slot} {name!r}; there are: {', '.join(self.module_names(slot))}")
        spec, owner = self._modules[slot, name]
        try:
            module = spec.build(config)
        except TypeError as error:
            raise TypeError(
                f"{slot} {name!r} of {owner}: build is given the whole "
                f"{type(config).__name__}, and said: {error}"
            ) from error
        if not isinstance(module, torch.nn.Module):
            raise TypeError(
                f"{slot} {name!r} of {owner}: build must return an nn.Module, got {module!r}"
            )
        return module

    def modules(self) -> list[tuple[ModuleSpec, str]]:
        """All of them, each with the plugin that brought it."""
        self.before_lookup()
        return [self._modules[key] for key in sorted(self._modules)]

    def module_names(self, slot: str, owner: str | None = None) -> list[str]:
        return [m.name for m, of in self.modules() if m.slot == slot and owner in (None, of)]

    def forget_selections(self) -> None:
        """Every op chooses anew."""
        for op in self._ops.values():
            op.forget_selections()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """What is added inside is taken back if the block raises.

        An Op that the block made or took in stays whole, because a module that another plugin
        shares may hold it, but its name is free again. Ops that the registry made of an OpSpec are
        destroyed.
        """
        before = op_module.defined()
        ops, modules, score_mods = dict(self._ops), dict(self._modules), dict(self._score_mods)
        implementations = {name: list(op.implementations) for name, op in ops.items()}
        try:
            yield
        except BaseException:
            added = self._ops.keys() - ops.keys()
            for name in self._made & added:
                self._ops[name].destroy()
                self._made.remove(name)
            for name, op in op_module.defined().items():
                op.abandoned |= name not in before or name in added
            for name, kept in implementations.items():
                for implementation in [i for i in ops[name].implementations if i not in kept]:
                    ops[name].remove_implementation(implementation.provider)
            self._ops, self._modules, self._score_mods = ops, modules, score_mods
            raise

    def explain(self, op: str | Op, device: torch.device, dtype: torch.dtype) -> str:
        op = self.op(op)
        lines = [f"{op.spec.name} on {device}, {dtype}:"]
        for choice in op.implementations:
            verdict = choice.refusal(device, dtype) or "can run"
            if choice.supports is not None and verdict == "can run":
                verdict = "can run where its supports() agrees"
            owner = op.owner_of(choice.provider)
            lines.append(f"  {choice.provider} (priority {choice.priority}): {verdict} [{owner}]")
        lines.append(f"  reference: {_WHEN_THE_REFERENCE_RUNS} [PyTorch]")
        found = op.selection(device, dtype)
        if not selection.runnable(op, SelectionKey(device, dtype)):
            lines.append("  why: no implementation can run there")
        else:
            lines.append(f"  why: {found.reason}")
        lines.append(f"  takes: {found.first or 'the reference (PyTorch)'}")
        return "\n".join([*lines, *self._fusions(op, device, dtype)])

    def _fusions(self, op: Op, device: torch.device, dtype: torch.dtype) -> list[str]:
        """In whose one pass blocks have this op's work done, and whose work is done in its pass."""
        wholes = [whole for whole in self.ops() if op.spec.name in whole.spec.parts]
        parts = [self.op(name) for name in op.spec.parts]
        inside = [(w.spec.name, fusion.standing_in(w, op, device, dtype)) for w in wholes]
        instead = [(p.spec.name, fusion.standing_in(op, p, device, dtype)) for p in parts]
        lines = []
        for said, otherwise, found in (
            ("done in blocks by", "not done in blocks by", inside),
            ("stands in blocks for", "stands not in blocks for", instead),
        ):
            yes = ", ".join(name for name, taken in found if taken)
            no = ", ".join(name for name, taken in found if not taken)
            if yes:
                lines.append(f"  {said}: {yes}")
            if no:
                lines.append(f"  {otherwise}: {no} (who runs the part is not who runs the whole)")
        return lines


registry = Registry()
