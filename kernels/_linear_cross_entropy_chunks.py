"""The loop of linear_cross_entropy over chunks of tokens, and what it does to a chunk's logits.

A chunk's logits x W^T + bias lie in one buffer that all chunks share; their gradients are written
over them, and enter dx, dW and dbias from there. The matrix products are the vendor's, which want
sides divisible by 8: where kernels run the head has zeros after its last class until it is, and so
have logits, their gradients and dW, as torch.compile does it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from trilith.kernels._cross_entropy_kernels import (
    cross_entropy_fwd_kernel,
    cross_entropy_in_place_kernel,
    launch_options,
    scale_kernel,
)
from trilith.kernels._runtime.launch import launch
from trilith.kernels._runtime.rows import row_tile
from trilith.kernels._runtime.sizes import cdiv
from trilith.plugins import TRITON_DEVICES

CHUNK_TOKENS = 4096  # more make the matrix products no faster
LEAST_TOKENS = 512
CHUNK_BYTES = 2**30  # of logits, on a GPU
HOST_CHUNK_BYTES = 2**26
_SLICE_BYTES = 2**25  # of a partial weight gradient: stays in the L2 cache until it is added
_ALIGNED = 16  # classes: what wide loads and tensor cores want
_WIDEST_BLOCK, _SCALE_BLOCK = 2048, 4096
_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Options(NamedTuple):
    """What a row's loss depends on besides its logits and label."""

    weight: Tensor | None
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float | None


class Gradients(NamedTuple):
    """Buffers to fill, in fp32 or fp64; dx may be in x's dtype. None where nothing is wanted.

    The weight's has `padded_classes` rows.
    """

    input: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def runs_kernels(x: Tensor) -> bool:
    """Whether Triton's kernels take tensors like x; on fake ones a survey looks for launches."""
    able = x.device.type in TRITON_DEVICES or isinstance(x, FakeTensor)
    return able and x.dtype in _KERNEL_DTYPES


def chunk_tokens(tokens: int, classes: int, x: Tensor) -> int:
    """How many rows of logits a chunk has: chunks are about equal, and at most `CHUNK_TOKENS`."""
    size = classes * x.element_size()
    limit = CHUNK_BYTES // size if runs_kernels(x) else HOST_CHUNK_BYTES // size
    most = min(CHUNK_TOKENS, max(LEAST_TOKENS, limit))
    return cdiv(tokens, cdiv(tokens, most))


def padded_classes(classes: int, x: Tensor) -> int:
    """The classes, and those that there are none of, with zeros for weights."""
    return cdiv(classes, _ALIGNED) * _ALIGNED if runs_kernels(x) else classes


def run_chunks(
    x: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    options: Options,
    losses: Tensor | None,
    dloss: Tensor | None,
    gradients: Gradients,
) -> None:
    """Fill losses (M,), if given, and the gradients of sum(dloss * losses), dloss None for ones."""
    wants_gradient = any(g is not None for g in gradients)
    if losses is None and not wants_gradient:
        return
    m, classes = x.shape[0], linear_weight.shape[0]
    columns = padded_classes(classes, x)
    more = columns - classes
    head = linear_weight.to(x.dtype)
    bias = None if linear_bias is None else linear_bias.to(x.dtype)
    if more:
        head = F.pad(head, (0, 0, 0, more))
        bias = None if bias is None else F.pad(bias, (0, more))
    tokens = chunk_tokens(m, classes, x)
    buffer = x.new_empty(tokens, columns)
    rows = _rows_by_kernel if runs_kernels(x) else _rows_in_plain_pytorch
    for start in range(0, m, tokens):
        part = slice(start, min(start + tokens, m))
        logits = buffer[: part.stop - start]
        if bias is None:
            torch.mm(x[part], head.t(), out=logits)
        else:
            torch.addmm(bias, x[part], head.t(), out=logits)
        own = None if losses is None else losses[part]
        upstream = None if dloss is None else dloss[part]
        dlogits = rows(logits[:, :classes], target[part], options, own, upstream, wants_gradient)
        if gradients.bias is not None:
            gradients.bias.add_(dlogits.sum(0, dtype=gradients.bias.dtype))
        if more:
            dlogits = logits
            dlogits[:, classes:].zero_()  # NaN of a bad row else, of one that is ignored too
        if gradients.input is not None:
            _product(dlogits, head, gradients.input[part])
        if gradients.weight is not None:
            _product(dlogits.t(), x[part], gradients.weight, first=start == 0)


def _product(a: Tensor, b: Tensor, total: Tensor, first: bool = True) -> None:
    """total = a b where it is the first, else total += a b; not rounded on the way."""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=0.0 if first else 1.0, out=total)
    elif a.device.type == "cpu":
        _widened_product(a, b, total, first)
    elif first:
        torch.ops.aten.mm.dtype_out(a, b, total.dtype, out=total)
    else:
        step = max(1, _SLICE_BYTES // (total.shape[1] * total.element_size()))
        for start in range(0, total.shape[0], step):
            part = slice(start, start + step)
            total[part].add_(torch.mm(a[part], b, out_dtype=total.dtype))


def _widened_product(a: Tensor, b: Tensor, total: Tensor, first: bool) -> None:
    """The same on a CPU, where no product of 16-bit matrices gives fp32: a slice at a time."""
    step = max(1, _SLICE_BYTES // ((a.shape[0] + b.shape[1]) * total.element_size()))
    for start in range(0, a.shape[1], step):
        part = slice(start, start + step)
        left, right = a[:, part].to(total.dtype), b[part].to(total.dtype)
        fresh = first and start == 0
        torch.addmm(total, left, right, beta=0.0 if fresh else 1.0, out=total)


def _rows_by_kernel(
    logits: Tensor,
    target: Tensor,
    options: Options,
    losses: Tensor | None,
    dloss: Tensor | None,
    wants_gradient: bool,
) -> Tensor:
    weight, ignore_index, label_smoothing, z_loss, softcap = options
    smooth = label_smoothing > 0
    weight_sum = weight.sum(dtype=torch.float32) if smooth and weight is not None else None
    tile = row_tile(min(logits.shape[1], _WIDEST_BLOCK), per_thread=8, max_warps=8)
    weight_stride = None if weight is None else weight.stride(0)
    strides = (target.stride(0), weight_stride)
    steps = logits.stride()
    tail = (*strides, *logits.shape, ignore_index, label_smoothing, z_loss, softcap)
    settings = {"SMOOTH": smooth, **launch_options(tile, softcap)}
    grid = (cdiv(logits.shape[0], tile.block_m),)
    inputs = (logits, target, weight, weight_sum)
    if wants_gradient:
        upstream = (dloss, losses, None if dloss is None else dloss.stride(0))
        launch(cross_entropy_in_place_kernel, grid, *inputs, *upstream, steps, *tail, **settings)
    else:
        rows = (losses, None, None, 1, (steps[0], 0, steps[1]))
        launch(cross_entropy_fwd_kernel, grid, *inputs, *rows, *tail, **settings)
    return logits


def _rows_in_plain_pytorch(
    logits: Tensor,
    target: Tensor,
    options: Options,
    losses: Tensor | None,
    dloss: Tensor | None,
    wants_gradient: bool,
) -> Tensor:
    weight, ignore_index, smoothing, z_loss, softcap = options
    classes, dtype = logits.shape[1], wide(logits.dtype)
    y = logits.to(dtype)
    if softcap is not None:
        y = softcap * torch.tanh(y / softcap)
    counted = target != ignore_index
    label = target.clamp(0, classes - 1)
    weight = None if weight is None else weight.to(dtype)
    share = counted.to(dtype) if weight is None else weight[label] * counted
    scaled_rows = weight is not None or smoothing or z_loss
    log_p = torch.log_softmax(y, dim=1)
    certain = (1 - smoothing) * share
    loss = -certain * log_p.gather(1, label[:, None])[:, 0]
    factor = certain
    if smoothing:
        loss -= smoothing / classes * (log_p.sum(1) if weight is None else log_p @ weight)
        factor = factor + smoothing / classes * (classes if weight is None else weight.sum())
    if z_loss:
        lse = torch.logsumexp(y, dim=1)
        loss += z_loss * lse.square() * share
        factor = factor + 2 * z_loss * lse * share
    wrong = counted & (target != label)
    if losses is not None:
        losses.copy_(loss.masked_fill_(~counted, 0.0).masked_fill_(wrong, float("nan")))
    if not wants_gradient:
        return logits
    dy = log_p.exp_()
    if scaled_rows:  # else by 1, or by 0 in the ignored rows, which are filled below
        dy *= factor[:, None]
    dy.scatter_add_(1, label[:, None], -certain[:, None])
    if smoothing:
        dy -= smoothing / classes if weight is None else smoothing / classes * weight
    if softcap is not None:
        dy *= 1 - (y / softcap).square()
    if dloss is not None:
        dy *= dloss[:, None]
    # On a CPU a look at the labels costs nothing, and none of them is wrong.
    if dy.device.type != "cpu" or not counted.all():
        dy.masked_fill_(~counted[:, None], 0.0)
    if dy.device.type != "cpu":
        dy.masked_fill_(wrong[:, None], float("nan"))
    return dy.to(logits.dtype)


def scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous gradient times a scalar, rounded once; 0 stays 0 if the scale is not finite."""
    if runs_kernels(gradient):
        result = torch.empty_like(gradient, dtype=dtype)
        grid = (cdiv(gradient.numel(), _SCALE_BLOCK),)
        arguments = (gradient, scale, result, gradient.numel())
        launch(scale_kernel, grid, *arguments, BLOCK=_SCALE_BLOCK, num_warps=8)
        return result
    result = gradient.to(wide(gradient.dtype)) * scale
    if gradient.device.type != "cpu" or not scale.isfinite():
        result.masked_fill_(gradient == 0, 0.0)
    return result.to(dtype)
