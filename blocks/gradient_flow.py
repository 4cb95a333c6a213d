"""Norms of activations and gradients, layer by layer, as a table and as a picture."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from trilith.blocks.generation import evaluating
from trilith.blocks.mlp import MLP, GatedMLP
from trilith.blocks.spectrum import spectrum

_RELUS = ("relu", "relu2")


@dataclass(frozen=True)
class Layer:
    """A row of `GradientFlow`; what does not apply is NaN.

    activation, gradient: 2-norms of the output and of the loss's gradient with respect to it.
    parameters: 2-norm of the gradients of the layer's parameters.
    dead: share of the units (last dimension) of a ReLU that are 0 for all of the batch.
    singular, radius: of a block's Jacobian, the largest singular value and the spectral radius.
    """

    name: str
    kind: str
    activation: float
    gradient: float = math.nan
    parameters: float = math.nan
    dead: float = math.nan
    singular: float = math.nan
    radius: float = math.nan


_COLUMNS = ("activation", "gradient", "parameters", "dead", "singular", "radius")


@dataclass(frozen=True)
class GradientFlow:
    """Layers in the order of their calls; `str` is a table, `plot` a picture."""

    layers: tuple[Layer, ...]

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("layer", "kind", *_COLUMNS)]
        for layer in self.layers:
            values = (getattr(layer, column) for column in _COLUMNS)
            cells = ("" if math.isnan(value) else f"{value:.3g}" for value in values)
            rows.append((layer.name, layer.kind, *cells))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
        )

    def plot(self, path: str | Path | None = None) -> Any:
        """A matplotlib Figure of the table, written to `path` if one is given."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(max(6.0, 0.3 * len(self.layers)), 9.0), layout="constrained")
        norms, jacobians, dead = figure.subplots(3, sharex=True)
        places = range(len(self.layers))
        for axes, columns in ((norms, _COLUMNS[:3]), (jacobians, _COLUMNS[4:])):
            for column in columns:
                axes.plot(places, [getattr(row, column) for row in self.layers], ".-", label=column)
            axes.set_yscale("log")
            axes.legend()
        jacobians.axhline(1.0, color="grey", linewidth=0.5)
        dead.bar(places, [0.0 if math.isnan(row.dead) else row.dead for row in self.layers])
        dead.set_ylim(0, 1)
        titles = ("2-norms", "Jacobian of each block", "share of dead ReLUs")
        for axes, title in zip((norms, jacobians, dead), titles, strict=True):
            axes.set_title(title)
        dead.set_xticks(places, [row.name for row in self.layers], rotation=90)
        if path is not None:
            figure.savefig(path)
        return figure


def gradient_flow(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> GradientFlow:
    """Norms of activations and gradients, dead ReLUs and Jacobians, layer by layer.

    Rows are calls of modules without children and of blocks: the members of the outermost
    nn.ModuleList or nn.Sequential of the model, or its children where it has neither. `loss` is
    called once, with hooks on the model's modules, which take their unfused path; parameters'
    `.grad` stay as they are. Jacobians are of blocks that were called with a float tensor alone and
    made one, in eval mode.

    Args:
        model: with parameters that require gradients.
        loss: called as `loss(model)`, returns a scalar that depends on the model's output, such as
            `lambda model: cross_entropy(model(x), targets)`.

    Raises:
        ValueError: the loss is not a scalar with a gradient, or the model has no parameters that
            require one.
        TypeError: loss cannot be called, or returns no tensor.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
        >>> print(gradient_flow(model, lambda m: m(torch.randn(8, 4)).square().mean()))
        ... # doctest: +SKIP
    """
    if not callable(loss):
        raise TypeError(
            f"gradient_flow: loss must be callable as loss(model), got {type(loss).__name__}; "
            "give `lambda model: ...`"
        )
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("gradient_flow: model must have parameters that require gradients")
    recorder = _Recorder(model, _blocks(model))
    with recorder.hooked():
        value = loss(model)
        if not isinstance(value, Tensor):
            raise TypeError(
                f"gradient_flow: loss must return a tensor, got {type(value).__name__}; leave its "
                "item() out"
            )
        if value.numel() != 1 or not value.requires_grad:
            raise ValueError(
                "gradient_flow: loss must return a scalar that requires a gradient, "
                f"got shape {tuple(value.shape)}, requires_grad={value.requires_grad}"
            )
        found = torch.autograd.grad(value, trained, allow_unused=True)
        gradients: dict[int, Tensor | None] = dict(zip(map(id, trained), found, strict=True))
    return GradientFlow(tuple(recorder.row(call, gradients) for call in recorder.calls))


class _Call:
    """One call of a module: what its hooks saw."""

    def __init__(self, name: str, module: nn.Module, x: Tensor | None, out: Tensor) -> None:
        self.name = name
        self.module = module
        self.x = x
        self.activation = _norm(out)
        self.gradient = math.nan
        self.dead = _dead(out) if isinstance(module, nn.ReLU) else math.nan
        if out.requires_grad:
            out.register_hook(self._keep_gradient)

    def _keep_gradient(self, gradient: Tensor) -> None:
        self.gradient = _norm(gradient)


class _Recorder:
    """Hooks on a model's layers and blocks, and the calls that they saw."""

    def __init__(self, model: nn.Module, blocks: set[nn.Module]) -> None:
        self.blocks = blocks
        self.calls: list[_Call] = []
        self.dead: dict[nn.Module, float] = {}
        mlps = [m for m in model.modules() if isinstance(m, (MLP, GatedMLP))]
        # an activation that an MLP has by name is no module: what `down` reads tells
        self.readers = {mlp.down for mlp in mlps if mlp.activation in _RELUS}
        self.named = {
            module: name
            for name, module in model.named_modules()
            if module in blocks or module in self.readers or not any(module.children())
        }

    @contextmanager
    def hooked(self) -> Iterator[None]:
        handles = [
            module.register_forward_hook(self._called, with_kwargs=True) for module in self.named
        ]
        handles += [m.register_forward_pre_hook(self._activated) for m in self.readers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _activated(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        self.dead[module] = _dead(arguments[0])

    def _called(
        self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], out: Any
    ) -> None:
        is_plain = isinstance(out, Tensor) and len(arguments) == 1
        is_plain = is_plain and all(value is None for value in named.values())
        out = out[0] if isinstance(out, tuple) else out
        if not isinstance(out, Tensor):
            return
        x = arguments[0] if is_plain and module in self.blocks else None
        if not (isinstance(x, Tensor) and x.is_floating_point()):
            x = None
        call = _Call(self.named[module], module, None if x is None else x.detach(), out)
        call.dead = self.dead.pop(module, call.dead)
        self.calls.append(call)

    def row(self, call: _Call, gradients: dict[int, Tensor | None]) -> Layer:
        own = (gradients.get(id(p)) for p in call.module.parameters())
        found = [_norm(gradient) for gradient in own if gradient is not None]
        singular, radius = math.nan, math.nan
        if call.x is not None:
            with evaluating(call.module), sdpa_kernel(SDPBackend.MATH):
                singular, radius = spectrum(_widened(call.module), call.x)
        return Layer(
            call.name,
            type(call.module).__name__,
            call.activation,
            call.gradient,
            math.hypot(*found) if found else math.nan,
            call.dead,
            singular,
            radius,
        )


def _blocks(model: nn.Module) -> set[nn.Module]:
    """Members of the outermost lists of modules, or the children where there is no list."""
    if isinstance(model, (nn.ModuleList, nn.Sequential)):
        return set(model)
    found: set[nn.Module] = set()
    for child in model.children():
        listed = isinstance(child, (nn.ModuleList, nn.Sequential))
        deeper = any(isinstance(m, (nn.ModuleList, nn.Sequential)) for m in child.modules())
        if listed or deeper:
            found |= _blocks(child)
    return found or set(model.children())


def _widened(module: nn.Module) -> nn.Module:
    """In float32, as what it is given is, where its parameters have 16 bits."""
    narrow = any(p.dtype in (torch.float16, torch.bfloat16) for p in module.parameters())
    return copy.deepcopy(module).float() if narrow else module


def _norm(t: Tensor) -> float:
    wide = torch.promote_types(t.dtype, torch.float32)
    return torch.linalg.vector_norm(t.detach(), dtype=wide).item()


def _dead(out: Tensor) -> float:
    """Share of the last dimension's units that are 0 everywhere."""
    return (torch.atleast_2d(out.detach()) == 0).flatten(0, -2).all(0).double().mean().item()
