"""What gradients do on their way through a model: Jacobians, gradient checks, gradient flow."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError
from torch.func import functional_call, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

from trilith.blocks.gradient_flow import GradientFlow, Layer, gradient_flow

__all__ = ["GradientFlow", "Layer", "gradcheck", "gradient_flow", "jacobian"]


def jacobian(module: nn.Module, x: Tensor) -> Tensor:
    """d module(x) / d x, of shape module(x).shape + x.shape (`torch.func.jacrev`).

    Example:
        >>> layer = torch.nn.Linear(3, 2)
        >>> bool((jacobian(layer, torch.randn(3)) == layer.weight).all())
        True
    """
    with sdpa_kernel(SDPBackend.MATH):
        return jacrev(module)(x)


def gradcheck(module: nn.Module, x: Tensor) -> bool:
    """Whether backward gives the derivatives of forward, by central differences in float64.

    The module is copied to float64, where Trilith's ops take their references; x and every
    parameter that requires a gradient are checked in turn. Random numbers are the same in each
    call, and running statistics stay as they are.

    Returns:
        True.

    Raises:
        torch.autograd.gradcheck.GradcheckError: says for which input or parameter, and both
            Jacobians.
    """
    module = copy.deepcopy(module).double()
    frozen = {name: p for name, p in module.named_parameters() if not p.requires_grad}
    checked = {name: p for name, p in module.named_parameters() if p.requires_grad}
    inputs = {"x": x.detach().double(), **{f"parameter {n}": p for n, p in checked.items()}}

    for varied in inputs:

        def forward(value: Tensor, varied: str = varied) -> Any:
            values = [value if name == varied else t.detach() for name, t in inputs.items()]
            parameters = dict(zip(checked, values[1:], strict=True))
            buffers = {name: b.clone() for name, b in module.named_buffers()}
            with torch.random.fork_rng():
                torch.manual_seed(0)
                return functional_call(module, {**frozen, **parameters, **buffers}, (values[0],))

        try:
            torch.autograd.gradcheck(forward, (inputs[varied].detach().requires_grad_(),))
        except GradcheckError as error:
            kind = type(module).__name__
            raise GradcheckError(f"gradcheck: {kind}: the gradient of {varied}: {error}") from error
    return True
