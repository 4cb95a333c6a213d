"""The residual stream between branches, with what the last branch adds not yet added.

The sum that ends one branch and the norm that begins the next are one pass over memory, and the
linear layers that read the norm can do without its output being kept. Where a module may not be
read past its own forward (`blocks.linear.plain`), it is called; where somebody else was chosen to
run a part of the fused pass (`plugins.may_fuse`), each part is a call of its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from trilith.blocks.attention import SelfAttention
from trilith.blocks.linear import kernels_run, plain
from trilith.blocks.mlp import MLP, GatedMLP
from trilith.blocks.norms import LayerNorm, RMSNorm
from trilith.kernels import (
    ADD_NORM,
    ADD_NORM_LINEAR,
    BIAS_DROPOUT_ADD,
    DROPOUT,
    NORM_LINEAR,
    bias_dropout_add,
    dropout,
)
from trilith.plugins import Op, may_fuse

_BRANCHES = (SelfAttention, MLP, GatedMLP)
_Norm = LayerNorm | RMSNorm
_Branch = SelfAttention | MLP | GatedMLP


class Stream(NamedTuple):
    """x + dropout(added), or x alone; p is 0 where nothing is dropped."""

    x: Tensor
    added: Tensor | None = None
    p: float = 0.0

    def total(self) -> Tensor:
        added, p = self.added, self.p
        if added is None:
            return self.x
        if p and not may_fuse(BIAS_DROPOUT_ADD, added, DROPOUT):
            added, p = dropout(added, p), 0.0
        return bias_dropout_add(added, self.x, p=p)

    def normed(self, norm: nn.Module) -> tuple[Tensor, Tensor]:
        """(norm(total), total)."""
        if self.added is not None and plain(norm, LayerNorm, RMSNorm):
            known = cast("_Norm", norm)
            if may_fuse(ADD_NORM, self.x, known.op, *self._sum()):
                return known.added(self.added, self.x, self.p)
        total = self.total()
        return norm(total), total

    def through(self, norm: nn.Module, branch: nn.Module) -> tuple[Tensor, Tensor]:
        """(branch(norm(total)), total)."""
        known = plain(norm, LayerNorm, RMSNorm) and plain(branch, *_BRANCHES)
        fuses = known and kernels_run(self.x) and self._may_fuse_linear(cast("_Norm", norm))
        layers = cast("_Branch", branch).first_layers() if fuses else ()
        if not layers:
            normed, total = self.normed(norm)
            return branch(normed), total
        norm, branch = cast("_Norm", norm), cast("_Branch", branch)
        weights, biases = zip(*layers, strict=True)
        if len(weights) == 1:
            weights, biases = weights[0], biases[0]
        if self.added is None:
            projected, total = norm.linear(self.x, weights, biases), self.x
        else:
            projected, total = norm.linear(self.added, weights, biases, self.x, self.p)
        return branch.finish(*_as_tuple(projected)), total

    def _may_fuse_linear(self, norm: _Norm) -> bool:
        if self.added is None:
            return may_fuse(NORM_LINEAR, self.x, norm.op)
        return may_fuse(ADD_NORM_LINEAR, self.x, ADD_NORM, norm.op, *self._sum())

    def _sum(self) -> tuple[Op, ...]:
        """The ops whose work `total` is."""
        return (BIAS_DROPOUT_ADD, DROPOUT) if self.p else (BIAS_DROPOUT_ADD,)


def _as_tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)
