"""Checks of an op against itself: called again, pulled back again, with another call between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from trilith.plugins.conformance.compare import assert_bits, assert_same, is_differentiable
from trilith.plugins.conformance.support import (
    as_tuple,
    begun,
    both,
    bound,
    fixed_upstream,
    floating,
    gradients_of,
    has_gradient,
    name_of,
    named_check,
    random_like,
)
from trilith.plugins.op import Op
from trilith.plugins.spec import Sample


@named_check
def backward_twice(op: Op, sample: Sample) -> None:
    """With retain_graph: the same again is bit-equal, and twice the upstream gives twice."""
    args = bound(op, sample)
    if not has_gradient(op, args):
        return
    inputs = floating(args)
    outputs, pull = begun(op, args, inputs)
    upstream = random_like(outputs)
    halves = [g / 2 if is_differentiable(g) else g for g in upstream]
    first, half, again = (pull(g, again=True) for g in (upstream, halves, upstream))
    for i, f, h, a in zip(inputs, first, half, again, strict=True):
        assert_bits(f"gradient of {name_of(op, i)} in a second backward", a, f)
        assert_same(f"gradient of {name_of(op, i)} at half the upstream", 2 * h, f)


@named_check
def runs_are_bit_equal(op: Op, sample: Sample, device: torch.device) -> None:
    args = bound(op, sample)
    upstream = fixed_upstream(op, args)
    first = both(op, args, upstream)
    for _ in range(50 if device.type == "cuda" else 2):
        again = both(op, args, upstream)
        for i, (a, f) in enumerate(zip(again[0], first[0], strict=True)):
            assert_bits(f"output {i}, from run to run,", a, f)
        for i, a, f in zip(floating(args), again[1], first[1], strict=True):
            assert_bits(f"gradient of {name_of(op, i)}, from run to run,", a, f)


@named_check
def calls_are_apart(op: Op, sample: Sample) -> None:
    """What a call makes, aux too, is its own: one between its forward and backward changes none."""
    args = bound(op, sample)
    _require_memory_apart(op, args)
    wanted = floating(args) if has_gradient(op, args) else []
    upstream = random_like(as_tuple(op.spec.reference(*args)))
    expected = [[t.clone() for t in found] for found in gradients_of(op, args, upstream, wanted)]
    outputs, pull = begun(op, args, wanted)
    _, pull_other = begun(op, _unlike(args), wanted)
    gradients = pull(upstream)
    pull_other(upstream)
    for i, (o, e) in enumerate(zip(outputs, expected[0], strict=True)):
        assert_bits(f"output {i}, with another call after it,", o, e)
    for i, g, e in zip(wanted, gradients, expected[1], strict=True):
        assert_bits(f"gradient of {name_of(op, i)}, with another call beside it,", g, e)


def _require_memory_apart(op: Op, args: Sequence[Any]) -> None:
    provider = op.choose(*args)
    if provider is None:
        return
    first, second = (op.torch_ops.run_forward(*args, provider) for _ in range(2))
    for i, (one, other) in enumerate(zip(first, second, strict=True)):
        storages = [t.untyped_storage().data_ptr() for t in (one, other) if t.numel()]
        apart = len(storages) == len(set(storages))
        assert apart, f"forward result {i} of two calls is one and the same memory"


def _unlike(args: Sequence[Any]) -> list[Any]:
    """Other values, of the same sign and no larger."""
    chosen = floating(args)
    return [a.flip(tuple(range(a.ndim))) / 2 if i in chosen else a for i, a in enumerate(args)]
