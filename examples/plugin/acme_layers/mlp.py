"""A gated MLP whose gate is acme::relu2_gate."""

from __future__ import annotations

from torch import Tensor, nn

from acme_layers.relu2_gate import relu2_gate
from trilith.blocks import LMConfig


class Relu2MLP(nn.Module):
    """down(relu2_gate(gate(x), up(x))).

    Args:
        gate, up, down: linear layers dim -> hidden twice and hidden -> dim.
    """

    def __init__(self, *, gate: nn.Module, up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.gate = gate
        self.up = up
        self.down = down

    def forward(self, x: Tensor) -> Tensor:
        return self.down(relu2_gate(self.gate(x), self.up(x)))


def build(config: LMConfig) -> Relu2MLP:
    hidden = config.mlp_hidden or 3 * config.dim
    return Relu2MLP(
        gate=nn.Linear(config.dim, hidden, bias=config.bias),
        up=nn.Linear(config.dim, hidden, bias=config.bias),
        down=nn.Linear(hidden, config.dim, bias=config.bias),
    )
