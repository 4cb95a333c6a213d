"""Checks of values where they are hard: far from those of the samples, or of another dtype."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trilith.plugins.conformance.compare import FEW, assert_near, is_finite
from trilith.plugins.conformance.support import (
    as_tuple,
    both,
    both_of,
    bound,
    fixed_upstream,
    floating,
    half_a_step_away,
    name_of,
    named_check,
    oracle,
    random_like,
    replaced,
    rounds_inside,
)
from trilith.plugins.conformance.transforms import require_exact_fakes
from trilith.plugins.op import Op
from trilith.plugins.spec import Sample

_NUDGES_OF_FEW = 3  # what one does to a few elements may be little by chance


@named_check
def mixed_dtypes(op: Op, sample: Sample) -> None:
    """Each tensor but the first in another dtype: right, if the reference takes it, or refused."""
    args = bound(op, sample)
    for i in floating(args)[1:]:
        narrow = args[i].dtype == torch.float32
        moved = replaced(args, [i], [args[i].to(torch.bfloat16) if narrow else _widened(args[i])])
        try:
            upstream = random_like(as_tuple(op.spec.reference(*moved)))
            actual = both(op, moved, upstream)
        except Exception:  # refused: by the public function, or by a compiler in its own way
            continue
        what = f"{name_of(op, i)} in {moved[i].dtype}: "
        once = not rounds_inside(op)
        _require_near_reference(op, moved, upstream, actual, what, True, rounds_once=once)
        require_exact_fakes(op, moved)


def _widened(tensor: Tensor) -> Tensor:
    """In float32, with values that the tensor's own dtype has not."""
    wide = tensor.detach().float()
    return wide * (1 - torch.rand_like(wide) / 256)


@named_check
def regimes(op: Op, sample: Sample) -> None:
    """The first tensor far from zero, tiny, zero, equal along a row, large, with a NaN, an inf.

    Gradients only where it is finite: what the derivative of relu at NaN is, libraries differ.
    """
    args = bound(op, sample)
    inputs = floating(args)
    if not inputs:
        return
    lead = args[inputs[0]].detach()
    for what, values in (
        ("with mean 1e4", lead + 1e4),
        ("of size 1e-4", lead * 1e-4),
        ("of zeros", torch.zeros_like(lead)),
        ("equal along a row", _equal_along_rows(lead)),
        ("of size 1e4", lead * 1e4),
        ("with a NaN", _with_one(torch.nan, lead)),
        ("with an inf", _with_one(torch.inf, lead)),
    ):
        _against_reference(op, replaced(args, inputs[:1], [values]), f"{what}: ")


def _equal_along_rows(tensor: Tensor) -> Tensor:
    return tensor[..., :1].expand(tensor.shape).contiguous() if tensor.ndim else tensor


def _with_one(value: float, tensor: Tensor) -> Tensor:
    position = torch.arange(tensor.numel(), device=tensor.device).view(tensor.shape)
    return torch.where(position == tensor.numel() // 2, value, tensor)


@named_check
def regimes_of_others(op: Op, sample: Sample) -> None:
    """Each tensor but the first large, with an inf, with a NaN.

    Coarsely: how an infinite weight becomes inf or NaN differs from formula to formula, and so does
    what cancels in a gradient, as of a softmax whose largest score is 1e4.
    """
    args = bound(op, sample)
    for i in floating(args)[1:]:
        own, name = args[i].detach(), name_of(op, i)
        for what, values in (
            ("of size 1e4", own * 1e4),
            ("with an inf", _with_one(torch.inf, own)),
            ("with a NaN", _with_one(torch.nan, own)),
        ):
            moved = replaced(args, [i], [values])
            _against_reference(op, moved, f"{name} {what}: ", coarse=True)


@named_check
def regimes_in_16_bits(op: Op, sample: Sample) -> None:
    """Where 16 bits have too few: up to 6e4, gradients of outputs too, and tiny in float16, far
    from zero in bfloat16."""
    args = bound(op, sample)
    inputs = floating(args)
    if not inputs or args[inputs[0]].dtype not in (torch.float16, torch.bfloat16):
        return
    lead = args[inputs[0]].detach()
    if lead.dtype == torch.float16:
        upstream = [_up_to_6e4(g) for g in fixed_upstream(op, args)]
        _against_reference(op, args, "gradients of outputs up to 6e4: ", upstream=upstream)
        chosen = [("up to 6e4", _up_to_6e4(lead)), ("of size 1e-4", lead * 1e-4)]
    else:
        chosen = [("with mean 1e4", lead + 1e4)]
    for what, values in (*chosen, ("with an inf", _with_one(torch.inf, lead))):
        _against_reference(op, replaced(args, inputs[:1], [values]), f"{what}: ")


def _up_to_6e4(tensor: Tensor) -> Tensor:
    if tensor.dtype != torch.float16 or not tensor.numel():
        return tensor
    return (tensor.float() * (6e4 / tensor.abs().max().float())).half()


def _against_reference(
    op: Op,
    args: Sequence[Any],
    what: str,
    *,
    upstream: Sequence[Tensor] | None = None,
    coarse: bool = False,
) -> None:
    """The call's outputs, and its gradients if no argument is NaN or inf."""
    if upstream is None:
        upstream = random_like(as_tuple(op.spec.reference(*args)))
    finite = all(bool(args[i].isfinite().all()) for i in floating(args))
    actual = both(op, args, upstream) if finite else _outputs_alone(op, args, upstream)
    _require_near_reference(op, args, upstream, actual, what, finite, coarse=coarse)


def _outputs_alone(function: Any, args: Sequence[Any], upstream: Sequence[Tensor]) -> Any:
    return as_tuple(function(*args)), []


def _require_near_reference(
    op: Op,
    args: Sequence[Any],
    upstream: Sequence[Tensor],
    actual: Any,
    what: str,
    finite: bool,
    *,
    rounds_once: bool = False,
    coarse: bool = False,
) -> None:
    """Outputs and, of finite inputs, gradients: near the reference's in float64 as its own are.

    Or as near as it is to itself for inputs half a step away: where that moves it, fp32 may err.
    Finite inputs may overflow 16 bits on the way to a result, where the reference's do in the
    arguments' dtypes, if the op rounds on that way: before a matrix product, or to an output.
    Where a gradient of the reference is not finite, as that of a root at 0, formulas differ. If
    `coarse`, an output may be NaN where the reference gives inf, and gradients need but be finite
    where its are.
    """
    compute = functools.partial(_outputs_alone, op.spec.reference)
    if finite:
        compute = functools.partial(both_of, op.spec.reference, op)
    expected = oracle(compute, args, upstream)
    few = any(e.numel() < FEW for results in expected for e in results)
    nudged = [
        oracle(compute, half_a_step_away(op, args), half_a_step_away(op, upstream))
        for _ in range(_NUDGES_OF_FEW if few else 1)
    ]
    eager = compute(args, upstream)
    on_the_way = finite and (rounds_inside(op) or any(map(_overflows, actual[0], expected[0])))
    outputs, gradients = (
        list(zip(*(results[k] for results in (actual, expected, eager, *nudged)), strict=True))
        for k in (0, 1)
    )
    for i, (a, e, p, *others) in enumerate(outputs):
        excused = ~is_finite(e) & ~is_finite(a) & coarse
        if on_the_way and a.element_size() == 2:
            excused |= ~is_finite(p)
        name = f"{what}output {i}"
        assert_near(name, a, e, p, *others, rounds_once=rounds_once, excused=excused)
    for i, (a, e, p, *others) in zip(floating(args), gradients, strict=finite):
        name = f"{what}gradient of {name_of(op, i)}"
        excused = ~e.isfinite()
        if on_the_way and a.element_size() == 2:
            excused |= ~p.isfinite()
        if coarse:
            lost = int((~a.isfinite() & e.to(a.dtype).isfinite() & ~excused).sum())
            assert not lost, f"{name}: NaN or inf in {lost} of {a.numel()} elements"
        else:
            assert_near(name, a, e, p, *others, rounds_once=rounds_once, excused=excused)


def _overflows(actual: Tensor, expected: Tensor) -> bool:
    """Whether what is finite in the reference is beyond the dtype of the result."""
    rounded = expected.to(actual.dtype)
    return bool((is_finite(expected) & ~is_finite(rounded)).any())
