"""The two-layer perceptron of a transformer block, plain and gated."""

from __future__ import annotations

from torch import Tensor, nn

from trilith.blocks.linear import linear_act, reset_linear
from trilith.kernels import dropout, gated_act


class MLP(nn.Module):
    """down(dropout(activation(up(x)))).

    Args:
        up, down: linear layers dim -> hidden and hidden -> dim, or anything called like them.
        activation: a name that `trilith.kernels.bias_act` knows.
        dropout: probability, applied to the activated hidden layer.
        gain: scales `down`'s initial weights; 1 / sqrt(2 * layers) where it ends in a residual.
    """

    def __init__(
        self,
        *,
        up: nn.Module,
        down: nn.Module,
        activation: str = "gelu",
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
        reset_linear(self.down, self.gain)

    def forward(self, x: Tensor) -> Tensor:
        hidden = linear_act(self.up, x, self.activation, p=self.dropout, training=self.training)
        return self.down(hidden)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, dropout={self.dropout}"


class GatedMLP(nn.Module):
    """down(dropout(activation(gate(x)) * up(x))): SwiGLU with silu, GeGLU with gelu.

    Args:
        gate, up, down: linear layers dim -> hidden twice and hidden -> dim, or anything called
            like them. `gate` and `up` are apart because a packed pair would have to be split, and
            the gradient of a split is a copy larger than the sum that it saves.
        activation: a name that `trilith.kernels.gated_act` knows.
        dropout: probability, applied to the gated hidden layer.
        gain: scales `down`'s initial weights; 1 / sqrt(2 * layers) where it ends in a residual.
    """

    def __init__(
        self,
        *,
        gate: nn.Module,
        up: nn.Module,
        down: nn.Module,
        activation: str = "silu",
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
        reset_linear(self.down, self.gain)

    def forward(self, x: Tensor) -> Tensor:
        hidden = gated_act(self.gate(x), self.up(x), self.activation)
        return self.down(dropout(hidden, self.dropout, self.training))

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, dropout={self.dropout}"
