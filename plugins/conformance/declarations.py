"""Checks of what a spec says of its op, beside what the op does."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch.utils.flop_counter import FlopCounterMode

from trilith.plugins.conformance.support import (
    as_tuple,
    both,
    bound,
    fixed_upstream,
    has_gradient,
    named_check,
)
from trilith.plugins.op import Op
from trilith.plugins.spec import Cost, Sample


@named_check
def cost_is_sound(op: Op, sample: Sample) -> None:
    """A Cost of whole numbers; forward moves its outputs at least; torch's FlopCounterMode counts
    what it says."""
    if op.spec.cost is None:
        return
    args = bound(op, sample)
    cost = op.spec.cost(*args)
    assert isinstance(cost, Cost), f"cost must return a Cost, got {cost!r}"
    for field in fields(cost):
        value = getattr(cost, field.name)
        whole = type(value) is int and value >= 0
        assert whole, f"{field.name} must be a whole number, got {value!r}"
    with torch.no_grad():
        least = sum(o.numel() * o.element_size() for o in as_tuple(op(*args)))
    said = cost.forward_bytes
    assert said >= least, f"forward_bytes {said} is less than the {least} bytes of the outputs"
    if op.choose(*args) is None:
        return
    wanted = cost.forward_flops
    with FlopCounterMode(display=False) as counter:
        op(*args)
    assert counter.get_total_flops() == wanted, "FlopCounterMode does not count forward_flops"
    if has_gradient(op, args):
        wanted += cost.backward_flops
        upstream = fixed_upstream(op, args)
        with FlopCounterMode(display=False) as counter:
            both(op, args, upstream)
        flops = counter.get_total_flops()
        assert flops == wanted, f"FlopCounterMode counts {flops} with backward, not {wanted}"
