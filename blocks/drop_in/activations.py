"""torch.nn's activations.

What no kernel computes is torch's own: tensors where none runs, in-place calls, numbers that are
not floating-point, and slopes other than torch's defaults.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trilith.blocks.drop_in.layouts import elementwise
from trilith.blocks.drop_in.swap import keep_called, unhooked
from trilith.kernels import BIAS_ACT, bias_act
from trilith.kernels._runtime.functors import ACTIVATIONS


class ReLU(nn.ReLU):
    """torch.nn.ReLU."""

    passed_over_by_torch = True

    def __init__(self, inplace: bool = False) -> None:
        super().__init__(inplace)
        keep_called(self)

    def forward(self, input: Tensor) -> Tensor:
        if input.is_cpu and BIAS_ACT.is_reference_on_cpu or _beyond(self, input):
            return torch.relu_(input) if self.inplace else torch.relu(input)
        return _run("relu", input)


class GELU(nn.GELU):
    """torch.nn.GELU, by erf or, with approximate="tanh", by tanh."""

    passed_over_by_torch = True

    def __init__(self, approximate: str = "none") -> None:
        super().__init__(approximate)
        keep_called(self)

    def forward(self, input: Tensor) -> Tensor:
        if input.is_cpu and BIAS_ACT.is_reference_on_cpu or _beyond(self, input):
            return F.gelu(input, approximate=self.approximate)
        return _run(_name(self), input)


class LeakyReLU(nn.LeakyReLU):
    """torch.nn.LeakyReLU; a kernel where the slope is 0.01."""

    def forward(self, input: Tensor) -> Tensor:
        if input.is_cpu and BIAS_ACT.is_reference_on_cpu or _beyond(self, input):
            return F.leaky_relu(input, self.negative_slope, self.inplace)
        return _run("leaky_relu", input)


class ELU(nn.ELU):
    """torch.nn.ELU; a kernel where alpha is 1."""

    def forward(self, input: Tensor) -> Tensor:
        if input.is_cpu and BIAS_ACT.is_reference_on_cpu or _beyond(self, input):
            return F.elu(input, self.alpha, self.inplace)
        return _run("elu", input)


class SiLU(nn.SiLU):
    """torch.nn.SiLU."""

    def forward(self, input: Tensor) -> Tensor:
        if input.is_cpu and BIAS_ACT.is_reference_on_cpu or _beyond(self, input):
            return F.silu(input, self.inplace)
        return _run("silu", input)


class Sigmoid(nn.Sigmoid):
    """torch.nn.Sigmoid."""

    def forward(self, input: Tensor) -> Tensor:
        if input.is_cpu and BIAS_ACT.is_reference_on_cpu or _beyond(self, input):
            return torch.sigmoid(input)
        return _run("sigmoid", input)


class Tanh(nn.Tanh):
    """torch.nn.Tanh."""

    def forward(self, input: Tensor) -> Tensor:
        if input.is_cpu and BIAS_ACT.is_reference_on_cpu or _beyond(self, input):
            return torch.tanh(input)
        return _run("tanh", input)


class Activation(nn.Module):
    """Another library's activation that a probe recognised, by the kernel of that name."""

    ATTRIBUTE = "_trilith_activation"

    def forward(self, input: Tensor) -> Tensor:
        name = vars(self)[self.ATTRIBUTE]
        if not input.is_floating_point() or input.is_cpu and BIAS_ACT.is_reference_on_cpu:
            return ACTIVATIONS[name].torch(input)
        return _run(name, input)


_NAMES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    LeakyReLU: "leaky_relu",
    nn.ELU: "elu",
    ELU: "elu",
    nn.SiLU: "silu",
    SiLU: "silu",
    nn.Sigmoid: "sigmoid",
    Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    Tanh: "tanh",
    nn.GELU: "gelu",
    GELU: "gelu",
    nn.Identity: "identity",
}


def kernel_name(activation: nn.Module | Callable[[Tensor], Tensor]) -> str | None:
    """What `bias_act` calls an activation, if calling it there is the same as calling it."""
    if not isinstance(activation, nn.Module):
        functions = {F.relu: "relu", F.gelu: "gelu", F.silu: "silu", torch.relu: "relu"}
        return functions.get(activation)
    return _name(activation) if unhooked(activation) and _default(activation) else None


def _name(module: nn.Module) -> str | None:
    if type(module) is Activation:
        return vars(module)[Activation.ATTRIBUTE]
    name = _NAMES.get(type(module))
    if name == "gelu" and getattr(module, "approximate", "none") != "none":
        return "gelu_tanh"
    return name


def _default(module: nn.Module) -> bool:
    """Whether no attribute asks for more than the kernel does."""
    return (
        not getattr(module, "inplace", False)
        and getattr(module, "negative_slope", 0.01) == 0.01
        and getattr(module, "alpha", 1.0) == 1.0
        and getattr(module, "approximate", "none") in ("none", "tanh")
    )


def _beyond(module: nn.Module, x: Tensor) -> bool:
    return not (_default(module) and x.is_floating_point())


def _run(name: str | None, x: Tensor) -> Tensor:
    assert name is not None
    return elementwise(lambda part: bias_act(part, None, name), x)
