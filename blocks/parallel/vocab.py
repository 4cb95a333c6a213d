"""Cross-entropy where each rank holds a part of the vocabulary; logits are never gathered.

    lse = logsumexp over ranks of lse_r        loss = lse - y_t        lse_r = ce_r(l) + y_l

Each rank's op gives ce_r(l), the loss of its own classes against a label l among them, whose logit
must not be far below the others, or lse_r is lost in rounding: the largest one's where there are
logits; else the target, or, where this rank doesn't have it, the class of the largest bias. Between
ranks go one lse and one logit a token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.nn import functional as F

from trilith.blocks.transformer import Projection
from trilith.kernels import LINEAR_CROSS_ENTROPY, cross_entropy
from trilith.kernels._runtime.checks import require, require_shape, require_tensors
from trilith.kernels.cross_entropy import require_label_dtype, require_options
from trilith.plugins.autocast import autocasts

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class VocabParallel(Projection):
    """The projection of a `TransformerLM` whose head is split over a mesh by classes."""

    takes_shards = True

    def __init__(self, mesh: DeviceMesh, layout: Placement) -> None:
        self.mesh = mesh
        self.layout = layout
        self.splits_tokens = layout != Replicate()

    def logits(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = shared(x, self.mesh, self.layout)
        parts = F.linear(x, _own(weight), None if bias is None else _own(bias))
        shape = torch.Size((*parts.shape[:-1], weight.shape[0]))
        strides = torch.empty(shape, device="meta").stride()
        last = [Shard(parts.ndim - 1)]
        whole = DTensor.from_local(parts, self.mesh, last, shape=shape, stride=strides)
        return whole.full_tensor()

    def loss(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        num_items: int | Tensor | None,
    ) -> Tensor:
        x = shared(x, self.mesh, self.layout)
        return vocab_parallel_linear_cross_entropy(
            x, weight, targets, linear_bias=bias, num_items=num_items
        )


def vocab_parallel_linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    num_items: int | Tensor | None = None,
) -> Tensor:
    """`linear_cross_entropy` with a head that is split over ranks by classes.

    Args:
        input: hidden states (..., K), a plain tensor, the same on all ranks. Its gradient is this
            rank's part of the sum over ranks: `shared` makes it whole.
        linear_weight: (V, K), a DTensor sharded in dimension 0 of a mesh of one dimension.
        target: class indices (...,) among all V, the same on all ranks.
        linear_bias: (V,), sharded likewise.
        reduction, ignore_index, num_items: as in `linear_cross_entropy`.

    Returns:
        The loss, a plain tensor, the same on all ranks.

    Raises:
        ValueError: linear_weight is not so sharded, there are fewer classes than ranks, shapes
            don't fit, or an option is none of its values.
        IndexError: a label is out of range, on CPU; on a GPU its loss is NaN.
        RuntimeError: target is of another dtype than labels'.

    Memory: no more logits than `linear_cross_entropy` has of this rank's classes. Backward computes
        them again.

    Example:
        >>> weight = distribute_tensor(head.weight, mesh, [Shard(0)])
        >>> loss = vocab_parallel_linear_cross_entropy(hidden, weight, labels)
    """
    ignore_index = -100 if ignore_index is None else ignore_index
    op = "vocab_parallel_linear_cross_entropy"
    mesh, start = _split(linear_weight)
    _check(op, target, input.shape[:-1], reduction)
    rule = "be None unless reduction is 'mean'"
    require(num_items is None or reduction == "mean", op, "num_items", rule, num_items)
    weight = _own(linear_weight)
    bias = None if linear_bias is None else _own(linear_bias)
    x, labels = input.reshape(-1, input.shape[-1]), target.reshape(-1).to(torch.int64)
    _require_in_range(labels, linear_weight.shape[0], ignore_index)
    own = _among(labels - start, weight.shape[0], 0 if bias is None else bias.argmax())
    autocast = autocasts(x)
    if autocast and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    options = (-1, 0.0, 0.0, None)  # of a class here none is ignored
    ce = LINEAR_CROSS_ENTROPY(x, weight, own, bias, None, True, *options)
    logit = (x.to(ce.dtype) * weight[own].to(x.dtype).to(ce.dtype)).sum(-1)
    if bias is not None:
        logit = logit + bias[own].to(x.dtype)
    logit = logit.to(x.dtype).to(ce.dtype)  # rounded as the op rounds it
    loss = _combined(ce + logit, logit, labels, own + start, mesh)
    loss = _reduced(loss, labels, target.shape, reduction, ignore_index, num_items)
    return loss if autocast else loss.to(input.dtype)


def vocab_parallel_cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    """`cross_entropy` of logits that are split over ranks by classes.

    Args:
        input: logits (..., V), a DTensor sharded in its last dimension on a mesh of one dimension.
        target: class indices (...,) among all V, the same on all ranks.
        reduction, ignore_index: as in `cross_entropy`.

    Returns:
        The loss, a plain tensor, the same on all ranks.

    Raises:
        ValueError: input is not so sharded, there are fewer classes than ranks, shapes don't fit,
            or reduction is none of its values.
        IndexError: a label is out of range, on CPU; on a GPU its loss is NaN.
        RuntimeError: target is of another dtype than labels'.

    Example:
        >>> logits = DTensor.from_local(own_logits, mesh, [Shard(-1)])
        >>> loss = vocab_parallel_cross_entropy(logits, labels)
    """
    mesh, start = _split(input, dim=input.ndim - 1)
    _check("vocab_parallel_cross_entropy", target, input.shape[:-1], reduction)
    local = _own(input)
    logits, labels = local.flatten(0, -2), target.reshape(-1).to(torch.int64)
    _require_in_range(labels, input.shape[-1], ignore_index)
    own = _among(labels - start, local.shape[-1], 0)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    top, at = wide.detach().max(-1)
    masked = top == -torch.inf  # all classes of this rank: NaN by itself, and in its gradient
    ce = cross_entropy(wide.masked_fill(masked[:, None], 0.0), at, reduction="none")
    largest, logit = wide.gather(1, torch.stack([at, own], 1)).unbind(1)
    loss = _combined(ce + largest, logit, labels, own + start, mesh)
    return _reduced(loss, labels, target.shape, reduction, ignore_index, None).to(local.dtype)


def shared(x: Tensor, mesh: DeviceMesh, layout: Placement) -> Tensor:
    """All of x, local shares of which are placed so; each rank's gradient is a part of a sum."""
    whole = DTensor.from_local(x, mesh, [layout], run_check=False).redistribute(mesh, [Replicate()])
    return whole.to_local(grad_placements=[Partial()])


def _split(tensor: Tensor, dim: int = 0) -> tuple[DeviceMesh, int]:
    """The mesh and this rank's first class."""
    if not isinstance(tensor, DTensor) or list(tensor.placements) != [Shard(dim)]:
        found = tensor.placements if isinstance(tensor, DTensor) else "a plain tensor"
        raise ValueError(
            f"vocab parallel: the classes must be Shard({dim}) of a mesh of one dimension, "
            f"got {found}"
        )
    mesh, classes = tensor.device_mesh, tensor.shape[dim]
    each = -(-classes // mesh.size())
    if each * (mesh.size() - 1) >= classes:
        raise ValueError(
            f"vocab parallel: each of {mesh.size()} ranks must have a class, got {classes} classes"
        )
    return mesh, each * mesh.get_local_rank()


def _own(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _check(op: str, target: Tensor, shape: torch.Size, reduction: str) -> None:
    require_tensors(op, target=target)
    require_label_dtype(op, target)
    require_shape(op, "target", target, shape)
    require_options(op, reduction, label_smoothing=0.0, softcap=None)


def _require_in_range(labels: Tensor, classes: int, ignore_index: int) -> None:
    if labels.device.type != "cpu":
        return
    wrong = ((labels < 0) | (labels >= classes)) & (labels != ignore_index)
    if wrong.any():
        found = labels[wrong][0].item()
        raise IndexError(f"vocab parallel: target must be in [0, {classes}), got {found}")


def _among(own: Tensor, classes: int, other: int | Tensor) -> Tensor:
    """A rank's own labels, and `other` for those that it doesn't have."""
    return torch.where((own >= 0) & (own < classes), own, other)


def _combined(lse: Tensor, logit: Tensor, labels: Tensor, own: Tensor, mesh: DeviceMesh) -> Tensor:
    """Each token's loss from what this rank knows of its class `own`; NaN if no rank has it."""
    lses = DTensor.from_local(lse[None], mesh, [Shard(0)], run_check=False)
    lse = lses.redistribute(mesh, [Replicate()]).to_local().logsumexp(0)
    here = own == labels
    mine = torch.stack([torch.where(here, logit, 0.0), here.to(logit.dtype)])
    parts = DTensor.from_local(mine, mesh, [Partial()], run_check=False)
    chosen, found = parts.redistribute(mesh, [Replicate()]).to_local()
    return torch.where(found > 0, lse - chosen, torch.nan)


def _reduced(
    loss: Tensor,
    labels: Tensor,
    shape: torch.Size,
    reduction: str,
    ignore_index: int,
    num_items: int | Tensor | None,
) -> Tensor:
    loss = torch.where(labels == ignore_index, 0.0, loss)
    if reduction == "none":
        return loss.reshape(shape)
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / ((labels != ignore_index).sum() if num_items is None else num_items)
