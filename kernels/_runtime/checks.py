"""Argument checks of the public functions. Each message names op, argument, rule, and what came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def require(condition: bool, op: str, arg: str, rule: str, actual: Any) -> None:
    if not condition:
        raise ValueError(f"{op}: {arg} must {rule}, got {actual}")


def require_tensors(op: str, **given: Any) -> None:
    for arg, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {arg} must be a tensor, got {type(tensor).__name__}")


def require_floating(op: str, **given: Any) -> None:
    for arg, tensor in given.items():
        if not (isinstance(tensor, Tensor) and tensor.is_floating_point()):
            raise _not_floating(op, arg, tensor)


def require_floating_if_given(op: str, **given: Any) -> None:
    """As `require_floating`, of those that are not None."""
    for arg, tensor in given.items():
        if tensor is not None and not (isinstance(tensor, Tensor) and tensor.is_floating_point()):
            raise _not_floating(op, arg, tensor)


def _not_floating(op: str, arg: str, given: Any) -> TypeError:
    kind = given.dtype if isinstance(given, Tensor) else type(given).__name__
    return TypeError(f"{op}: {arg} must be a floating-point tensor, got {kind}")


def require_bias(op: str, x: Tensor, bias: Tensor | None) -> None:
    """One number for each element of x's last dimension; or None."""
    if bias is None:
        return
    require_floating(op, bias=bias)
    require_same_device(op, x, bias=bias)
    require(x.ndim > 0, op, "x", "have a dimension where there is a bias", "a scalar")
    require_shape(op, "bias", bias, x.shape[-1:])


def require_same_device(op: str, lead: Tensor, **tensors: Tensor | None) -> None:
    for arg, tensor in tensors.items():
        if tensor is not None and tensor.device != lead.device:
            raise ValueError(
                f"{op}: {arg} must be on the input's device {lead.device}, got {tensor.device}"
            )


def require_shape(op: str, arg: str, tensor: Tensor | None, shape: Sequence[int]) -> None:
    if tensor is not None and tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{op}: {arg} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")


def require_probability(op: str, arg: str, p: float) -> None:
    require(0.0 <= p <= 1.0, op, arg, "be a probability between 0 and 1", p)
