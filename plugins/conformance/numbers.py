"""Checks of values: outputs and gradients against the reference, and against themselves."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trilith.plugins.conformance.compare import assert_near, assert_same
from trilith.plugins.conformance.support import (
    as_tuple,
    assert_all_same,
    both,
    both_of,
    bound,
    differentiable,
    fixed_upstream,
    floating,
    gradients_of,
    half_a_step_away,
    has_gradient,
    largest,
    name_of,
    named_check,
    oracle,
    rounds_inside,
    with_grad,
)
from trilith.plugins.op import Op
from trilith.plugins.spec import Sample

_COMBINED_AT_MOST = 4


@named_check
def forward_matches_reference(op: Op, sample: Sample) -> None:
    args = bound(op, sample)
    expected = oracle(lambda a: as_tuple(op.spec.reference(*a)), args)
    eager = as_tuple(op.spec.reference(*args))
    nudged: Sequence[Tensor] = eager
    if rounds_inside(op):
        nudged = oracle(lambda a: as_tuple(op.spec.reference(*a)), half_a_step_away(op, args))
    actual = as_tuple(op(*args))
    assert len(actual) == len(expected), f"{len(actual)} outputs, the reference has {len(expected)}"
    for i, (a, e, p, n) in enumerate(zip(actual, expected, eager, nudged, strict=True)):
        assert a.dtype == p.dtype, f"output {i}: dtype {a.dtype}, the reference gives {p.dtype}"
        assert a.device == p.device, f"output {i}: on {a.device}, the reference on {p.device}"
        assert_near(f"output {i}", a, e, p, n, rounds_once=not rounds_inside(op))


@named_check
def gradients_match_reference(op: Op, sample: Sample) -> None:
    args = bound(op, sample)
    if not has_gradient(op, args):
        return
    upstream = fixed_upstream(op, args)
    compute = functools.partial(gradients_of, op.spec.reference)
    _, expected = oracle(compute, args, upstream)
    _, eager = compute(args, upstream)
    nudged = eager
    if rounds_inside(op):
        _, nudged = oracle(compute, half_a_step_away(op, args), half_a_step_away(op, upstream))
    _, actual = gradients_of(op, args, upstream)
    for i, a, e, p, n in zip(floating(args), actual, expected, eager, nudged, strict=True):
        what = f"gradient of {name_of(op, i)}"
        assert a.dtype == args[i].dtype, f"{what}: dtype {a.dtype}, the input has {args[i].dtype}"
        assert_near(what, a, e, p, n, rounds_once=not rounds_inside(op))


@named_check
def gradient_subsets(op: Op, sample: Sample) -> None:
    args = bound(op, sample)
    if not has_gradient(op, args):
        return
    inputs = floating(args)
    upstream = fixed_upstream(op, args)
    outputs, full = gradients_of(op, args, upstream)
    gradient = dict(zip(inputs, full, strict=True))
    sizes = range(len(inputs)) if len(inputs) <= _COMBINED_AT_MOST else (0, 1, len(inputs) - 1)
    for size in sizes:
        for wanted in itertools.combinations(inputs, size):
            actual = gradients_of(op, args, upstream, wanted)
            names = ", ".join(name_of(op, i) for i in wanted) or "nothing"
            expected = outputs, [gradient[i] for i in wanted]
            assert_all_same(f"only {names} requires grad", op, wanted, actual, expected, upstream)


@named_check
def unused_outputs(op: Op, sample: Sample) -> None:
    """Where only some of the outputs reach the loss, the others count as zero."""
    args = bound(op, sample)
    if not has_gradient(op, args) or op.spec.outputs == 1:
        return
    inputs = floating(args)
    upstream = fixed_upstream(op, args)
    for used in range(op.spec.outputs):
        leaves = with_grad(args, inputs)
        output = as_tuple(op(*leaves))[used]
        if not output.requires_grad:
            continue
        wanted = [leaves[i] for i in inputs]
        actual = torch.autograd.grad(output, wanted, upstream[used], allow_unused=True)
        silent = [g if i == used else torch.zeros_like(g) for i, g in enumerate(upstream)]
        _, expected = gradients_of(op.spec.reference, args, silent)
        for i, a, e in zip(inputs, actual, expected, strict=True):
            a = torch.zeros_like(e) if a is None else a
            what = f"only output {used} is used: gradient of {name_of(op, i)}"
            assert_same(what, a, e, largest(silent))


@named_check
def empty_tensors(op: Op, sample: Sample) -> None:
    """With a leading dimension of 0: the reference's outputs, and its gradients, finite ones."""
    args = bound(op, sample)
    lead = op.parameters.lead(tuple(args))
    if lead.ndim < 2 or lead.shape[0] < 2:
        return
    inputs = floating(args)
    emptied = [
        a[:0] if isinstance(a, Tensor) and a.ndim and a.shape[0] == lead.shape[0] else a
        for a in args
    ]
    try:
        expected = as_tuple(op.spec.reference(*emptied))
    except (RuntimeError, ValueError, IndexError):
        return
    upstream = [torch.ones_like(o) for o in expected]
    outputs, gradients = both(op, emptied, upstream)
    compute = functools.partial(both_of, op.spec.reference, op)
    _, wanted = oracle(compute, emptied, upstream)
    _, eager = compute(emptied, upstream)
    for i, (o, e) in enumerate(zip(outputs, expected, strict=True)):
        assert_same(f"output {i} of empty tensors", o, e)
    for i, g, w, e in zip(inputs, gradients, wanted, eager, strict=True):
        what = f"gradient of {name_of(op, i)} of empty tensors"
        assert g.isfinite().all(), f"{what} must be finite, got {g.flatten()[:4].tolist()}"
        assert_near(what, g, w, e)


@named_check
def double_backward(op: Op, sample: Sample) -> None:
    """Second derivatives: those of the reference in float64."""
    args = bound(op, sample)
    if not has_gradient(op, args):
        return
    inputs = floating(args)
    used = differentiable(as_tuple(op.spec.reference(*with_grad(args, inputs))))
    if not used:
        return
    upstream = fixed_upstream(op, args)
    weights = [torch.randn_like(args[i]) for i in inputs]
    compute = functools.partial(_second, op.spec.reference, used)
    expected = oracle(compute, args, upstream, weights)
    eager = compute(args, upstream, weights)
    actual = _second(op, used, args, upstream, weights)
    names = [name_of(op, i) for i in inputs] + [f"grad_output {i}" for i in used]
    for name, a, e, p in zip(names, actual, expected, eager, strict=True):
        assert_near(f"second derivative by {name}", a, e, p)


def _second(
    function: Callable[..., Any],
    used: Sequence[int],
    args: Sequence[Any],
    upstream: Sequence[Tensor],
    weights: Sequence[Tensor],
) -> list[Tensor]:
    """Gradients of sum(weights * first gradients), by the inputs and by the upstream of outputs."""
    inputs = floating(args)
    leaves = with_grad(args, inputs)
    outputs = as_tuple(function(*leaves))
    pulled = [upstream[i].to(outputs[i].dtype).detach().requires_grad_() for i in used]
    wanted = [leaves[i] for i in inputs]
    first = torch.autograd.grad(
        [outputs[i] for i in used], wanted, pulled, create_graph=True, allow_unused=True
    )
    terms = [
        (g * w).sum() for g, w in zip(first, weights, strict=True) if g is not None and g.grad_fn
    ]
    by = [*wanted, *pulled]
    if not terms:
        return [torch.zeros_like(t) for t in by]
    found = torch.autograd.grad(functools.reduce(torch.add, terms), by, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, by, strict=True)]
