"""Checks of what a spec says of its op, beside what the op does."""

from __future__ import annotations

from dataclasses import fields

import torch

from trilith.plugins.conformance.support import as_tuple, bound, named_check
from trilith.plugins.op import Op
from trilith.plugins.spec import Cost, Sample


@named_check
def cost_is_sound(op: Op, sample: Sample, device: torch.device, dtype: torch.dtype) -> None:
    """A Cost of whole numbers; forward moves its outputs at least."""
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
