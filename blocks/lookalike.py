"""Layers of other libraries that compute what a kernel does, known by their parts and a probe.

The probe runs the layer's own forward, on the CPU, with stand-ins for its parameters, in training
and in evaluation, on numbers small and large. Only a layer that takes one tensor, and gives what
ours gives, in value and dtype, is taken for one of ours.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from trilith.blocks.drop_in.activations import kernel_name
from trilith.kernels import GATED_ACT, RMS_NORM, gated_act, rms_norm
from trilith.kernels._runtime.functors import ACTIVATIONS
from trilith.plugins.manager import use_implementation

_PROBE_DIM = 8
_LARGE = 1e4  # beyond what layers clamp at
_PROBED_NAMES = ("gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "sigmoid", "tanh")
_COPIED = "QuickGELU"  # the class of OpenAI's CLIP, which others have under this name


class _LikeRMSNorm(nn.Module):
    weight: Tensor

    def epsilon(self) -> float:
        own = vars(self)
        return own["variance_epsilon"] if "variance_epsilon" in own else own["eps"]

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.epsilon()}"


class ScaledRMSNorm(_LikeRMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight, in the wider dtype of x and weight."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight = self.weight
        x = hidden_states.to(torch.promote_types(hidden_states.dtype, weight.dtype))
        return rms_norm(x, weight.shape, weight, self.epsilon())


class WeightRMSNorm(ScaledRMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight, in weight's dtype."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states).to(self.weight.dtype)


class InputRMSNorm(_LikeRMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight, in x's dtype."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight = self.weight
        return rms_norm(hidden_states, weight.shape, weight, self.epsilon())


class ShiftedRMSNorm(_LikeRMSNorm):
    """x / sqrt(mean(x^2) + eps) * (1 + weight), in x's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        weight = 1.0 + self.weight.float()
        return rms_norm(x, weight.shape, weight, self.epsilon())


class GatedMLP(nn.Module):
    """down_proj(act_fn(gate_proj(x)) * up_proj(x)), the middle in one pass."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        name = kernel_name(self.act_fn)
        gate, up = self.gate_proj(x), self.up_proj(x)
        if name is None or x.is_cpu and GATED_ACT.is_reference_on_cpu:
            return self.down_proj(self.act_fn(gate) * up)
        return self.down_proj(gated_act(gate, up, name))


def _on_cpu(function: Callable[[nn.Module], Any]) -> Callable[[nn.Module], Any]:
    """Whatever the default device is."""

    @wraps(function)
    def on_cpu(module: nn.Module) -> Any:
        with torch.device("cpu"):
            return function(module)

    return on_cpu


@_on_cpu
def rms_norm_like(module: nn.Module) -> type[nn.Module] | None:
    """The class of ours that computes what this RMS norm does."""
    weight, own = module._parameters["weight"], vars(module)
    eps = own.get("variance_epsilon", own.get("eps"))
    if weight is None or weight.dim() != 1 or not isinstance(eps, float):
        return None
    if len(module._parameters) > 1 or module._modules or not _takes_one_tensor(module):
        return None
    probes = []
    for weight_dtype in (torch.float32, torch.bfloat16):
        values = torch.linspace(0.5, 1.5, weight.shape[0], dtype=weight_dtype)
        probe = _with(module, parameters={"weight": nn.Parameter(values)})
        x = torch.linspace(-2, 3, 2 * weight.shape[0]).view(2, -1)
        for dtype in (torch.float32, torch.bfloat16):
            probes += [(probe, (size * x).to(dtype)) for size in (math.sqrt(eps), 1.0, _LARGE)]
    for cls in (ScaledRMSNorm, WeightRMSNorm, InputRMSNorm, ShiftedRMSNorm):
        if all(_agree(cls, probe, x) for probe, x in probes):
            return cls
    return None


@_on_cpu
def gated_mlp(module: nn.Module) -> bool:
    children = module._modules
    if set(children) != {"gate_proj", "up_proj", "down_proj", "act_fn"} or module._parameters:
        return False
    if not _takes_one_tensor(module):
        return False
    act = children["act_fn"]
    if act is None or kernel_name(act) is None and known_activation(act) is None:
        return False
    parts: dict[str, nn.Module | None] = {"act_fn": act}
    steps = torch.arange(_PROBE_DIM**2, dtype=torch.float32).view(_PROBE_DIM, -1)
    for shift, name in enumerate(("gate_proj", "up_proj", "down_proj")):
        linear = nn.utils.skip_init(nn.Linear, _PROBE_DIM, _PROBE_DIM, bias=False)
        linear.weight.data = torch.sin(steps + shift)
        parts[name] = linear
    probe = _with(module, modules=parts)
    x = torch.linspace(-2, 3, 2 * _PROBE_DIM).view(2, -1)
    return all(_agree(GatedMLP, probe, size * x, terms=size**2) for size in (1.0, _LARGE))


@_on_cpu
def known_activation(module: nn.Module) -> str | None:
    """The kernel name of a module without parts that computes one of the usual activations."""
    cls = type(module)
    if not (cls.__module__.startswith("transformers.activations") or cls.__name__ == _COPIED):
        return None
    x = torch.cat([torch.linspace(-6, 6, 101), torch.tensor([-_LARGE, -20.0, 20.0, _LARGE])])
    for name in _PROBED_NAMES if _takes_one_tensor(module) else ():
        results = [_result(module, x, training) for training in (False, True)]
        if all(_close(y, ACTIVATIONS[name].torch(x)) for y in results):
            return name
    return None


def _takes_one_tensor(module: nn.Module) -> bool:
    """Whether there is no other argument that a model might call it with."""
    try:
        parameters = inspect.signature(type(module).forward).parameters.values()
    except (TypeError, ValueError):
        return False
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return len(parameters) == 2 and all(p.kind in by_position for p in parameters)


def _with(
    module: nn.Module,
    *,
    parameters: dict[str, nn.Parameter | None] | None = None,
    modules: dict[str, nn.Module | None] | None = None,
) -> nn.Module:
    """A shallow copy with other parameters or children."""
    probe = copy.copy(module)
    own = vars(probe)
    own["_parameters"] = module._parameters if parameters is None else parameters
    own["_modules"] = module._modules if modules is None else modules
    return probe


def _agree(cls: type[nn.Module], probe: nn.Module, x: Tensor, terms: float = 1.0) -> bool:
    twin = copy.copy(probe)
    twin.__class__ = cls
    narrow = any(t.dtype == torch.bfloat16 for t in (x, *probe.parameters()))
    with use_implementation(RMS_NORM, "reference"), use_implementation(GATED_ACT, "reference"):
        return all(
            _close(_result(probe, x, training), _result(twin, x, training), narrow, terms)
            for training in (False, True)
        )


def _close(a: Any, b: Any, narrow: bool = False, terms: float = 1.0) -> bool:
    """`terms`: the size of what was summed up, and may cancel."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape):
        return False
    rtol, atol = (2e-2, 1e-3) if narrow else (1e-4, 1e-6)
    return a.dtype == b.dtype and torch.allclose(a, b, rtol=rtol, atol=atol * terms)


def _result(probe: nn.Module, x: Tensor, training: bool) -> Any:
    """What a probe's forward gives; None where it does not take a tensor."""
    probe = copy.copy(probe)
    vars(probe)["training"] = training
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return type(probe).forward(probe, x)
    except Exception:  # another library's forward may raise anything
        return None
