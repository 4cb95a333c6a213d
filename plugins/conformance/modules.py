"""The checks of a module that a plugin brings for a slot: shapes, gradients, copies.

Each is a function of (spec, config, device) that raises AssertionError; `MODULE_CHECKS` holds all.
Modules are built from a small configuration, in eval mode.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trilith.plugins.conformance.compare import assert_bits
from trilith.plugins.conformance.support import as_tuple, telling
from trilith.plugins.spec import ModuleSpec

ModuleCheck = Callable[[ModuleSpec, Any, torch.device], None]

_BATCH, _TIME = 2, 5


def _named(function: ModuleCheck) -> ModuleCheck:
    return telling(function, lambda spec, *_: f"{spec.slot} {spec.name}")


def _built(spec: ModuleSpec, config: Any, device: torch.device) -> nn.Module:
    module = spec.build(config)
    assert isinstance(module, nn.Module), f"build must return an nn.Module, got {module!r}"
    return _started(module).to(device).eval()


def _started(module: nn.Module) -> nn.Module:
    """As build_lm starts it: by its own reset_parameters, or its children's."""
    reset = getattr(module, "reset_parameters", None)
    if reset is not None:
        reset()
        return module
    for child in module.children():
        _started(child)
    return module


def _inputs(module: nn.Module, spec: ModuleSpec, config: Any, device: torch.device) -> list[Tensor]:
    """What its slot calls it with; nothing for a position of the scores."""
    tokens = [_BATCH, _TIME, config.dim]
    heads = [[_BATCH, n, _TIME, config.head_dim] for n in (config.n_heads, config.kv_heads)]
    shapes: Sequence[Sequence[int]] = [tokens]
    if spec.slot == "position":
        acts_on: Any = getattr(module, "acts_on", None)
        known = {"tokens": [tokens], "heads": heads, "scores": []}
        assert acts_on in known, f"acts_on must be one of {', '.join(known)}, got {acts_on!r}"
        shapes = known[acts_on]
    return [torch.randn(*shape, device=device) for shape in shapes]


def _same(what: str, module: nn.Module, twin: nn.Module, given: Sequence[Tensor]) -> None:
    with torch.no_grad():
        pairs = zip(as_tuple(twin(*given)), as_tuple(module(*given)), strict=True)
    for one, other in pairs:
        assert_bits(f"{what}: the output", one, other)


def _shared(one: nn.Module, other: nn.Module) -> list[str]:
    held = {id(tensor) for tensor in (*one.parameters(), *one.buffers())}
    named = (*other.named_parameters(), *other.named_buffers())
    return [name for name, tensor in named if id(tensor) in held]


@_named
def shapes_are_kept(spec: ModuleSpec, config: Any, device: torch.device) -> None:
    """Outputs are like inputs, and finite."""
    module = _built(spec, config, device)
    given = _inputs(module, spec, config, device)
    if not given:
        return
    results = as_tuple(module(*given))
    assert len(results) == len(given), f"{len(results)} outputs for {len(given)} inputs"
    for result, like in zip(results, given, strict=True):
        said = f"{result.dtype} {list(result.shape)}"
        wanted = f"{like.dtype} {list(like.shape)}"
        assert said == wanted, f"gives {said} for {wanted}"
        assert result.isfinite().all(), "gives NaN or inf for random inputs"


@_named
def nothing_is_foreseen(spec: ModuleSpec, config: Any, device: torch.device) -> None:
    """Outputs do not depend on later tokens."""
    module = _built(spec, config, device)
    given = _inputs(module, spec, config, device)
    others = [torch.cat([t[..., :-1, :], torch.randn_like(t[..., :1, :])], -2) for t in given]
    if not given:
        return
    with torch.no_grad():
        pairs = zip(as_tuple(module(*given)), as_tuple(module(*others)), strict=True)
    for before, after in pairs:
        earlier = before[..., : _TIME - 1, :], after[..., : _TIME - 1, :]
        wrong = before.shape[-2] == _TIME and not torch.allclose(*earlier, rtol=1e-3, atol=1e-4)
        assert not wrong, "an output changes with a later token"


@_named
def gradients_reach_all(spec: ModuleSpec, config: Any, device: torch.device) -> None:
    """Inputs and parameters get gradients, finite ones."""
    module = _built(spec, config, device)
    given = [t.requires_grad_() for t in _inputs(module, spec, config, device)]
    if not given:
        return
    sum((o * torch.randn_like(o)).sum() for o in as_tuple(module(*given))).backward()
    wanted = {f"input {i}": t for i, t in enumerate(given)}
    wanted |= {name: p for name, p in module.named_parameters() if p.requires_grad}
    for name, tensor in wanted.items():
        assert tensor.grad is not None, f"{name} gets no gradient"
        assert tensor.grad.isfinite().all(), f"the gradient of {name} is NaN or inf"


@_named
def builds_are_apart(spec: ModuleSpec, config: Any, device: torch.device) -> None:
    """Each build has parameters and buffers of its own: a model has many layers."""
    shared = _shared(_built(spec, config, device), _built(spec, config, device))
    assert not shared, f"two builds share {', '.join(shared)}"


@_named
def copies_agree(spec: ModuleSpec, config: Any, device: torch.device) -> None:
    """A deep copy, and another build with its state dict, do the same; and it can be pickled."""
    module = _built(spec, config, device)
    given = _inputs(module, spec, config, device)
    twin, other = copy.deepcopy(module), _built(spec, config, device)
    shared = _shared(module, twin)
    assert not shared, f"a deep copy shares {', '.join(shared)}"
    other.load_state_dict(module.state_dict())
    torch.save(module, io.BytesIO())
    if given:
        _same("of a deep copy", module, twin, given)
        _same("of a build with this one's state dict", module, other, given)


MODULE_CHECKS: tuple[ModuleCheck, ...] = (
    shapes_are_kept,
    nothing_is_foreseen,
    gradients_reach_all,
    builds_are_apart,
    copies_agree,
)
