"""The checks of a module that a plugin brings for a slot: shapes, gradients, copies.

Each is a function of (spec, config, device) that raises AssertionError; `MODULE_CHECKS` holds all.
Modules are built from a small configuration, in eval mode unless a check says otherwise.
"""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from trilith.plugins.conformance.compare import assert_bits
from trilith.plugins.conformance.support import as_tuple, telling
from trilith.plugins.spec import ModuleSpec

ModuleCheck = Callable[[ModuleSpec, Any, torch.device], None]

_BATCH, _TIME, _LONG = 2, 5, 40  # the longer sequence is more than a few blocks
_STEP, _NEAR = 1e-4, 1e-2  # of a difference quotient, and how far a derivative may be from it


def _named(function: ModuleCheck) -> ModuleCheck:
    given = ["spec", "config", "device"]
    return telling(function, lambda spec, *_: f"{spec.slot} {spec.name}", given)


def _built(spec: ModuleSpec, config: Any, device: torch.device) -> nn.Module:
    module = spec.build(replace(config, max_len=_LONG))
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


def _inputs(
    module: nn.Module, spec: ModuleSpec, config: Any, device: torch.device, time: int = _TIME
) -> list[Tensor]:
    """What its slot calls it with; nothing for a position of the scores."""
    tokens = [_BATCH, time, config.dim]
    heads = [[_BATCH, n, time, config.head_dim] for n in (config.n_heads, config.kv_heads)]
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
    """Outputs are like inputs, bfloat16 ones too, and finite, for one token, a few and many."""
    for dtype in (torch.float32, torch.bfloat16):
        module = _built(spec, config, device).to(dtype)
        for time in (1, _TIME, _LONG):
            given = [t.to(dtype) for t in _inputs(module, spec, config, device, time)]
            if given:
                _require_alike(as_tuple(module(*given)), given)


def _require_alike(results: Sequence[Tensor], given: Sequence[Tensor]) -> None:
    assert len(results) == len(given), f"{len(results)} outputs for {len(given)} inputs"
    for result, like in zip(results, given, strict=True):
        said = f"{result.dtype} {list(result.shape)}"
        wanted = f"{like.dtype} {list(like.shape)}"
        assert said == wanted, f"gives {said} for {wanted}"
        assert result.isfinite().all(), "gives NaN or inf for random inputs"


@_named
def nothing_is_foreseen(spec: ModuleSpec, config: Any, device: torch.device) -> None:
    """Outputs depend on no later token, and on no other sequence of the batch; in training too."""
    module = _built(spec, config, device)
    for training, time in itertools.product((False, True), (_TIME, _LONG)):
        module.train(training)
        given = _inputs(module, spec, config, device, time)
        if not given:
            return
        cuts = {cut: [_changed(t, -2, cut) for t in given] for cut in (time // 2, time - 1)}
        sequences = [_changed(t, 0, 1) for t in given]
        mode = ", in training" if training else ""
        before = _outputs(module, given)
        for cut, later in cuts.items():
            for one, other in zip(before, _outputs(module, later), strict=True):
                earlier = one[..., :cut, :], other[..., :cut, :]
                wrong = one.shape[-2] == time and not _close(*earlier)
                assert not wrong, f"an output changes with a later token{mode}"
        for one, other in zip(before, _outputs(module, sequences), strict=True):
            same = _close(one[:1], other[:1])
            assert same, f"an output changes with another sequence of the batch{mode}"


@torch.no_grad()
def _outputs(module: nn.Module, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What a copy gives, each time with the same dropout: running statistics may move on."""
    torch.manual_seed(2)  # whatever is to differ must have been drawn by now
    return as_tuple(copy.deepcopy(module)(*given))


def _changed(tensor: Tensor, dim: int, start: int) -> Tensor:
    """Other values from `start` on."""
    others = torch.randn_like(tensor).narrow(dim, start, tensor.shape[dim] - start)
    return torch.cat([tensor.narrow(dim, 0, start), others], dim)


def _close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-3, atol=1e-4, equal_nan=True)


@_named
def gradients_reach_all(spec: ModuleSpec, config: Any, device: torch.device) -> None:
    """Inputs and parameters get gradients, finite ones."""
    module = _built(spec, config, device)
    given = [t.requires_grad_() for t in _inputs(module, spec, config, device)]
    if not given:
        return
    sum((o * torch.randn_like(o)).sum() for o in as_tuple(module(*given))).backward()
    for name, tensor in _differentiated(module, given).items():
        assert tensor.grad is not None, f"{name} gets no gradient"
        assert tensor.grad.isfinite().all(), f"the gradient of {name} is NaN or inf"


@_named
def gradients_are_derivatives(spec: ModuleSpec, config: Any, device: torch.device) -> None:
    """Each gradient is what a step in a random direction changes the output by."""
    module = _built(spec, config, device)
    given = _inputs(module, spec, config, device)
    if not given:
        return
    module, given = _in_float64(module, given)
    weights = [torch.randn_like(o) for o in as_tuple(module(*given))]

    def total() -> Tensor:
        pairs = zip(as_tuple(module(*given)), weights, strict=True)
        return torch.stack([(o * w).sum() for o, w in pairs]).sum()

    wanted = _differentiated(module, [t.requires_grad_() for t in given])
    gradients = torch.autograd.grad(total(), list(wanted.values()), allow_unused=True)
    for (name, tensor), gradient in zip(wanted.items(), gradients, strict=True):
        if gradient is None:
            continue
        direction = torch.randn_like(tensor)
        said = (gradient * direction).sum().item()
        change = _difference_quotient(total, tensor, direction)
        size = max(gradient.norm().item(), abs(change))
        assert abs(said - change) <= _NEAR * size, (
            f"the gradient of {name} gives {said:.4g} in a direction in which the outputs change "
            f"by {change:.4g}"
        )


def _in_float64(module: nn.Module, given: list[Tensor]) -> tuple[nn.Module, list[Tensor]]:
    """Or as they are, where the module does not take it, as its kernels may not."""
    wide, tensors = copy.deepcopy(module).double(), [t.double() for t in given]
    try:
        wide(*tensors)
    except Exception:
        return module, given
    return wide, tensors


def _differentiated(module: nn.Module, given: Sequence[Tensor]) -> dict[str, Tensor]:
    wanted = {f"input {i}": t for i, t in enumerate(given)}
    return wanted | {name: p for name, p in module.named_parameters() if p.requires_grad}


@torch.no_grad()
def _difference_quotient(total: Callable[[], Tensor], tensor: Tensor, direction: Tensor) -> float:
    """The change of `total` per step along the direction, by one to either side."""
    start, found = tensor.clone(), []
    for step in (_STEP, -_STEP):
        tensor.copy_(start + step * direction)
        found.append(total().item())
    tensor.copy_(start)
    return (found[0] - found[1]) / (2 * _STEP)


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
    gradients_are_derivatives,
    builds_are_apart,
    copies_agree,
)
