"""The two-layer perceptron of a transformer block, plain and gated."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from trilith.blocks.linear import (
    act_linear,
    gate_linear,
    kernels_run,
    plain_linear,
    reset,
    reset_linear,
)
from trilith.kernels import dropout, gated_act


class MLP(nn.Module):
    """down(dropout(activation(up(x)))).

    Args:
        up, down: linear layers dim -> hidden and hidden -> dim, or anything called like them.
        activation: a name that `trilith.kernels.bias_act` knows; or an elementwise module, which is
            called, and fused with nothing.
        dropout: probability, applied to the activated hidden layer.
        gain: scales `down`'s initial weights; 1 / sqrt(2 * layers) where it ends in a residual.
    """

    def __init__(
        self,
        *,
        up: nn.Module,
        down: nn.Module,
        activation: str | nn.Module = "gelu",
        dropout: float = 0.0,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.up = up
        self.down = down
        self.activation = activation
        self.dropout = dropout
        self.gain = gain

    def reset_parameters(self) -> None:
        reset_linear(self.up)
        _reset_activation(self.activation)
        reset_linear(self.down, self.gain)

    def forward(self, x: Tensor) -> Tensor:
        by_kernel = isinstance(self.activation, str) and kernels_run(x)
        if by_kernel and plain_linear(self.up):  # the activation's pass adds the bias
            return self.finish(F.linear(x, self.up.weight))
        return self._act_down(self.up(x), None)

    def first_layers(self) -> tuple[tuple[Tensor, Tensor | None], ...]:
        """What `finish` takes the product with; none where `up` must be called."""
        if not plain_linear(self.up):
            return ()
        return ((self.up.weight, None if isinstance(self.activation, str) else self.up.bias),)

    def finish(self, hidden: Tensor) -> Tensor:
        """The rest of forward, from the product with `first_layers`."""
        named = isinstance(self.activation, str)
        return self._act_down(hidden, cast("Tensor | None", self.up.bias) if named else None)

    def _act_down(self, hidden: Tensor, bias: Tensor | None) -> Tensor:
        if isinstance(self.activation, str):
            p = self.dropout if self.training else 0.0
            return act_linear(hidden, bias, self.activation, self.down, p)
        return self.down(dropout(self.activation(hidden), self.dropout, self.training))

    def extra_repr(self) -> str:
        return _repr(self.activation, self.dropout)


class GatedMLP(nn.Module):
    """down(dropout(activation(gate(x)) * up(x))): SwiGLU with silu, GeGLU with gelu.

    Likewise ReGLU with relu and GLU with sigmoid.

    Args:
        gate, up, down: linear layers dim -> hidden twice and hidden -> dim, or anything called
            like them. `gate` and `up` are apart because a packed pair would have to be split, and
            the gradient of a split is a copy larger than the sum that it saves.
        activation: a name that `trilith.kernels.gated_act` knows; or an elementwise module, which
            is called, and fused with nothing.
        dropout: probability, applied to the gated hidden layer.
        gain: scales `down`'s initial weights; 1 / sqrt(2 * layers) where it ends in a residual.
    """

    def __init__(
        self,
        *,
        gate: nn.Module,
        up: nn.Module,
        down: nn.Module,
        activation: str | nn.Module = "silu",
        dropout: float = 0.0,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.gate = gate
        self.up = up
        self.down = down
        self.activation = activation
        self.dropout = dropout
        self.gain = gain

    def reset_parameters(self) -> None:
        reset_linear(self.gate)
        reset_linear(self.up)
        _reset_activation(self.activation)
        reset_linear(self.down, self.gain)

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(self.gate(x), self.up(x))

    def first_layers(self) -> tuple[tuple[Tensor, Tensor | None], ...]:
        """What makes `finish`'s arguments; nothing where `gate` or `up` must be called."""
        layers = [m for m in (self.gate, self.up) if plain_linear(m)]
        return tuple((m.weight, m.bias) for m in layers) if len(layers) == 2 else ()

    def finish(self, gate: Tensor, up: Tensor) -> Tensor:
        """The rest of forward, from gate(x) and up(x)."""
        act = self.activation
        if isinstance(act, str) and not (self.training and self.dropout):
            return gate_linear(gate, up, act, self.down)
        hidden = gated_act(gate, up, act) if isinstance(act, str) else act(gate) * up
        return self.down(dropout(hidden, self.dropout, self.training))

    def extra_repr(self) -> str:
        return _repr(self.activation, self.dropout)


def _reset_activation(activation: str | nn.Module) -> None:
    if isinstance(activation, nn.Module):
        reset(activation)


def _repr(activation: str | nn.Module, dropout: float) -> str:
    named = f"activation={activation!r}, " if isinstance(activation, str) else ""
    return f"{named}dropout={dropout}"
