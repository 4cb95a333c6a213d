"""An existing model's layers made ours, one instance at a time, and back.

A layer is swapped by giving the instance another class: its parameters, buffers, hooks, name and
place stay what they were, so state dicts, optimizers, sharing and wrappers don't notice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from trilith.blocks import drop_in
from trilith.blocks.causal_lm import FusedLossClass, causal_lm, has_causal_parts
from trilith.blocks.drop_in.activations import Activation
from trilith.blocks.drop_in.swap import adopt, may_be_passed_over
from trilith.blocks.drop_in.transformer import calls_its_own
from trilith.blocks.lookalike import (
    computes_gated,
    gated_parts,
    known_activation,
    layer_norm_like,
    rms_norm_like,
)
from trilith.blocks.sequential import FusedSequential, has_pattern

_EXACT: dict[type[nn.Module], type[nn.Module]] = {
    getattr(nn, name): getattr(drop_in, name) for name in drop_in.__all__
}
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_GAINS = frozenset({"weight", "scale"})  # what norms call theirs
_CLASSES = "_trilith_classes"
_FUSED_LOSS = "fused_linear_cross_entropy"


@dataclass(frozen=True)
class Entry:
    """A module's name in the model, its class, the class it was given (None: left), and why."""

    name: str
    was: str
    became: str | None
    why: str


class FuseReport:
    """What `fuse` or `unfuse` swapped and what it left; `print` shows a table."""

    def __init__(self, entries: list[Entry]) -> None:
        self.entries = entries

    @property
    def swapped(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.became is not None]

    @property
    def left(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.became is None]

    def __str__(self) -> str:
        names: dict[tuple[str, str, str], list[str]] = {}  # of the layers that share a row
        for e in self.entries:
            names.setdefault((e.was, e.became or "left", e.why), []).append(e.name or "(model)")
        rows = [("layer", "became", "count", "first", "why")]
        for was, became, why in sorted(names, key=lambda row: (row[1] == "left", row)):
            alike = names[was, became, why]
            rows.append((was, became, str(len(alike)), alike[0], why))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        return "\n".join(
            "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[4]]).rstrip()
            for row in rows
        )


def fuse(model: nn.Module, *, fused_linear_cross_entropy: bool = True) -> FuseReport:
    """Give `model`'s layers Trilith's kernels, in place, instance by instance.

    Swapped: layers whose class is exactly one that `trilith.blocks.drop_in` has; an nn.Sequential
    that holds Linear, activation, Linear or norm, Linear; and of other libraries RMS norms, layer
    norms that cast, gated MLPs and activations, known by their parts and by computing on a probe
    what ours does. Left: other subclasses, parametrized layers, layers whose forward was replaced.
    A wrapped model (PEFT, DDP, FSDP, torch.compile) is treated inside the wrapper. Doing it again
    changes nothing.

    A causal language model of transformers no longer makes its logits in training with labels, only
    the loss: its output's `logits` are None there, unless it is called with `logits=True`.

    Dropout's masks on a GPU are others than torch draws from the same seed. Results otherwise are
    the same function's, differently rounded.

    Args:
        model: any module; it may be one of the layers itself.
        fused_linear_cross_entropy: whether causal language models are treated so.

    Returns:
        What was swapped, what was left, and why.

    Example:
        >>> print(fuse(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))))
    """
    found = list(_found(model, fused_linear_cross_entropy))
    for module, target, _ in found:
        if target is not None:
            _swap(module, target)
    for module in model.modules():
        if isinstance(module, drop_in.TransformerEncoderLayer):
            calls_its_own(module)
    return FuseReport([entry for _, _, entry in found])


def preview(model: nn.Module) -> FuseReport:
    """What `fuse` has swapped in `model`, what it would swap and what leave, and why.

    Changes nothing.
    """
    done = []
    for name, module in model.named_modules():
        if _CLASSES in vars(module):
            was, became = vars(module)[_CLASSES]
            done.append(Entry(name, was.__name__, _label(became), "swapped by fuse"))
    entries = [entry for _, _, entry in _found(model, True)]
    would = [replace(e, why=f"would be swapped: {e.why}") if e.became else e for e in entries]
    return FuseReport(done + would)


def unfuse(model: nn.Module) -> FuseReport:
    """Give every layer that `fuse` swapped its own class again; the instances are the same."""
    entries = []
    for name, module in model.named_modules():
        if _CLASSES not in vars(module):
            continue
        was, became = vars(module)[_CLASSES]
        if type(module) is not became:
            why = "another library changed its class after fuse"
            entries.append(Entry(name, type(module).__name__, None, why))
            continue
        del vars(module)[_CLASSES]
        vars(module).pop(Activation.ATTRIBUTE, None)
        module.__class__ = was
        may_be_passed_over(module)
        entries.append(Entry(name, _label(became), was.__name__, "swapped by fuse"))
    return FuseReport(entries)


def _found(
    model: nn.Module, fused_linear_cross_entropy: bool
) -> Iterator[tuple[nn.Module, type[nn.Module] | None, Entry]]:
    """The modules that something can be said of, and the class that each is to be given."""
    for name, module in model.named_modules():
        if _CLASSES in vars(module):
            continue
        was = type(module)
        target, why = _target(module, _inner(was))
        if isinstance(target, FusedLossClass) and not fused_linear_cross_entropy:
            target, why = None, "fused_linear_cross_entropy is off"
        if target is not None or why:
            became = None if target is None else _label(target)
            yield module, target, Entry(name, was.__name__, became, why)


def _swap(module: nn.Module, target: type[nn.Module]) -> None:
    was = type(module)
    if target is Activation:
        vars(module)[Activation.ATTRIBUTE] = known_activation(module)
    adopt(module, target if _inner(was) is was else _rewrapped(was, target))
    vars(module)[_CLASSES] = (was, type(module))


def _label(cls: type[nn.Module]) -> str:
    return _FUSED_LOSS if isinstance(cls, FusedLossClass) else cls.__name__


def _inner(cls: type[nn.Module]) -> type[nn.Module]:
    """What a class was before `fully_shard` put FSDPModule before it."""
    return cls.__mro__[2] if cls.__bases__[0].__name__ == "FSDPModule" else cls


def _rewrapped(cls: type[nn.Module], target: type[nn.Module]) -> type[nn.Module]:
    """`target` with FSDPModule before it, as `cls` has its own."""
    own = {name: cls.__dict__[name] for name in ("__deepcopy__",) if name in cls.__dict__}
    make: Any = type(target)
    return make(f"FSDP{target.__name__}", (cls.__bases__[0], target), own)


def _target(module: nn.Module, cls: type[nn.Module]) -> tuple[type[nn.Module] | None, str]:
    """The class to give a module of class `cls`, and why; None and "" where nothing is to say."""
    if cls in _EXACT.values() or cls is FusedSequential:
        return None, ""
    if parametrize.is_parametrized(module):
        return None, "parametrized: its parameters are computed on each call"
    if "forward" in vars(module):
        return None, "its forward was replaced on this instance"
    if cls in _EXACT:
        return _EXACT[cls], "a torch.nn layer"
    if isinstance(module, nn.Sequential) and cls is nn.Sequential:
        return (
            (FusedSequential, "its linear layers' neighbours")
            if has_pattern(module)
            else (None, "")
        )
    ancestor = next((base for base in _EXACT if isinstance(module, base)), None)
    if ancestor is nn.LayerNorm:
        found = layer_norm_like(module)
        if found is not None:
            return found, "computes a LayerNorm"
    if ancestor is not None:
        return None, f"a subclass of {ancestor.__name__}, whose forward may be its own"
    if has_causal_parts(module):
        lm = causal_lm(module, cls)
        return lm, "its loss without logits" if lm else "a causal model whose loss is another"
    return _lookalike(module)


def _lookalike(module: nn.Module) -> tuple[type[nn.Module] | None, str]:
    if "norm" in type(module).__name__.lower() and not _GAINS.isdisjoint(module._parameters):
        found = rms_norm_like(module)
        why = "computes an RMS norm" if found else "no RMS norm or LayerNorm that we know"
        return found, why
    gated = gated_parts(module)
    if gated is not None:
        fits = computes_gated(module)
        return (gated, "act(gate) * up") if fits else (None, "not down(act(gate) * up)")
    if not (module._modules or module._parameters):
        name = known_activation(module)
        return (Activation, f"computes {name}") if name else (None, "")
    if not module._modules and not isinstance(module, _CONTAINERS):
        return None, "no faster form of it here"
    return None, ""
