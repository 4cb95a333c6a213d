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
from contextlib import ExitStack
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trilith.blocks.drop_in.activations import kernel_name
from trilith.kernels import GATED_ACT, LAYER_NORM, RMS_NORM, gated_act, layer_norm, rms_norm
from trilith.kernels._runtime.functors import ACTIVATIONS
from trilith.plugins.manager import use_implementation

_PROBE_DIM = 8
_LARGE = 1e4  # beyond what layers clamp at
_PROBED_NAMES = ("gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "sigmoid", "tanh")
_COPIED = "QuickGELU"  # the class of OpenAI's CLIP, which others have under this name


class CastLayerNorm(nn.LayerNorm):
    """torch's LayerNorm in x's dtype, whatever that of the weight is: models cast around theirs."""

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class _LikeRMSNorm(nn.Module):
    scale: Tensor  # of those that have no weight

    @property
    def gain(self) -> Tensor:
        """Read by its name: replicas, FSDP and parametrizations keep it where no parameter is."""
        weight: Tensor | None = getattr(self, "weight", None)
        return self.scale if weight is None else weight

    def epsilon(self) -> float:
        own = vars(self)
        return own["variance_epsilon"] if "variance_epsilon" in own else own["eps"]

    def extra_repr(self) -> str:
        return f"{tuple(self.gain.shape)}, eps={self.epsilon()}"


class ScaledRMSNorm(_LikeRMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight, in the wider dtype of x and weight."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight = self.gain
        x = hidden_states.to(torch.promote_types(hidden_states.dtype, weight.dtype))
        return rms_norm(x, weight.shape, weight, self.epsilon())


class WeightRMSNorm(ScaledRMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight, in weight's dtype."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states).to(self.gain.dtype)


class InputRMSNorm(_LikeRMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight, in x's dtype."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight = self.gain
        return rms_norm(hidden_states, weight.shape, weight, self.epsilon())


class ShiftedRMSNorm(_LikeRMSNorm):
    """x / sqrt(mean(x^2) + eps) * (1 + weight), in x's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        weight = 1.0 + self.gain.float()
        return rms_norm(x, weight.shape, weight, self.epsilon())


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)), the middle in one pass; act is silu where it is no module."""

    parts = ("gate_proj", "up_proj", "down_proj", "act_fn")

    def forward(self, x: Tensor) -> Tensor:
        gate_proj, up_proj, down_proj, act = (self._modules.get(name) for name in self.parts)
        assert gate_proj is not None and up_proj is not None and down_proj is not None
        name = "silu" if act is None else kernel_name(act)
        gate, up = gate_proj(x), up_proj(x)
        if name is None or x.is_cpu and GATED_ACT.is_reference_on_cpu:
            return down_proj((F.silu if act is None else act)(gate) * up)
        return down_proj(gated_act(gate, up, name))


class NumberedGatedMLP(GatedMLP):
    """GatedMLP with the names of Llama's own code."""

    parts = ("w1", "w3", "w2", "activation")


def _on_cpu(function: Callable[[nn.Module], Any]) -> Callable[[nn.Module], Any]:
    """Whatever the default device is."""

    @wraps(function)
    def on_cpu(module: nn.Module) -> Any:
        with torch.device("cpu"):
            return function(module)

    return on_cpu


@_on_cpu
def layer_norm_like(module: nn.Module) -> type[nn.Module] | None:
    """The class of ours that computes what a subclass of torch's does, in each dtype it takes."""
    assert isinstance(module, nn.LayerNorm)
    if {*module._parameters} != {"weight", "bias"} or not _takes_one_tensor(module):
        return None
    shape, n = module.normalized_shape, math.prod(module.normalized_shape)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        values = {"weight": torch.linspace(0.5, 1.5, n), "bias": torch.linspace(-1, 1, n)}
        own = {
            name: None if parameter is None else nn.Parameter(values[name].view(shape).to(dtype))
            for name, parameter in module._parameters.items()
        }
        probe, x = _with(module, parameters=own), torch.linspace(-2, 3, 2 * n).view(2, *shape)
        for x_dtype in (torch.float32, torch.bfloat16):
            for size in (math.sqrt(module.eps), 1.0, _LARGE):
                values_of_x = (size * x).to(x_dtype)
                if _result(probe, values_of_x, training=True) is not None:
                    found.append(_agree(CastLayerNorm, probe, values_of_x))
    return CastLayerNorm if found and all(found) else None


@_on_cpu
def rms_norm_like(module: nn.Module) -> type[nn.Module] | None:
    """The class of ours that computes what this RMS norm does."""
    if len(module._parameters) > 1 or module._modules or not _takes_one_tensor(module):
        return None
    ((name, weight),), own = module._parameters.items(), vars(module)
    eps = own.get("variance_epsilon", own.get("eps"))
    if weight is None or weight.dim() != 1 or not isinstance(eps, float):
        return None
    probes = []
    for weight_dtype in (torch.float32, torch.bfloat16):
        values = torch.linspace(0.5, 1.5, weight.shape[0], dtype=weight_dtype)
        probe = _with(module, parameters={name: nn.Parameter(values)})
        x = torch.linspace(-2, 3, 2 * weight.shape[0]).view(2, -1)
        for dtype in (torch.float32, torch.bfloat16):
            probes += [(probe, (size * x).to(dtype)) for size in (math.sqrt(eps), 1.0, _LARGE)]
    for cls in (ScaledRMSNorm, WeightRMSNorm, InputRMSNorm, ShiftedRMSNorm):
        if all(_agree(cls, probe, x) for probe, x in probes):
            return cls
    return None


def gated_parts(module: nn.Module) -> type[GatedMLP] | None:
    """The class of ours that has the names of a module's linear layers."""
    known, children = (GatedMLP, NumberedGatedMLP), {*module._modules}
    return next((cls for cls in known if {*cls.parts[:3]} <= children), None)


@_on_cpu
def computes_gated(module: nn.Module) -> bool:
    """Whether a module with such children is down(act(gate(x)) * up(x))."""
    cls, children = gated_parts(module), module._modules
    if cls is None or module._parameters or not {*children} <= {*cls.parts}:
        return False
    if None in children.values():
        return False
    if not _takes_one_tensor(module):
        return False
    *linears, act_name = cls.parts
    act = children.get(act_name)
    if act is not None and kernel_name(act) is None and known_activation(act) is None:
        return False
    parts: dict[str, Any] = {} if act is None else {act_name: act}
    steps = torch.arange(_PROBE_DIM**2, dtype=torch.float32).view(_PROBE_DIM, -1)
    for shift, name in enumerate(linears):
        parts[name] = nn.utils.skip_init(nn.Linear, _PROBE_DIM, _PROBE_DIM, bias=False)
        parts[name].weight.data = torch.sin(steps + shift)
    probe = _with(module, modules=parts)
    x = torch.linspace(-2, 3, 2 * _PROBE_DIM).view(2, -1)
    return all(_agree(cls, probe, size * x, terms=size**2) for size in (1.0, _LARGE))


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
    with ExitStack() as scopes:
        for op in (LAYER_NORM, RMS_NORM, GATED_ACT):
            scopes.enter_context(use_implementation(op, "reference"))
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
