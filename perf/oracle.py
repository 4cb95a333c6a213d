"""Whether a result is right, before anyone asks how fast it came: against eager in float64.

The root mean square error may be three times that of eager PyTorch in the same dtype, plus two
roundings. An element that may be dropped must equal one of its two branches, and the share of
dropped ones must be p.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from perf.workloads import Draw, Function, Workload

_SEED = 20


class Wrong(AssertionError):
    """A result that is too far from the oracle's."""


@dataclass(frozen=True)
class Expected:
    """Results in float64 for each branch (kept, dropped), and eager's error in the dtype."""

    branches: list[list[Tensor]]
    eager_errors: list[float]


_last: dict[tuple[str, torch.dtype], Expected] = {}


def seeded_arguments(workload: Workload, device: torch.device, dtype: torch.dtype) -> tuple:
    """The same arguments for every provider."""
    torch.manual_seed(_SEED)
    return workload.arguments(Draw(device, torch.float32 if workload.autocast else dtype))


def autocasting(workload: Workload, device: torch.device) -> Any:
    if workload.autocast and device.type == "cuda":
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return nullcontext()


def leaves(args: Sequence[Any]) -> list[Tensor]:
    """What a gradient is wanted of: tensors among the arguments, and modules' parameters."""
    found: list[Tensor] = []
    for arg in args:
        if isinstance(arg, Tensor) and arg.requires_grad:
            found.append(arg)
        elif isinstance(arg, nn.Module):
            found += [p for p in arg.parameters() if p.requires_grad]
    return found


def gradient_for(out: Any) -> Any:
    """The gradients that come from above: the same for every provider."""
    if isinstance(out, tuple):
        return tuple(map(gradient_for, out))
    if out.dim() == 0:
        return torch.ones_like(out)
    generator = torch.Generator(out.device).manual_seed(_SEED)
    return torch.randn(out.shape, dtype=out.dtype, device=out.device, generator=generator)


def check(function: Function, workload: Workload, device: torch.device, dtype: torch.dtype) -> None:
    """Compare a provider's output and gradients with the oracle's; of a training step, the loss.

    Raises:
        Wrong: naming the tensor, its error, and the bound.
    """
    expected = _expected(workload, device, dtype)
    with autocasting(workload, device):
        args = seeded_arguments(workload, device, dtype)
        actual = [workload.part(t) for t in _results(function, args, not workload.steps)]
    count = len(actual) if workload.steps else len(actual) - len(leaves(args))
    names = ["output"] + [f"output {i}" for i in range(1, count)]
    names += [f"gradient {i}" for i in range(len(actual) - count)]
    eps = torch.finfo(dtype).eps
    for i, (name, tensor) in enumerate(zip(names, actual, strict=True)):
        branches = [branch[i] for branch in expected.branches]
        if len(branches) > 1 and tensor.shape != actual[0].shape:
            continue  # a sum over elements that were dropped at random
        bound = 3 * expected.eager_errors[i] + 2 * eps * max(_rms(b) for b in branches)
        error = _rms(_distance(tensor, branches))
        if not error <= bound:
            raise Wrong(f"{name} is off by {error:.3g} rms, allowed are {bound:.3g}")
    if len(expected.branches) > 1:
        _check_share(actual[0], [b[0] for b in expected.branches], workload.p)


def forget() -> None:
    """Give the memory of the last results back."""
    _last.clear()
    torch.cuda.empty_cache()


def _expected(workload: Workload, device: torch.device, dtype: torch.dtype) -> Expected:
    key = (workload.name, dtype)
    if key not in _last:
        _last.clear()
        _last[key] = _compute(workload, device, dtype)
    return _last[key]


def _compute(workload: Workload, device: torch.device, dtype: torch.dtype) -> Expected:
    gradients = not workload.steps
    functions: list[Function] = [workload.eager]
    if workload.p:
        keep = 1 / (1 - workload.p)
        functions = [workload.with_drop(lambda x: x * keep), workload.with_drop(lambda x: x * 0)]
    args = seeded_arguments(workload, device, dtype)
    with autocasting(workload, device):
        eager = _results(functions[0], args, gradients)
    wide = [_widened(arg, workload) for arg in args]
    above: list[Tensor] | None = None
    if gradients:
        outputs = eager[: len(eager) - len(leaves(args))]
        above = [workload.part(gradient_for(out)).double() for out in outputs]
    branches = [_results(f, wide, gradients, above) for f in functions]
    errors = [
        _rms(_distance(workload.part(e), [g])) for e, g in zip(eager, branches[0], strict=True)
    ]
    return Expected(branches, errors)


def _results(
    function: Function, args: Sequence[Any], gradients: bool, above: Any = None
) -> list[Tensor]:
    """The function's outputs, then the gradients of its arguments."""
    if not gradients:
        with torch.no_grad():
            return [function(*args)]
    found = function(*args)
    outputs = found if isinstance(found, tuple) else (found,)
    above = gradient_for(outputs) if above is None else above
    gradients_ = torch.autograd.grad(outputs, leaves(args), above)
    return [*(out.detach() for out in outputs), *gradients_]


def _widened(arg: Any, workload: Workload) -> Any:
    if isinstance(arg, nn.Module):
        return copy.deepcopy(arg).double()
    if not isinstance(arg, Tensor):
        return arg
    part = workload.part(arg).detach()
    wide = part.double() if part.is_floating_point() else part
    return wide.requires_grad_(arg.requires_grad)


def _distance(actual: Tensor, branches: list[Tensor]) -> Tensor:
    errors = [(actual.double() - branch).abs() for branch in branches]
    return errors[0] if len(errors) == 1 else torch.minimum(*errors)


def _rms(error: Tensor) -> float:
    return error.double().square().mean().sqrt().item()


def _check_share(actual: Tensor, branches: list[Tensor], p: float) -> None:
    kept, dropped = ((actual.double() - branch).abs() for branch in branches)
    rounding = torch.finfo(actual.dtype).eps * torch.maximum(*(b.abs() for b in branches))
    differ = (branches[0] - branches[1]).abs() > 2 * rounding
    share = ((dropped < kept) & differ).sum().item() / max(1, int(differ.sum()))
    allowed = 5 * (p * (1 - p) / max(1, int(differ.sum()))) ** 0.5
    if abs(share - p) > allowed:
        raise Wrong(f"a share of {share:.4f} is dropped, not {p} +- {allowed:.4f}")
