"""Linear layers as the blocks use them: their init, and when their weight may be read directly."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeGuard, cast

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from torch.nn.modules import module as _torch

from trilith.kernels import (
    BIAS_ACT,
    BIAS_ACT_LINEAR,
    DROPOUT,
    GATED_ACT,
    GATED_ACT_LINEAR,
    bias_act,
    bias_act_linear,
    dropout,
    gated_act,
    gated_act_linear,
)
from trilith.plugins import TRITON_DEVICES, may_fuse
from trilith.plugins.sharding import is_dtensor

_WEIGHTS = (nn.Parameter, Tensor, FakeTensor)


def plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether reading the module's parameters is the same as calling it.

    Only for one of the kinds itself, with no hook and no forward of its own: a subclass, a
    parametrization, a LoRA or quantized wrapper and a sharding hook do something when called.
    Nor while torch has hooks for all modules.
    """
    return (
        type(module) in kinds
        and not module._forward_pre_hooks
        and not module._forward_hooks
        and not module._backward_pre_hooks
        and not module._backward_hooks
        and "forward" not in vars(module)
        and not hooks_of_all_modules()
    )


def hooks_of_all_modules() -> bool:
    """Whether a hook was registered for every module, as profilers and debuggers do."""
    return bool(
        _torch._global_forward_hooks
        or _torch._global_forward_pre_hooks
        or _torch._global_backward_hooks
        or _torch._global_backward_pre_hooks
    )


def plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Of a weight that is numbers as they are: a quantized one has a type of its own."""
    if not plain(module, nn.Linear):
        return False
    weight: Tensor | None = module._parameters.get("weight")  # quicker than the attribute
    if weight is None:
        weight = cast(Tensor, module.weight)
    return type(weight) in _WEIGHTS or is_dtensor(weight)


def kernels_run(x: Tensor) -> bool:
    """Whether fusing pays: PyTorch's own layers are as good where the reference would run."""
    return x.device.type in TRITON_DEVICES


def linear_act(
    linear: nn.Module,
    x: Tensor,
    activation: str,
    p: float,
    product: Callable[[Tensor, Tensor], Tensor] = F.linear,
) -> Tensor:
    """dropout(activation(linear(x))); where kernels run, the activation's pass adds the bias.

    Elsewhere the matrix product adds the bias at no cost, and adding it apart would be a pass more.
    `p` is 0 where nothing is dropped, as in evaluation; `product` takes x and linear's weight where
    it may be read.
    """
    if kernels_run(x) and plain_linear(linear):
        return _act(product(x, linear.weight), linear.bias, activation, p)
    return _act(linear(x), None, activation, p)


def act_linear(
    x: Tensor, bias: Tensor | None, activation: str, linear: nn.Module, p: float
) -> Tensor:
    """linear(dropout(activation(x + bias)))."""
    parts = (BIAS_ACT, DROPOUT) if p else (BIAS_ACT,)
    if kernels_run(x) and plain_linear(linear) and may_fuse(BIAS_ACT_LINEAR, x, *parts):
        return bias_act_linear(x, bias, linear.weight, linear.bias, activation, p=p)
    return linear(_act(x, bias, activation, p))


def _act(x: Tensor, bias: Tensor | None, activation: str, p: float) -> Tensor:
    """dropout(activation(x + bias)), in one pass where nobody else was chosen for the dropout."""
    if p and not may_fuse(BIAS_ACT, x, DROPOUT):
        return dropout(bias_act(x, bias, activation), p)
    return bias_act(x, bias, activation, p=p)


def gate_linear(gate: Tensor, up: Tensor, activation: str, linear: nn.Module) -> Tensor:
    """linear(activation(gate) * up)."""
    fuses = kernels_run(gate) and may_fuse(GATED_ACT_LINEAR, gate, GATED_ACT)
    if fuses and plain_linear(linear):
        return gated_act_linear(gate, up, linear.weight, linear.bias, activation)
    return linear(gated_act(gate, up, activation))


def reset_linear(module: nn.Module, gain: float = 1.0) -> None:
    """Weight normal with standard deviation gain / sqrt(fan_in), bias zero.

    A module that is not an nn.Linear resets itself, if it can.
    """
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=gain / math.sqrt(module.in_features))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    else:
        reset(module)


def reset(*modules: nn.Module | None) -> None:
    """Call the reset_parameters of each module; where there is none, of its children."""
    for module in modules:
        if module is None:
            continue
        own = getattr(module, "reset_parameters", None)
        if own is not None:
            own()
        else:
            reset(*module.children())
