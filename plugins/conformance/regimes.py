"""Checks of values where they are hard: far from those of the samples, or of another dtype."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trilith.plugins.conformance.compare import FEW, assert_near
from trilith.plugins.conformance.support import (
    both,
    both_of,
    bound,
    fixed_upstream,
    floating,
    half_a_step_away,
    name_of,
    named_check,
    oracle,
    replaced,
    rounds_inside,
)
from trilith.plugins.op import Op
from trilith.plugins.spec import Sample

_NUDGES_OF_FEW = 3  # what one does to a few elements may be little by chance


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
        ("equal along a row", _equal_along_rows(lead)),
        ("of size 1e4", lead * 1e4),
        ("with a NaN", torch.where(one, torch.nan, lead)),
        ("with an inf", torch.where(one, torch.inf, lead)),
    ):
        moved = replaced(args, inputs[:1], [values])
        _against_reference(op, moved, f"{what}: ", finite=bool(values.isfinite().all()))


def _equal_along_rows(tensor: Tensor) -> Tensor:
    return tensor[..., :1].expand(tensor.shape).contiguous() if tensor.ndim else tensor


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
        oracle(compute, half_a_step_away(op, args), half_a_step_away(op, upstream))
        for _ in range(_NUDGES_OF_FEW if few else 1)
    ]
    eager = compute(args, upstream)
    actual = both(op, args, upstream)
    on_the_way = finite and (rounds_inside(op) or any(map(_overflows, actual[0], expected[0])))
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
