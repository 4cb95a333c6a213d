"""Functions of a tensor that give the same values in another layout, and two that repeat some."""

from __future__ import annotations

import torch
from torch import Tensor

from trilith.plugins.conformance.compare import is_differentiable

_SPARE = 4


def contiguous(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def transposed(tensor: Tensor) -> Tensor:
    """The last two dimensions lie the other way round in memory."""
    if tensor.ndim < 2:
        return every_other(tensor)
    return tensor.detach().transpose(-1, -2).clone(memory_format=torch.contiguous_format).mT


def every_other(tensor: Tensor) -> Tensor:
    """Every second element of a wider tensor; NaN between."""
    if tensor.ndim == 0:
        return misaligned(tensor)
    wide = _filled(tensor, (*tensor.shape[:-1], 2 * tensor.shape[-1]))
    return wide[..., ::2].copy_(tensor.detach())


def padded_rows(tensor: Tensor) -> Tensor:
    """Rows of a wider tensor; NaN beyond them."""
    if tensor.ndim == 0:
        return misaligned(tensor)
    wide = _filled(tensor, (*tensor.shape[:-1], tensor.shape[-1] + 3))
    return wide[..., : tensor.shape[-1]].copy_(tensor.detach())


def misaligned(tensor: Tensor) -> Tensor:
    """Contiguous, one element off the allocation's alignment; NaN before and after."""
    wide = _filled(tensor, (tensor.numel() + 2,))
    return wide[1 : 1 + tensor.numel()].view(tensor.shape).copy_(tensor.detach())


def packed(tensor: Tensor) -> Tensor:
    """The middle third of a projection that packs three, as q, k and v come."""
    if tensor.ndim == 0:
        return misaligned(tensor)
    wide = _filled(tensor, (*tensor.shape[:-1], 3, tensor.shape[-1]))
    return wide.select(-2, 1).copy_(tensor.detach())


def odd_unit_strides(tensor: Tensor) -> Tensor:
    """Dimensions of size 1 with strides that no contiguous tensor has."""
    dense = contiguous(tensor)
    strides = [7 if n == 1 else s for n, s in zip(dense.shape, dense.stride(), strict=True)]
    return dense.as_strided(dense.shape, strides)


def expanded(tensor: Tensor) -> Tensor:
    """The first element everywhere, stride 0: what `.sum().backward()` hands to an op."""
    if tensor.numel() == 0:
        return misaligned(tensor)
    return tensor.detach().flatten()[0].clone().expand(tensor.shape)


def expanded_rows(tensor: Tensor) -> Tensor:
    """The first row everywhere, stride 0: what `.sum(0)` hands back."""
    if tensor.ndim < 2:
        return expanded(tensor)
    return tensor.detach()[:1].clone().expand(tensor.shape)


def negated(tensor: Tensor) -> Tensor:
    """The negatives in memory, and torch's negative bit: so come imaginary parts of a conjugate."""
    if not is_differentiable(tensor):
        return contiguous(tensor)
    return torch._neg_view(contiguous(-tensor))


LAYOUTS = (
    contiguous,
    transposed,
    every_other,
    padded_rows,
    misaligned,
    packed,
    odd_unit_strides,
    negated,
)
EXPANDED = (expanded, expanded_rows)


def far_apart(tensor: Tensor, dim: int) -> Tensor | None:
    """2**31 elements from the first to the last along one dimension; another value (of floats NaN)
    where an offset would land that wrapped round at 32 bits. None where so much memory cannot be
    addressed.

    On a CPU the memory is only promised: what is not touched takes no room. On a GPU it is taken,
    if four times as much is free.
    """
    last = tensor.shape[dim] - 1
    step = -(-(2**31) // last)
    size = 2**32 + 2**20
    if (
        tensor.is_cuda
        and torch.cuda.mem_get_info(tensor.device)[0] < _SPARE * size * tensor.itemsize
    ):
        return None
    try:
        wide = torch.empty(size, dtype=tensor.dtype, device=tensor.device)
    except RuntimeError:
        return None
    strides = [step if i == dim else s for i, s in enumerate(contiguous(tensor).stride())]
    far = wide.as_strided(tensor.shape, strides, 2**31)
    others = [s for i, s in enumerate(strides) if i != dim]
    wrapped = 2**31 + last * step - 2**32
    canary = wide.as_strided(far.select(dim, 0).shape, others, wrapped)
    if tensor.is_floating_point():
        canary.fill_(float("nan"))
    else:
        canary.copy_(tensor.detach().select(dim, last) == 0)
    return far.copy_(tensor.detach())


def _filled(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    value = float("nan") if tensor.is_floating_point() else 0
    return torch.full(shape, value, dtype=tensor.dtype, device=tensor.device)
