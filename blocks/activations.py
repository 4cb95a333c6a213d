"""Activations that torch.nn has no module of: relu squared, and the gated linear units."""

from __future__ import annotations

from torch import Tensor, nn

from trilith.kernels import bias_act, gated_act


class ReLU2(nn.Module):
    """max(x, 0) ** 2, elementwise, of any shape and floating dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return bias_act(x, None, "relu2")


class GatedActivation(nn.Module):
    """activation(gate) * up, of two tensors or of the halves of one.

    Called with one tensor it is up in the first half of the last dimension, and gate in the second,
    as torch.nn.GLU has them: (..., 2 N) -> (..., N). Many models pack gate first: give them as two,
    `unit(*x.chunk(2, dim=-1))`.

    Args:
        activation: a name that `trilith.kernels.gated_act` knows.

    Raises:
        ValueError: one tensor, and its last dimension is odd; what `gated_act` raises.

    Source:
        Shazeer, "GLU variants improve transformer", 2020.

    Example:
        >>> SwiGLU()(torch.randn(2, 16)).shape
        torch.Size([2, 8])
    """

    def __init__(self, activation: str = "silu") -> None:
        super().__init__()
        self.activation = activation

    def forward(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        if up is None:
            if gate.shape[-1] % 2:
                raise ValueError(
                    f"{type(self).__name__}: the last dimension of x must be even, up before gate, "
                    f"got shape {tuple(gate.shape)}"
                )
            up, gate = gate.chunk(2, dim=-1)
        return gated_act(gate, up, self.activation)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


class GLU(GatedActivation):
    """sigmoid(gate) * up; of one tensor, torch.nn.GLU of the last dimension."""

    def __init__(self) -> None:
        super().__init__("sigmoid")


class SwiGLU(GatedActivation):
    """silu(gate) * up."""

    def __init__(self) -> None:
        super().__init__("silu")


class GeGLU(GatedActivation):
    """gelu(gate) * up."""

    def __init__(self) -> None:
        super().__init__("gelu")


class ReGLU(GatedActivation):
    """relu(gate) * up."""

    def __init__(self) -> None:
        super().__init__("relu")
