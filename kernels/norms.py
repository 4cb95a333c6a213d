"""Layer norm and RMS norm over the last N elements, with fp32 statistics.

    layer_norm  y = (x - mean(x)) * rstd * weight + bias    rstd = 1 / sqrt(var(x) + eps)
    rms_norm    y = x * rstd * weight                       rstd = 1 / sqrt(mean(x^2) + eps)

Saved for backward besides the inputs: mean and rstd, one fp32 number each a row.

Source: Ba et al., "Layer Normalization", 2016; Zhang and Sennrich, "Root Mean Square Layer
Normalization", 2019.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from trilith.kernels._norm_backward import norm_backward
from trilith.kernels._norm_forward import norm_forward
from trilith.kernels._runtime.checks import (
    require_floating,
    require_floating_if_given,
    require_same_device,
)
from trilith.kernels._runtime.plan import planned
from trilith.kernels._runtime.sharding import by_rows
from trilith.plugins import BackwardContext, Cost, Op, OpSpec, Sample


def _layer_norm_out(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return x.new_empty(x.shape), mean, mean.new_empty(mean.shape)


@planned
def _layer_norm_fwd(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, rstd = _layer_norm_out(x)
    norm_forward(x, weight, bias, eps, y, mean, rstd)
    return y, mean, rstd


@planned
def _layer_norm_bwd(ctx: BackwardContext, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, _ = ctx.inputs
    mean, rstd = ctx.aux
    return norm_backward(dy, x, weight, bias, mean, rstd, ctx.needs_input_grad[:3])


def _layer_norm_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    if weight is None and bias is not None:  # which torch cannot differentiate twice
        weight = torch.ones_like(bias)
    if _all_wide(x, weight, bias):
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    wide = _wide_dtype(x, weight, bias)  # torch's own backward sums half-precision dweight in half
    weight, bias = _cast(weight, wide), _cast(bias, wide)
    return F.layer_norm(x.to(wide), x.shape[-1:], weight, bias, eps).to(x.dtype)


def _rms_norm_out(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


@planned
def _rms_norm_fwd(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    y, rstd = _rms_norm_out(x)
    norm_forward(x, weight, None, eps, y, None, rstd)
    return y, rstd


@planned
def _rms_norm_bwd(ctx: BackwardContext, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, _ = ctx.inputs
    (rstd,) = ctx.aux
    needs = (*ctx.needs_input_grad[:2], False)
    return norm_backward(dy, x, weight, None, None, rstd, needs)[:2]


def _rms_norm_reference(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if _all_wide(x, weight):
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    wide = _wide_dtype(x, weight)
    return F.rms_norm(x.to(wide), x.shape[-1:], _cast(weight, wide), eps).to(x.dtype)


def norm_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool
) -> Tensor:
    """layer_norm where `centred`, else rms_norm, in plain PyTorch."""
    if centred:
        return _layer_norm_reference(x, weight, bias, eps)
    return _rms_norm_reference(x, weight, eps)


def _all_wide(x: Tensor, *parameters: Tensor | None) -> bool:
    same = all(p is None or p.dtype == x.dtype for p in parameters)
    return same and x.dtype in (torch.float32, torch.float64)


def _wide_dtype(*tensors: Tensor | None) -> torch.dtype:
    double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if double else torch.float32


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _samples(device: torch.device, dtype: torch.dtype, *, biased: bool) -> Iterable[Sample]:
    def parameters(n: int, of: torch.dtype | None = dtype) -> tuple[Tensor | None, ...]:
        draw = [None if of is None else torch.randn(n, device=device, dtype=of) for _ in range(2)]
        return tuple(draw) if biased else (draw[0],)

    def x(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    yield Sample(x(7, 33), *parameters(33), eps=1e-5)
    yield Sample(x(2, 3, 130), *parameters(130), eps=1e-3)
    yield Sample(x(4, 48), *parameters(48, None), eps=1e-5)
    yield Sample(x(4, 3, 20).transpose(0, 1), *parameters(20), eps=1e-5)
    yield Sample(x(9, 17), *parameters(17, torch.float32), eps=1e-6)
    if biased:
        yield Sample(x(5), *parameters(5)[:1], None, eps=1e-5)
        yield Sample(x(3, 16), None, *parameters(16)[1:], eps=1e-5)


def _layer_norm_samples(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    return _samples(device, dtype, biased=True)


def _rms_norm_samples(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    return _samples(device, dtype, biased=False)


def _norm_cost(x: Tensor, *parameters: Tensor | None, statistics: int) -> Cost:
    """Forward reads x and writes y; backward reads dy and x and writes dx."""
    rows = x.numel() // max(1, x.shape[-1])
    data, saved = x.numel() * x.element_size(), 4 * statistics * rows
    sizes = [p.numel() * p.element_size() for p in parameters if p is not None]
    return Cost(
        forward_bytes=2 * data + saved + sum(sizes),
        backward_bytes=3 * data + saved + sum(sizes) + sum(sizes[:1]),
        forward_flops=8 * x.numel(),
        backward_flops=13 * x.numel(),
    )


def _layer_norm_cost(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Cost:
    return _norm_cost(x, weight, bias, statistics=2)


def _rms_norm_cost(x: Tensor, weight: Tensor | None) -> Cost:
    return _norm_cost(x, weight, statistics=1)


LAYER_NORM = Op(
    OpSpec(
        name="trilith::layer_norm",
        forward=_layer_norm_fwd,
        backward=_layer_norm_bwd,
        reference=_layer_norm_reference,
        samples=_layer_norm_samples,
        save_outputs=False,
        fake=_layer_norm_out,
        cost=_layer_norm_cost,
        sharding=by_rows,
    )
)
RMS_NORM = Op(
    OpSpec(
        name="trilith::rms_norm",
        forward=_rms_norm_fwd,
        backward=_rms_norm_bwd,
        reference=_rms_norm_reference,
        samples=_rms_norm_samples,
        save_outputs=False,
        fake=_rms_norm_out,
        cost=_rms_norm_cost,
        sharding=by_rows,
    )
)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Subtract the mean and divide by the standard deviation over the last dimensions.

    Args:
        input: (*, *normalized_shape), floating point, any strides.
        normalized_shape: the trailing sizes to normalise over, one or more.
        weight: normalized_shape, any floating dtype, multiplied after the division.
        bias: normalized_shape, any floating dtype, added last.
        eps: added to the variance under the square root.

    Returns:
        The normalised tensor, in input's shape and dtype, contiguous.

    Raises:
        RuntimeError: normalized_shape is empty or is not the end of input's shape, or weight or
            bias is not of that shape, as in torch.
        TypeError: a tensor is not floating point, or normalized_shape not a sequence.
        ValueError: weight or bias is on another device.

    Numerics:
        Statistics and arithmetic in float32 (float64 for float64 input), rounded once. The variance
        is biased. Weight and bias gradients are accumulated in float32 in a fixed order.

    Source:
        Ba et al., "Layer Normalization", 2016.

    Example:
        >>> layer_norm(torch.randn(8, 512), (512,), torch.ones(512), torch.zeros(512)).shape
        torch.Size([8, 512])
    """
    dims = _checked_dims("layer_norm", input, normalized_shape, weight=weight, bias=bias)
    y = LAYER_NORM(input.flatten(-dims), _flat(weight), _flat(bias), eps)
    return y if dims == 1 else y.reshape(input.shape)


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """Divide by the root of the mean square over the last dimensions.

    Args:
        input: (*, *normalized_shape), floating point, any strides.
        normalized_shape: the trailing sizes to normalise over, one or more.
        weight: normalized_shape, any floating dtype, multiplied after the division.
        eps: added to the mean square under the square root. None, as in torch, is the machine
            epsilon of the arithmetic: 2**-23, and 2**-52 for float64 input.

    Returns:
        The normalised tensor, in input's shape and dtype, contiguous.

    Raises:
        RuntimeError: normalized_shape is empty or is not the end of input's shape, or weight is not
            of that shape, as in torch.
        TypeError: a tensor is not floating point, or normalized_shape not a sequence.
        ValueError: weight is on another device.

    Numerics:
        As layer_norm. The product with weight is taken in float32, before the one rounding.

    Source:
        Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.

    Example:
        >>> rms_norm(torch.randn(8, 512), (512,), torch.ones(512)).shape
        torch.Size([8, 512])
    """
    dims = _checked_dims("rms_norm", input, normalized_shape, weight=weight)
    eps = rms_eps(input) if eps is None else eps
    y = RMS_NORM(input.flatten(-dims), _flat(weight), eps)
    return y if dims == 1 else y.reshape(input.shape)


def rms_eps(x: Tensor) -> float:
    """torch's default: the machine epsilon of the arithmetic."""
    return torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps


def _checked_dims(
    op: str, input: Tensor, normalized_shape: Sequence[int], **parameters: Tensor | None
) -> int:
    """How many dimensions are normalised, once the arguments are known to fit."""
    if isinstance(normalized_shape, int):
        raise TypeError(
            f"{op}: normalized_shape must be a sequence of sizes, got {normalized_shape}; "
            f"write ({normalized_shape},)"
        )
    shape = tuple(normalized_shape)
    if not shape:
        raise RuntimeError(f"{op}: normalized_shape must have at least one dimension, got {shape}")
    require_floating(op, input=input)
    require_floating_if_given(op, **parameters)
    require_same_device(op, input, **parameters)
    if input.shape[-len(shape) :] != shape:
        raise RuntimeError(
            f"{op}: input must have shape (*, {', '.join(map(str, shape))}) to be normalised over "
            f"{shape}, got {tuple(input.shape)}"
        )
    for name, parameter in parameters.items():
        if parameter is not None and parameter.shape != shape:
            raise RuntimeError(
                f"{op}: {name} must have normalized_shape {shape}, got {tuple(parameter.shape)}"
            )
    return len(shape)


def _flat(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.flatten()
