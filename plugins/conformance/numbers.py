"""Checks of values: outputs and gradients against the reference, and against themselves."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trilith.plugins.conformance.compare import FEW, assert_bits, assert_near, assert_same
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
    has_gradient,
    in_float64,
    largest,
    name_of,
    named_check,
    oracle,
    replaced,
    with_grad,
)
from trilith.plugins.op import Op
from trilith.plugins.spec import Sample

_COMBINED_AT_MOST = 4
_NUDGES_OF_FEW = 3  # what one does to a few elements may be little by chance


@named_check
def forward_matches_reference(
    op: Op, sample: Sample, device: torch.device, dtype: torch.dtype
) -> None:
    args = bound(op, sample)
    expected = oracle(lambda a: as_tuple(op.spec.reference(*a)), args)
    eager = as_tuple(op.spec.reference(*args))
    nudged: Sequence[Tensor] = eager
    if _rounds_inside(op):
        nudged = oracle(lambda a: as_tuple(op.spec.reference(*a)), _nudged(op, args))
    actual = as_tuple(op(*args))
    assert len(actual) == len(expected), f"{len(actual)} outputs, the reference has {len(expected)}"
    for i, (a, e, p, n) in enumerate(zip(actual, expected, eager, nudged, strict=True)):
        assert a.dtype == p.dtype, f"output {i}: dtype {a.dtype}, the reference gives {p.dtype}"
        assert a.device == p.device, f"output {i}: on {a.device}, the reference on {p.device}"
        assert_near(f"output {i}", a, e, p, n, rounds_once=not _rounds_inside(op))


@named_check
def gradients_match_reference(
    op: Op, sample: Sample, device: torch.device, dtype: torch.dtype
) -> None:
    args = bound(op, sample)
    if not has_gradient(op, args):
        return
    upstream = fixed_upstream(op, args)
    compute = functools.partial(gradients_of, op.spec.reference)
    _, expected = oracle(compute, args, upstream)
    _, eager = compute(args, upstream)
    nudged = eager
    if _rounds_inside(op):
        _, nudged = oracle(compute, _nudged(op, args), _nudged(op, upstream))
    _, actual = gradients_of(op, args, upstream)
    for i, a, e, p, n in zip(floating(args), actual, expected, eager, nudged, strict=True):
        what = f"gradient of {name_of(op, i)}"
        assert a.dtype == args[i].dtype, f"{what}: dtype {a.dtype}, the input has {args[i].dtype}"
        assert_near(what, a, e, p, n, rounds_once=not _rounds_inside(op))


@named_check
def mixed_dtypes(op: Op, sample: Sample, device: torch.device, dtype: torch.dtype) -> None:
    """Each tensor but the first in another dtype: right, if the reference takes it, or refused."""
    args = bound(op, sample)
    for i in floating(args)[1:]:
        narrow = args[i].dtype == torch.float32
        moved = replaced(args, [i], [args[i].to(torch.bfloat16 if narrow else torch.float32)])
        try:
            op.spec.reference(*moved)
            both(op, moved, fixed_upstream(op, moved))
        except Exception:  # refused: by the public function, or by a compiler in its own way
            continue
        _against_reference(op, moved, f"{name_of(op, i)} in {moved[i].dtype}: ")


@named_check
def regimes(op: Op, sample: Sample, device: torch.device, dtype: torch.dtype) -> None:
    """The first tensor far from zero, tiny, equal along a row, large, with a NaN, with an inf.

    Gradients only where it is finite: what the derivative of relu at NaN is, libraries differ.
    """
    args = bound(op, sample)
    inputs = floating(args)
    if not inputs:
        return
    lead = args[inputs[0]].detach()
    one = torch.arange(lead.numel(), device=device).view(lead.shape) == lead.numel() // 2
    for what, values in (
        ("with mean 1e4", lead + 1e4),
        ("of size 1e-4", lead * 1e-4),
        ("equal along a row", lead[..., :1].expand(lead.shape).contiguous()),
        ("of size 1e4", lead * 1e4),
        ("with a NaN", torch.where(one, torch.nan, lead)),
        ("with an inf", torch.where(one, torch.inf, lead)),
    ):
        moved = replaced(args, inputs[:1], [values])
        _against_reference(op, moved, f"{what}: ", finite=bool(values.isfinite().all()))


@named_check
def regimes_in_16_bits(op: Op, sample: Sample, device: torch.device, dtype: torch.dtype) -> None:
    """Where 16 bits have too few: up to 6e4 and tiny in float16, far from zero in bfloat16."""
    args = bound(op, sample)
    inputs = floating(args)
    if not inputs or args[inputs[0]].dtype not in (torch.float16, torch.bfloat16):
        return
    lead = args[inputs[0]].detach()
    one = torch.arange(lead.numel(), device=device).view(lead.shape) == lead.numel() // 2
    if lead.dtype == torch.float16:
        largest_ = lead.float() * (6e4 / lead.abs().max().float())
        chosen = [("up to 6e4", largest_.half()), ("of size 1e-4", lead * 1e-4)]
    else:
        chosen = [("with mean 1e4", lead + 1e4)]
    for what, values in (*chosen, ("with an inf", torch.where(one, torch.inf, lead))):
        moved = replaced(args, inputs[:1], [values])
        _against_reference(op, moved, f"{what}: ", finite=bool(values.isfinite().all()))


def _against_reference(op: Op, args: Sequence[Any], what: str, *, finite: bool = True) -> None:
    """Outputs and, of finite inputs, gradients: near the reference's in float64 as its own are.

    Or as near as it is to itself for inputs half a step away: where that moves it, fp32 may err.
    Finite inputs may overflow 16 bits on the way to a result, where the reference's do in the
    arguments' dtypes, if the op rounds on that way: before a matrix product, or to an output.
    """
    upstream = fixed_upstream(op, args)
    compute = functools.partial(both_of, op.spec.reference, op)
    expected = oracle(compute, args, upstream)
    few = any(e.numel() < FEW for results in expected for e in results)
    nudged = [
        oracle(compute, _nudged(op, args), _nudged(op, upstream))
        for _ in range(_NUDGES_OF_FEW if few else 1)
    ]
    eager = compute(args, upstream)
    actual = both(op, args, upstream)
    on_the_way = finite and (_rounds_inside(op) or any(map(_overflows, actual[0], expected[0])))
    names = [f"output {i}" for i in range(len(expected[0]))]
    found = list(zip(*(results[0] for results in (actual, expected, eager, *nudged)), strict=True))
    if finite:
        names += [f"gradient of {name_of(op, i)}" for i in floating(args)]
        found += zip(*(results[1] for results in (actual, expected, eager, *nudged)), strict=True)
    for name, (a, e, p, *others) in zip(names, found, strict=True):
        excused = ~p.isfinite() if on_the_way and a.element_size() == 2 else None
        assert_near(f"{what}{name}", a, e, p, *others, excused=excused)


def _overflows(actual: Tensor, expected: Tensor) -> bool:
    """Whether what is finite in the reference is beyond the dtype of the result."""
    rounded = expected.to(actual.dtype)
    return bool((expected.isfinite() & ~rounded.isfinite()).any())


def _rounds_inside(op: Op) -> bool:
    """Whether it has matrix products in 16 bits, as the ops have that autocast lowers."""
    said = op.spec.rounds_inside
    return op.spec.autocast == "low" if said is None else said


def _nudged(op: Op, args: Sequence[Any]) -> list[Any]:
    """The arguments in float64, each element half a step of fp32 up or down.

    As much as this changes, an op may err that computes in fp32. One that rounds to 16 bits inside,
    before a matrix product, may err by half a step of a 16-bit tensor's own dtype.
    """
    chosen = floating(args)
    moved = in_float64(args)
    for i in chosen:
        dtype = args[i].dtype
        own = dtype == torch.float64 or (args[i].element_size() == 2 and _rounds_inside(op))
        step = torch.finfo(dtype if own else torch.float32).eps
        sign = torch.rand(args[i].shape, device=args[i].device).round() - 0.5
        moved[i] = moved[i] * (1 + step * sign)
    return moved


@named_check
def gradient_subsets(op: Op, sample: Sample, device: torch.device, dtype: torch.dtype) -> None:
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
def unused_outputs(op: Op, sample: Sample, device: torch.device, dtype: torch.dtype) -> None:
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
def backward_twice(op: Op, sample: Sample, device: torch.device, dtype: torch.dtype) -> None:
    """With retain_graph: the same again is bit-equal, and twice the upstream gives twice."""
    args = bound(op, sample)
    if not has_gradient(op, args):
        return
    inputs = floating(args)
    leaves = with_grad(args, inputs)
    outputs = as_tuple(op(*leaves))
    used = differentiable(outputs)
    if not used:
        return
    upstream = [torch.randn_like(outputs[i]) for i in used]

    def pull(scale: float) -> list[Tensor]:
        found = torch.autograd.grad(
            [outputs[i] for i in used],
            [leaves[i] for i in inputs],
            [scale * g for g in upstream],
            retain_graph=True,
            allow_unused=True,
        )
        zeros = [torch.zeros_like(args[i]) for i in inputs]
        return [z if g is None else g for g, z in zip(found, zeros, strict=True)]

    first, half, again = pull(1.0), pull(0.5), pull(1.0)
    for i, f, h, a in zip(inputs, first, half, again, strict=True):
        assert_bits(f"gradient of {name_of(op, i)} in a second backward", a, f)
        assert_same(f"gradient of {name_of(op, i)} at half the upstream", 2 * h, f)


@named_check
def runs_are_bit_equal(op: Op, sample: Sample, device: torch.device, dtype: torch.dtype) -> None:
    args = bound(op, sample)
    upstream = fixed_upstream(op, args)
    first = both(op, args, upstream)
    for _ in range(50 if device.type == "cuda" else 2):
        again = both(op, args, upstream)
        for i, (a, f) in enumerate(zip(again[0], first[0], strict=True)):
            assert_bits(f"output {i}, from run to run,", a, f)
            apart = a.numel() == 0 or a.data_ptr() != f.data_ptr()
            assert apart, f"output {i} of two runs is one and the same memory"
        for i, a, f in zip(floating(args), again[1], first[1], strict=True):
            assert_bits(f"gradient of {name_of(op, i)}, from run to run,", a, f)


@named_check
def empty_tensors(op: Op, sample: Sample, device: torch.device, dtype: torch.dtype) -> None:
    """With a leading dimension of 0: the reference's outputs, and gradients exactly 0."""
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
    outputs, gradients = both(op, emptied, [torch.ones_like(o) for o in expected])
    for i, (o, e) in enumerate(zip(outputs, expected, strict=True)):
        assert_same(f"output {i} of empty tensors", o, e)
    for i, g in zip(inputs, gradients, strict=True):
        what = f"gradient of {name_of(op, i)} of empty tensors"
        assert g.shape == emptied[i].shape, f"{what}: shape {g.shape}, not {emptied[i].shape}"
        assert (g == 0).all(), f"{what} must be 0, got {g.flatten()[:4].tolist()}"


@named_check
def double_backward(op: Op, sample: Sample, device: torch.device, dtype: torch.dtype) -> None:
    """Second derivatives: those of the reference in float64."""
    args = bound(op, sample)
    if not has_gradient(op, args):
        return
    upstream = fixed_upstream(op, args)
    weights = [torch.randn_like(args[i]) for i in floating(args)]
    compute = functools.partial(_second, op.spec.reference)
    expected = oracle(compute, args, upstream, weights)
    eager = compute(args, upstream, weights)
    actual = _second(op, args, upstream, weights)
    names = [name_of(op, i) for i in floating(args)]
    names += [f"grad_output {i}" for i in range(len(actual) - len(names))]
    for name, a, e, p in zip(names, actual, expected, eager, strict=True):
        assert_near(f"second derivative by {name}", a, e, p)


def _second(
    function: Callable[..., Any],
    args: Sequence[Any],
    upstream: Sequence[Tensor],
    weights: Sequence[Tensor],
) -> list[Tensor]:
    """Gradients of sum(weights * first gradients), by the inputs and by the upstream."""
    inputs = floating(args)
    leaves = with_grad(args, inputs)
    outputs = as_tuple(function(*leaves))
    used = differentiable(outputs)
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
