"""The residual connection and where its norms stand."""

from __future__ import annotations

from torch import Tensor, nn

from trilith.blocks.linear import reset
from trilith.blocks.stream import Stream


class Residual(nn.Module):
    """post(x + dropout(inner(branch(pre(x))))).

    Args:
        branch: called with a tensor, returns one of the same shape.
        pre, inner, post: norms; those not given are left out. Pre-norm gives `pre`, post-norm
            `post`, sandwich `pre` and `inner`.
        dropout: probability, applied to what the branch adds.
    """

    def __init__(
        self,
        *,
        branch: nn.Module,
        pre: nn.Module | None = None,
        inner: nn.Module | None = None,
        post: nn.Module | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.branch = branch
        self.pre = pre or nn.Identity()
        self.inner = inner or nn.Identity()
        self.post = post or nn.Identity()
        self.dropout = dropout

    def reset_parameters(self) -> None:
        reset(*self.children())

    def forward(self, x: Tensor) -> Tensor:
        return self.extend(Stream(x)).total()

    def extend(self, stream: Stream) -> Stream:
        """The stream behind this connection, the last sum of which is left to who reads it."""
        branched, x = stream.through(self.pre, self.branch)
        stream = Stream(x, self.inner(branched), self.dropout if self.training else 0.0)
        if isinstance(self.post, nn.Identity):
            return stream
        normed, _ = stream.normed(self.post)
        return Stream(normed)

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}"
