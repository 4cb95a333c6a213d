"""nn.Sequential whose norm, Linear and Linear, activation[, dropout] run in fewer passes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from trilith.blocks.drop_in.activations import kernel_name
from trilith.blocks.drop_in.norms import may_join_linear, norm_linear, plain_norm
from trilith.blocks.drop_in.transformer import plain_dropout
from trilith.blocks.linear import linear_act, plain_linear
from trilith.blocks.lookalike import known_activation
from trilith.kernels import BIAS_ACT, DROPOUT


class FusedSequential(nn.Sequential):
    """torch.nn.Sequential: the activation's pass adds the bias before it and drops out after it.

    What a norm before a linear layer gives is not kept for backward.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.is_cpu and all(op.is_reference_on_cpu for op in (BIAS_ACT, DROPOUT)):
            return super().forward(input)
        x, modules, at = input, list(self), 0
        while at < len(modules):
            product: Any = F.linear
            joins = _norm_and_linear(modules, at)
            if joins and may_join_linear(x, modules[at + 1].weight, modules[at]):  # type: ignore[arg-type]
                product, at = partial(norm_linear, modules[at]), at + 1  # type: ignore[arg-type]
            length = _pattern(modules, at)
            if length:
                x = _activated(modules[at : at + length], x, product)
                at += length
                continue
            module = modules[at]
            x = module(x) if product is F.linear else product(x, module.weight, module.bias)
            at += 1
        return x


def has_pattern(sequence: nn.Sequential) -> bool:
    """Whether something of it runs as one, once its activations are ours too."""
    modules = list(sequence)
    return any(
        _pattern(modules, at, _name_to_be) or _norm_and_linear(modules, at)
        for at in range(len(modules))
    )


def _name_to_be(activation: nn.Module) -> str | None:
    return kernel_name(activation) or known_activation(activation)


def _activated(modules: list[nn.Module], x: Tensor, product: Any) -> Tensor:
    """Linear, activation and maybe dropout of x."""
    name = kernel_name(modules[1])
    assert name is not None
    drops = len(modules) == 3 and modules[2].training
    p = float(modules[2].p) if drops else 0.0  # type: ignore[arg-type]
    return linear_act(modules[0], x, name, p, product)


def _norm_and_linear(modules: list[nn.Module], at: int) -> bool:
    pair = modules[at : at + 2]
    return len(pair) == 2 and plain_norm(pair[0]) and plain_linear(pair[1])


def _pattern(
    modules: list[nn.Module], at: int, name: Callable[[nn.Module], str | None] = kernel_name
) -> int:
    """How many modules from `at` on run as one: 0, Linear + activation, or those and dropout."""
    if at + 2 >= len(modules) or not plain_linear(modules[at]):
        return 0
    if name(modules[at + 1]) in (None, "identity"):
        return 0
    length = 3 if plain_dropout(modules[at + 2]) else 2
    follows = modules[at + length] if at + length < len(modules) else None
    return length if isinstance(follows, nn.Linear) else 0
