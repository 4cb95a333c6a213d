"""Cross-entropy of the logits x W^T + bias, whose logits are never all in memory.

    y = x W^T + bias        loss = cross_entropy(y, t), one a token       dx = dy W    dW = dy^T x

x (M, K) hidden states, W (V, K) the head, t (M,) labels. Tokens are taken in chunks of C <= 4096.
Where the loss is summed its gradients are made together with it, while a chunk's logits are at
hand, and backward multiplies them by what comes from above; saved for that are dx (M, K), dW (V, K)
and dbias (V,) in fp32, of those that are wanted. Losses one a token have no gradient that could be
made so: backward computes each chunk's logits again.

Numerics: logits and their gradients rounded to x's dtype, the rest in fp32: dx, dW and dbias are
summed in fp32, also over chunks, and rounded once, after the multiplication.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from trilith.kernels._linear_cross_entropy_chunks import (
    Gradients,
    Options,
    padded_classes,
    run_chunks,
    scaled,
    wide,
)
from trilith.kernels._runtime.checks import (
    require,
    require_floating,
    require_floating_if_given,
    require_same_device,
    require_shape,
    require_tensors,
)
from trilith.kernels._runtime.sharding import Strategy, split
from trilith.kernels.cross_entropy import (
    counted_rows,
    cross_entropy,
    cross_entropy_rows,
    loss_in,
    require_constant_weight,
    require_label_dtype,
    require_labels,
    require_loss_dtype,
    require_options,
)
from trilith.plugins import BackwardContext, Cost, Op, OpSpec, Sample
from trilith.plugins.autocast import autocasts

_OP = "linear_cross_entropy"
_DEVICES = ("cuda", "cpu")
_INPUT, _WEIGHT, _BIAS = 0, 1, 3  # positions among forward's parameters


def _linear_cross_entropy_fwd(
    x: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    per_row: bool,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    needs_input_grad: Sequence[bool],
) -> tuple[Tensor, ...]:
    losses = x.new_empty(x.shape[0], dtype=wide(x.dtype))
    needs = () if per_row else needs_input_grad
    gradients = _buffers(x, linear_weight, needs)
    options = Options(weight, ignore_index, label_smoothing, z_loss, softcap)
    run_chunks(x, linear_weight, target, linear_bias, options, losses, None, gradients)
    require_labels(_OP, losses, target, ignore_index, linear_weight.shape[0])
    return (losses if per_row else losses.sum(), *_made(gradients, x, linear_weight))


def _linear_cross_entropy_fake(
    x: Tensor, linear_weight: Tensor, per_row: bool, needs_input_grad: Sequence[bool]
) -> tuple[Tensor, ...]:
    loss = x.new_empty((x.shape[0],) if per_row else (), dtype=wide(x.dtype))
    gradients = _buffers(x, linear_weight, () if per_row else needs_input_grad)
    return (loss, *_made(gradients, x, linear_weight))


def _made(gradients: Gradients, x: Tensor, linear_weight: Tensor) -> Iterator[Tensor]:
    """As outputs: an empty tensor for what is not wanted."""
    return (x.new_empty(0) if g is None else g for g in _of_classes(gradients, linear_weight))


def _of_classes(gradients: Gradients, linear_weight: Tensor) -> Gradients:
    dweight = gradients.weight
    if dweight is None or dweight.shape == linear_weight.shape:
        return gradients
    return gradients._replace(weight=dweight[: linear_weight.shape[0]])


def _buffers(x: Tensor, linear_weight: Tensor, needs: Sequence[bool]) -> Gradients:
    """Nothing is allocated for what wants no gradient, such as a frozen head."""
    dx = dweight = dbias = None
    if needs and needs[_INPUT]:
        dx = x.new_empty(x.shape, dtype=wide(x.dtype))
    if needs and needs[_WEIGHT]:
        rows = padded_classes(linear_weight.shape[0], x)
        dweight = x.new_empty((rows, linear_weight.shape[1]), dtype=wide(x.dtype))
    if needs and needs[_BIAS]:
        dbias = x.new_zeros(linear_weight.shape[0], dtype=wide(x.dtype))
    return Gradients(dx, dweight, dbias)


def _rounded(gradient: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return gradient.to(dtype) if scale is None else scaled(gradient, scale, dtype)


def _linear_cross_entropy_bwd(ctx: BackwardContext, dloss: Tensor) -> tuple[Tensor | None, ...]:
    x, linear_weight, target, linear_bias, weight, per_row, *scalars = ctx.inputs
    needs = [ctx.needs_input_grad[i] for i in (_INPUT, _WEIGHT, _BIAS)]
    if not per_row and all(g.numel() for g, need in zip(ctx.aux, needs, strict=True) if need):
        gradients, scale = Gradients(*ctx.aux), dloss
    else:
        gradients, scale = _buffers(x, linear_weight, ctx.needs_input_grad), None
        rows = dloss if per_row else dloss.expand(x.shape[0])
        options = Options(weight, *scalars)
        run_chunks(x, linear_weight, target, linear_bias, options, None, rows, gradients)
        gradients = _of_classes(gradients, linear_weight)
    dx, dweight, dbias = (
        _rounded(g, scale, like.dtype) if need and g is not None and like is not None else None
        for g, like, need in zip(gradients, (x, linear_weight, linear_bias), needs, strict=True)
    )
    return dx, dweight, None, dbias


def _linear_cross_entropy_reference(
    x: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    per_row: bool,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
) -> Tensor:
    """Cross-entropy of F.linear's logits, one a row or summed; class weights are constants."""
    bias = None if linear_bias is None else linear_bias.to(x.dtype)
    logits = F.linear(x, linear_weight.to(x.dtype), bias)
    rows = cross_entropy_rows(
        logits, target, weight, ignore_index, label_smoothing, z_loss, softcap
    )
    return rows if per_row else rows.sum()


def _linear_cross_entropy_samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def draw(m: int, k: int, v: int) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.randn(m, k, device=device, dtype=dtype)
        head = torch.randn(v, k, device=device, dtype=dtype) / k**0.5
        return x, head, torch.randint(0, v, (m,), device=device)

    x, head, target = draw(9, 16, 33)
    yield Sample(x, head, target, None, None, False, -100, 0.0, 0.0, None)
    target[2] = -100
    bias = torch.randn(33, device=device, dtype=dtype)
    weight = torch.rand(33, device=device) + 0.5
    yield Sample(x, head, target, bias, weight, True, -100, 0.1, 1e-3, 20.0)
    yield Sample(x, head, target, bias, weight, False, -100, 0.1, 1e-3, 20.0)
    x, head, target = draw(5, 24, 1)
    yield Sample(x, head, target, None, None, True, 7, 0.0, 0.0, None)
    x, head, target = draw(3, 8, 2100)
    yield Sample(x, head.float(), target, None, None, False, -1, 0.0, 1e-2, None)


def _linear_cross_entropy_cost(x: Tensor, linear_weight: Tensor, target: Tensor) -> Cost:
    """Forward: the logits' product. Backward: those of dx and dW."""
    operands = x.numel() * x.element_size() + linear_weight.numel() * linear_weight.element_size()
    labels = target.numel() * target.element_size()
    flops = 2 * x.numel() * linear_weight.shape[0]
    return Cost(operands + labels, 2 * operands + labels, flops, 2 * flops)


def _linear_cross_entropy_sharding(per_row: bool) -> list[Strategy]:
    return [split([0 if per_row else None], [0, None, 0])]


LINEAR_CROSS_ENTROPY = Op(
    OpSpec(
        name="trilith::linear_cross_entropy",
        forward=_linear_cross_entropy_fwd,
        backward=_linear_cross_entropy_bwd,
        reference=_linear_cross_entropy_reference,
        samples=_linear_cross_entropy_samples,
        fake=_linear_cross_entropy_fake,
        cost=_linear_cross_entropy_cost,
        sharding=_linear_cross_entropy_sharding,
        parts=("trilith::cross_entropy",),
        save_outputs=False,
        rounds_inside=True,
        devices=_DEVICES,
        dtypes=None,
    )
)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    num_items: int | Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`cross_entropy(F.linear(input, linear_weight, linear_bias), target)` without the logits.

    As `torch.nn.functional.linear_cross_entropy`, but: there is no `options`, the size of chunks is
    chosen here; input may have more leading dimensions; whether target holds probabilities is told
    by its dtype and not by its shape; shapes that don't fit are a ValueError, not a RuntimeError;
    with probabilities an ignore_index that is negative is not an error.

    Args:
        input: hidden states (..., K), floating-point.
        linear_weight: (V, K), the head's weight, in input's dtype; under autocast in any. Or
            (V, d1, ..., K) for input (N, K): logits (N, V, d1, ...), which are not fused.
        target: class indices (...,) or (N, d1, ...), int64 or uint8; or class probabilities,
            floating-point and shaped as the logits, which are not fused: the logits are as large.
        linear_bias: (V,) or (V, d1, ...), the head's bias.
        weight: (V,) weight of each class; it cannot require a gradient.
        reduction, label_smoothing, z_loss, softcap, dtype: as in `cross_entropy`.
        ignore_index: as in `cross_entropy`; None is -100.
        num_items: what the mean divides by, instead of what is counted in this call: with gradient
            accumulation the number of tokens of the whole batch, so that the micro-batches'
            losses and gradients add up to the batch's.

    Returns:
        A scalar, or for "none" a tensor shaped as the class indices; without `dtype` in the input's
        dtype, but float32 (float64 for float64) under autocast.

    Raises:
        IndexError: a label is out of range, on CPU. On a GPU that row's loss is NaN, and so are
            the gradients that it enters.
        RuntimeError: target is of another integer dtype, weight requires a gradient,
            label_smoothing is out of its range, or ignore_index is not negative with class
            probabilities; as torch.
        ValueError: shapes don't fit, or another option is out of its range.
        TypeError: a tensor is not floating-point, or their dtypes differ without autocast.

    Memory: beside its arguments, with b bytes an element of input, w of linear_weight, if fused:
        forward   C V b + 4 M K + 4 V K       C tokens a chunk: at most 4096, and 1 GiB of logits
        backward  (4 + b) M K + (4 + w) V K   of which 4 M K + 4 V K are kept since forward
    without the terms in M K where input is frozen, or in V K where the head is. On a GPU b V K more
    where V is not divisible by 16: the head with zeros after it. The chunk is 64 MiB
    where Triton doesn't run, and the terms in C count up to four times. With reduction "none"
    backward needs what forward does here, and nothing is kept.

    Numerics: logits and their gradients rounded to the input's dtype, as without fusion; the loss
    in fp32; gradients summed in fp32, rounded once after the upstream factor. Deterministic.

    Source: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2025; Hsu et al.,
        "Liger Kernel: Efficient Triton Kernels for LLM Training", 2024.

    Example:
        >>> loss = linear_cross_entropy(hidden, head.weight, labels, num_items=labels_in_batch)
    """
    ignore_index = -100 if ignore_index is None else ignore_index
    _check(input, linear_weight, target, linear_bias, weight, reduction, ignore_index, num_items)
    require_options(_OP, reduction, label_smoothing, softcap)
    require_loss_dtype(_OP, dtype)
    x = input.reshape(-1, input.shape[-1])
    if autocasts(input) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(input.device.type))
    if target.is_floating_point() or linear_weight.dim() > 2:
        scalars = (ignore_index, label_smoothing, z_loss, softcap)
        loss = _of_all_logits(
            x, linear_weight, target, linear_bias, weight, reduction, *scalars, num_items, dtype
        )
        if reduction == "none":
            loss = loss.reshape(input.shape[:-1] + linear_weight.shape[1:-1])
        return loss_in(dtype, loss, input)
    labels = target.reshape(-1).to(torch.int64)
    loss = LINEAR_CROSS_ENTROPY(
        x,
        linear_weight,
        labels,
        linear_bias,
        weight,
        reduction == "none",
        ignore_index,
        label_smoothing,
        z_loss,
        softcap,
    )
    if reduction == "none":
        loss = loss.reshape(target.shape)
    elif reduction == "mean":
        own = num_items is None
        loss = loss / (counted_rows(labels, weight, ignore_index) if own else num_items)
    return loss_in(dtype, loss, input)


def _of_all_logits(
    x: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    num_items: int | Tensor | None,
    dtype: torch.dtype | None,
) -> Tensor:
    """The unfused loss, for targets as large as the logits and for heads (V, d1, ..., K)."""
    classes, *positions = linear_weight.shape[:-1]
    bias = None if linear_bias is None else linear_bias.flatten().to(x.dtype)
    logits = F.linear(x, linear_weight.flatten(0, -2).to(x.dtype), bias)
    logits = logits.reshape(x.shape[0], classes, *positions)
    soft = target.is_floating_point()
    if num_items is not None:
        logits = logits.to(wide(x.dtype))  # a sum may exceed what float16 holds
    loss = cross_entropy(
        logits,
        target.reshape(logits.shape if soft else (x.shape[0], *positions)),
        weight,
        ignore_index=ignore_index,
        reduction=reduction if num_items is None else "sum",
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        dtype=dtype,
    )
    return loss if num_items is None else loss / num_items


def _check(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    num_items: int | Tensor | None,
) -> None:
    require_floating(_OP, input=input, linear_weight=linear_weight)
    require_floating_if_given(_OP, linear_bias=linear_bias, weight=weight)
    require_tensors(_OP, target=target)
    require(input.dim() > 0, _OP, "input", "have at least one dimension", "a scalar")
    rule = "be (V, K), or (V, d1, ..., K) with an input (N, K)"
    fits = linear_weight.dim() == 2 or (linear_weight.dim() > 2 and input.dim() == 2)
    require(fits, _OP, "linear_weight", rule, tuple(linear_weight.shape))
    classes, *positions, width = linear_weight.shape
    require(input.shape[-1] == width, _OP, "input", f"end in {width}", tuple(input.shape))
    if not autocasts(input):
        for name, tensor in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
            if tensor is not None and tensor.dtype != input.dtype:
                raise TypeError(
                    f"{_OP}: {name} must have the input's dtype {input.dtype}, got {tensor.dtype}"
                )
    soft = target.is_floating_point()
    if not soft:
        require_label_dtype(_OP, target)
    elif ignore_index >= 0:
        raise RuntimeError(
            f"{_OP}: ignore_index must be negative with class probabilities, got {ignore_index}; "
            "zero the rows' probabilities"
        )
    require_constant_weight(_OP, weight)
    per_row = (classes, *positions) if soft else positions
    require_shape(_OP, "target", target, (*input.shape[:-1], *per_row))
    require_shape(_OP, "linear_bias", linear_bias, (classes, *positions))
    require_shape(_OP, "weight", weight, (classes,))
    tensors = {"linear_weight": linear_weight, "linear_bias": linear_bias}
    require_same_device(_OP, input, target=target, weight=weight, **tensors)
    rule = "be None unless reduction is 'mean'"
    require(num_items is None or reduction == "mean", _OP, "num_items", rule, num_items)
