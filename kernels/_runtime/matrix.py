"""Matrix products and their gradients by PyTorch's GEMMs, for ops that end in a linear one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from trilith.kernels._runtime import checks
from trilith.kernels._runtime.plan import as_one

linear = as_one(F.linear)


def input_gradient(dys: Sequence[Tensor | None], weights: Sequence[Tensor | None]) -> Tensor:
    """The sum of dy @ weight over the outputs that have a gradient; one of them has."""
    total: Tensor | None = None
    for dy, weight in zip(dys, weights, strict=True):
        if dy is None or weight is None:
            continue
        total = _product(dy, weight) if total is None else _sum_and_product(total, dy, weight)
    assert total is not None
    return total


@as_one
def _product(dy: Tensor, weight: Tensor) -> Tensor:
    return torch.mm(as_matrix(dy), weight).view(*dy.shape[:-1], weight.shape[1])


@as_one
def _sum_and_product(total: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
    return torch.addmm(as_matrix(total), as_matrix(dy), weight).view(total.shape)


def parameter_gradients(
    dy: Tensor | None, hidden: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of weight and bias in y = hidden @ weight.T + bias, those that are needed."""
    if dy is None:
        return None, None
    if not needs[0]:
        return None, _bias_gradient(dy) if needs[1] else None
    assert hidden is not None
    return _both_gradients(dy, hidden) if needs[1] else (_weight_gradient(dy, hidden), None)


@as_one
def _weight_gradient(dy: Tensor, hidden: Tensor) -> Tensor:
    return torch.mm(as_matrix(dy).t(), as_matrix(hidden))


@as_one
def _bias_gradient(dy: Tensor) -> Tensor:
    return as_matrix(dy).sum(0)


@as_one
def _both_gradients(dy: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    dy = as_matrix(dy)  # of some strides a copy, which both read
    return torch.mm(dy.t(), as_matrix(hidden)), dy.sum(0)


def as_matrix(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def room_for(inputs: Sequence[Tensor | None], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Contiguous gradients, not yet written, of the inputs that need one."""
    return tuple(
        t.new_empty(t.shape) if t is not None and need else None
        for t, need in zip(inputs, needs, strict=False)
    )


def require_linear(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, bias_name: str = "bias"
) -> None:
    """Refuse what no linear layer is for x."""
    biases = {bias_name: bias}
    checks.require_floating(op, weight=weight)
    checks.require_floating_if_given(op, **biases)
    checks.require_same_device(op, x, weight=weight, **biases)
    fits = weight.ndim == 2 and weight.shape[1] == x.shape[-1]
    shape = tuple(weight.shape)
    checks.require(fits, op, "weight", f"have shape (K, {x.shape[-1]})", shape)
    checks.require_shape(op, bias_name, bias, weight.shape[:1])
    if bias is not None:
        same = bias.dtype == weight.dtype
        checks.require(same, op, bias_name, f"have weight's dtype {weight.dtype}", bias.dtype)
