"""nn.Sequential whose Linear, activation[, dropout], Linear run in fewer passes."""

from __future__ import annotations

from torch import Tensor, nn

from trilith.blocks.drop_in.activations import kernel_name
from trilith.blocks.drop_in.transformer import plain_dropout
from trilith.blocks.linear import linear_act, plain_linear
from trilith.kernels import BIAS_ACT, DROPOUT


class FusedSequential(nn.Sequential):
    """torch.nn.Sequential: the activation's pass adds the bias before it and drops out after it."""

    def forward(self, input: Tensor) -> Tensor:
        if input.is_cpu and all(op.is_reference_on_cpu for op in (BIAS_ACT, DROPOUT)):
            return super().forward(input)
        x, modules, at = input, list(self), 0
        while at < len(modules):
            length = _pattern(modules, at)
            if length:
                name = kernel_name(modules[at + 1])
                assert name is not None
                last = modules[at + length - 1]
                drops = length == 3 and last.training
                p = float(last.p) if drops else 0.0  # type: ignore[arg-type]
                x = linear_act(modules[at], x, name, p=p, training=drops)
                at += length
            else:
                x = modules[at](x)
                at += 1
        return x


def has_pattern(sequence: nn.Sequential) -> bool:
    return any(_pattern(list(sequence), at) for at in range(len(sequence)))


def _pattern(modules: list[nn.Module], at: int) -> int:
    """How many modules from `at` on run as one: 0, Linear + activation, or those and dropout."""
    if at + 2 >= len(modules) or not plain_linear(modules[at]):
        return 0
    if kernel_name(modules[at + 1]) in (None, "identity"):
        return 0
    length = 3 if plain_dropout(modules[at + 2]) else 2
    follows = modules[at + length] if at + length < len(modules) else None
    return length if isinstance(follows, nn.Linear) else 0
