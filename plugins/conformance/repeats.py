"""Checks of an op against itself: called again, pulled back again, with other calls between."""

from __future__ import annotations

import torch
from torch import Tensor

from trilith.plugins.conformance.compare import assert_bits, assert_same
from trilith.plugins.conformance.support import (
    as_tuple,
    both,
    bound,
    differentiable,
    fixed_upstream,
    floating,
    has_gradient,
    name_of,
    named_check,
    with_grad,
)
from trilith.plugins.op import Op
from trilith.plugins.spec import Sample


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
