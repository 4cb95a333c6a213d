"""What checks are made of: an op's samples, calls and gradients, and failures that say where."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trilith.plugins.arguments import by_name
from trilith.plugins.autograd import asked_of_backward
from trilith.plugins.conformance.compare import assert_same, is_differentiable
from trilith.plugins.op import Op
from trilith.plugins.spec import Sample

Check = Callable[[Op, Sample, torch.device, torch.dtype], None]


def samples_of(op: Op, device: torch.device, dtype: torch.dtype) -> list[Sample]:
    """The op's samples, the same ones each time."""
    torch.manual_seed(0)
    found = list(op.spec.samples(device, dtype))
    for sample in found:
        if not isinstance(sample, Sample):
            kind = type(sample).__name__
            raise AssertionError(f"{op.spec.name}: samples() must yield Samples, got a {kind}")
    return found


def backward_arguments(
    op: Op, args: Sequence[Any], provider: str, results: Sequence[Tensor], grads: Sequence[Any]
) -> tuple[Any, ...]:
    """What `op.torch_ops.backward` is called with after a forward that gave `results`."""
    spec = op.spec
    dropped = set(op.parameters.tensors) - set(op.parameters.saved)
    inputs = [None if i in dropped else a for i, a in enumerate(args)]
    kept = [*(results[i] for i in op.parameters.saved_outputs), *results[spec.outputs :]]
    needs = [i in floating(args) for i in range(len(args))]
    sources = {} if spec.shared_gradients is None else spec.shared_gradients(*inputs)
    return (*grads, *inputs, kept, provider, asked_of_backward(op, needs, sources))


def floating(args: Sequence[Any]) -> list[int]:
    """Positions of the tensors that one differentiates by."""
    return [i for i, a in enumerate(args) if isinstance(a, Tensor) and is_differentiable(a)]


def tensors_of(args: Sequence[Any]) -> list[int]:
    """Positions of all tensors."""
    return [i for i, a in enumerate(args) if isinstance(a, Tensor)]


def covering(op: Op, samples: Sequence[Sample]) -> list[Sample]:
    """The samples that give a tensor which none before gave: together, all that any of them gives.

    Enough for what is checked of one tensor at a time, as its layouts.
    """
    seen: set[int] = set()
    chosen: list[Sample] = []
    for sample in samples:
        given = set(tensors_of(bound(op, sample)))
        if not given <= seen or not chosen:
            chosen.append(sample)
            seen |= given
    return chosen


def telling(
    check: Callable[..., None], subject: Callable[..., str], given: list[str]
) -> Callable[..., None]:
    """The check, with what it was of, and its own name, in whatever goes wrong.

    It is called with all that is `given`, and takes what it names.
    """
    run = by_name(check, given)

    @functools.wraps(check)
    def checked(*args: Any) -> None:
        require_assertions()
        torch.manual_seed(1)
        try:
            run(*args)
        except Exception as error:
            kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            raise AssertionError(f"{subject(*args)}: {check.__name__}: {kind}{error}") from error

    return checked


def require_assertions() -> None:
    if not __debug__:
        raise RuntimeError(
            "the conformance checks are assert statements, which this Python leaves out: run it "
            "without -O and PYTHONOPTIMIZE"
        )


def named_check(function: Callable[..., None]) -> Check:
    """A check of those of (op, sample, device, dtype) that the function names."""
    given = ["op", "sample", "device", "dtype"]
    return telling(function, lambda op, sample, *_: f"{op.spec.name}({sample})", given)


def bound(op: Op, sample: Sample) -> list[Any]:
    args = list(op.parameters.bind(sample.args, sample.kwargs))
    for i in tensors_of(args):
        _require_real(name_of(op, i), args[i])
    return args


def as_tuple(outputs: Any) -> tuple[Any, ...]:
    found = (outputs,) if isinstance(outputs, Tensor) or outputs is None else tuple(outputs)
    for i, output in enumerate(found):
        if not isinstance(output, Tensor):
            raise TypeError(f"output {i} must be a tensor, got {output!r}")
        _require_real(f"output {i}", output)
    return found


def _require_real(what: str, tensor: Tensor) -> None:
    if tensor.is_complex():
        raise TypeError(f"{what} must be real, got {tensor.dtype}; use torch.view_as_real of it")


def with_grad(args: Sequence[Any], wanted: Sequence[int]) -> list[Any]:
    """The arguments, those wanted as leaves that require grad, all in their own layouts."""
    return [a.detach().requires_grad_() if i in wanted else a for i, a in enumerate(args)]


def differentiable(outputs: Sequence[Tensor]) -> list[int]:
    return [i for i, o in enumerate(outputs) if is_differentiable(o) and o.requires_grad]


def random_like(outputs: Sequence[Tensor]) -> list[Tensor]:
    return [torch.randn_like(o) if is_differentiable(o) else o for o in outputs]


def gradients_of(
    function: Callable[..., Any],
    args: Sequence[Any],
    upstream: Sequence[Tensor] | None = None,
    wanted: Sequence[int] | None = None,
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Outputs, and one gradient per wanted input (zeros where there is none)."""
    outputs, pull = begun(function, args, floating(args) if wanted is None else wanted)
    return outputs, pull(random_like(outputs) if upstream is None else upstream)


def begun(
    function: Callable[..., Any], args: Sequence[Any], wanted: Sequence[int]
) -> tuple[tuple[Tensor, ...], Callable[..., list[Tensor]]]:
    """Outputs, and what pulls gradients of them back to the wanted inputs, once or more often."""
    leaves = with_grad(args, wanted)
    outputs = as_tuple(function(*leaves))
    used = differentiable(outputs)

    def pull(upstream: Sequence[Tensor], *, again: bool = False) -> list[Tensor]:
        zeros = [torch.zeros_like(args[i]) for i in wanted]
        if not used or not wanted:
            return zeros
        found = torch.autograd.grad(
            [outputs[i] for i in used],
            [leaves[i] for i in wanted],
            [upstream[i].to(outputs[i].dtype) for i in used],
            retain_graph=again,
            allow_unused=True,
        )
        return [z if g is None else g for g, z in zip(found, zeros, strict=True)]

    return tuple(o.detach() for o in outputs), pull


def in_float64(args: Sequence[Any]) -> list[Any]:
    chosen = floating(args)
    return [a.detach().double() if i in chosen else a for i, a in enumerate(args)]


def oracle(compute: Callable[..., Any], *given: Sequence[Any]) -> list[Any]:
    """What `compute` makes of lists of arguments in float64 on a CPU, brought back to their device.

    There torch's functions are their formulas: its rms_norm on a GPU gives NaN for a whole row with
    an inf.
    """
    device = next(a.device for a in given[0] if isinstance(a, Tensor))
    moved = ([a.cpu() if isinstance(a, Tensor) else a for a in in_float64(args)] for args in given)
    return _moved(compute(*moved), device)


def _moved(found: Sequence[Any], device: torch.device) -> list[Any]:
    return [t.to(device) if isinstance(t, Tensor) else _moved(t, device) for t in found]


def rounds_inside(op: Op) -> bool:
    """Whether it has matrix products in 16 bits, as the ops have that autocast lowers."""
    said = op.spec.rounds_inside
    return op.spec.autocast == "low" if said is None else said


def half_a_step_away(op: Op, args: Sequence[Any]) -> list[Any]:
    """The arguments in float64, each element half a step of fp32 up or down.

    As much as this changes, an op may err that computes in fp32. One that rounds to 16 bits inside,
    before a matrix product, may err by half a step of a 16-bit tensor's own dtype.
    """
    chosen = floating(args)
    moved = in_float64(args)
    for i in chosen:
        dtype = args[i].dtype
        own = dtype == torch.float64 or (args[i].element_size() == 2 and rounds_inside(op))
        step = torch.finfo(dtype if own else torch.float32).eps
        sign = torch.rand(args[i].shape, device=args[i].device).round() - 0.5
        moved[i] = moved[i] * (1 + step * sign)
    return moved


def largest(tensors: Sequence[Any]) -> float:
    """The largest finite magnitude in the floating-point tensors."""
    sizes = (tensors[i].detach().abs() for i in floating(tensors) if tensors[i].numel())
    return max((torch.where(s.isfinite(), s, 0).max().item() for s in sizes), default=0.0)


def fixed_upstream(op: Op, args: Sequence[Any]) -> list[Tensor]:
    """Gradients of the outputs: the same for the op and its reference."""
    with torch.no_grad():
        return random_like(as_tuple(op(*args)))


def both(op: Op, args: Sequence[Any], upstream: Sequence[Tensor]) -> Any:
    """The op's outputs and gradients; of an op without gradients zeros."""
    return both_of(op, op, args, upstream)


def both_of(
    function: Callable[..., Any], op: Op, args: Sequence[Any], upstream: Sequence[Tensor]
) -> Any:
    """The same of a function in the op's place."""
    if has_gradient(op, args):
        return gradients_of(function, args, upstream)
    return as_tuple(function(*args)), [torch.zeros_like(args[i]) for i in floating(args)]


def replaced(args: Sequence[Any], positions: Sequence[int], values: Sequence[Any]) -> list[Any]:
    merged = list(args)
    for i, value in zip(positions, values, strict=True):
        merged[i] = value
    return merged


def assert_all_same(
    what: str,
    op: Op,
    wanted: Sequence[int],
    actual: Any,
    expected: Any,
    upstream: Sequence[Any],
    cancelling: Sequence[Any] = (),
) -> None:
    """Compares (outputs, gradients) with (outputs, gradients), sums of terms of upstream's size.

    Outputs are sums of terms of the size of `cancelling`, if it is given.
    """
    for i, (a, e) in enumerate(zip(actual[0], expected[0], strict=True)):
        assert_same(f"{what}: output {i}", a, e, largest(cancelling))
    scale = largest(upstream)
    for i, a, e in zip(wanted, actual[1], expected[1], strict=True):
        assert_same(f"{what}: gradient of {name_of(op, i)}", a, e, scale)


def name_of(op: Op, position: int) -> str:
    return op.parameters.names[position]


def has_gradient(op: Op, args: Sequence[Any]) -> bool:
    return op.spec.backward is not None and bool(floating(args))
